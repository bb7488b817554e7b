#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use super::{BlockError, DESCRIPTION, FRAME_HEADER, Packet, Walk};

const BLOCK: u32 = 4096;

fn description(packets: u32, first: u32) -> [u8; DESCRIPTION] {
    let mut bytes = [0xa5; DESCRIPTION];
    bytes[12..16].copy_from_slice(&packets.to_ne_bytes());
    bytes[16..20].copy_from_slice(&first.to_ne_bytes());
    bytes
}

/// The header of a frame of `len` bytes at `mac`, and how far the next header is.
fn header(next: u32, (snap, len): (u32, u32), mac: u16, status: u32) -> [u8; FRAME_HEADER] {
    let mut bytes = [0; FRAME_HEADER];
    for (at, value) in [(0, next), (12, snap), (16, len), (20, status), (32, 0x2005)] {
        bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    bytes[24..26].copy_from_slice(&mac.to_ne_bytes());
    bytes[36..38].copy_from_slice(&0x88a8_u16.to_ne_bytes());
    bytes
}

#[test]
fn a_walk_gives_every_frame_and_ends() {
    let mut walk = Walk::new(&description(3, 48), BLOCK).unwrap();
    for (number, at) in [48, 248, 448].into_iter().enumerate() {
        assert_eq!(walk.header_at(), Some(at));
        let packet = walk.take(&header(200, (60 + number as u32, 64), 94, 1)).unwrap().unwrap();
        let len = 60 + number as u32;
        assert_eq!(packet, Packet { start: at + 94, len, original_len: 64, tag: None });
        assert!(packet.is_truncated());
        assert_eq!(packet.end(), at + 94 + len);
    }
    assert_eq!(walk.header_at(), None);
    assert_eq!(Walk::new(&description(0, u32::MAX), BLOCK).unwrap().header_at(), None);
}

#[test]
fn tags_are_those_that_the_status_says() {
    for (status, tag) in
        [(1, None), (0x11, Some((0x8100, 0x2005))), (0x51, Some((0x88a8, 0x2005))), (0x41, None)]
    {
        let mut walk = Walk::new(&description(1, 48), BLOCK).unwrap();
        assert_eq!(walk.take(&header(0, (60, 60), 94, status)).unwrap().unwrap().tag, tag);
    }
}

#[test]
fn places_outside_of_the_block_are_refused() {
    for first in [0, 40, 47, 52, BLOCK - 40, BLOCK, u32::MAX - 7] {
        let error = Walk::new(&description(1, first), BLOCK).unwrap_err();
        assert_eq!(error, BlockError::Header { at: first, block: BLOCK });
    }
    let take = |header| Walk::new(&description(2, 48), BLOCK).unwrap().take(&header);
    assert!(take(header(BLOCK - 96, (60, 60), 94, 1)).is_ok());
    for next in [0, 8, 40, 50, BLOCK - 88, BLOCK, u32::MAX, u32::MAX - 40] {
        let error = take(header(next, (60, 60), 94, 1)).unwrap_err();
        let at = 48_u32.saturating_add(next);
        assert_eq!(error, BlockError::Header { at, block: BLOCK }, "next {next}");
    }
    let room = BLOCK - 48 - 94;
    assert!(take(header(200, (room, room), 94, 1)).is_ok());
    for len in [room + 1, BLOCK, u32::MAX] {
        let error = take(header(200, (len, len), 94, 1)).unwrap_err();
        assert!(matches!(error, BlockError::Frame { at: 142, .. }), "{error}");
    }
    for mac in [0, 48, 57] {
        let error = take(header(200, (60, 60), mac, 1)).unwrap_err();
        assert_eq!(error, BlockError::Overlap { at: 48 + u64::from(mac) });
    }
    assert!(take(header(200, (60, 60), 58, 1)).is_ok());
    assert!(take(header(200, (0, 60), u16::MAX, 1)).is_err());
}

#[test]
fn what_the_kernel_gave_up_is_stepped_over_whatever_is_left_there() {
    let mut walk = Walk::new(&description(3, 48), BLOCK).unwrap();
    // What stands in such a header is of the ring's last lap, or bytes of a frame.
    for (mac, len) in [(94, 60), (0, u32::MAX)] {
        assert_eq!(walk.take(&header(200, (len, len), mac, 0x50)), Ok(None));
    }
    assert_eq!(walk.header_at(), Some(448));
    assert!(walk.take(&header(0, (60, 60), 94, 1)).unwrap().is_some());
    assert_eq!(walk.header_at(), None);
    let mut walk = Walk::new(&description(2, 48), BLOCK).unwrap();
    assert!(walk.take(&header(BLOCK, (60, 60), 94, 0)).is_err());
}

/// Any headers at all: whatever comes out is within the block, and the walk ends.
#[test]
fn any_bytes_stay_within_the_block() {
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..20_000 {
        let mut bytes = [0; DESCRIPTION];
        let small = |value: u64| (value as u32) >> ((value >> 32) % 32);
        bytes[12..16].copy_from_slice(&small(next()).to_ne_bytes());
        bytes[16..20].copy_from_slice(&(small(next()) & !7).to_ne_bytes());
        let Ok(mut walk) = Walk::new(&bytes, BLOCK) else { continue };
        let mut steps = 0;
        while let Some(at) = walk.header_at() {
            assert!((48..=BLOCK - 48).contains(&at));
            let lens = (small(next()), small(next()));
            let header = header(small(next()) & !7, lens, small(next()) as u16, next() as u32);
            let Ok(packet) = walk.take(&header) else { break };
            let within = |p: Packet| p.start >= at + 58 && p.end() <= BLOCK;
            assert!(packet.is_none_or(within));
            steps += 1;
            assert!(steps <= BLOCK / 48);
        }
    }
}
