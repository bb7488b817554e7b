//! What else a front end has us map, the in-flight file and the log of written pages: cut short
//! while rings use them, or with pages that cannot be had.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use testkit::SharedMemory;
use testkit::request::{GET_VRING_BASE, SET_INFLIGHT_FD, SET_LOG_BASE, SET_MEM_TABLE};
use virtq::inflight_bytes;

use super::chains::STATION;
use crate::evil::{Evil, INDIRECT_DESC, MEMORY, SIZE, WRITE, areas, desc, longs, words};
use crate::world::{Case, EVIL, Stage, case};

/// Protocol features.
const LOG_SHMFD: u64 = 1 << 1;
const INFLIGHT_SHMFD: u64 = 1 << 12;
/// Rings note which pages they write.
const LOG_ALL: u64 = 1 << 26;
/// Bytes of a page.
const P: u64 = 4096;

fn file(bytes: u64) -> OwnedFd {
    let fd = memfd_create("kept", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

/// Features are agreed, and there is an in-flight file whose regions begin at `offset`.
fn with_inflight(stage: &Stage<'_>, offset: u64) -> (Evil, OwnedFd) {
    let mut evil = Evil::connect(stage);
    evil.protocol |= INFLIGHT_SHMFD;
    evil.negotiate();
    let bytes = 2 * inflight_bytes(stage.layout, SIZE) as u64;
    let kept = file((offset + bytes).next_multiple_of(P));
    let queues = words(&[2 | u32::from(SIZE) << 16]);
    let body = [longs(&[bytes, offset]), queues].concat();
    assert!(evil.ack(SET_INFLIGHT_FD, &body, &[kept.as_fd()]));
    assert!(evil.share());
    (evil, kept)
}

/// Both rings run with it, and have used it.
fn running_with_inflight(stage: &Stage<'_>, offset: u64) -> (Evil, OwnedFd) {
    let (mut evil, kept) = with_inflight(stage, offset);
    start(stage, &mut evil);
    (evil, kept)
}

/// Both rings run with a log of written pages, and have used it.
fn running_with_log(stage: &Stage<'_>, offset: u64) -> (Evil, OwnedFd) {
    let mut evil = Evil::connect(stage);
    evil.protocol |= LOG_SHMFD;
    evil.features = INDIRECT_DESC | LOG_ALL;
    evil.negotiate();
    let bytes = MEMORY / P / 8;
    let log = file((offset + bytes).next_multiple_of(P));
    evil.front.send(SET_LOG_BASE, &longs(&[bytes, offset]), &[log.as_fd()]).unwrap();
    let _ = evil.front.reply(SET_LOG_BASE).unwrap();
    assert!(evil.share());
    start(stage, &mut evil);
    (evil, log)
}

fn start(stage: &Stage<'_>, evil: &mut Evil) {
    for ring in 0..2 {
        evil.set_ring(ring);
    }
    stage.is_up(evil);
    evil.frame(&[0xff; 60]);
    evil.wait_used(1, 1);
}

/// The port is in quarantine for that.
fn loses(stage: &Stage<'_>, evil: &mut Evil, what: &str) {
    stage.loses(evil);
    let reason = stage.world.port(EVIL)["reason"].clone();
    assert!(reason.as_str().unwrap().contains(what), "{reason}");
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = inflight();
    all.extend(log());
    all.extend(huge("a page that nobody has taken", false));
    all.extend(huge("a page that is there", true));
    all
}

/// A huge page; `taken` from those that are free, if there is one.
fn huge_file(taken: bool) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let fd = memfd_create("huge", flags).unwrap();
    ftruncate(&fd, 2 << 20).unwrap();
    if taken && let Err(error) = fallocate(&fd, FallocateFlags::empty(), 0, 2 << 20) {
        println!("no huge page is free: {error}");
    }
    fd
}

/// The kernel splits and unmaps whole huge pages only: nothing of such a file is to stay mapped.
fn huge(name: &str, taken: bool) -> Vec<Case> {
    const WHAT: &str = "a file of huge pages";
    vec![
        case(format!("an in-flight file of huge pages: {name}"), move |stage| {
            let mut evil = Evil::connect(stage);
            evil.protocol |= INFLIGHT_SHMFD;
            evil.negotiate();
            assert!(evil.share());
            let bytes = 2 * inflight_bytes(stage.layout, SIZE) as u64;
            let body = [longs(&[bytes, 0]), words(&[2 | u32::from(SIZE) << 16])].concat();
            for _ in 0..8 {
                let kept = huge_file(taken);
                let said = (SET_INFLIGHT_FD, &body[..]);
                stage.refuses_fds(&mut evil, said, &[kept.as_fd()], WHAT);
            }
            start(stage, &mut evil);
        }),
        case(format!("a log in huge pages: {name}"), move |stage| {
            let mut evil = Evil::connect(stage);
            evil.protocol |= LOG_SHMFD;
            evil.features = INDIRECT_DESC | LOG_ALL;
            evil.negotiate();
            assert!(evil.share());
            start(stage, &mut evil);
            let log = huge_file(taken);
            let body = longs(&[MEMORY / P / 8, 0]);
            evil.front.send(SET_LOG_BASE, &body, &[log.as_fd()]).unwrap();
            evil.frame(&[0xff; 60]);
            stage.closes(&mut evil, WHAT);
        }),
    ]
}

fn inflight() -> Vec<Case> {
    const WHAT: &str = "in-flight";
    vec![
        case("the in-flight file is cut short: frames are taken", |stage| {
            let (mut evil, kept) = running_with_inflight(stage, 0);
            ftruncate(&kept, 0).unwrap();
            evil.frame(&[0xff; 60]);
            loses(stage, &mut evil, WHAT);
        }),
        case("the in-flight file is cut short: a frame is delivered", |stage| {
            let (mut evil, kept) = running_with_inflight(stage, 0);
            ftruncate(&kept, 0).unwrap();
            evil.offer(0, &[desc(2048, WRITE)]);
            stage.world.flood(STATION);
            loses(stage, &mut evil, WHAT);
        }),
        case("the in-flight file is cut short: its second page", |stage| {
            // The receiveq's region begins in the first page, the transmitq's in the second.
            let offset = P - inflight_bytes(stage.layout, SIZE) as u64;
            let (mut evil, kept) = running_with_inflight(stage, offset);
            ftruncate(&kept, P).unwrap();
            evil.frame(&[0xff; 60]);
            loses(stage, &mut evil, WHAT);
        }),
        case("the in-flight file is cut short: before rings start", |stage| {
            let (mut evil, kept) = with_inflight(stage, 0);
            ftruncate(&kept, 0).unwrap();
            // The control thread meets it.
            for ring in 0..2 {
                evil.set_ring_blindly(ring);
            }
            loses(stage, &mut evil, WHAT);
        }),
        case("the in-flight file is cut short: rings stop and start", |stage| {
            let (mut evil, kept) = running_with_inflight(stage, 0);
            ftruncate(&kept, 0).unwrap();
            let (table, memory) = (SharedMemory::table(0, MEMORY), evil.memory.as_fd());
            let _ = evil.front.send(SET_MEM_TABLE, &table, &[memory]);
            loses(stage, &mut evil, WHAT);
        }),
        case("the in-flight file is replaced and then cut short", |stage| {
            let (mut evil, kept) = running_with_inflight(stage, 0);
            let bytes = 2 * inflight_bytes(stage.layout, SIZE) as u64;
            let next = file(P);
            let queues = words(&[2 | u32::from(SIZE) << 16]);
            let body = [longs(&[bytes, 0]), queues].concat();
            assert!(evil.ack(SET_INFLIGHT_FD, &body, &[next.as_fd()]));
            // Nobody uses the old one any more.
            ftruncate(&kept, 0).unwrap();
            stage.is_up(&mut evil);
            let _ = evil.front.ask(GET_VRING_BASE, &words(&[0, 0])).unwrap();
            stage.answers(&mut evil);
        }),
    ]
}

fn log() -> Vec<Case> {
    const WHAT: &str = "the log of written pages";
    vec![
        case("the log is cut short: a used ring is written", |stage| {
            let (mut evil, log) = running_with_log(stage, 0);
            ftruncate(&log, 0).unwrap();
            evil.frame(&[0xff; 60]);
            loses(stage, &mut evil, WHAT);
        }),
        case("the log is cut short: a frame is delivered", |stage| {
            let (mut evil, log) = running_with_log(stage, 0);
            ftruncate(&log, 0).unwrap();
            evil.offer(0, &[desc(2048, WRITE)]);
            stage.world.flood(STATION);
            loses(stage, &mut evil, WHAT);
        }),
        case("the log is cut short: its second page", |stage| {
            // The pages of the rings are in the first bytes of the log.
            let bits = areas(1)[0] / P / 8;
            let (mut evil, log) = running_with_log(stage, P - bits);
            ftruncate(&log, P).unwrap();
            evil.frame(&[0xff; 60]);
            loses(stage, &mut evil, WHAT);
        }),
    ]
}
