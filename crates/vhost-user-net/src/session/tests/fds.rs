//! What a session keeps of the front end's fds, and what there is room for.

use super::front::{Event, Front, PLAIN, event, memory, region, socket};
use crate::codec::{InflightSpec, LogArea, Request, VringFd};
use crate::fds::{FdPool, Kept};

/// A session that may keep so many.
fn with_room(most: usize) -> (Front, FdPool) {
    // A quarter is set apart, and of the rest one half is kept.
    let pool = FdPool::of_limit(most * 8 / 3 + 1);
    pool.set_ports(0);
    assert_eq!(pool.part(), most);
    let mut front = Front::new();
    front.session.set_fd_pool(&pool);
    (front, pool)
}

fn kick(ring: u32) -> Request {
    Request::SetVringKick(VringFd { ring, has_fd: true })
}

fn call(ring: u32) -> Request {
    Request::SetVringCall(VringFd { ring, has_fd: true })
}

fn err(ring: u32) -> Request {
    Request::SetVringErr(VringFd { ring, has_fd: true })
}

#[test]
fn what_cannot_be_kept_is_refused_by_name_and_changes_nothing() {
    let (mut front, _) = with_room(6);
    front.up(PLAIN, 1);
    // A region and two kicks so far.
    for request in [call(0), call(1), err(1)] {
        assert_eq!(front.ack(request, vec![event()]), 0);
    }
    let _ = front.events();
    let more = [
        (call(2), event()),
        (kick(3), event()),
        (err(0), event()),
        (Request::AddMemReg(region(1)), memory(1 << 20)),
        (Request::SetBackendReqFd, socket()),
        (Request::SetLogFd, event()),
    ];
    for (request, fd) in more {
        let outcome = front.bytes(&request.write(true), vec![fd]).unwrap();
        assert_eq!(
            outcome.refused.unwrap().to_string(),
            "7 fds of this front end to keep, at most 6 are allowed: a part of what the process \
             may have (RLIMIT_NOFILE)"
        );
    }
    assert_eq!(front.events(), Vec::<Event>::new());
    let spec = InflightSpec { bytes: 4096, offset: 0, queues: 2, queue_size: 4, padded: false };
    let said = front.refused(Request::SetInflightFd(spec), vec![memory(1 << 20)]);
    assert!(said.starts_with("8 fds of this"), "{said}");
    let log = LogArea { bytes: 4096, offset: 0 };
    let said = front.refused(Request::SetLogBase(log), vec![memory(1 << 20)]);
    assert!(said.starts_with("8 fds of this"), "{said}");
    let two = Request::SetMemTable(vec![region(0), region(1)]);
    assert_ne!(front.ack(two, vec![memory(1 << 20), memory(1 << 20)]), 0);
    // In the place of what is there, and without an fd, anything may come.
    for request in [kick(1), call(1), err(1)] {
        assert_eq!(front.ack(request, vec![event()]), 0);
    }
    let table = Request::SetMemTable(vec![region(0)]);
    assert_eq!(front.ack(table, vec![memory(1 << 20)]), 0);
    front.say(Request::SetVringErr(VringFd { ring: 0, has_fd: false }));
    assert_eq!(front.running(), [0, 1]);
    // What goes makes room.
    front.say(Request::SetVringErr(VringFd { ring: 1, has_fd: false }));
    assert_eq!(front.ack(call(2), vec![event()]), 0);
    let _ = front.base(1);
    assert_eq!(front.ack(Request::AddMemReg(region(1)), vec![memory(1 << 20)]), 0);
    assert_ne!(front.ack(kick(1), vec![event()]), 0);
}

#[test]
fn a_region_that_is_added_again_needs_no_room() {
    let (mut front, _) = with_room(3);
    front.negotiate(PLAIN);
    let file = memory(1 << 20);
    for _ in 0..9 {
        let fd = rustix::io::dup(&file).unwrap();
        assert_eq!(front.ack(Request::AddMemReg(region(0)), vec![fd]), 0);
    }
    assert_eq!(front.ack(Request::AddMemReg(region(1)), vec![memory(1 << 20)]), 0);
}

#[test]
fn all_that_is_kept_is_counted_and_none_of_it_when_the_session_is_gone() {
    let (mut front, pool) = with_room(300);
    let left = |pool: &FdPool| (0..=300).rev().find(|n| Kept::of(pool).admit(*n).is_ok()).unwrap();
    front.up(PLAIN, 1);
    assert_eq!(left(&pool), 297);
    assert_eq!(front.ack(Request::SetLogFd, vec![event()]), 0);
    let log = LogArea { bytes: 4096, offset: 0 };
    let _ = front.ask(&Request::SetLogBase(log), vec![memory(1 << 20)]);
    assert_eq!(left(&pool), 294);
    let spec = InflightSpec { bytes: 4096, offset: 0, queues: 2, queue_size: 4, padded: false };
    assert_eq!(front.ack(Request::SetInflightFd(spec), vec![memory(1 << 20)]), 0);
    assert_eq!(front.ack(Request::SetBackendReqFd, vec![socket()]), 0);
    assert_eq!(left(&pool), 291);
    // Others of the pool have what is left, and then there is none.
    let mut other = Kept::of(&pool);
    other.set(291);
    assert!(front.refused(err(0), vec![event()]).starts_with("10 fds of this front end to keep"));
    drop(other);
    assert_eq!(front.ack(err(0), vec![event()]), 0);
    // What cannot be right is not kept.
    assert_ne!(front.ack(err(1), vec![memory(4096)]), 0);
    assert_eq!(left(&pool), 290);
    drop(front);
    assert_eq!(left(&pool), 300);
}
