//! A driver that breaks its ring, and its way back.

use super::front::{Event, Front, PLAIN, REGION_BYTES, event, memory, region};
use crate::codec::{Request, VringFd};
use crate::session::{RingIndex, Unready};

const NEEDS_RESET: u64 = 64;

fn broken() -> Front {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    front.say_fd(Request::SetVringErr(VringFd { ring: 1, has_fd: true }), event());
    front.say(Request::SetStatus(0xf));
    front.break_ring(1);
    assert!(front.session.ring_fault(RingIndex(1), &mut front.rings));
    assert!(front.session.err_eventfd(RingIndex(1)).is_some());
    front
}

#[test]
fn a_broken_ring_stops_alone_and_is_shown() {
    let mut front = broken();
    assert_eq!(front.running(), [0]);
    assert_eq!(front.session.ready(), Err(Unready::Broken(RingIndex(1))));
    assert_eq!(front.get(Request::GetStatus), 0xf | NEEDS_RESET);
}

#[test]
fn it_stays_broken_whatever_changes_but_a_reset() {
    let mut front = broken();
    front.say_fd(Request::SetMemTable(vec![region(0)]), memory(REGION_BYTES));
    front.say_fd(Request::SetVringCall(VringFd { ring: 1, has_fd: true }), event());
    front.enable(1, false);
    front.enable(1, true);
    assert_eq!(front.running(), [0]);
}

#[test]
fn a_driver_that_resets_gets_its_ring_back() {
    let mut front = broken();
    let _ = (front.base(0), front.base(1));
    for ring in 0..2 {
        front.describe(ring, 0);
        front.kick(ring);
    }
    assert_eq!(front.running(), [0, 1]);
    assert_eq!(front.session.ready(), Ok(()));
    assert_eq!(front.get(Request::GetStatus), 0xf);
}

#[test]
fn reset_device_mends_it_too() {
    let mut front = broken();
    front.say(Request::ResetDevice);
    assert_eq!(front.session.ready(), Err(Unready::NotSetUp));
    front.say(Request::SetFeatures(PLAIN));
    for ring in 0..2 {
        front.describe(ring, 0);
        front.kick(ring);
        front.enable(ring, true);
    }
    assert_eq!(front.session.ready(), Ok(()));
}

#[test]
fn a_fault_of_a_ring_that_is_gone_is_ignored() {
    let mut front = Front::new();
    assert!(!front.session.ring_fault(RingIndex(1), &mut front.rings));
    assert!(front.running().is_empty());
}

#[test]
fn a_late_word_of_a_fault_leaves_a_ring_that_was_started_anew_alone() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    front.break_ring(1);
    // The driver resets it before the session hears of the fault.
    let _ = front.base(1);
    front.describe(1, 7);
    front.kick(1);
    let _ = front.events();
    assert!(!front.session.ring_fault(RingIndex(1), &mut front.rings));
    assert_eq!(front.session.ready(), Ok(()));
    let position = virtq::RingPosition::Split { avail: 7, used: 7 };
    let started = Event::Started { ring: 1, enabled: true, position };
    assert_eq!(front.events(), [Event::Stopped(1), started]);
    // The next fault is its own.
    front.break_ring(1);
    assert!(front.session.ring_fault(RingIndex(1), &mut front.rings));
    assert!(!front.session.ring_fault(RingIndex(1), &mut front.rings), "it is known");
    assert_eq!(front.session.ready(), Err(Unready::Broken(RingIndex(1))));
}
