//! Descriptors: what is no eventfd, what blocks, what is full, and too many of them.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::{ioctl_fionbio, write};
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use testkit::request::*;

use crate::evil::{Evil, event, longs};
use crate::world::{Case, Stage, case};

/// Its name, and how to get one.
type Kind = (&'static str, fn() -> OwnedFd);

/// Things that are no eventfd.
const KINDS: [Kind; 11] = [
    ("a pipe's end", || pipe_with(PipeFlags::CLOEXEC).unwrap().0),
    ("a pipe's other end", || pipe_with(PipeFlags::CLOEXEC).unwrap().1),
    ("a socket", || UnixStream::pair().unwrap().0.into()),
    ("a TCP socket", || TcpListener::bind("127.0.0.1:0").unwrap().into()),
    ("a file in memory", || memfd_create("m", MemfdFlags::CLOEXEC).unwrap()),
    ("an epoll set", || epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
    ("a timer", || timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap()),
    ("/dev/null", || File::open("/dev/null").unwrap().into()),
    ("a directory", || File::open("/").unwrap().into()),
    ("a path", || open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()),
    ("a file of /proc", || File::open("/proc/self/status").unwrap().into()),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // What is refused for one use is refused for all: the others get a sample.
    let uses =
        [("kick", SET_VRING_KICK, 1), ("call", SET_VRING_CALL, 3), ("error", SET_VRING_ERR, 5)];
    for (what, request, step) in uses {
        for (name, fd) in KINDS.into_iter().step_by(step) {
            all.push(case(format!("{name} to {what}"), move |stage| {
                let mut evil = Evil::up(stage);
                let fd = fd();
                let fds: &[BorrowedFd<'_>] = &[fd.as_fd()];
                stage.refuses_fds(&mut evil, (request, &longs(&[1])), fds, "no eventfd");
                stage.is_up(&mut evil);
            }));
        }
    }
    all.extend(own_connection());
    all.extend(counts());
    all.extend(calls());
    all.extend(kicks());
    all.extend(slow_to_close().into_iter().chain(out_of_band()));
    all
}

/// The connection itself, in place of what it is about.
fn own_connection() -> Vec<Case> {
    [("kick", SET_VRING_KICK), ("call", SET_VRING_CALL)]
        .map(|(what, request)| {
            case(format!("its own connection to {what}"), move |stage| {
                let mut evil = Evil::up(stage);
                let fd = evil.front.stream().try_clone().unwrap();
                evil.front.send(request, &longs(&[1]), &[fd.as_fd()]).unwrap();
                drop(fd);
                stage.closes(&mut evil, "its own end of the connection");
            })
        })
        .into()
}

fn counts() -> Vec<Case> {
    let beside = |name: &str, request: u32, body: Vec<u8>, count: usize, text: &'static str| {
        case(name, move |stage| {
            let mut evil = Evil::negotiated(stage);
            let fd = event();
            let fds = vec![fd.as_fd(); count];
            stage.refuses_fds(&mut evil, (request, &body), &fds, text);
        })
    };
    let mut all = vec![
        beside("a kick without its fd", SET_VRING_KICK, longs(&[0]), 0, "0 fds instead of 1"),
        beside("a kick with two", SET_VRING_KICK, longs(&[0]), 2, "2 fds instead of 1"),
        beside("a kick with one too many", SET_VRING_KICK, longs(&[256]), 1, "1 fds instead of 0"),
        beside("a call with 32", SET_VRING_CALL, longs(&[0]), 32, "32 fds instead of 1"),
        beside("an owner with an fd", SET_OWNER, Vec::new(), 1, "1 fds instead of 0"),
        beside("features with 9 fds", SET_FEATURES, longs(&[0]), 9, "9 fds instead of 0"),
        beside("a channel without an fd", SET_BACKEND_REQ_FD, Vec::new(), 0, "0 fds instead of 1"),
    ];
    for count in [33usize, 100, 253] {
        all.push(case(format!("{count} fds beside a message"), move |stage| {
            let mut evil = Evil::negotiated(stage);
            let fd = event();
            evil.front.send(SET_VRING_KICK, &longs(&[0]), &vec![fd.as_fd(); count]).unwrap();
            stage.closes(&mut evil, "more than 32 fds");
        }));
    }
    all.push(case("fds beside every byte of a message", |stage| {
        let mut evil = Evil::negotiated(stage);
        let fd = event();
        let message = [crate::evil::words(&[SET_VRING_KICK, 1, 8]), longs(&[0])].concat();
        for byte in message.chunks(1) {
            if evil.front.send_raw(byte, &[fd.as_fd(); 4]).is_err() {
                break;
            }
        }
        assert!(evil.front.is_closed());
    }));
    all.push(case("fds and no message", |stage| {
        let mut evil = Evil::negotiated(stage);
        let fd = event();
        let _ = evil.front.send_raw(&[SET_OWNER as u8], &[fd.as_fd(); 30]).unwrap();
        stage.world.progress();
    }));
    all
}

/// An eventfd whose counter is full, and blocking: whoever writes to it stands still.
fn full() -> OwnedFd {
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let _ = write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fd
}

fn calls() -> Vec<Case> {
    vec![
        case("a call that is full and blocks", |stage| {
            let mut evil = Evil::up(stage);
            evil.fds[1][1] = full();
            assert!(evil.set_fds(1));
            ioctl_fionbio(&evil.fds[1][1], false).unwrap();
            for _ in 0..10 {
                evil.frame(&[0xff; 60]);
            }
            evil.wait_used(1, 10);
            stage.is_up(&mut evil);
        }),
        case("the receiveq's call is full and blocks", |stage| {
            let mut evil = Evil::up(stage);
            evil.fds[0][1] = full();
            assert!(evil.set_fds(0));
            ioctl_fionbio(&evil.fds[0][1], false).unwrap();
            evil.offer(0, &[crate::evil::desc(2048, crate::evil::WRITE)]);
            stage.world.flood(packet::MacAddr::BROADCAST);
            evil.wait_used(0, 1);
            stage.is_up(&mut evil);
        }),
        case("an error that is full and blocks", |stage| {
            let mut evil = Evil::up(stage);
            let fd = full();
            assert!(evil.ack(SET_VRING_ERR, &longs(&[1]), &[fd.as_fd()]));
            evil.offer(1, &[crate::evil::Desc { addr: u64::MAX, ..crate::evil::desc(9, 0) }]);
            stage.breaks(&mut evil, "wraps around");
        }),
    ]
}

fn kicks() -> Vec<Case> {
    vec![
        case("a kick that is empty and blocks", |stage| {
            let mut evil = Evil::up(stage);
            evil.fds[1][0] = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            assert!(evil.set_fds(1));
            for round in 1..5 {
                ioctl_fionbio(&evil.fds[1][0], false).unwrap();
                evil.frame(&[0xff; 60]);
                evil.wait_used(1, round);
            }
            stage.is_up(&mut evil);
        }),
        case("a kick that is full", |stage| {
            let mut evil = Evil::up(stage);
            evil.fds[1][0] = full();
            assert!(evil.set_fds(1));
            stage.is_up(&mut evil);
        }),
        case("one eventfd for everything", |stage| {
            let mut evil = Evil::up(stage);
            let fd = event();
            for ring in 0..2 {
                for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                    assert!(evil.ack(request, &longs(&[ring]), &[fd.as_fd()]));
                }
            }
            let _ = write(&fd, &1u64.to_ne_bytes()).unwrap();
            stage.is_up(&mut evil);
        }),
        case("a flood of kicks", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..50_000 {
                evil.kick(1);
            }
            stage.is_up(&mut evil);
        }),
        case("kicks that are replaced all the time", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..100 {
                assert!(evil.set_fds(1));
            }
            stage.is_up(&mut evil);
        }),
    ]
}

