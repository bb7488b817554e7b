//! Requests about what is beside the rings: the in-flight file, the log, channels, configuration,
//! status, announcements.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use testkit::request::*;

use crate::evil::{Desc, Evil, INDIRECT_DESC, PACKED, PROTOCOL, VERSION_1, areas, desc};
use crate::evil::{event, longs, words};
use crate::world::{Case, EVIL, Stage, case};

/// Protocol features.
const LOG_SHMFD: u64 = 1 << 1;
const INFLIGHT_SHMFD: u64 = 1 << 12;
const LOG_ALL: u64 = 1 << 26;
/// Times that something is repeated.
const MANY: u32 = 200;

pub(crate) fn cases() -> Vec<Case> {
    let mut all = inflight();
    all.extend(logs());
    all.extend(channels());
    all.extend(configuration());
    all.extend(states());
    all
}

fn file(bytes: u64) -> OwnedFd {
    let fd = memfd_create("asked", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn with(stage: &Stage<'_>, protocol: u64) -> Evil {
    let mut evil = Evil::connect(stage);
    evil.protocol |= protocol;
    evil.negotiate();
    assert!(evil.share());
    for ring in 0..2 {
        evil.set_ring(ring);
    }
    evil
}

/// Bytes, offset, queues, their size.
fn inflight_body(bytes: u64, offset: u64, [queues, size]: [u32; 2]) -> Vec<u8> {
    [longs(&[bytes, offset]), words(&[queues | size << 16])].concat()
}

fn inflight() -> Vec<Case> {
    let asked = |name: &str, sizes: [u32; 2], text: &'static str| {
        case(format!("an in-flight file asked for: {name}"), move |stage| {
            let mut evil = with(stage, INFLIGHT_SHMFD);
            let body = inflight_body(u64::MAX, u64::MAX, sizes);
            evil.front.send(GET_INFLIGHT_FD, &body, &[]).unwrap();
            stage.closes(&mut evil, text);
        })
    };
    let given = |name: &str, body: Vec<u8>| {
        case(format!("an in-flight file given: {name}"), move |stage| {
            let mut evil = with(stage, INFLIGHT_SHMFD);
            let kept = file(4096);
            assert!(!evil.ack(SET_INFLIGHT_FD, &body, &[kept.as_fd()]), "accepted");
            stage.is_up(&mut evil);
        })
    };
    vec![
        asked("for no queues", [0, 16], "1 to 4 queues"),
        asked("for 65535 queues of 65535", [0xffff, 0xffff], "1 to 4 queues"),
        asked("for queues of 0", [4, 0], "queues of 1 to"),
        asked("for queues of 65535", [4, 0xffff], "queues of 1 to"),
        given("larger than the file", inflight_body(1 << 40, 0, [2, 16])),
        given("that wraps around", inflight_body(u64::MAX, u64::MAX, [2, 16])),
        given("behind the file", inflight_body(64, 1 << 40, [2, 16])),
        given("for more queues than there are", inflight_body(64, 0, [5, 16])),
        case("an in-flight file of which nearly nothing is needed", |stage| {
            let mut evil = with(stage, INFLIGHT_SHMFD);
            let kept = file(1 << 46);
            let body = inflight_body(1 << 46, 0, [2, 16]);
            let said = (SET_INFLIGHT_FD, &body[..]);
            stage.refuses_fds(&mut evil, said, &[kept.as_fd()], "at most 4096 are allowed");
            stage.is_up(&mut evil);
        }),
        case("an in-flight file too small for its rings", |stage| {
            let mut evil = with(stage, INFLIGHT_SHMFD);
            let kept = file(4096);
            let body = inflight_body(64, 0, [2, 16]);
            let _ = evil.ack(SET_INFLIGHT_FD, &body, &[kept.as_fd()]);
            evil.frame(&[0xff; 60]);
            stage.answers(&mut evil);
        }),
        case("in-flight files asked for without end", |stage| {
            let mut evil = with(stage, INFLIGHT_SHMFD);
            for _ in 0..MANY {
                let body = inflight_body(0, 0, [4, 32768]);
                let _ = evil.front.ask(GET_INFLIGHT_FD, &body).unwrap();
            }
            stage.is_up(&mut evil);
        }),
        case("an in-flight file full of nonsense", |stage| {
            let mut evil = Evil::connect(stage);
            evil.protocol |= INFLIGHT_SHMFD;
            evil.negotiate();
            let bytes = 2 * virtq::inflight_bytes(stage.layout, 16) as u64;
            let kept = file(bytes.next_multiple_of(4096));
            let noise: Vec<u8> = (0..bytes).map(|n| (n * 37) as u8).collect();
            let _ = rustix::io::pwrite(&kept, &noise, 0).unwrap();
            let body = inflight_body(bytes, 0, [2, 16]);
            assert!(evil.ack(SET_INFLIGHT_FD, &body, &[kept.as_fd()]));
            assert!(evil.share());
            for ring in 0..2 {
                evil.set_ring_blindly(ring);
            }
            stage.answers(&mut evil);
        }),
    ]
}

fn logs() -> Vec<Case> {
    let refused = |name: &str, body: Vec<u8>| {
        case(format!("a log {name}"), move |stage| {
            let mut evil = with(stage, LOG_SHMFD);
            let log = file(4096);
            evil.front.send(SET_LOG_BASE, &body, &[log.as_fd()]).unwrap();
            assert!(evil.front.is_closed(), "accepted");
        })
    };
    vec![
        refused("of all bytes", longs(&[u64::MAX, 0])),
        refused("that wraps around", longs(&[4096, u64::MAX])),
        refused("larger than its file", longs(&[1 << 30, 0])),
        refused("of nothing", longs(&[0, 0])),
        case("a log shorter than the memory", |stage| {
            let mut evil = with(stage, LOG_SHMFD);
            let log = file(4096);
            evil.front.send(SET_LOG_BASE, &longs(&[1, 0]), &[log.as_fd()]).unwrap();
            let _ = evil.front.reply(SET_LOG_BASE).unwrap();
            log_writes(&mut evil);
            evil.frame(&[0xff; 60]);
            evil.wait_used(1, 1);
            stage.answers(&mut evil);
        }),
        case("used rings logged far outside of the log", |stage| {
            let mut evil = with(stage, LOG_SHMFD);
            let log = file(4096);
            evil.front.send(SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]).unwrap();
            let _ = evil.front.reply(SET_LOG_BASE).unwrap();
            log_writes(&mut evil);
            for (round, place) in (1..).zip([u64::MAX, u64::MAX - 4095, 1 << 60, 0]) {
                let [a, b, c] = areas(1);
                let body = [words(&[1, 1]), longs(&[a, b, c, place])].concat();
                let _ = evil.ack(SET_VRING_ADDR, &body, &[]);
                evil.frame(&[0xff; 60]);
                evil.wait_used(1, round);
            }
            stage.is_up(&mut evil);
        }),
        case("addresses with every flag", |stage| {
            let mut evil = with(stage, LOG_SHMFD);
            let [a, b, c] = areas(1);
            for flags in [2u32, 0x8000_0000, u32::MAX] {
                let body = [words(&[1, flags]), longs(&[a, b, c, 0])].concat();
                let _ = evil.ack(SET_VRING_ADDR, &body, &[]);
            }
            stage.answers(&mut evil);
        }),
        case("logging that begins and ends without end", |stage| {
            let mut evil = with(stage, LOG_SHMFD);
            for n in 0..u64::from(MANY) {
                let all = VERSION_1 | 1 << 15 | PROTOCOL | INDIRECT_DESC | packed(&evil);
                let bits = if n % 2 == 0 { all | LOG_ALL } else { all };
                assert!(evil.ack(SET_FEATURES, &longs(&[bits]), &[]));
            }
            stage.is_up(&mut evil);
        }),
    ]
}

