//! What ports may send: at a rate, without loss; floods and addresses that are not theirs.

use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{DropReason, Fabric};
use switch::{
    PollMode, PortConfig, PortLimits, Rate, Sources, Switch, SwitchConfig, Turn, Workers,
};

use crate::mock::{BROADCAST, Wire, add, at, drops, frame, mac, number, settle, wait_for};

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    Some(Rate { per_second, burst })
}

fn limited(name: &str, limits: PortLimits) -> PortConfig {
    PortConfig { limits, ..PortConfig::new(name) }
}

fn frames(count: u32) -> Vec<Vec<u8>> {
    (0..count).map(|n| frame(BROADCAST, mac(1), n)).collect()
}

/// A rate makes the sender wait, in every way of polling, and nothing is lost or out of order.
#[test]
fn a_rate_holds_frames_back_and_loses_none() {
    for poll in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        let workers = Workers::Unpinned(1);
        let switch = Switch::start(&SwitchConfig { workers, poll, ..SwitchConfig::default() });
        let switch = switch.unwrap();
        let limits = PortLimits { frames: rate(1000, 50), ..PortLimits::default() };
        let (_, slow) = add(&switch, &limited("slow", limits));
        let (_, other) = add(&switch, &PortConfig::new("other"));
        let began = Instant::now();
        slow.send(&frames(250));
        let stats = settle(&switch, &[&slow]);
        // 50 at once and 200 in 200 ms, less a nanosecond here and there: it may take longer, but
        // never less, however busy the machine is.
        assert!(began.elapsed() >= Duration::from_micros(199_900), "{:?}", began.elapsed());
        let arrived: Vec<u32> = other.take().iter().map(|frame| number(frame)).collect();
        assert_eq!(arrived, (0..250).collect::<Vec<_>>());
        let queue = &stats.ports[0].queues[0];
        assert_eq!((queue.dropped(), queue.rx_frames), (0, 250));
        assert!(queue.rests > 3, "{queue:?}");
        if poll != PollMode::Busy {
            // It sleeps while there is nothing that it may do.
            assert!(stats.workers[0].sleeps > 3, "{stats:?}");
        }
    }
}

#[test]
fn a_rate_in_bytes_and_one_that_changes() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    // 60 bytes each: 100 a second.
    let limits = PortLimits { bytes: rate(6000, 600), ..PortLimits::default() };
    let (port, slow) = add(&switch, &limited("slow", limits));
    let (_, other) = add(&switch, &PortConfig::new("other"));
    slow.send(&frames(30_000));
    let began = Instant::now();
    wait_for("the first frames", || !other.take().is_empty());
    std::thread::sleep(Duration::from_millis(100));
    let arrived = other.take().len();
    // A burst is at most 64 frames beyond what there was credit for.
    let fair = began.elapsed().as_millis() as usize / 10 + 10 + 64;
    assert!(arrived <= fair, "{arrived} of {fair}");
    // Without a limit the rest comes at once, though the queue rests.
    assert!(switch.set_limits(port.id, &PortLimits::default()));
    let _ = settle(&switch, &[&slow]);
    assert!(began.elapsed() < Duration::from_secs(30));
    // And the other way round.
    let limits = PortLimits { frames: rate(1000, 1), ..PortLimits::default() };
    assert!(switch.set_limits(port.id, &limits));
    wait_for("the limit", || {
        slow.send(&frames(1));
        switch.stats().ports[0].queues[0].rests > 0
    });
    let _ = settle(&switch, &[&slow]);
    let rests = || switch.stats().ports[0].queues[0].rests;
    let before = rests();
    slow.send(&frames(200));
    let _ = settle(&switch, &[&slow]);
    assert!(rests() > before, "200 frames at 1000 a second, one at once");
}

/// A queue that rests is given back, and a port that rests can be removed.
#[test]
fn a_queue_that_rests_is_nobodys() {
    let workers = Workers::Manual(1);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let limits = PortLimits { frames: rate(1, 1), ..PortLimits::default() };
    let (port, slow) = add(&switch, &limited("slow", limits));
    let (_, other) = add(&switch, &PortConfig::new("other"));
    slow.send(&frames(3));
    assert_eq!(switch.turn(0), Some(Turn::Worked));
    for _ in 0..100 {
        // Time brings it back, no fd: there is always another turn to take.
        assert_eq!(switch.turn(0), Some(Turn::Idle));
    }
    assert_eq!((other.take().len(), slow.waiting(), slow.is_armed()), (1, 2, false));
    assert!(switch.remove_port(port.id));
    assert_ne!(switch.turn(0), Some(Turn::Worked));
    assert_eq!(slow.waiting(), 2);
}

