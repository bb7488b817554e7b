//! Ports and queues come and go while frames move.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use packet::{MacAddr, VlanId};
use port::capture::{Capture, CaptureSettings, Direction};
use port::{DropReason, Fabric};
use switch::{
    FdbEntry, FdbLimits, PortConfig, PortError, STATIC_MAX, Switch, SwitchConfig, Workers,
};

use crate::mock::{
    BROADCAST, Behaviour, MockEgress, MockIngress, Wire, add, at, attach, attach_egress,
    attach_ingress, check_law, drops, frame, mac, new_egress, plain_ports, settle, wait_for,
};

fn two_workers() -> SwitchConfig {
    SwitchConfig { workers: Workers::Unpinned(2), ..SwitchConfig::default() }
}

#[test]
fn after_detach_nobody_is_inside_of_the_queue() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[0].behave(Behaviour::Slow);
    let mut sent = 0;
    for round in 0..50 {
        let frames: Vec<_> = (0..20).map(|n| frame(BROADCAST, mac(1), n)).collect();
        wires[0].send(&frames);
        sent += 20;
        if round % 3 == 0 {
            wait_for("the worker to take them", || wires[0].waiting() == 0);
        }
        let ingress = switch.detach_ingress(at(ports[0].0.id, 0)).unwrap();
        assert!(!wires[0].inside.load(Ordering::SeqCst), "the worker has released its batch");
        assert!(!wires[0].is_armed(), "given back disarmed");
        let ingress = ingress.into_any().downcast::<MockIngress>().unwrap();
        assert!(Arc::ptr_eq(&ingress.wire, wires[0]));
        switch.attach_ingress(at(ports[0].0.id, 0), ingress);
    }
    let stats = settle(&switch, &wires);
    assert_eq!(stats.ports[0].queues[0].rx_frames, sent);
    assert_eq!(wires[1].take().len(), usize::try_from(sent).unwrap());
}

#[test]
fn an_egress_goes_and_comes_under_load() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[2].send(&[frame(BROADCAST, mac(3), 0)]);
    let _ = settle(&switch, &wires);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for station in [0, 1] {
            let (wire, stop) = (wires[station], &stop);
            let _ = scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if wire.waiting() < 200 {
                        wire.send(&vec![frame(mac(3), mac(10 + station as u32), 1); 50]);
                    }
                }
            });
        }
        for _ in 0..100 {
            let egress = switch.detach_egress(at(ports[2].0.id, 0));
            drop(egress.unwrap());
            let quiet = wires[2].take().len();
            std::thread::sleep(std::time::Duration::from_micros(500));
            assert_eq!(wires[2].take().len(), 0, "nobody touches it any more ({quiet} before)");
            let _ = switch.stats();
            attach_egress(&switch, &ports[2].0, 0, wires[2]);
            wait_for("traffic", || !wires[2].take().is_empty());
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = settle(&switch, &wires);
    assert!(drops(&stats, DropReason::PortDown) > 0);
}