/// A TCP connection whose last owner waits in `close`: it lingers until what was sent arrived, and
/// nobody reads. With the end that does not.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    let linger = Some(std::time::Duration::from_secs(30));
    rustix::net::sockopt::set_socket_linger(&stream, linger).unwrap();
    stream.set_nonblocking(true).unwrap();
    while write(&stream, &[0; 1 << 16]).is_ok() {}
    (stream, peer)
}

/// Has the switch close it; the end that keeps it busy.
fn send_lingering(stage: &Stage<'_>, evil: &mut Evil) -> TcpStream {
    let (stream, peer) = lingering();
    // We let go before the switch has it: it is the last one.
    stage.world.pause(|| {
        evil.front.send(SET_VRING_KICK, &longs(&[1]), &[stream.as_fd()]).unwrap();
        drop(stream);
    });
    assert!(evil.front.is_closed());
    peer
}

fn slow_to_close() -> Vec<Case> {
    vec![
        case("an fd whose close takes half a minute", |stage| {
            let mut evil = Evil::negotiated(stage);
            let _peer = send_lingering(stage, &mut evil);
            stage.world.progress();
        }),
        case("such an fd in the queue of a socket", |stage| {
            let (stream, _peer) = lingering();
            let mut evil = Evil::up(stage);
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut sender = testkit::FrontEnd::from_stream(ours).unwrap();
            let _ = sender.send_raw(&[0], &[stream.as_fd()]).unwrap();
            stage.world.pause(|| {
                evil.front.send(SET_VRING_KICK, &longs(&[1]), &[theirs.as_fd()]).unwrap();
                drop((stream, sender, theirs));
            });
            assert!(evil.front.is_closed());
            stage.world.progress();
        }),
        case("such an fd with front ends that are sent away", |stage| {
            let mut evil = Evil::up(stage);
            // The switch has the last one of each, and not before all have come.
            let _peers = stage.world.pause(|| {
                [(); 6].map(|()| {
                    let (stream, peer) = lingering();
                    let mut other = testkit::FrontEnd::connect(stage.world.socket()).unwrap();
                    let _ = other.send_raw(&[0], &[stream.as_fd()]).unwrap();
                    peer
                })
            });
            stage.world.progress();
            stage.is_up(&mut evil);
        }),
        case("such fds on a connection that nobody reads", |stage| {
            let (stream, _peer) = lingering();
            let mut evil = Evil::negotiated(stage);
            // Wrong, and more behind it: the connection ends with that unread.
            let bad = crate::evil::words(&[SET_OWNER, 2, 0]);
            stage.world.pause(|| {
                for _ in 0..2 {
                    let _ = evil.front.send_raw(&bad, &[stream.as_fd()]).unwrap();
                }
                drop(stream);
            });
            stage.world.progress();
        }),
    ]
}