#[test]
fn storm_control_stops_floods_only() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let limits = PortLimits { storm: rate(1, 10), ..PortLimits::default() };
    let (_, noisy) = add(&switch, &limited("noisy", limits));
    let (_, other) = add(&switch, &PortConfig::new("other"));
    other.send(&[frame(BROADCAST, mac(2), 0)]);
    let _ = settle(&switch, &[&other]);
    let unknown = mac(77);
    let group = [1, 0, 0x5e, 0, 0, 1];
    let kinds = [BROADCAST, unknown, group, mac(2)];
    let mixed: Vec<_> = (0..400).map(|n| frame(kinds[n as usize % 4], mac(1), n)).collect();
    noisy.send(&mixed);
    let stats = settle(&switch, &[&noisy, &other]);
    let arrived = other.take();
    let to_it = arrived.iter().filter(|frame| frame[..6] == mac(2)).count();
    assert_eq!(to_it, 100, "what is for a known station passes");
    let floods = arrived.len() - to_it;
    // One more a second, on a slow machine.
    assert!((10..20).contains(&floods), "{floods}");
    assert_eq!(drops(&stats, DropReason::Storm), 300 - floods as u64);
}

#[test]
fn antispoof_drops_what_others_would_have_sent() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let sources = Some(Sources::new(MacAddr(mac(1)), []));
    let limits = PortLimits { sources, ..PortLimits::default() };
    let (_, guarded) = add(&switch, &limited("guarded", limits));
    let (_, other) = add(&switch, &PortConfig::new("other"));
    let mixed: Vec<_> = (0..100).map(|n| frame(BROADCAST, mac(1 + n % 2), n)).collect();
    guarded.send(&mixed);
    let stats = settle(&switch, &[&guarded]);
    let arrived: Vec<u32> = other.take().iter().map(|frame| number(frame)).collect();
    assert_eq!(arrived, (0..100).step_by(2).collect::<Vec<_>>());
    assert_eq!(drops(&stats, DropReason::Spoofed), 50);
    let learned = switch.fdb();
    assert_eq!(learned.len(), 1, "nothing is learned from a frame that is not its own");
    // Whoever really is there can send.
    other.send(&[frame(mac(1), mac(2), 7)]);
    let _ = settle(&switch, &[&other]);
    assert_eq!(guarded.take().len(), 1);
}

/// What a front end has us announce for its guest is no way around that.
#[test]
fn antispoof_holds_for_announcements() {
    let workers = Workers::Manual(1);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let sources = Some(Sources::new(MacAddr(mac(1)), []));
    let limits = PortLimits { sources, storm: rate(1, 2), ..PortLimits::default() };
    let (guarded, _) = add(&switch, &limited("guarded", limits));
    let (_, other) = add(&switch, &PortConfig::new("other"));
    other.send(&[frame(BROADCAST, mac(2), 0)]);
    while switch.turn(0) == Some(Turn::Worked) {}
    // It says that the other one is here now.
    switch.originate(guarded.id, &frame(BROADCAST, mac(2), 1));
    assert_eq!(other.take().len(), 0);
    let is_at = |mac_: [u8; 6]| switch.fdb().iter().find(|e| e.mac.0 == mac_).map(|e| e.port);
    assert_ne!(is_at(mac(2)), Some(guarded.id), "its frames would go there");
    assert_eq!(switch.stats().originated, 0);
    // And as often as it may flood, whose announcement is its own.
    for _ in 0..10 {
        switch.originate(guarded.id, &frame(BROADCAST, mac(1), 2));
    }
    assert_eq!(is_at(mac(1)), Some(guarded.id));
    let floods = other.take().len();
    assert!((2..5).contains(&floods), "{floods}");
    crate::mock::check_law(&switch.stats());
}

/// No burst of a queue is taken without its port's limits: of a new port's, of one that comes
/// again, and on a worker that has taken no turn since.
#[test]
fn limits_hold_from_the_first_burst_on() {
    let workers = Workers::Manual(1);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let (_, other) = add(&switch, &PortConfig::new("other"));
    while switch.turn(0) == Some(Turn::Worked) {}
    let limits = PortLimits { frames: rate(1, 3), ..PortLimits::default() };
    let (port, slow) = add(&switch, &limited("slow", limits));
    slow.send(&frames(64));
    assert_eq!(switch.turn(0), Some(Turn::Worked));
    assert_eq!(other.take().len(), 3);
    for _ in 0..3 {
        // Its front end changes something: the queue stops and starts.
        let ingress = switch.detach_ingress(at(port.id, 0)).unwrap();
        switch.attach_ingress(at(port.id, 0), ingress);
        let _ = switch.turn(0);
    }
    // A second apart from the next one, on however slow a machine: not a burst.
    assert!(other.take().len() < 10);
    assert!(slow.waiting() > 50, "{}", slow.waiting());
}