#[test]
fn a_way_out_is_exchanged_under_load_and_no_frame_finds_none() {
    const EACH: usize = 4000;
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let (port, first) = &ports[2];
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    first.send(&[frame(BROADCAST, mac(3), 0)]);
    let _ = settle(&switch, &wires);
    wires.iter().for_each(|wire| drop(wire.take()));
    // A tap stays around whatever stands there.
    let (mut capture, tap) = Capture::new(CaptureSettings::default()).unwrap();
    assert!(switch.add_tap(port.id, &tap));
    let second = Wire::new();
    let mut turns = 0u64;
    std::thread::scope(|scope| {
        let senders = [0, 1].map(|station| {
            let wire = wires[station];
            scope.spawn(move || {
                for _ in 0..EACH / 20 {
                    wire.send(&vec![frame(mac(3), mac(10 + station as u32), 1); 20]);
                    wait_for("the frames are taken", || wire.waiting() == 0);
                }
            })
        });
        while senders.iter().any(|sender| !sender.is_finished()) {
            for (old, new) in [(first, &second), (&second, first)] {
                let exchanged = switch.exchange_egress(at(port.id, 0), &mut |egress| {
                    let bare = egress.into_any().downcast::<MockEgress>().unwrap();
                    assert!(Arc::ptr_eq(&bare.wire, old));
                    Box::new(new_egress(port, 0, new))
                });
                assert!(exchanged);
                let quiet = old.take().len();
                std::thread::yield_now();
                assert_eq!(old.take().len(), 0, "nobody touches it any more ({quiet} before)");
                turns += 1;
            }
            let _ = capture.drain(|_| ());
        }
    });
    let stats = settle(&switch, &wires);
    assert_eq!(drops(&stats, DropReason::PortDown), 0);
    assert_eq!(drops(&stats, DropReason::NoDestination), 0);
    assert_eq!(stats.ports[2].queues[0].tx_frames, 2 * EACH as u64);
    assert_eq!(capture.totals(Direction::Out).seen, 2 * EACH as u64);
    assert!(turns > 10, "{turns}");
    drop(switch.detach_egress(at(port.id, 0)).unwrap());
    assert!(!switch.exchange_egress(at(port.id, 0), &mut |one| one));
}

#[test]
fn held_is_never_negative_under_load() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 4);
    for round in 0..300u32 {
        for (station, (_, wire)) in (0u32..).zip(&ports) {
            let to = if round % 5 == 0 { BROADCAST } else { mac((station + 1) % 4) };
            wire.send(&vec![frame(to, mac(station), round); 10]);
        }
        // `held` is what is left, and nought if an end was seen before its beginning.
        let stats = switch.stats();
        let queues = stats.ports.iter().flat_map(|port| &port.queues);
        let (began, ended) = queues.fold((stats.flood_copies, 0), |(began, ended), totals| {
            (began + totals.rx_frames, ended + totals.tx_frames + totals.dropped())
        });
        assert!(began >= ended, "{began} began, {ended} ended");
    }
    // What the stations sent and got agrees with the counters, and nothing stays held.
    let stats = settle(&switch, &ports.iter().map(|(_, wire)| wire).collect::<Vec<_>>());
    assert_eq!(stats.held, 0);
    for (port, (_, wire)) in stats.ports.iter().zip(&ports) {
        assert_eq!(port.queues[0].rx_frames, 300 * 10);
        assert_eq!(port.queues[0].tx_frames, wire.take().len() as u64);
    }
}

#[test]
fn a_removed_port_leaves_its_counts() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    let burst: Vec<_> = (0..100).map(|n| frame(BROADCAST, mac(1), n)).collect();
    wires[1].send(&burst);
    let before = settle(&switch, &wires);
    assert!(switch.remove_port(ports[1].0.id));
    assert!(!switch.remove_port(ports[1].0.id));
    let after = switch.stats();
    check_law(&after);
    assert_eq!(after.removed_ports.rx_frames, 100);
    assert_eq!(after.ports.len(), before.ports.len() - 1);
    assert!(switch.fdb().is_empty(), "its stations are forgotten");
    assert!(switch.port("p1").is_none());

    // A new port has neither its past nor its id, which an event may still name.
    let (again, wire) = add(&switch, &PortConfig::new("again"));
    assert_ne!(again.id, ports[1].0.id);
    wires[0].send(&[frame(BROADCAST, mac(7), 7)]);
    let stats = settle(&switch, &[wires[0], wires[2], &wire]);
    assert_eq!(stats.ports[2].queues[0].rx_frames, 0);
    assert_eq!(wire.take().len(), 1);
}

