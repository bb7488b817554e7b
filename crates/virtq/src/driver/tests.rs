//! The driver against ring contents computed by hand.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use super::{Buffer, BufferPool, DriverConfig, DriverError, DriverQueue, Used};
use crate::config::{Layout, RingFeatures, RingPosition};
use crate::mem::{GuestMap, GuestPhysAddr};

const BYTES: u32 = 1 << 16;

/// A queue at address 0, and all of its memory as one buffer to look into.
struct Bench {
    queue: DriverQueue,
    memory: BufferPool,
}

impl Bench {
    fn new(config: DriverConfig) -> Self {
        let map = GuestMap::private(BYTES as usize).unwrap();
        let queue = DriverQueue::new(&map, config, GuestPhysAddr(0)).unwrap();
        let memory = BufferPool::new(&map, GuestPhysAddr(0), BYTES, 1).unwrap();
        Self { queue, memory }
    }

    fn u16(&self, at: u64) -> u16 {
        let mut out = [0; 2];
        assert_eq!(self.memory.read(0, at as u32, &mut out), 2);
        u16::from_le_bytes(out)
    }

    fn desc(&self, index: u64) -> (u64, u32, u16, u16) {
        let at = self.queue.areas().desc.0 + index * 16;
        let mut out = [0; 16];
        assert_eq!(self.memory.read(0, at as u32, &mut out), 16);
        let (addr, rest) = out.split_at(8);
        let addr = u64::from_le_bytes(addr.try_into().unwrap());
        let len = u32::from_le_bytes(rest[..4].try_into().unwrap());
        let (a, b) = ([rest[4], rest[5]], [rest[6], rest[7]]);
        (addr, len, u16::from_le_bytes(a), u16::from_le_bytes(b))
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(self.memory.write(0, at as u32, bytes), bytes.len());
    }

    /// Split: writes used entry `slot` and the index.
    fn use_split(&self, slot: u64, id: u32, len: u32, index: u16) {
        let used = self.queue.areas().device.0;
        self.poke(used + 4 + slot * 8, &id.to_le_bytes());
        self.poke(used + 8 + slot * 8, &len.to_le_bytes());
        self.poke(used + 2, &index.to_le_bytes());
    }

    /// Packed: writes used descriptor `slot`.
    fn use_packed(&self, slot: u64, id: u16, len: u32, wrap: bool) {
        let at = self.queue.areas().desc.0 + slot * 16;
        self.poke(at + 8, &len.to_le_bytes());
        self.poke(at + 12, &id.to_le_bytes());
        self.poke(at + 14, &if wrap { 0x8080u16 } else { 0 }.to_le_bytes());
    }
}

fn b(addr: u64, len: u32) -> Buffer {
    Buffer { addr: GuestPhysAddr(addr), len }
}

fn features(event_idx: bool, indirect: bool, in_order: bool) -> RingFeatures {
    RingFeatures { event_idx, indirect, in_order }
}

#[test]
fn split_descriptors_and_available_entries_stand_as_the_specification_says() {
    let mut t = Bench::new(DriverConfig::new(Layout::Split, 4));
    t.queue.add(&[b(0x1000, 10)], &[b(0x2000, 20), b(0x3000, 30)], 7).unwrap();
    t.queue.add_writable(&[b(0x4000, 40)], 8).unwrap();
    assert_eq!(t.desc(0), (0x1000, 10, 1, 1));
    assert_eq!(t.desc(1), (0x2000, 20, 1 | 2, 2));
    assert_eq!(t.desc(2), (0x3000, 30, 2, 0));
    assert_eq!(t.desc(3), (0x4000, 40, 2, 0));
    let avail = t.queue.areas().driver.0;
    assert_eq!((t.u16(avail + 4), t.u16(avail + 6)), (0, 3));
    assert_eq!(t.u16(avail + 2), 0, "not published yet");
    assert!(!t.queue.needs_kick(), "nothing published, nothing to kick for");
    t.queue.publish();
    assert_eq!(t.u16(avail + 2), 2);
    assert!(t.queue.needs_kick());
    assert!(!t.queue.needs_kick(), "asked already");
    let full = DriverError::Full { needed: 1, free: 0 };
    assert_eq!(t.queue.add_readable(&[b(0, 1)], 9), Err(full));
    // Out of order: the second chain first.
    t.use_split(0, 3, 33, 1);
    assert_eq!(t.queue.poll_used(), Ok(Some(Used { cookie: 8, len: 33 })));
    assert_eq!(t.queue.poll_used(), Ok(None));
    assert_eq!(t.queue.free(), 1);
    t.use_split(1, 0, 50, 2);
    assert_eq!(t.queue.poll_used(), Ok(Some(Used { cookie: 7, len: 50 })));
    assert_eq!((t.queue.free(), t.queue.outstanding()), (4, 0));
}

