#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use packet::{MacAddr, VlanId};
use port::PortId;
use proptest::prelude::{Just, Strategy, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::{FREE, Fdb, FdbLimits, Key, STATIC_MAX, Source};

const A: PortId = PortId(1);
const B: PortId = PortId(2);
/// The bound of static entries in most tests.
const FIXED_MAX: u32 = 5;

fn fdb(entries: u32, per_port: u32) -> Fdb {
    let limits = FdbLimits { entries, per_port, age_secs: 300 };
    Fdb::new(limits, FIXED_MAX, 0x1234_5678_9abc_def1)
}

fn key(station: u64) -> Key {
    Key::new(0, station)
}

#[test]
fn a_change_is_told_once_each_time_it_is_waited_for() {
    let fdb = fdb(1000, 1000);
    let readable = || {
        let fd = fdb.changes().unwrap();
        rustix::io::read(fd, &mut [0; 8]).is_ok()
    };
    assert!(!readable());
    fdb.learn(&[key(1)], A, 0);
    assert!(!readable(), "nobody waits");
    fdb.watch();
    assert!(!readable());
    let _ = fdb.touch(key(1), A, 1);
    assert!(!readable(), "seen again is no change");
    fdb.learn(&[key(2), key(3)], A, 1);
    assert!(readable());
    fdb.learn(&[key(4)], A, 1);
    assert!(!readable(), "told once");
    fdb.watch();
    assert_eq!(fdb.flush(None), 4);
    assert!(readable());
}

#[test]
fn a_station_is_learned_refreshed_moved_and_aged() {
    let fdb = fdb(1000, 1000);
    assert_eq!(fdb.lookup(key(1)), None);
    assert_eq!(fdb.touch(key(1), A, 0), Source::ToLearn);
    fdb.learn(&[key(1)], A, 0);
    assert_eq!(fdb.lookup(key(1)), Some(A));
    assert_eq!(fdb.touch(key(1), A, 200), Source::Known);
    assert_eq!(fdb.age(300), 0, "it was seen at 200");
    assert_eq!(fdb.touch(key(1), B, 400), Source::ToLearn, "it has moved");
    assert_eq!(fdb.lookup(key(1)), Some(A), "touching does not move");
    fdb.learn(&[key(1)], B, 400);
    assert_eq!(fdb.lookup(key(1)), Some(B));
    assert_eq!(fdb.age(699), 0);
    assert_eq!(fdb.age(700), 1);
    assert_eq!(fdb.lookup(key(1)), None);
    assert_eq!(fdb.usage(), (0, 0));
}

#[test]
fn vlans_are_apart() {
    let fdb = fdb(1000, 1000);
    fdb.learn(&[Key::new(5, 1)], A, 0);
    assert_eq!(fdb.lookup(Key::new(6, 1)), None);
    fdb.learn(&[Key::new(6, 1)], B, 0);
    assert_eq!(fdb.lookup(Key::new(5, 1)), Some(A));
}

#[test]
fn the_generation_follows_every_change_and_nothing_else() {
    let fdb = fdb(1000, 1000);
    let mut last = fdb.generation();
    let mut changed = || std::mem::replace(&mut last, fdb.generation()) != fdb.generation();
    fdb.learn(&[key(1)], A, 0);
    assert!(changed());
    let _ = fdb.touch(key(1), A, 1);
    fdb.learn(&[key(1)], A, 1);
    assert!(!changed(), "a refresh changes no answer");
    fdb.learn(&[key(1)], B, 1);
    assert!(changed());
    assert_eq!(fdb.flush(Some(A)), 0);
    assert!(!changed());
    assert_eq!(fdb.flush(Some(B)), 1);
    assert!(changed());
    assert!(fdb.add_static(VlanId::NONE, MacAddr::from_u64(9), A));
    assert!(changed());
}

#[test]
fn each_port_has_its_share() {
    let fdb = fdb(100, 10);
    let invented: Vec<_> = (100..200).map(key).collect();
    fdb.learn(&invented, A, 0);
    assert_eq!(fdb.usage(), (10, 90));
    fdb.learn(&[key(1)], B, 0);
    assert_eq!(fdb.lookup(key(1)), Some(B));
    fdb.learn(&[key(1)], A, 0);
    assert_eq!(fdb.lookup(key(1)), Some(B), "a full port does not take stations over");
    assert_eq!(fdb.usage(), (11, 91));
    assert_eq!(fdb.flush(Some(A)), 10);
    fdb.learn(&invented[..5], A, 0);
    assert_eq!(fdb.usage(), (6, 91), "a flush gives the share back");
}

#[test]
fn the_whole_has_a_bound() {
    let fdb = fdb(100, 100);
    for station in 0..500 {
        fdb.learn(&[key(1000 + station)], PortId(station as u16 % 20), 0);
    }
    assert_eq!(fdb.usage(), (100, 400));
}

#[test]
fn the_default_limits_can_be_reached() {
    let fdb = Fdb::new(FdbLimits::default(), STATIC_MAX, 77);
    let limits = fdb.limits;
    for port in 0..8u64 {
        let keys: Vec<_> = (0..u64::from(limits.per_port)).map(|n| key(port << 32 | n)).collect();
        fdb.learn(&keys, PortId(port as u16), 0);
    }
    let (used, refused) = fdb.usage();
    assert_eq!(u64::from(used) + refused, u64::from(limits.entries));
    assert!(refused * 1000 < u64::from(limits.entries), "{refused} for want of a slot");
    let found = (0..8u64).flat_map(|port| (0..1000).map(move |n| (port, n)));
    let missing = found.filter(|(port, n)| {
        let hit = fdb.lookup(key(port << 32 | n));
        assert!(hit.is_none_or(|hit| u64::from(hit.0) == *port));
        hit.is_none()
    });
    assert!(missing.count() < 80);
}

#[test]
fn static_stations_do_not_move_age_or_flush() {
    let fdb = fdb(100, 10);
    assert!(fdb.add_static(VlanId::NONE, MacAddr::from_u64(5), A));
    assert_eq!(fdb.touch(key(5), B, 0), Source::Elsewhere(A));
    assert_eq!(fdb.touch(key(5), A, 0), Source::Known);
    fdb.learn(&[key(5)], B, 0);
    assert_eq!((fdb.age(10_000), fdb.flush(None)), (0, 0));
    assert_eq!(fdb.lookup(key(5)), Some(A));
    let entries = fdb.entries(10_000);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].mac, entries[0].age_secs), (MacAddr::from_u64(5), 0));
    assert!(entries[0].fixed);
    assert_eq!(fdb.forget(A), 1);
    assert_eq!(fdb.usage(), (0, 0));
}