fn out_of_band() -> Vec<Case> {
    vec![
        case("an fd whose close takes half a minute, with a byte out of band", |stage| {
            let (stream, _peer) = lingering();
            let mut evil = Evil::negotiated(stage);
            stage.world.pause(|| {
                let _ = evil.front.send_urgent(&[0], &[stream.as_fd()]).unwrap();
                evil.front.send(SET_OWNER, &[], &[]).unwrap();
                drop(stream);
            });
            assert!(evil.front.is_closed(), "it is the first byte of a message");
            stage.world.progress();
        }),
        case("such an fd left in a channel by a byte that was taken", |stage| {
            for accepted in [true, false] {
                let (stream, _peer) = lingering();
                let mut evil = Evil::up(stage);
                let (ours, theirs) = UnixStream::pair().unwrap();
                let mut sender = testkit::FrontEnd::from_stream(ours).unwrap();
                let _ = sender.send_urgent(&[0], &[stream.as_fd()]).unwrap();
                let _ = recv(&theirs, &mut [0; 1][..], RecvFlags::OOB).unwrap();
                drop(stream);
                let request = if accepted { SET_BACKEND_REQ_FD } else { SET_VRING_KICK };
                let body = if accepted { Vec::new() } else { longs(&[1]) };
                stage.world.pause(|| {
                    evil.front.send(request, &body, &[theirs.as_fd()]).unwrap();
                    drop((sender, theirs));
                });
                // Its end is the channel's.
                drop(evil);
                let mut next = Evil::up(stage);
                stage.is_up(&mut next);
            }
        }),
    ]
}