#[test]
fn ports_come_and_go_under_load() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 2);
    let (a, b) = (&ports[0].1, &ports[1].1);
    b.send(&[frame(BROADCAST, mac(2), 0)]);
    let _ = settle(&switch, &[a, b]);
    let mut sent = 0;
    for round in 0..60 {
        let frames: Vec<_> = (0..50).map(|n| frame(mac(2), mac(1), sent + n)).collect();
        sent += 50;
        a.send(&frames);
        let (port, wire) = add(&switch, &PortConfig::new(format!("guest{round}")));
        wire.send(&[frame(BROADCAST, mac(1000 + round), round)]);
        assert!(switch.remove_port(port.id));
    }
    let stats = settle(&switch, &[a, b]);
    let to_b = b.take().iter().filter(|frame| frame[..6] == mac(2)).count();
    assert_eq!(to_b, sent as usize, "ports that did not change lose no frame");
    assert_eq!(stats.ports.len(), 2);
}

#[test]
fn what_a_queue_holds_when_it_is_attached_is_served() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 1);
    let port = switch.add_port(&PortConfig::new("late")).unwrap();
    let wire = crate::mock::Wire::new();
    wire.preload(&[frame(BROADCAST, mac(1), 1)]);
    attach_ingress(&switch, &port, 0, &wire);
    wait_for("the frame", || ports[0].1.take().len() == 1);
}

#[test]
fn attaching_again_replaces() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let (port, old) = add(&switch, &PortConfig::new("p"));
    let (_, peer) = add(&switch, &PortConfig::new("q"));
    let new = attach(&switch, &port, 0);
    old.preload(&[frame(BROADCAST, mac(1), 1)]);
    peer.send(&[frame(BROADCAST, mac(2), 2)]);
    let _ = settle(&switch, &[&peer, &new]);
    assert_eq!((old.take().len(), old.waiting(), new.take().len()), (0, 1, 1));
    assert!(switch.detach_ingress(at(port.id, 5)).is_none());
    assert!(switch.detach_egress(at(port.id, 5)).is_none());
}

/// An event of a removed port that is still under way must not name a new one.
#[test]
fn the_id_of_a_removed_port_comes_back_late() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let stays = switch.add_port(&PortConfig::new("stays")).unwrap().id;
    let new = || switch.add_port(&PortConfig::new("p")).unwrap().id;
    let mut seen = HashSet::from([stays]);
    for _ in 0..100 {
        let id = new();
        assert!(seen.insert(id), "{id:?} again");
        assert!(switch.remove_port(id));
    }
}

#[test]
fn static_entries_have_a_bound_and_a_text() {
    let fdb = FdbLimits { entries: 1, per_port: 1, age_secs: 300 };
    let switch = Switch::start(&SwitchConfig { fdb, ..SwitchConfig::default() }).unwrap();
    let stations: Vec<_> = (0..STATIC_MAX).map(|n| (VlanId::NONE, MacAddr(mac(n)))).collect();
    let full = PortConfig { stations, ..PortConfig::new("full") };
    let (port, _) = add(&switch, &full);
    let one = vec![(VlanId::NONE, MacAddr(mac(STATIC_MAX)))];
    let one = PortConfig { stations: one, ..PortConfig::new("one more") };
    let error = switch.add_port(&one).unwrap_err().to_string();
    let text =
        "no room for the static entry of 02:00:00:00:10:00: 4096 static entries are possible";
    assert_eq!(error, text);
    assert!(switch.remove_port(port.id));
    assert!(switch.add_port(&one).is_ok());
}

#[test]
fn wrong_ports_are_refused() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let _ = switch.add_port(&PortConfig::new("p")).unwrap();
    let again = switch.add_port(&PortConfig::new("p"));
    assert_eq!(again.unwrap_err(), PortError::Name("p".into()));
    for pairs in [0, switch::PAIRS_MAX + 1] {
        let port = switch.add_port(&PortConfig { pairs, ..PortConfig::new("q") });
        assert_eq!(port.unwrap_err(), PortError::Pairs(pairs));
    }
    let start = Switch::start(&SwitchConfig {
        workers: Workers::Cpus(vec![0, 1 << 20]),
        ..SwitchConfig::default()
    });
    assert!(start.unwrap_err().to_string().contains("1048576"));
}

