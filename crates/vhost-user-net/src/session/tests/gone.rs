//! What is large is handed out instead of freed.

use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, fallocate, fstat};
use virtio_net::features::ACCESS_PLATFORM;

use super::front::{Front, PLAIN, event, memory, region};
use crate::codec::{InflightSpec, LogArea, Request, VringFd};
use crate::memory::{LARGE, RegionSpec};

/// A file whose pages are all there.
fn full(bytes: u64) -> OwnedFd {
    let file = memory(bytes);
    fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
    file
}

/// What a session handed out after each of these requests.
fn gone(front: &mut Front, requests: Vec<(Request, Option<OwnedFd>)>) -> Vec<usize> {
    let said = requests.into_iter().map(|(request, file)| {
        let _ = front.ask(&request, file.into_iter().collect());
        front.session.take_gone().len()
    });
    said.collect()
}

#[test]
fn memory_that_is_taken_back_or_replaced() {
    for (size, count) in [(LARGE, 1), (LARGE / 2, 0)] {
        let mut front = Front::new();
        front.negotiate(PLAIN);
        let spec = RegionSpec { size, ..region(0) };
        let table = || (Request::SetMemTable(vec![spec]), Some(memory(size)));
        let add = (Request::AddMemReg(spec), Some(memory(size)));
        let remove = (Request::RemMemReg(spec), None);
        let counts = gone(&mut front, vec![add, remove, table(), table()]);
        assert_eq!(counts, [0, count, 0, count]);
        assert_eq!(front.session.into_gone().len(), 1, "the session");
    }
}

#[test]
fn what_stays_is_not_counted() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let (large, other) = (RegionSpec { size: LARGE, ..region(0) }, region(LARGE >> 20));
    let add = |spec: RegionSpec| (Request::AddMemReg(spec), Some(memory(spec.size)));
    let remove = (Request::RemMemReg(other), None);
    assert_eq!(gone(&mut front, vec![add(large), add(other), remove]), [0; 3]);
}

#[test]
fn files_with_more_pages_than_are_used() {
    let spec = InflightSpec { bytes: 4096, offset: 0, queues: 1, queue_size: 64, padded: false };
    let area = LogArea { bytes: 4096, offset: 0 };
    let requests = [
        Request::SetMemTable(vec![region(0)]),
        Request::SetInflightFd(spec),
        Request::SetLogBase(area),
    ];
    for request in requests {
        let mut front = Front::new();
        front.negotiate(PLAIN);
        let with = |file: OwnedFd| (request.clone(), Some(file));
        let files = vec![with(full(LARGE)), with(memory(1 << 20)), with(full(LARGE))];
        assert_eq!(gone(&mut front, files), [0, 1, 0], "{request:?}");
        assert_eq!(front.session.into_gone().len(), 1, "{request:?}");
    }
}

/// Behind a vIOMMU, too, whose translations are into the memory that there is.
#[test]
fn nothing_else_keeps_memory_mapped() {
    for features in [PLAIN, PLAIN | ACCESS_PLATFORM] {
        let mut front = Front::new();
        front.negotiate(features);
        let file = memory(LARGE);
        let inode = format!(" {} ", fstat(&file).unwrap().st_ino);
        let is_mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&inode);
        let spec = RegionSpec { size: LARGE, ..region(0) };
        front.say_fd(Request::AddMemReg(spec), file);
        assert!(is_mapped());
        front.say(Request::RemMemReg(spec));
        assert!(is_mapped());
        drop(front.session.take_gone());
        assert!(!is_mapped());
    }
}

/// It would be kept, and freed whenever the next one comes.
#[test]
fn a_file_is_no_back_channel() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let request = Request::SetBackendReqFd.write(false);
    let error = front.bytes(&request, vec![full(LARGE)]).unwrap_err();
    assert_eq!(error.to_string(), "SET_BACKEND_REQ_FD with an fd that is no socket");
    assert!(front.session.backend_channel().is_none());
}

/// Whatever it looks like: nobody can see all that waits in it.
#[test]
fn the_channel_of_the_back_end() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let channel = || {
        let (channel, _end) = std::os::unix::net::UnixStream::pair().unwrap();
        (Request::SetBackendReqFd, Some(channel.into()))
    };
    assert_eq!(gone(&mut front, vec![channel(), channel()]), [0, 1]);
    front.session.close(&mut front.rings);
    assert_eq!(front.session.into_gone().len(), 2, "and the session");
}

/// Very many epolls may watch them, and each of those is to be told.
#[test]
fn eventfds_of_rings() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let v = VringFd { ring: 1, has_fd: true };
    for request in [Request::SetVringKick(v), Request::SetVringCall(v), Request::SetVringErr(v)] {
        let with = |_| (request.clone(), Some(event()));
        assert_eq!(gone(&mut front, (0..3).map(with).collect()), [0, 1, 1], "{request:?}");
    }
    let _ = front.base(1);
    assert_eq!(front.session.take_gone().len(), 1, "its kick");
    let _ = gone(&mut front, vec![(Request::SetVringKick(v), Some(event()))]);
    assert_eq!(front.ack(Request::ResetDevice, Vec::new()), 0);
    assert_eq!(front.session.take_gone().len(), 1, "its kick");
}
