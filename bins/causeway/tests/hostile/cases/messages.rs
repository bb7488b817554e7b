//! Messages: versions, flags, sizes, numbers, order, values.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use testkit::FrontEnd;
use testkit::request::*;

use crate::evil::{EVENT_IDX, Evil, PACKED, SIZE, VERSION_1, event, longs, words};
use crate::world::{Case, Stage, case, eventually};

/// Requests whose payload has one size.
const SIZED: [(&str, u32, u32); 19] = [
    ("GET_FEATURES", GET_FEATURES, 0),
    ("SET_FEATURES", SET_FEATURES, 8),
    ("SET_OWNER", SET_OWNER, 0),
    ("RESET_OWNER", RESET_OWNER, 0),
    ("SET_VRING_NUM", SET_VRING_NUM, 8),
    ("SET_VRING_ADDR", SET_VRING_ADDR, 40),
    ("SET_VRING_BASE", SET_VRING_BASE, 8),
    ("GET_VRING_BASE", GET_VRING_BASE, 8),
    ("SET_VRING_KICK", SET_VRING_KICK, 8),
    ("SET_VRING_CALL", SET_VRING_CALL, 8),
    ("SET_VRING_ERR", SET_VRING_ERR, 8),
    ("SET_PROTOCOL_FEATURES", SET_PROTOCOL_FEATURES, 8),
    ("SET_VRING_ENABLE", SET_VRING_ENABLE, 8),
    ("NET_SET_MTU", NET_SET_MTU, 8),
    ("RESET_DEVICE", RESET_DEVICE, 0),
    ("ADD_MEM_REG", ADD_MEM_REG, 40),
    ("REM_MEM_REG", REM_MEM_REG, 40),
    ("SET_STATUS", SET_STATUS, 8),
    ("GET_MAX_MEM_SLOTS", GET_MAX_MEM_SLOTS, 0),
];

fn message(request: u32, flags: u32, size: u32) -> Vec<u8> {
    words(&[request, flags, size])
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = headers();
    all.extend(sizes());
    all.extend(numbers());
    all.extend(order());
    all.extend(values());
    all.extend(pace());
    all
}

fn headers() -> Vec<Case> {
    let header = |name: &str, bytes: Vec<u8>, text: &'static str| {
        case(format!("header: {name}"), move |stage| {
            let mut evil = Evil::connect(stage);
            let _ = evil.front.send_raw(&bytes, &[]).unwrap();
            stage.closes(&mut evil, text);
        })
    };
    vec![
        header("version 0", message(GET_FEATURES, 0, 0), "message version 0"),
        header("version 2", message(GET_FEATURES, 2, 0), "message version 2"),
        header("version 3", message(GET_FEATURES, 3, 0), "message version 3"),
        header("a reserved flag", message(GET_FEATURES, 1 | 1 << 4, 0), "reserved message flags"),
        header("the highest flag", message(GET_FEATURES, 1 | 1 << 31, 0), "0x80000000"),
        header("a reply", message(GET_FEATURES, 1 | 4, 0), "a reply to GET_FEATURES"),
        header("a size of 4 GiB", message(GET_FEATURES, 1, u32::MAX), "4294967295 bytes"),
        header("a size above all", message(SET_FEATURES, 1, 4097), "4097 bytes"),
        header("noise", vec![0xa5; 64], "reserved message flags"),
        header("zeros", vec![0; 64], "message version 0"),
    ]
}

fn sizes() -> Vec<Case> {
    let mut all = Vec::new();
    for (name, request, right) in SIZED {
        for size in [right.wrapping_sub(1), right + 1, 4096] {
            if size == u32::MAX {
                continue;
            }
            all.push(case(format!("{name} with {size} bytes"), move |stage| {
                let mut evil = Evil::connect(stage);
                let mut bytes = message(request, 1, size);
                bytes.resize(12 + size as usize, 0);
                let _ = evil.front.send_raw(&bytes, &[]).unwrap();
                stage.closes(&mut evil, &format!("{name} with {size} bytes"));
            }));
        }
    }
    all
}

