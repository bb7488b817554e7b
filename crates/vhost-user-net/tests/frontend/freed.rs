//! What the control thread does not wait for: memory that is freed, and connections that end.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use port::PortState;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_user_net::codec::{Request, VringFd};
use vhost_user_net::memory::{FrontendAddr, RegionSpec};
use vhost_user_net::session::{FEATURES, PROTOCOL_FEATURES};
use virtq::mem::GuestPhysAddr;

use crate::floods::ByHand;

/// A message with an fd.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], fd: &OwnedFd) {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent.unwrap(), bytes.len());
}

fn say(stream: &UnixStream, request: &Request) {
    assert_eq!(rustix::io::write(stream, &request.write(false)).unwrap(), 12 + 8);
}

/// Shares memory of so many bytes and takes it back. Returns whether a thread told the control
/// thread that it let go of it.
fn is_let_go_of_by_a_thread(size: u64) -> bool {
    let mut bench = ByHand::new();
    let stream = bench.connect(0);
    say(&stream, &Request::SetFeatures(FEATURES));
    say(&stream, &Request::SetProtocolFeatures(PROTOCOL_FEATURES));
    let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    let user = FrontendAddr(1 << 40);
    let spec = RegionSpec { guest: GuestPhysAddr(0), size, user, mmap_offset: 0 };
    let add = Request::AddMemReg(spec).write(false);
    send(&stream, &add, &file);
    bench.round();
    // What came with it is let go of.
    while bench.manager.run_with_timeout(200).unwrap() > 0 {}
    let remove = Request::RemMemReg(spec).write(false);
    assert!(rustix::io::write(&stream, &remove).is_ok());
    bench.round();
    bench.manager.run_with_timeout(if size > 1 << 20 { 20_000 } else { 200 }).unwrap() > 0
}

/// It takes seconds if nobody else has it. (It has no pages here.)
#[test]
fn large_memory_is_freed_by_a_thread_whenever_it_goes() {
    assert!(is_let_go_of_by_a_thread(2 << 30));
    assert!(!is_let_go_of_by_a_thread(1 << 20));
}

/// A connection whose last owner waits when it closes it, and its other end.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    set_socket_linger(&stream, Some(Duration::from_secs(60))).unwrap();
    stream.set_nonblocking(true).unwrap();
    while rustix::io::write(&stream, &[0; 1 << 16]).is_ok() {}
    (stream.into(), peer)
}

/// Of connections that nobody has accepted yet, with messages that hold what lingers.
#[test]
fn a_port_that_goes_waits_for_nobody() {
    let (fd, peer) = lingering();
    let bench = ByHand::new();
    let stream = bench.connect(0);
    send(&stream, &[0], &fd);
    drop((stream, fd));
    let start = Instant::now();
    drop(bench);
    assert!(start.elapsed() < Duration::from_secs(30), "it lingers for twice as long");
    drop(peer);
}

/// By the timer: nobody says anything any more.
#[test]
fn whose_fds_do_not_get_closed_is_quarantined() {
    let mut bench = ByHand::new();
    let kick = Request::SetVringKick(VringFd { ring: 1, has_fd: true }).write(false);
    let sent = (0..4).map(|_| {
        let (stream, (fd, peer)) = (bench.connect(0), lingering());
        send(&stream, &kick, &fd);
        drop(fd);
        while rustix::io::read(&stream, &mut [0; 1]).is_err() {
            bench.round();
        }
        peer
    });
    let peers: Vec<_> = sent.collect();
    let end = Instant::now() + Duration::from_secs(20);
    while bench.status[0].read().state != PortState::Quarantined {
        assert!(Instant::now() < end, "nobody looks at them");
        let _ = bench.manager.run_with_timeout(20).unwrap();
    }
    let reason = bench.status[0].read().reason;
    assert!(reason.starts_with("the front end sent fds that take very long"), "{reason}");
    assert_ne!(bench.status[1].read().state, PortState::Quarantined);
    drop(peers);
}