#[test]
fn a_learned_station_can_be_fixed() {
    let fdb = fdb(100, 10);
    fdb.learn(&[key(5)], B, 0);
    assert!(fdb.add_static(VlanId::NONE, MacAddr::from_u64(5), A));
    assert_eq!((fdb.lookup(key(5)), fdb.usage()), (Some(A), (1, 0)));
}

/// Neither kind of entry takes room from the other, up to either bound.
#[test]
fn static_stations_have_their_own_bound() {
    let fix = |fdb: &Fdb, n| fdb.add_static(VlanId::NONE, MacAddr::from_u64(n), B);
    let fdb = Fdb::new(FdbLimits { entries: 100, per_port: 100, age_secs: 300 }, 400, 9);
    let learned: Vec<_> = (1..=100).map(key).collect();
    fdb.learn(&learned, A, 0);
    assert_eq!(fdb.usage(), (100, 0));
    assert!((1000..1400).all(|n| fix(&fdb, n)), "a full database takes static ones");
    assert!(!fix(&fdb, 1400) && fix(&fdb, 1399), "up to their bound; again is not one more");
    assert!(learned.iter().all(|key| fdb.lookup(*key) == Some(A)), "nobody was pushed out");
    assert_eq!(fdb.flush(None), 100);
    fdb.learn(&learned, A, 0);
    assert_eq!(fdb.usage(), (500, 0), "static ones do not count against the learned");
    assert_eq!(fdb.forget(B), 400);
    assert!(fix(&fdb, 1400));
}

/// A static entry whose window is full takes the place of a learned one, and the books agree.
#[test]
fn a_static_station_finds_a_slot_among_learned_ones() {
    let fdb = Fdb::new(FdbLimits { entries: 64, per_port: 1000, age_secs: 300 }, 16, 9);
    let full = |key| fdb.window(fdb.place(key).0).all(|s| s.key.load(Ordering::Relaxed) > FREE);
    let home = |n| fdb.place(key(n)).0;
    let near = (1..).filter(|n| (32..64).contains(&home(*n))).take(64).map(key);
    fdb.learn(&near.collect::<Vec<_>>(), A, 0);
    let station = (1 << 20..).find(|n| full(key(*n))).unwrap();
    let used = fdb.usage().0;
    assert!(fdb.add_static(VlanId::NONE, MacAddr::from_u64(station), B));
    assert_eq!(fdb.lookup(key(station)), Some(B));
    assert_eq!((fdb.usage().0, fdb.entries(0).len() as u32), (used, used));
    assert_eq!(fdb.flush(None) as u32, used - 1);
    assert_eq!(fdb.usage().0, 1);
}

