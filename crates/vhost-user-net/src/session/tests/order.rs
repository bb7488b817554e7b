//! A ring runs as soon as everything is there, whatever came last.

use std::time::{Duration, Instant};

use super::front::{Event, Front, PLAIN, event, ring_addr};
use crate::codec::{Request, VringFd, VringState};
use crate::session::{RingIndex, Unready};

/// The parts of a ring's set-up.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Features,
    Memory,
    Num,
    Addr,
    Kick,
    Enable,
}

impl Step {
    const ALL: [Self; 6] =
        [Self::Features, Self::Memory, Self::Num, Self::Addr, Self::Kick, Self::Enable];

    fn run(self, front: &mut Front) {
        match self {
            Self::Features => front.say(Request::SetFeatures(PLAIN)),
            Self::Memory => front.share(),
            Self::Num => front.say(Request::SetVringNum(VringState { ring: 0, num: 256 })),
            Self::Addr => front.say(Request::SetVringAddr(ring_addr(0))),
            Self::Kick => front.kick(0),
            Self::Enable => front.enable(0, true),
        }
    }
}

/// All orders of `left` after `done`.
fn permute(done: &mut Vec<Step>, left: &[Step], visit: &mut dyn FnMut(&[Step])) {
    if left.is_empty() {
        visit(done);
    }
    for step in left {
        let rest: Vec<Step> = left.iter().copied().filter(|other| other != step).collect();
        done.push(*step);
        permute(done, &rest, visit);
        let _ = done.pop();
    }
}

#[test]
fn a_receiveq_runs_after_its_last_part_and_not_before_in_every_order() {
    let mut orders = 0;
    permute(&mut Vec::new(), &Step::ALL, &mut |steps| {
        let mut front = Front::new();
        for (number, step) in steps.iter().enumerate() {
            assert!(front.running().is_empty(), "after {number} steps");
            step.run(&mut front);
        }
        assert_eq!(front.running(), [0]);
        orders += 1;
    });
    assert_eq!(orders, 720);
}

#[test]
fn status_tells_what_is_missing() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    assert_eq!(front.session.ready(), Err(Unready::NotSetUp));
    for ring in 0..2 {
        front.describe(ring, 0);
        front.kick(ring);
    }
    front.enable(0, true);
    assert_eq!(front.session.ready(), Err(Unready::NotEnabled(RingIndex(1))));
    assert_eq!(front.session.ready().unwrap_err().to_string(), "ring 1 not enabled by the driver");
    front.enable(1, true);
    assert_eq!(front.session.ready(), Ok(()));
}

#[test]
fn what_is_wrong_with_a_ring_is_told_when_its_memory_comes_last() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    for ring in 0..2 {
        front.describe(ring, 0);
        front.say(Request::SetVringNum(VringState { ring, num: 3 - ring }));
        front.kick(ring);
        front.enable(ring, true);
    }
    assert!(front.session.take_complaints().is_empty());
    front.share();
    let wrong = front.session.ready().unwrap_err();
    assert!(matches!(wrong, Unready::SetUp(RingIndex(0), _)));
    assert!(wrong.to_string().contains("power of two"), "{wrong}");
    let complaints = front.session.take_complaints();
    assert_eq!(complaints.len(), 1);
    assert!(complaints[0].to_string().starts_with("ring 0: "), "{}", complaints[0]);
    // Known already.
    front.share();
    assert!(front.session.take_complaints().is_empty());
    front.say(Request::SetVringNum(VringState { ring: 0, num: 4 }));
    assert_eq!(front.session.ready(), Ok(()));
}

#[test]
fn a_call_is_replaced_while_the_ring_runs() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    assert!(front.rings.queues[&0].call.is_none());
    assert!(!front.rings.queues[&0].resumed);
    front.say_fd(Request::SetVringCall(VringFd { ring: 0, has_fd: true }), event());
    assert!(front.rings.queues[&0].call.is_some());
    assert!(front.rings.queues[&0].resumed, "a call may have been lost");
    let _ = front.ask(&Request::SetVringCall(VringFd { ring: 0, has_fd: false }), Vec::new());
    assert!(front.rings.queues[&0].call.is_none());
}

#[test]
fn a_transmitq_is_held_until_it_is_known_to_be_enabled_or_time_is_over() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.describe(1, 0);
    let now = Instant::now();
    assert_eq!(front.session.hold_rings(now), None);
    front.kick(1);
    assert_eq!(front.session.hold_rings(now), Some(now));
    assert!(front.running().is_empty());
    front.session.release_held_rings(now, &mut front.rings);
    assert_eq!(front.session.hold_rings(now), None);
    let events = front.events();
    assert!(matches!(events[..], [Event::Started { ring: 1, enabled: false, .. }]));
    front.enable(1, true);
    let _ = front.base(1);
    front.kick(1);
    assert_eq!(front.session.hold_rings(now), None, "it is known to be enabled");
}