fn numbers() -> Vec<Case> {
    let unknown = [0, 46, 1000, u32::MAX].map(|request| {
        case(format!("request {request}"), move |stage| {
            let mut evil = Evil::connect(stage);
            evil.front.send(request, &[], &[]).unwrap();
            stage.closes(&mut evil, &format!("unknown request {request}"));
        })
    });
    let not_offered = [
        ("IOTLB_MSG", IOTLB_MSG),
        ("SET_VRING_ENDIAN", SET_VRING_ENDIAN),
        ("SET_CONFIG", SET_CONFIG),
        ("POSTCOPY_LISTEN", POSTCOPY_LISTEN),
        ("POSTCOPY_END", POSTCOPY_END),
        ("GPU_SET_SOCKET", GPU_SET_SOCKET),
        ("VRING_KICK", VRING_KICK),
        ("CHECK_DEVICE_STATE", CHECK_DEVICE_STATE),
    ]
    .map(|(name, request)| {
        case(format!("{name} out of place"), move |stage| {
            let mut evil = Evil::connect(stage);
            evil.front.send(request, &[0; 24], &[]).unwrap();
            // Whichever rule it breaks first.
            stage.closes(&mut evil, name);
        })
    });
    unknown.into_iter().chain(not_offered).collect()
}

fn order() -> Vec<Case> {
    let early = |name: &'static str, request: u32, body: Vec<u8>| {
        case(format!("{name} without its protocol feature"), move |stage| {
            let mut evil = Evil::connect(stage);
            evil.front.send(request, &body, &[]).unwrap();
            stage.closes(&mut evil, "without its protocol feature");
        })
    };
    let running = |name: &'static str, request: u32, body: Vec<u8>| {
        case(format!("{name} while the ring runs"), move |stage| {
            let mut evil = Evil::up(stage);
            stage.refuses(&mut evil, request, &body, "while ring 1 runs");
            stage.is_up(&mut evil);
        })
    };
    vec![
        early("NET_SET_MTU", NET_SET_MTU, longs(&[1500])),
        early("GET_MAX_MEM_SLOTS", GET_MAX_MEM_SLOTS, Vec::new()),
        early("SEND_RARP", SEND_RARP, longs(&[2])),
        early("RESET_DEVICE", RESET_DEVICE, Vec::new()),
        early("SET_STATUS", SET_STATUS, longs(&[1])),
        early("GET_STATUS", GET_STATUS, Vec::new()),
        early("REM_MEM_REG", REM_MEM_REG, longs(&[0, 0, 4096, 0, 0])),
        running("SET_VRING_NUM", SET_VRING_NUM, words(&[1, u32::from(SIZE) * 2])),
        running("SET_VRING_BASE", SET_VRING_BASE, words(&[1, 0])),
        case("other features while a ring runs", |stage| {
            let mut evil = Evil::up(stage);
            stage.refuses(&mut evil, SET_FEATURES, &longs(&[VERSION_1]), "runs");
            stage.is_up(&mut evil);
        }),
        case("an enable before everything", |stage| {
            let mut evil = Evil::negotiated(stage);
            for ring in 0..4u32 {
                assert!(evil.ack(SET_VRING_ENABLE, &words(&[ring, 1]), &[]));
            }
            stage.answers(&mut evil);
        }),
        case("everything twice", |stage| {
            let mut evil = Evil::up(stage);
            for ring in 0..2 {
                assert!(evil.set_fds(ring));
            }
            assert!(evil.share());
            stage.is_up(&mut evil);
        }),
        case("a position asked for and never used", |stage| {
            let mut evil = Evil::up(stage);
            for ring in [1u32, 1, 0, 0, 3, 2] {
                let _ = evil.front.ask(GET_VRING_BASE, &words(&[ring, 9])).unwrap();
            }
            stage.answers(&mut evil);
        }),
        case("a reset, again and again", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..20 {
                assert!(evil.ack(RESET_DEVICE, &[], &[]));
            }
            stage.answers(&mut evil);
        }),
    ]
}