#[test]
fn dropping_the_switch_ends_its_threads() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 2);
    drop(switch);
    // The halves are gone, although the handles are not.
    assert_eq!(Arc::strong_count(&ports[0].1), 1);
}

/// What one process counted and learned, another one goes on with.
#[test]
fn a_successor_goes_on_with_counters_and_stations() {
    let began = Instant::now();
    let old = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&old, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    for station in 0..3u32 {
        wires[station as usize].send(&[frame(BROADCAST, mac(station), 0)]);
    }
    let before = settle(&old, &wires);
    let new = Switch::start(&two_workers()).unwrap();
    // Ids differ, and the last port does not come along.
    let _ = new.add_port(&PortConfig::new("other")).unwrap();
    let ids: Vec<_> = (0..2)
        .map(|at| {
            let handle = new.add_port(&PortConfig::new(before.ports[at].name.clone())).unwrap();
            new.carry_port(handle.id, &old.record_port(ports[at].0.id));
            handle.id
        })
        .collect();
    new.carry_removed(&ports[2].0.counters(0).unwrap().record());
    new.carry(&old.record());
    let entries: Vec<_> = old.fdb().into_iter().filter(|e| e.port != ports[2].0.id).collect();
    let moved = entries.iter().map(|entry| FdbEntry {
        port: ids[usize::from(entry.port == ports[1].0.id)],
        age_secs: entry.age_secs + 7,
        ..*entry
    });
    assert_eq!(new.restore_fdb(moved), 0);
    let station = |mac: [u8; 6]| new.fdb().into_iter().find(|entry| entry.mac == MacAddr(mac));
    assert_eq!(station(mac(1)).map(|entry| entry.port), Some(ids[1]));
    // As old as it was made, and as much older as the test has taken; both are rounded.
    let passed = u32::try_from(began.elapsed().as_secs()).unwrap() + 2;
    let age = station(mac(0)).unwrap().age_secs;
    assert!((7..=7 + passed).contains(&age), "{age}");
    assert!(station(mac(2)).is_none());
    let after = new.stats();
    check_law(&after);
    assert_eq!((after.held, after.flood_copies), (0, before.flood_copies));
    let sum = |stats: &switch::SwitchStats| {
        let queues = stats.ports.iter().flat_map(|port| &port.queues);
        queues.map(|queue| queue.rx_frames).sum::<u64>() + stats.removed_ports.rx_frames
    };
    assert_eq!(sum(&before), 3);
    assert_eq!((sum(&after), after.removed_ports.rx_frames), (3, 1));
}

#[test]
fn after_quiesce_no_batch_is_held_that_was_taken_before() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[0].behave(Behaviour::Slow);
    for round in 0..20 {
        // In every other round to a worker that sleeps.
        std::thread::sleep(Duration::from_millis(round % 2 * 5));
        let before = wires[0].released.load(Ordering::SeqCst);
        wires[0].send(&[frame(BROADCAST, mac(1), 1)]);
        wait_for("a worker to take it", || {
            wires[0].inside.load(Ordering::SeqCst)
                || wires[0].released.load(Ordering::SeqCst) > before
        });
        switch.quiesce();
        assert!(wires[0].released.load(Ordering::SeqCst) > before, "it has let go");
    }
    let _ = settle(&switch, &wires);
}

#[test]
fn quiesce_lets_workers_sleep() {
    let switch = Switch::start(&two_workers()).unwrap();
    let ports = plain_ports(&switch, 3);
    let sleeps = || switch.stats().workers.iter().map(|worker| worker.sleeps).sum::<u64>();
    // Who falls asleep is counted when it wakes: until nobody does any more.
    let mut last = u64::MAX;
    wait_for("the workers to sleep", || {
        std::thread::sleep(Duration::from_millis(20));
        std::mem::replace(&mut last, sleeps()) == sleeps()
    });
    for _ in 0..100 {
        switch.quiesce();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(sleeps(), last);
    drop(ports);
}
