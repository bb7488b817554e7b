//! Captures on a switch with mock ports: what is seen, what it costs, and that the books are exact.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use port::capture::{Capture, CaptureSettings, Direction, Tap};
use port::{DropReason, Fabric, PortId};
use switch::{PortConfig, Switch, SwitchConfig, VlanRule, Workers};

use crate::mock::{
    BROADCAST, Behaviour, Wire, add, at, attach, attach_egress, attach_ingress, check_law, frame,
    mac, number, plain_ports, settle, tagged, wait_for,
};

/// A captured frame that a test keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    direction: Direction,
    data: Vec<u8>,
    len: u32,
    pair: u16,
    dropped: Option<DropReason>,
}

fn start() -> Switch {
    Switch::start(&SwitchConfig::default()).unwrap()
}

fn begin(switch: &Switch, port: PortId, settings: CaptureSettings) -> (Capture, Tap) {
    let (capture, tap) = Capture::new(settings).unwrap();
    assert!(switch.add_tap(port, &tap));
    (capture, tap)
}

fn drain(capture: &mut Capture) -> Vec<Seen> {
    let mut seen = Vec::new();
    let mut last = 0;
    let _ = capture.drain(|frame| {
        assert!(frame.time_ns >= last && frame.time_ns > 1 << 60, "in order, since 1970");
        last = frame.time_ns;
        seen.push(Seen {
            direction: frame.direction,
            data: frame.data.to_vec(),
            len: frame.frame_bytes,
            pair: frame.pair,
            dropped: frame.dropped,
        });
    });
    seen
}

fn of(seen: &[Seen], direction: Direction) -> Vec<(u32, Option<DropReason>)> {
    let of = seen.iter().filter(|one| one.direction == direction);
    of.map(|one| (number(&one.data), one.dropped)).collect()
}

fn drops() -> CaptureSettings {
    CaptureSettings { drops: true, ..CaptureSettings::default() }
}

fn numbers(range: std::ops::Range<u32>) -> Vec<(u32, Option<DropReason>)> {
    range.map(|n| (n, None)).collect()
}

#[test]
fn both_directions_are_seen_whole_and_in_order_and_nothing_after_the_end() {
    for workers in [Workers::Unpinned(2), Workers::PerQueue, Workers::Manual(1)] {
        let by_hand = matches!(workers, Workers::Manual(_));
        let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
        let ports = plain_ports(&switch, 2);
        let run = || {
            wait_for("the frames", || {
                let _ = switch.turn(0);
                ports.iter().all(|(_, wire)| wire.waiting() == 0) && switch.stats().held == 0
            });
            if !by_hand {
                // Captures are told after the books.
                switch.quiesce();
            }
        };
        let (left, right) = (&ports[0].1, &ports[1].1);
        left.send(&[frame(BROADCAST, mac(1), 1000)]);
        run();
        let (mut capture, tap) = begin(&switch, ports[0].0.id, CaptureSettings::default());
        let there: Vec<_> = (0..300).map(|n| frame(mac(2), mac(1), n)).collect();
        let back: Vec<_> = (300..500).map(|n| frame(mac(1), mac(2), n)).collect();
        left.send(&there);
        run();
        right.send(&back);
        run();
        let seen = drain(&mut capture);
        assert_eq!(of(&seen, Direction::In), numbers(0..300));
        assert_eq!(of(&seen, Direction::Out), numbers(300..500));
        let sent: Vec<_> = there.iter().chain(&back).cloned().collect();
        assert_eq!(seen.iter().map(|one| one.data.clone()).collect::<Vec<_>>(), sent);
        assert!(seen.iter().all(|one| one.len == 60 && one.pair == 0));
        for (direction, count) in [(Direction::In, 300), (Direction::Out, 200)] {
            let totals = capture.totals(direction);
            assert_eq!((totals.seen, totals.accepted, totals.skipped), (count, count, 0));
        }
        assert!(switch.remove_tap(ports[0].0.id, &tap));
        left.send(&there);
        run();
        assert!(drain(&mut capture).is_empty(), "it has ended");
        check_law(&switch.stats());
    }
}

