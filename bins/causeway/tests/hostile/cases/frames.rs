//! Frames and their headers.

use packet::MacAddr;

use crate::evil::{BUFFERS, Evil, desc};
use crate::good::GOOD;
use crate::world::{Case, Stage, case, eventually};

const STATION: [u8; 6] = [2, 0, 0, 0, 0, 0x66];

/// A frame of `len` bytes from the hostile station to `to`.
fn frame(to: MacAddr, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len.max(14)];
    bytes[..6].copy_from_slice(&to.0);
    bytes[6..12].copy_from_slice(&STATION);
    bytes.truncate(len);
    bytes
}

fn dropped(stage: &Stage<'_>, reason: &str, act: impl FnOnce()) {
    let before = stage.world.drops(reason);
    act();
    eventually(&format!("dropped as {reason}"), || stage.world.drops(reason) > before);
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = lengths();
    all.extend(headers());
    all.extend(addresses());
    all.extend(tags());
    all
}

fn lengths() -> Vec<Case> {
    let with = |len: usize, reason: &'static str| {
        case(format!("a frame of {len} bytes"), move |stage| {
            let mut evil = Evil::up(stage);
            let bytes = frame(MacAddr::BROADCAST, len);
            if reason.is_empty() {
                evil.frame(&bytes);
                evil.wait_used(1, 1);
            } else {
                dropped(stage, reason, || evil.frame(&bytes));
            }
            stage.is_up(&mut evil);
        })
    };
    let mut all = vec![
        with(0, "runt"),
        with(1, "runt"),
        with(13, "runt"),
        with(14, ""),
        with(15, ""),
        with(59, ""),
        with(9014, ""),
        with(9100, "oversize"),
        with(65535, "oversize"),
        with(1 << 20, "oversize"),
    ];
    for len in [1u32, 9, 10, 11, 12] {
        all.push(case(format!("{len} bytes of a header and no more"), move |stage| {
            let mut evil = Evil::up(stage);
            dropped(stage, "runt", || evil.offer(1, &[desc(len, 0)]));
            stage.is_up(&mut evil);
        }));
    }
    all
}

/// `flags, gso_type, hdr_len, gso_size, csum_start, csum_offset` and a zero.
fn header(flags: u8, gso: u8, [hdr_len, gso_size, start, offset]: [u16; 4]) -> Vec<u8> {
    let mut bytes = vec![flags, gso];
    for field in [hdr_len, gso_size, start, offset, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

fn headers() -> Vec<Case> {
    // Without any offload negotiated each of these asks for what is not allowed.
    let bad = |name: &str, header: Vec<u8>| {
        case(format!("header: {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            let bytes = frame(GOOD[0], 1000);
            dropped(stage, "bad_offload", || evil.headed(&header, &bytes));
            stage.is_up(&mut evil);
        })
    };
    vec![
        bad("a checksum that was not negotiated", header(1, 0, [0, 0, 34, 16])),
        bad("a checksum behind the frame", header(1, 0, [0, 0, 1000, 16])),
        bad("a checksum that wraps", header(1, 0, [0, 0, 0xffff, 0xffff])),
        bad("a checksum field behind the frame", header(1, 0, [0, 0, 990, 9])),
        bad("TSO that was not negotiated", header(1, 1, [54, 100, 34, 16])),
        bad("TSO without a checksum", header(0, 1, [54, 100, 0, 0])),
        bad("segments of no bytes", header(1, 1, [54, 0, 34, 16])),
        bad("headers longer than the frame", header(1, 4, [0xffff, 100, 34, 16])),
        bad("no such type", header(0, 0x7f, [0, 0, 0, 0])),
        bad("type 2", header(0, 2, [54, 100, 0, 0])),
        bad("UFO", header(1, 3, [42, 100, 34, 6])),
        bad("USO that was not negotiated", header(1, 5, [42, 100, 34, 6])),
        bad("ECN alone", header(0, 0x80, [0, 0, 0, 0])),
        bad("ones", vec![0xff; 12]),
        case("header: number of buffers", |stage| {
            let mut evil = Evil::up(stage);
            let header = [vec![0; 10], vec![0xff; 2]].concat();
            evil.headed(&header, &frame(GOOD[0], 60));
            evil.wait_used(1, 1);
            stage.is_up(&mut evil);
        }),
    ]
}

fn addresses() -> Vec<Case> {
    let from = |name: &str, bytes: [u8; 6], reason: &'static str| {
        case(format!("from {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            let mut frame = frame(GOOD[0], 60);
            frame[6..12].copy_from_slice(&bytes);
            dropped(stage, reason, || evil.frame(&frame));
            stage.is_up(&mut evil);
        })
    };
    vec![
        from("all", [0xff; 6], "bad_source"),
        from("a group", [1, 0, 0x5e, 0, 0, 1], "bad_source"),
        from("nobody", [0; 6], "bad_source"),
        case("to itself", |stage| {
            let mut evil = Evil::up(stage);
            evil.frame(&frame(GOOD[0], 60));
            evil.wait_used(1, 1);
            dropped(stage, "same_port", || evil.frame(&frame(MacAddr(STATION), 60)));
        }),
        case("to a bridge", |stage| {
            let mut evil = Evil::up(stage);
            let to = MacAddr([1, 0x80, 0xc2, 0, 0, 0]);
            dropped(stage, "reserved_mac", || evil.frame(&frame(to, 60)));
        }),
        case("from a thousand stations", |stage| {
            let mut evil = Evil::up(stage);
            for round in 0..64u8 {
                let mut bytes = frame(GOOD[0], 60);
                bytes[10] = round;
                evil.write(BUFFERS, &[vec![0; 12], bytes].concat());
                if round < 15 {
                    evil.offer(1, &[crate::evil::Desc { next: 0, ..desc(72, 0) }]);
                }
            }
            stage.is_up(&mut evil);
        }),
    ]
}

fn tags() -> Vec<Case> {
    let tagged = |name: &str, tags: &'static [[u8; 4]], len: usize| {
        case(format!("tags: {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            let mut bytes = frame(GOOD[1], 12);
            bytes.extend(tags.iter().flatten());
            bytes.resize(len, 0x81);
            evil.frame(&bytes);
            evil.wait_used(1, 1);
            stage.is_up(&mut evil);
        })
    };
    const TAG: [u8; 4] = [0x81, 0, 0xff, 0xff];
    vec![
        tagged("half a tag", &[], 14),
        tagged("a tag and no more", &[TAG], 16),
        tagged("VLAN 4095", &[TAG], 64),
        tagged("thirty of them", &[TAG; 30], 200),
        tagged("nothing but tags", &[TAG; 2], 1400),
        tagged("of a provider", &[[0x88, 0xa8, 0, 5], TAG], 80),
    ]
}