/// One that floods many ports gives way to another one after each few hundred copies.
#[test]
fn a_storm_to_many_ports_makes_its_own_bursts_smaller() {
    let workers = Workers::Manual(1);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let (_, noisy) = add(&switch, &PortConfig::new("noisy"));
    let others: Vec<_> =
        (0..40).map(|n| add(&switch, &PortConfig::new(format!("o{n}"))).1).collect();
    noisy.send(&frames(64 + 6 + 6));
    let arrived = |wire: &Wire| wire.take().len();
    assert_eq!(switch.turn(0), Some(Turn::Worked));
    assert_eq!(arrived(&others[0]), 64);
    for _ in 0..2 {
        assert_eq!(switch.turn(0), Some(Turn::Worked));
        assert_eq!(arrived(&others[0]), 6, "64 frames made 2496 copies more: 256 are a turn's");
    }
    // It grows again with what it sends to one port.
    let known = others[1].clone();
    known.send(&[frame(BROADCAST, mac(2), 0)]);
    // Until nobody remembers that one of them carried little.
    wait_for("a while", || switch.turn(0) != Some(Turn::Worked));
    std::thread::sleep(Duration::from_millis(150));
    let _ = (0..10).map(|_| switch.turn(0)).collect::<Vec<_>>();
    let one: Vec<_> = (0..300).map(|n| frame(mac(2), mac(1), n)).collect();
    let _ = known.take();
    noisy.send(&one);
    let mut bursts = Vec::new();
    while noisy.waiting() > 0 {
        let _ = switch.turn(0);
        bursts.extend(Some(arrived(&known)).filter(|count| *count > 0));
    }
    assert_eq!(bursts.last(), Some(&(300 - bursts.iter().rev().skip(1).sum::<usize>())));
    assert!(bursts.contains(&64) && bursts[0] < 64, "{bursts:?}");
}

/// Turns until all that `heavy` has is taken: the frames that `other` got in each.
fn bursts(switch: &Switch, heavy: &Wire, other: &Wire) -> Vec<usize> {
    let mut bursts = Vec::new();
    while heavy.waiting() > 0 {
        let _ = switch.turn(0);
        bursts.push(other.take().len());
    }
    bursts
}

/// Beside one that sends little, others' bursts are small; alone they are as large as can be.
#[test]
fn who_sends_little_waits_for_a_part_of_a_burst() {
    let workers = Workers::Manual(1);
    // Nobody goes to sleep.
    let poll_us = 60_000_000;
    let config = SwitchConfig { workers, poll_us, ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    let [heavy, sink, light] =
        ["heavy", "sink", "light"].map(|name| add(&switch, &PortConfig::new(name)).1);
    sink.send(&[frame(BROADCAST, mac(2), 0)]);
    while switch.turn(0) == Some(Turn::Worked) {}
    let to_sink = |count: u32| -> Vec<_> { (0..count).map(|n| frame(mac(2), mac(1), n)).collect() };
    heavy.send(&to_sink(640));
    let alone = bursts(&switch, &heavy, &sink);
    assert!(alone.contains(&64), "{alone:?}");

    // Both send until the worker has compared them: it looks at the clock now and then. Then light
    // is looked at after each burst of heavy, a small one.
    let mut first = Vec::new();
    wait_for("smaller bursts", || {
        heavy.send(&to_sink(640));
        light.send(&[frame(mac(2), mac(3), 0)]);
        let _ = bursts(&switch, &heavy, &sink);
        heavy.send(&to_sink(64));
        light.send(&[frame(mac(2), mac(3), 7)]);
        assert_eq!(switch.turn(0), Some(Turn::Worked));
        first = sink.take();
        first.len() <= 33
    });
    assert!(first.iter().any(|frame| frame[6..12] == mac(3)), "{first:?}");
    // Alone again, after a while, they grow again.
    wait_for("larger bursts", || {
        heavy.send(&to_sink(640));
        bursts(&switch, &heavy, &sink).contains(&64)
    });
    while switch.turn(0) == Some(Turn::Worked) {}
    assert_eq!(switch.stats().held, 0);
    crate::mock::check_law(&switch.stats());
}