#[test]
fn packed_burst_becomes_visible_with_its_first_flags() {
    let mut t = Bench::new(DriverConfig::new(Layout::Packed, 3));
    t.queue.add(&[b(0x1000, 10)], &[b(0x2000, 20)], 7).unwrap();
    t.queue.add_readable(&[b(0x3000, 30)], 8).unwrap();
    assert_eq!(t.desc(0), (0x1000, 0, 0, 0), "held back until the publication");
    assert_eq!(t.desc(1), (0x2000, 20, 0, 0x80 | 2));
    assert_eq!(t.desc(2), (0x3000, 30, 1, 0x80));
    t.queue.publish();
    assert_eq!(t.desc(0), (0x1000, 10, 0, 0x80 | 1));
    // The used descriptor of a chain of two stands at its first place; the next one after both.
    t.use_packed(0, 0, 20, true);
    assert_eq!(t.queue.poll_used(), Ok(Some(Used { cookie: 7, len: 20 })));
    assert_eq!(t.queue.poll_used(), Ok(None));
    // The second turn: wrap counter 0, so AVAIL clear and USED set.
    t.queue.add_readable(&[b(0x5000, 50), b(0x6000, 60)], 9).unwrap();
    t.queue.publish();
    assert_eq!(t.desc(0), (0x5000, 50, 2, 0x8000 | 1));
    assert_eq!(t.desc(1), (0x6000, 60, 2, 0x8000));
    t.use_packed(2, 1, 0, true);
    t.use_packed(0, 2, 0, false);
    assert_eq!(t.queue.poll_used(), Ok(Some(Used { cookie: 8, len: 0 })));
    assert_eq!(t.queue.poll_used(), Ok(Some(Used { cookie: 9, len: 0 })));
    assert_eq!((t.queue.free(), t.queue.outstanding()), (3, 0));
}

#[test]
fn indirect_tables_belong_to_their_id() {
    for layout in [Layout::Split, Layout::Packed] {
        let config = DriverConfig::new(layout, 2).with_features(features(false, true, false), 3);
        let mut t = Bench::new(config);
        t.queue.add_readable(&[b(0x100, 1)], 1).unwrap();
        t.queue.add_indirect(&[b(0x1000, 10)], &[b(0x2000, 20)], 2).unwrap();
        t.queue.publish();
        let table = t.queue.areas().tables.0 + 3 * 16;
        let (addr, len, x, y) = t.desc(1);
        assert_eq!((addr, len), (table, 32));
        let at = (table - t.queue.areas().desc.0) / 16;
        match layout {
            Layout::Split => {
                assert_eq!((x, y), (4, 0));
                assert_eq!(t.desc(at), (0x1000, 10, 1, 1));
                assert_eq!(t.desc(at + 1), (0x2000, 20, 2, 0));
            }
            Layout::Packed => {
                assert_eq!((x, y), (1, 0x80 | 4));
                assert_eq!(t.desc(at), (0x1000, 10, 0, 0));
                assert_eq!(t.desc(at + 1), (0x2000, 20, 0, 2));
            }
        }
        let long = [b(0, 1); 4];
        let error = DriverError::Table { needed: 4, room: 3 };
        assert_eq!(t.queue.add_indirect(&long, &[], 0), Err(error));
    }
}

#[test]
fn one_used_entry_stands_for_a_batch_in_order() {
    let in_order = features(false, false, true);
    let mut t = Bench::new(DriverConfig::new(Layout::Split, 8).with_features(in_order, 0));
    let mut p = Bench::new(DriverConfig::new(Layout::Packed, 8).with_features(in_order, 0));
    for queue in [&mut t.queue, &mut p.queue] {
        queue.add_writable(&[b(0, 100)], 0).unwrap();
        queue.add_writable(&[b(0, 100), b(0, 1)], 1).unwrap();
        queue.add_writable(&[b(0, 100)], 2).unwrap();
        queue.add_writable(&[b(0, 100)], 3).unwrap();
        queue.publish();
    }
    t.use_split(0, 3, 5, 3);
    t.use_split(3, 4, 6, 3);
    p.use_packed(0, 2, 5, true);
    for (bench, more) in [(&mut t, false), (&mut p, true)] {
        let mut out = [Used::default(); 8];
        assert_eq!(bench.queue.poll_burst(&mut out), Ok(3));
        let want = [(0, 100), (1, 101), (2, 5)];
        assert_eq!(out[..3].iter().map(|u| (u.cookie, u.len)).collect::<Vec<_>>(), want);
        assert!(!bench.queue.has_used());
        // The next one stands after the places of the whole batch.
        if more {
            bench.use_packed(4, 3, 6, true);
        } else {
            bench.use_split(3, 4, 6, 4);
        }
        assert_eq!(bench.queue.poll_used(), Ok(Some(Used { cookie: 3, len: 6 })));
    }
}