#[test]
fn each_ring_is_held_for_a_time_of_its_own() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    let start = Instant::now();
    let after = |ms| start + Duration::from_millis(ms);
    front.describe(1, 0);
    front.kick(1);
    assert_eq!(front.session.hold_rings(after(200)), Some(after(200)));
    front.describe(3, 0);
    front.kick(3);
    assert_eq!(front.session.hold_rings(after(350)), Some(after(200)));
    front.session.release_held_rings(after(199), &mut front.rings);
    assert!(front.running().is_empty());
    front.session.release_held_rings(after(200), &mut front.rings);
    assert_eq!(front.running(), [1]);
    assert_eq!(front.session.hold_rings(after(400)), Some(after(350)));
    front.enable(3, true);
    assert_eq!(front.session.hold_rings(after(400)), None);
    // One that is started anew has all of its time again.
    front.describe(5, 0);
    front.kick(5);
    assert_eq!(front.session.hold_rings(after(500)), Some(after(500)));
    let _ = front.base(5);
    front.kick(5);
    assert_eq!(front.session.hold_rings(after(600)), Some(after(600)));
}

#[test]
fn a_ring_without_kick_is_polled() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.enable(1, true);
    front.describe(1, 0);
    front.say(Request::SetVringKick(VringFd { ring: 1, has_fd: false }));
    assert_eq!(front.running(), [1]);
    assert!(front.rings.queues[&1].kick.is_none());
}

#[test]
fn enabled_survives_stop_and_features() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = (front.base(0), front.base(1));
    front.say(Request::SetFeatures(PLAIN));
    front.describe(0, 0);
    front.kick(0);
    assert_eq!(front.running(), [0]);
}

#[test]
fn the_same_addresses_again_with_the_log_flag_leave_a_ring_alone() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = front.events();
    let mut addr = ring_addr(1);
    addr.flags = 1;
    addr.log = 0x1000;
    front.say(Request::SetVringAddr(addr));
    front.say(Request::SetFeatures(PLAIN));
    front.say(Request::SetVringNum(VringState { ring: 1, num: 256 }));
    front.enable(1, true);
    assert_eq!(front.events(), []);
}

#[test]
fn a_disabled_transmitq_runs_disabled() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = front.events();
    front.enable(1, false);
    let events = front.events();
    assert_eq!(events[0], Event::Stopped(1));
    assert!(matches!(events[1], Event::Started { ring: 1, enabled: false, .. }));
}

/// Frames for it take another pair from then on, if there is one.
#[test]
fn a_receiveq_that_is_disabled_lets_nothing_wait() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = front.events();
    front.enable(0, false);
    assert_eq!(front.events(), [Event::Stopped(0)]);
    front.enable(0, true);
    front.say_fd(Request::SetVringCall(VringFd { ring: 0, has_fd: true }), event());
    assert_eq!(front.events()[1], Event::Parked(0), "it goes on");
    assert!(front.rings.parked.is_empty());
}

#[test]
fn the_end_of_the_connection_stops_all_rings() {
    let mut front = Front::new();
    front.up(PLAIN, 4);
    front.session.close(&mut front.rings);
    assert!(front.running().is_empty());
}

#[test]
fn a_position_is_certain_once_the_ring_ran_here() {
    let mut front = Front::new();
    // DPDK asks on each new connection, before it says anything about the ring.
    let early = front.bytes(&Request::GetVringBase { ring: 0 }.write(false), Vec::new()).unwrap();
    assert_eq!(early.handed, None, "nothing was told");
    front.up(PLAIN, 1);
    assert!(!front.rings.queues[&0].known, "a record may know better");
    assert!(front.rings.queues[&0].identity.is_some());
    assert_ne!(front.rings.queues[&0].identity, front.rings.queues[&1].identity);
    front.enable(0, false);
    front.enable(0, true);
    assert!(front.rings.queues[&0].known && !front.rings.queues[&1].known);
    let late = front.bytes(&Request::GetVringBase { ring: 0 }.write(false), Vec::new()).unwrap();
    assert_eq!(late.handed, Some(RingIndex(0)));
    front.kick(0);
    assert!(front.rings.queues[&0].known, "the front end was told");
    front.rings.events.clear();
    front.say(Request::ResetDevice);
    let forgotten = |n| front.rings.events.contains(&Event::Forgotten(n));
    assert!(forgotten(0) && forgotten(1));
}