fn values() -> Vec<Case> {
    let refused = |name: &str, request: u32, body: Vec<u8>, text: &'static str| {
        case(name, move |stage| {
            let mut evil = Evil::shared(stage);
            stage.refuses(&mut evil, request, &body, text);
        })
    };
    let mut all = vec![
        refused("an MTU of 0", NET_SET_MTU, longs(&[0]), "MTU 0"),
        refused("an MTU of 67", NET_SET_MTU, longs(&[67]), "MTU 67"),
        refused("an MTU above the port's", NET_SET_MTU, longs(&[9001]), "MTU 9001"),
        refused("an MTU of 64 bits", NET_SET_MTU, longs(&[u64::MAX]), "MTU 18446744073709551615"),
        refused("features not offered", SET_FEATURES, longs(&[1 << 63]), "not offered"),
        refused("all features", SET_FEATURES, longs(&[u64::MAX]), "not offered"),
        refused("protocol features", SET_PROTOCOL_FEATURES, longs(&[1 << 40]), "not offered"),
        refused("a size of 0", SET_VRING_NUM, words(&[0, 0]), "with 0 entries"),
        refused("a size of 32769", SET_VRING_NUM, words(&[0, 32769]), "with 32769 entries"),
        refused("a size of 65536", SET_VRING_NUM, words(&[0, 65536]), "with 65536 entries"),
        refused("a size of 32 bits", SET_VRING_NUM, words(&[0, u32::MAX]), "4294967295 entries"),
        refused("enable 2", SET_VRING_ENABLE, words(&[0, 2]), "SET_VRING_ENABLE"),
    ];
    for ring in [4, 255, 256, 65536, u32::MAX] {
        for (name, request) in [("NUM", SET_VRING_NUM), ("BASE", SET_VRING_BASE)] {
            all.push(case(format!("SET_VRING_{name} for ring {ring}"), move |stage| {
                let mut evil = Evil::negotiated(stage);
                let text = format!("ring {ring}, but the port has 4 rings");
                stage.refuses(&mut evil, request, &words(&[ring, 16]), &text);
            }));
        }
    }
    all.push(case("a kick for ring 200", |stage| {
        let mut evil = Evil::negotiated(stage);
        let fd = event();
        let kick = (SET_VRING_KICK, &longs(&[200])[..]);
        stage.refuses_fds(&mut evil, kick, &[fd.as_fd()], "ring 200");
    }));
    all.push(case("event positions and no packed ring in between", |stage| {
        let mut evil = Evil::up_with(stage, EVENT_IDX);
        assert!(evil.ack(RESET_DEVICE, &[], &[]));
        let other = PACKED ^ if evil.layout == virtq::Layout::Packed { PACKED } else { 0 };
        assert!(evil.ack(SET_FEATURES, &longs(&[VERSION_1 | other | 1 << 30]), &[]));
        stage.answers(&mut evil);
    }));
    all
}

/// How fast, how slowly, and how completely it talks.
fn pace() -> Vec<Case> {
    let torn = |name: &str, bytes: Vec<u8>| {
        case(format!("{name}, and then it leaves"), move |stage| {
            let mut evil = Evil::connect(stage);
            let _ = evil.front.send_raw(&bytes, &[]).unwrap();
        })
    };
    let silent = |name: &str, bytes: Vec<u8>| {
        case(format!("{name}, and then silence"), move |stage| {
            let mut evil = Evil::connect(stage);
            let _ = evil.front.send_raw(&bytes, &[]).unwrap();
            // Nobody waits for it.
            stage.world.progress();
            assert_eq!(stage.world.port("good0")["state"], "up");
        })
    };
    let half = [message(SET_VRING_ADDR, 1, 40), vec![0; 17]].concat();
    vec![
        torn("one byte", vec![1]),
        torn("half a header", vec![1, 0, 0, 0, 1, 0]),
        torn("a header", message(SET_FEATURES, 1, 8)),
        torn("half a payload", half.clone()),
        silent("one byte", vec![1]),
        silent("a header", message(SET_FEATURES, 1, 8)),
        silent("half a payload", half),
        case("byte by byte", |stage| {
            let mut evil = Evil::connect(stage);
            for byte in message(GET_FEATURES, 1, 0).chunks(1) {
                let _ = evil.front.send_raw(byte, &[]).unwrap();
            }
            let mut answer = [0; 20];
            evil.front.receive_exact(&mut answer).unwrap();
        }),
        case("replies that it never reads", never_reads),
        case("a flood of messages", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..20_000 {
                evil.front.send(SET_OWNER, &[], &[]).unwrap();
            }
            stage.is_up(&mut evil);
        }),
        case("a second front end", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..20 {
                let mut second = FrontEnd::connect(stage.world.socket()).unwrap();
                assert!(second.is_closed());
            }
            stage.is_up(&mut evil);
        }),
        case("it comes and goes", |stage| {
            for _ in 0..50 {
                drop(UnixStream::connect(stage.world.socket()).unwrap());
            }
        }),
    ]
}

fn never_reads(stage: &Stage<'_>) {
    let evil = Evil::up(stage);
    let stream = evil.front.stream();
    stream.set_nonblocking(true).unwrap();
    // Until neither side takes any more.
    let question = message(GET_FEATURES, 1, 0);
    let mut full = 0;
    while full < 3 {
        match rustix::io::write(stream, &question) {
            Ok(_) => full = 0,
            Err(_) => {
                full += 1;
                stage.world.progress();
            }
        }
    }
    assert_eq!(stage.world.port("good0")["state"], "up");
    eventually("others are served", || stage.world.port("good1")["state"] == "up");
}