#[test]
fn hostile_used_entries_are_errors() {
    let mut t = Bench::new(DriverConfig::new(Layout::Split, 4));
    t.queue.add_writable(&[b(0, 100), b(0, 5)], 0).unwrap();
    t.queue.publish();
    let cases = [
        (4, 0, 1, DriverError::UsedId { id: 4, size: 4 }),
        (0x1_0000, 0, 1, DriverError::UsedId { id: 0x1_0000, size: 4 }),
        (1, 0, 1, DriverError::NotOutstanding(1)),
        (0, 106, 1, DriverError::UsedLength { len: 106, writable: 105 }),
    ];
    t.use_split(0, 0, 0, 2);
    let ahead = DriverError::UsedIndex { ahead: 2, outstanding: 1 };
    assert_eq!(t.queue.poll_used(), Err(ahead));
    for (id, len, index, error) in cases {
        t.use_split(0, id, len, index);
        assert_eq!(t.queue.poll_used(), Err(error));
    }
    let mut p = Bench::new(DriverConfig::new(Layout::Packed, 4));
    p.queue.add_writable(&[b(0, 100)], 0).unwrap();
    p.queue.publish();
    let cases = [
        (4, 0, DriverError::UsedId { id: 4, size: 4 }),
        (1, 0, DriverError::NotOutstanding(1)),
        (0, 101, DriverError::UsedLength { len: 101, writable: 100 }),
    ];
    for (id, len, error) in cases {
        p.use_packed(0, id, len, true);
        assert_eq!(p.queue.poll_used(), Err(error));
    }
    let in_order =
        DriverConfig::new(Layout::Split, 4).with_features(features(false, false, true), 0);
    let mut o = Bench::new(in_order);
    for cookie in 0..3 {
        o.queue.add_writable(&[b(0, 1)], cookie).unwrap();
    }
    o.queue.publish();
    o.use_split(0, 2, 0, 2);
    assert_eq!(o.queue.poll_used().unwrap().unwrap().cookie, 0);
    assert_eq!(o.queue.poll_used(), Err(DriverError::BatchTooLong { id: 2 }));
}

/// DPDK's packed rings do so.
#[test]
fn a_length_for_a_buffer_that_cannot_be_written_is_ignored() {
    let mut t = Bench::new(DriverConfig::new(Layout::Split, 4));
    let mut p = Bench::new(DriverConfig::new(Layout::Packed, 4));
    for bench in [&mut t, &mut p] {
        bench.queue.add_readable(&[b(0, 76)], 9).unwrap();
        bench.queue.publish();
    }
    t.use_split(0, 0, 76, 1);
    p.use_packed(0, 0, 76, true);
    for bench in [&mut t, &mut p] {
        assert_eq!(bench.queue.poll_used(), Ok(Some(Used { cookie: 9, len: 0 })));
    }
}

#[test]
fn kicks_follow_flags_and_events() {
    for event_idx in [false, true] {
        let with = features(event_idx, false, false);
        let mut t = Bench::new(DriverConfig::new(Layout::Split, 8).with_features(with, 0));
        let used = t.queue.areas().device.0;
        let (flags_at, event_at) = (used, used + 4 + 8 * 8);
        let mut kick = |flags: u16, event: u16| {
            assert_eq!(t.memory.write(0, flags_at as u32, &flags.to_le_bytes()), 2);
            assert_eq!(t.memory.write(0, event_at as u32, &event.to_le_bytes()), 2);
            t.queue.add_readable(&[b(0, 1)], 0).unwrap();
            t.queue.publish();
            t.queue.needs_kick()
        };
        assert!(kick(0, 0));
        assert_eq!(kick(1, 1), event_idx, "the flag counts without EVENT_IDX only");
        assert_eq!(kick(0, 1), !event_idx, "the event was passed before");
        assert_eq!(kick(0, 5), !event_idx, "the event is still ahead");
    }
    let mut p = Bench::new(
        DriverConfig::new(Layout::Packed, 8).with_features(features(true, false, false), 0),
    );
    let at = p.queue.areas().device.0;
    let mut kick = |event: u16, flags: u16| {
        assert_eq!(p.memory.write(0, at as u32, &event.to_le_bytes()), 2);
        assert_eq!(p.memory.write(0, at as u32 + 2, &flags.to_le_bytes()), 2);
        p.queue.add_readable(&[b(0, 1)], 0).unwrap();
        p.queue.publish();
        p.queue.needs_kick()
    };
    assert!(kick(0, 0));
    assert!(!kick(1 | 0x8000, 1));
    assert!(kick(2 | 0x8000, 2));
    assert!(!kick(2 | 0x8000, 2), "passed before");
    assert!(!kick(6 | 0x8000, 2), "still ahead");
    assert!(!kick(5, 2), "the other turn");
    assert!(kick(6 | 0x8000, 2));
}