#[test]
fn tags_are_seen_as_they_come_and_as_they_go() {
    let switch = start();
    let access = VlanRule::from_keys(Some(5), &[]).unwrap();
    let trunk = VlanRule::from_keys(None, &[5, 6]).unwrap();
    let access = add(&switch, &PortConfig { vlan: access, ..PortConfig::new("access") });
    let trunk = add(&switch, &PortConfig { vlan: trunk, ..PortConfig::new("trunk") });
    let (mut at_access, _a) = begin(&switch, access.0.id, CaptureSettings::default());
    let (mut at_trunk, _b) = begin(&switch, trunk.0.id, CaptureSettings::default());
    let bare = frame(BROADCAST, mac(1), 1);
    let with_tag = tagged(frame(BROADCAST, mac(2), 2), 5);
    access.1.send(std::slice::from_ref(&bare));
    let _ = settle(&switch, &[&access.1]);
    trunk.1.send(std::slice::from_ref(&with_tag));
    let _ = settle(&switch, &[&trunk.1]);
    let data = |capture: &mut Capture| -> Vec<_> {
        drain(capture).into_iter().map(|one| (one.direction, one.data)).collect()
    };
    assert_eq!(
        data(&mut at_access),
        [(Direction::In, bare.clone()), (Direction::Out, frame(BROADCAST, mac(2), 2))]
    );
    assert_eq!(data(&mut at_trunk), [(Direction::Out, tagged(bare, 5)), (Direction::In, with_tag)]);
}

#[test]
fn frames_that_the_switch_drops_are_seen_with_their_reason_if_that_is_asked_for() {
    let switch = start();
    let ports = plain_ports(&switch, 2);
    let (left, right) = (&ports[0].1, &ports[1].1);
    let (mut all, _a) = begin(&switch, ports[0].0.id, drops());
    let (mut passed, _b) = begin(&switch, ports[0].0.id, CaptureSettings::default());
    let burst = [
        frame(mac(9), mac(1), 0),
        frame(mac(9), BROADCAST, 1),
        frame([1, 0x80, 0xc2, 0, 0, 0], mac(1), 2),
        frame(mac(9), mac(1), 3),
        frame(mac(1), mac(3), 4),
        frame(mac(9), mac(1), 5),
    ];
    left.send(&burst);
    let _ = settle(&switch, &[left, right]);
    let reasons = [
        (0, None),
        (1, Some(DropReason::BadSource)),
        (2, Some(DropReason::ReservedMac)),
        (3, None),
        (4, Some(DropReason::SamePort)),
        (5, None),
    ];
    assert_eq!(of(&drain(&mut all), Direction::In), reasons);
    assert_eq!(of(&drain(&mut passed), Direction::In), [(0, None), (3, None), (5, None)]);
    let counted = |capture: &Capture| {
        let totals = capture.totals(Direction::In);
        (totals.seen, totals.accepted, totals.skipped)
    };
    assert_eq!((counted(&all), counted(&passed)), ((6, 6, 0), (3, 3, 0)));
    // Nobody is there: neither for one station nor for all.
    let _ = switch.detach_egress(at(ports[1].0.id, 0));
    switch.quiesce();
    left.send(&[frame(mac(9), mac(1), 6), frame(BROADCAST, mac(1), 7)]);
    let _ = settle(&switch, &[left, right]);
    let nobody = Some(DropReason::NoDestination);
    assert_eq!(of(&drain(&mut all), Direction::In), [(6, nobody), (7, nobody)]);
    assert!(drain(&mut passed).is_empty());
    // A station whose port has no way out.
    right.send(&[frame(mac(1), mac(2), 8)]);
    let _ = settle(&switch, &[left, right]);
    left.send(&[frame(mac(2), mac(1), 9)]);
    let _ = settle(&switch, &[left, right]);
    let seen = drain(&mut all);
    assert_eq!(of(&seen, Direction::In), [(9, Some(DropReason::PortDown))]);
    assert_eq!(of(&seen, Direction::Out), [(8, None)]);
}