/// Slots are recycled as fast as possible; no reader ever gets the port of another station.
#[test]
fn a_recycled_slot_never_misdelivers() {
    let fdb = Fdb::new(FdbLimits { entries: 32, per_port: 32, age_secs: 300 }, 0, 3);
    let stop = AtomicBool::new(false);
    let port_of = |station: u64| PortId((station % 7) as u16);
    std::thread::scope(|scope| {
        let reader = || {
            let mut hits = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for station in 0..500 {
                    if let Some(port) = fdb.lookup(key(station)) {
                        assert_eq!(port, port_of(station));
                        hits += 1;
                    }
                    if station % 7 == 1 {
                        let _ = fdb.touch(key(station), A, (hits % 1000) as u32);
                    }
                }
            }
            hits
        };
        let readers = [scope.spawn(reader), scope.spawn(reader)];
        for round in 0..20_000u64 {
            let station = round * 31 % 500;
            fdb.learn(&[key(station)], port_of(station), 0);
            if round % 3 == 0 {
                let _ = fdb.flush(Some(port_of(round)));
            }
        }
        stop.store(true, Ordering::Relaxed);
        let hits: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert!(hits > 0);
    });
}

#[derive(Debug, Clone)]
enum Op {
    Learn(u64, u16),
    Touch(u64, u16),
    Flush(Option<u16>),
    Wait(u32),
    Fix(u64, u16),
    Lend(u64, u16, u16),
    Unfix(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (station, port) = (0..40u64, 0..4u16);
    prop_oneof![
        8 => (station.clone(), port.clone()).prop_map(|(s, p)| Op::Learn(s, p)),
        4 => (station.clone(), port.clone()).prop_map(|(s, p)| Op::Touch(s, p)),
        1 => port.clone().prop_map(|p| Op::Flush(Some(p))),
        1 => Just(Op::Flush(None)),
        4 => (0..200u32).prop_map(Op::Wait),
        2 => (station.clone(), port.clone()).prop_map(|(s, p)| Op::Fix(s, p)),
        2 => (station.clone(), port.clone(), port).prop_map(|(s, a, b)| Op::Lend(s, a, b)),
        1 => station.prop_map(Op::Unfix),
    ]
}

proptest! {
    /// The database against a map: station to (port, seen, static).
    #[test]
    fn it_is_a_map_with_bounds(ops in proptest::collection::vec(op(), 0..300)) {
        let (fdb, mut map, mut now) = (fdb(30, 8), HashMap::<u64, (u16, u32, bool)>::new(), 0u32);
        for op in ops {
            match op {
                Op::Learn(station, port) => {
                    fdb.learn(&[key(station)], PortId(port), now);
                    let learned = map.values().filter(|e| !e.2).count();
                    let of_port = map.values().filter(|e| e.0 == port && !e.2).count();
                    match map.get(&station) {
                        Some((_, _, true)) => {}
                        Some((at, ..)) if *at == port => {}
                        found if of_port < 8 && (found.is_some() || learned < 30) => {
                            let _ = map.insert(station, (port, now, false));
                        }
                        _ => {}
                    }
                }
                Op::Touch(station, port) => {
                    let known = fdb.touch(key(station), PortId(port), now);
                    let want = match map.get_mut(&station) {
                        Some(entry) if entry.0 == port => {
                            entry.1 = now;
                            Source::Known
                        }
                        Some((at, _, true)) => Source::Elsewhere(PortId(*at)),
                        _ => Source::ToLearn,
                    };
                    prop_assert_eq!(known, want);
                }
                Op::Lend(station, from, to) => {
                    prop_assert!(fdb.lend(key(station), PortId(from), PortId(to)));
                    if let Some(entry) = map.get_mut(&station).filter(|e| e.2 && e.0 == from) {
                        *entry = (to, 0, true);
                    }
                }
                Op::Unfix(station) => {
                    fdb.remove_static(VlanId::NONE, MacAddr::from_u64(station));
                    map.retain(|at, e| *at != station || !e.2);
                }
                Op::Flush(port) => {
                    let before = map.len();
                    map.retain(|_, e| e.2 || port.is_some_and(|port| port != e.0));
                    prop_assert_eq!(fdb.flush(port.map(PortId)), before - map.len());
                }
                Op::Wait(secs) => {
                    now += secs;
                    let before = map.len();
                    map.retain(|_, e| e.2 || now - e.1 < 300);
                    prop_assert_eq!(fdb.age(now), before - map.len());
                }
                Op::Fix(station, port) => {
                    let fixed = map.values().filter(|e| e.2).count() as u32;
                    let again = map.get(&station).is_some_and(|e| e.2);
                    let fits = again || fixed < FIXED_MAX;
                    let mac = MacAddr::from_u64(station);
                    prop_assert_eq!(fdb.add_static(VlanId::NONE, mac, PortId(port)), fits);
                    if fits {
                        let _ = map.insert(station, (port, 0, true));
                    }
                }
            }
            for station in 0..40 {
                let want = map.get(&station).map(|e| PortId(e.0));
                prop_assert_eq!(fdb.lookup(key(station)), want);
            }
            prop_assert_eq!(fdb.usage().0 as usize, map.len());
        }
    }
}