#[test]
fn wishes_for_calls_stand_where_the_device_looks() {
    let with = features(true, false, false);
    let mut t = Bench::new(DriverConfig::new(Layout::Split, 4).with_features(with, 0));
    t.queue.add_readable(&[b(0, 1)], 0).unwrap();
    t.queue.publish();
    let event_at = t.queue.areas().driver.0 + 4 + 4 * 2;
    t.queue.disable_calls();
    assert_eq!(t.u16(event_at), 0x8000);
    assert!(!t.queue.enable_calls());
    assert_eq!(t.u16(event_at), 0);
    t.use_split(0, 0, 0, 1);
    assert!(t.queue.enable_calls(), "a chain was used already");
    let _ = t.queue.poll_used().unwrap();
    assert!(!t.queue.enable_calls());
    assert_eq!(t.u16(event_at), 1);

    let mut t = Bench::new(DriverConfig::new(Layout::Split, 4));
    let flags_at = t.queue.areas().driver.0;
    t.queue.disable_calls();
    assert_eq!(t.u16(flags_at), 1);
    assert!(!t.queue.enable_calls());
    assert_eq!(t.u16(flags_at), 0);

    let mut p = Bench::new(DriverConfig::new(Layout::Packed, 4).with_features(with, 0));
    let at = p.queue.areas().driver.0;
    p.queue.disable_calls();
    assert_eq!(p.u16(at + 2), 1);
    assert!(!p.queue.enable_calls());
    assert_eq!((p.u16(at), p.u16(at + 2)), (0x8000, 2));
    let mut p = Bench::new(DriverConfig::new(Layout::Packed, 4));
    let at = p.queue.areas().driver.0;
    p.queue.disable_calls();
    assert!(!p.queue.enable_calls());
    assert_eq!(p.u16(at + 2), 0);
}

#[test]
fn reset_gives_back_what_the_device_had() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut t = Bench::new(DriverConfig::new(layout, 4));
        for cookie in 10..13 {
            t.queue.add_readable(&[b(0, 1)], cookie).unwrap();
        }
        t.queue.publish();
        let mut back = Vec::new();
        t.queue.reset(|cookie| back.push(cookie)).unwrap();
        assert_eq!(back, [10, 11, 12]);
        assert_eq!((t.queue.free(), t.queue.outstanding()), (4, 0));
        assert_eq!(t.desc(0), (0, 0, 0, 0));
        assert_eq!(t.queue.poll_used(), Ok(None));
    }
}

#[test]
fn sizes_positions_and_areas_are_checked() {
    let map = GuestMap::private(4096).unwrap();
    let base = GuestPhysAddr(0);
    let make = |config| DriverQueue::new(&map, config, base).map(|_| ());
    for size in [0, 3, 32769] {
        let error = Err(DriverError::Size(size));
        assert_eq!(make(DriverConfig::new(Layout::Split, size)), error);
    }
    assert_eq!(make(DriverConfig::new(Layout::Packed, 3)), Ok(()));
    let split = DriverConfig::new(Layout::Split, 4);
    for position in [RingPosition::Split { avail: 1, used: 0 }, RingPosition::start(Layout::Packed)]
    {
        let config = DriverConfig { position, ..split };
        assert_eq!(make(config), Err(DriverError::Position));
    }
    let error = DriverError::Area(GuestPhysAddr(0));
    assert_eq!(make(DriverConfig::new(Layout::Packed, 300)), Err(error));
    let end = GuestPhysAddr(u64::MAX - 8);
    assert!(split.areas(end).is_err());
}