#[test]
fn frames_that_the_way_out_cannot_take_are_seen_with_their_reason() {
    for (behaviour, reason) in
        [(Behaviour::NoRoom, DropReason::NoBuffer), (Behaviour::EgressFaults, DropReason::PortDown)]
    {
        let switch = start();
        let ports = plain_ports(&switch, 2);
        let (mut all, _a) = begin(&switch, ports[1].0.id, drops());
        let (mut passed, _b) = begin(&switch, ports[1].0.id, CaptureSettings::default());
        ports[1].1.behave(behaviour);
        ports[0].1.preload(&(0..10).map(|n| frame(mac(2), mac(1), n)).collect::<Vec<_>>());
        ports[0].1.send(&[]);
        let stats = settle(&switch, &[&ports[0].1]);
        let seen = of(&drain(&mut all), Direction::Out);
        let dropped = &stats.ports[1].queues[0].drops;
        assert_eq!(seen.len() as u64, dropped[reason as usize], "{stats:?}");
        assert!(!seen.is_empty() && seen.iter().all(|(_, why)| *why == Some(reason)));
        assert!(drain(&mut passed).is_empty());
        assert_eq!(passed.totals(Direction::Out).seen, 0);
    }
}

#[test]
fn what_finds_no_room_is_skipped_and_counted_exactly() {
    let switch = start();
    let ports = plain_ports(&switch, 2);
    let (left, right) = (&ports[0].1, &ports[1].1);
    let settings = CaptureSettings { ring_bytes: 0, ..CaptureSettings::default() };
    let (mut capture, _a) = begin(&switch, ports[1].0.id, settings.clone());
    let (mut all, _b) = begin(&switch, ports[0].0.id, CaptureSettings { drops: true, ..settings });
    // Far more than a ring of the least size holds, some of them dropped.
    let source = |n: u32| if n % 10 == 3 { BROADCAST } else { mac(1) };
    let (mut shown, mut shown_all) = (0, 0);
    for round in 0..3 {
        for _ in 0..10 {
            let burst: Vec<_> = (0..400).map(|n| frame(mac(2), source(n), n)).collect();
            left.send(&burst);
            wait_for("the burst", || left.waiting() == 0);
        }
        let _ = settle(&switch, &[left, right]);
        // The reader comes late.
        shown += drain(&mut capture).len() as u64;
        shown_all += drain(&mut all).len() as u64;
        let sent = 4000 * (round + 1);
        let out = capture.totals(Direction::Out);
        assert_eq!(out.seen, sent * 9 / 10);
        assert_eq!((out.accepted, shown + out.skipped), (out.seen, out.seen));
        let inward = all.totals(Direction::In);
        assert_eq!((inward.seen, inward.accepted), (sent, sent));
        assert_eq!(shown_all + inward.skipped, sent);
        assert!(out.skipped > 0 && inward.skipped > 0, "there was no overload");
        assert!(shown > 0 && shown_all > 0);
    }
    assert_eq!(right.take().len() as u64, 3 * 3600, "the traffic does not notice");
}

#[test]
fn a_filter_and_a_snap_length_choose_what_is_stored() {
    let switch = start();
    let ports = plain_ports(&switch, 2);
    let settings = CaptureSettings {
        filter: "ether src 02:00:00:00:00:01".parse().unwrap(),
        snaplen: 20,
        ..CaptureSettings::default()
    };
    let (mut capture, _tap) = begin(&switch, ports[0].0.id, settings);
    let frames: Vec<_> = (0..40).map(|n| frame(mac(9), mac(1 + n % 2), n)).collect();
    ports[0].1.send(&frames);
    let _ = settle(&switch, &[&ports[0].1]);
    let seen = drain(&mut capture);
    assert_eq!(seen.len(), 20);
    assert!(seen.iter().all(|one| one.data.len() == 20 && one.len == 60));
    assert!(seen.iter().all(|one| number(&one.data).is_multiple_of(2)));
    let totals = capture.totals(Direction::In);
    assert_eq!((totals.seen, totals.accepted, totals.skipped), (40, 20, 0));
}