fn packed(evil: &Evil) -> u64 {
    if evil.layout == virtq::Layout::Packed { PACKED } else { 0 }
}

fn log_writes(evil: &mut Evil) {
    let bits = VERSION_1 | 1 << 15 | PROTOCOL | INDIRECT_DESC | LOG_ALL | packed(evil);
    assert!(evil.ack(SET_FEATURES, &longs(&[bits]), &[]));
}

fn channels() -> Vec<Case> {
    vec![
        case("channels without end", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..MANY {
                let (_ours, theirs) = UnixStream::pair().unwrap();
                assert!(evil.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
            }
            stage.is_up(&mut evil);
        }),
        case("a channel that is its own connection", |stage| {
            // It would stay open when the front end is gone, and nobody could come after it.
            let mut evil = Evil::up(stage);
            let own = evil.front.stream().try_clone().unwrap();
            evil.front.send(SET_BACKEND_REQ_FD, &[], &[own.as_fd()]).unwrap();
            drop(own);
            stage.closes(&mut evil, "its own end of the connection");
        }),
        case("its own connection beside half a message", |stage| {
            let mut evil = Evil::up(stage);
            let own = evil.front.stream().try_clone().unwrap();
            let _ = evil.front.send_raw(&[3], &[own.as_fd()]).unwrap();
            drop(own);
            stage.closes(&mut evil, "its own end of the connection");
        }),
        case("a channel with its own connection in its queue", |stage| {
            let mut evil = Evil::up(stage);
            let (ours, theirs) = UnixStream::pair().unwrap();
            let own = evil.front.stream().try_clone().unwrap();
            let mut sender = testkit::FrontEnd::from_stream(ours).unwrap();
            let _ = sender.send_raw(&[0], &[own.as_fd()]).unwrap();
            let _ = evil.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
            drop((own, theirs, sender));
        }),
        case("a channel that its own connection is put into later", |stage| {
            let mut evil = Evil::up(stage);
            let (ours, theirs) = UnixStream::pair().unwrap();
            assert!(evil.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
            let mut sender = testkit::FrontEnd::from_stream(ours).unwrap();
            let own = evil.front.stream().try_clone().unwrap();
            assert!(sender.send_raw(&[0], &[own.as_fd()]).is_err(), "it takes nothing in");
            stage.is_up(&mut evil);
        }),
        case("a channel that listens", |stage| {
            let mut evil = Evil::up(stage);
            let path = std::env::temp_dir().join(format!("hostile-l{}", std::process::id()));
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let _ = evil.ack(SET_BACKEND_REQ_FD, &[], &[listener.as_fd()]);
            stage.is_up(&mut evil);
        }),
        case("a channel that is no socket", |stage| {
            let mut evil = Evil::up(stage);
            for fd in [event(), file(4096), std::fs::File::open("/dev/null").unwrap().into()] {
                let _ = evil.ack(SET_BACKEND_REQ_FD, &[], &[fd.as_fd()]);
            }
            stage.is_up(&mut evil);
        }),
    ]
}

fn configuration() -> Vec<Case> {
    // Offset, size, flags, and then the bytes.
    let asked = |name: &str, head: [u32; 3], bytes: usize| {
        case(format!("configuration read: {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            let body = [words(&head), vec![0; bytes]].concat();
            evil.front.send(GET_CONFIG, &body, &[]).unwrap();
            // Nothing is to be had, and whatever the answer is, it is no more than that.
            let _ = evil.front.reply(GET_CONFIG);
            stage.world.progress();
        })
    };
    let mut all = vec![
        asked("all of it", [0, 256, 0], 256),
        asked("nothing", [0, 0, 0], 0),
        asked("more than there is", [u32::MAX, u32::MAX, u32::MAX], 4),
        asked("not as much as it says", [0, 4096, 0], 1),
    ];
    for (name, head, bytes) in
        [("all of it", [0, 256, 0], 256), ("far outside", [u32::MAX, 8, 1], 8), ("none", [0; 3], 0)]
    {
        all.push(case(format!("configuration written: {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            let body = [words(&head), vec![0xff; bytes]].concat();
            evil.front.send(SET_CONFIG, &body, &[]).unwrap();
            assert!(evil.front.is_closed(), "accepted");
        }));
    }
    all
}

fn states() -> Vec<Case> {
    vec![
        case("every status, in every order", |stage| {
            let mut evil = Evil::up(stage);
            for status in (0..=255u64).chain((0..=255).rev()) {
                assert!(evil.ack(SET_STATUS, &longs(&[status]), &[]));
            }
            stage.is_up(&mut evil);
            evil.frame(&[0xff; 60]);
            evil.wait_used(1, 1);
        }),
        case("a status that is none", |stage| {
            let mut evil = Evil::up(stage);
            for status in [256u64, 1 << 32, u64::MAX] {
                let _ = evil.ack(SET_STATUS, &longs(&[status]), &[]);
            }
            stage.is_up(&mut evil);
        }),
        case("an MTU that changes without end", |stage| {
            let mut evil = Evil::up(stage);
            for n in 0..u64::from(MANY) {
                assert!(evil.ack(NET_SET_MTU, &longs(&[68 + n]), &[]));
                evil.kick(1);
            }
            stage.is_up(&mut evil);
        }),
        case("announcements of stations that are none", |stage| {
            let mut evil = Evil::up(stage);
            // A group, everybody, nobody.
            for mac in [[1, 0, 0x5e, 0, 0, 1], [0xff; 6], [0; 6]] {
                let body = [&mac[..], &[0, 0]].concat();
                let _ = evil.ack(SEND_RARP, &body, &[]);
            }
            stage.world.progress();
            stage.is_up(&mut evil);
        }),
        case("it takes its rings out and puts them back without end", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..MANY / 4 {
                for ring in [0u32, 1] {
                    let _ = evil.front.ask(GET_VRING_BASE, &words(&[ring, 0])).unwrap();
                }
                for ring in 0..2 {
                    assert!(evil.set_fds(ring));
                }
            }
            stage.is_up(&mut evil);
        }),
        case("a reset while its ring is broken, again and again", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..10 {
                evil.offer(1, &[Desc { addr: u64::MAX, ..desc(9, 0) }]);
                assert!(evil.ack(RESET_DEVICE, &[], &[]));
            }
            stage.answers(&mut evil);
            assert_ne!(stage.world.port(EVIL)["state"], "up");
        }),
    ]
}