#[test]
fn a_capture_goes_on_when_queues_go_and_come_and_says_when_the_port_is_removed() {
    let switch = start();
    let ports = plain_ports(&switch, 2);
    let id = ports[0].0.id;
    let (mut capture, tap) = begin(&switch, id, CaptureSettings::default());
    let mut wire = Arc::clone(&ports[0].1);
    for round in 0..5 {
        wire.send(&[frame(mac(9), mac(1), round)]);
        let _ = settle(&switch, &[&wire]);
        ports[1].1.send(&[frame(mac(1), mac(2), round)]);
        let _ = settle(&switch, &[&ports[1].1]);
        let seen = drain(&mut capture);
        assert_eq!(of(&seen, Direction::In), [(round, None)]);
        assert_eq!(of(&seen, Direction::Out), [(round, None)]);
        // The owner gets its own types back.
        let ingress = switch.detach_ingress(at(id, 0)).unwrap();
        assert!(ingress.into_any().downcast::<crate::mock::MockIngress>().is_ok());
        let egress = switch.detach_egress(at(id, 0)).unwrap();
        assert!(egress.into_any().downcast::<crate::mock::MockEgress>().is_ok());
        wire = Wire::new();
        attach_egress(&switch, &ports[0].0, 0, &wire);
        attach_ingress(&switch, &ports[0].0, 0, &wire);
    }
    assert_eq!(capture.totals(Direction::In).seen, 5);
    wire.send(&[frame(mac(9), mac(1), 77)]);
    let _ = settle(&switch, &[&wire]);
    assert_eq!(capture.ended(), None);
    assert!(switch.remove_port(id));
    assert_eq!(capture.ended().unwrap(), "port p0 was removed");
    assert!(!capture.falls_asleep());
    assert_eq!(of(&drain(&mut capture), Direction::In), [(77, None)], "nothing is lost");
    assert!(!switch.add_tap(id, &tap) && !switch.remove_tap(id, &tap));
    let (capture, _tap) = begin(&switch, ports[1].0.id, CaptureSettings::default());
    drop(switch);
    assert_eq!(capture.ended().unwrap(), "the switch stopped");
}

#[test]
fn pairs_that_come_later_are_seen_too() {
    let switch = start();
    let (port, _first) = add(&switch, &PortConfig { pairs: 2, ..PortConfig::new("two") });
    let (mut capture, _tap) = begin(&switch, port.id, drops());
    let second = attach(&switch, &port, 1);
    second.send(&[frame(mac(9), mac(3), 7)]);
    let _ = settle(&switch, &[&second]);
    let seen = drain(&mut capture);
    let nobody = Some(DropReason::NoDestination);
    assert_eq!((of(&seen, Direction::In), seen[0].pair), (vec![(7, nobody)], 1));
}

#[test]
fn captures_that_come_and_go_under_load_miss_nothing_of_a_third() {
    let switch = start();
    let ports = plain_ports(&switch, 2);
    let (mut capture, tap) = begin(&switch, ports[0].0.id, CaptureSettings::default());
    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    std::thread::scope(|scope| {
        let _ = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (_other, tap) = begin(&switch, ports[0].0.id, drops());
                assert!(switch.remove_tap(ports[0].0.id, &tap));
            }
        });
        for n in 0..2000 {
            ports[0].1.send(&[frame(mac(9), mac(1), n)]);
            if n % 50 == 0 {
                let _ = settle(&switch, &[&ports[0].1]);
                seen.extend(drain(&mut capture));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let _ = settle(&switch, &[&ports[0].1]);
    assert!(switch.remove_tap(ports[0].0.id, &tap));
    seen.extend(drain(&mut capture));
    assert_eq!(of(&seen, Direction::In), numbers(0..2000));
    assert_eq!(capture.totals(Direction::In).skipped, 0);
}
