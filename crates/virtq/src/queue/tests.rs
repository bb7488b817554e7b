//! What both formats do alike: bursts as a whole.

use super::Virtq;
use crate::ChainBuf;
use crate::config::{Layout, RingPosition};
use crate::testing::{DATA, Guest, INDIRECT, NEXT, SECOND, WRITE};

const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];

/// Puts one buffer into slot `index` of a fresh ring of either format.
fn post(guest: &Guest, index: u16, buffer: (u64, u32), flags: u16) {
    match guest.config.layout {
        Layout::Split => {
            guest.desc(index, buffer, flags, index.wrapping_add(1));
            guest.avail(index, &[index]);
        }
        Layout::Packed => guest.slot(index, buffer, (index, flags), true),
    }
}

/// The used entry of slot `index`: id and length; none if it is not used.
fn used(guest: &Guest, index: u16) -> Option<(u32, u32)> {
    match guest.config.layout {
        Layout::Split => (index < guest.used_idx()).then(|| guest.used(index)),
        Layout::Packed => {
            let (len, id, flags) = guest.slot_now(index);
            (flags & 0x8080 == 0x8080).then_some((u32::from(id), len))
        }
    }
}

fn place(queue: &Virtq) -> (u16, u16) {
    match queue.position() {
        RingPosition::Split { avail, used } | RingPosition::Packed { avail, used, .. } => {
            (avail, used)
        }
    }
}

fn ring_of_four(layout: Layout, flags: u16, in_order: bool) -> (Guest, Virtq) {
    let mut guest = Guest::new(layout, 8);
    guest.config.features.in_order = in_order;
    for index in 0..4 {
        post(&guest, index, (DATA, 10 + u32::from(index)), flags);
    }
    let queue = guest.start();
    (guest, queue)
}

#[test]
fn a_burst_is_completed_with_the_bytes_written_into_each() {
    for layout in LAYOUTS {
        let (mut guest, mut queue) = ring_of_four(layout, WRITE, false);
        assert_eq!(guest.pop(&mut queue, 8).0.len(), 4);
        queue.complete_written(&guest.buf, &[5, 6, 0]);
        assert_eq!(used(&guest, 0), None, "not before publish");
        queue.unpop_after(&guest.buf, 3);
        queue.publish();
        let have: Vec<_> = (0..4).map(|index| used(&guest, index)).collect();
        assert_eq!(have, [Some((0, 5)), Some((1, 6)), Some((2, 0)), None]);
        assert_eq!(place(&queue), (3, 3));
        assert_eq!(guest.pop(&mut queue, 8).0, [(0, 13)], "the last one comes again");
        queue.complete_written(&guest.buf, &[1, 2, 3]);
        assert_eq!(place(&queue), (4, 4), "more lengths than chains");
    }
}

#[test]
fn a_burst_is_completed_with_nothing_written() {
    for layout in LAYOUTS {
        let (mut guest, mut queue) = ring_of_four(layout, 0, false);
        let _ = guest.pop(&mut queue, 3);
        queue.complete_read(&guest.buf);
        queue.complete_read(&guest.buf);
        queue.publish();
        let have: Vec<_> = (0..4).map(|index| used(&guest, index)).collect();
        assert_eq!(have, [Some((0, 0)), Some((1, 0)), Some((2, 0)), None], "once is enough");
        assert_eq!(place(&queue), (3, 3));
    }
}

#[test]
fn in_order_a_burst_is_one_used_entry() {
    for layout in LAYOUTS {
        let (mut guest, mut queue) = ring_of_four(layout, 0, true);
        let _ = guest.pop(&mut queue, 3);
        queue.complete_read(&guest.buf);
        queue.publish();
        assert_eq!(used(&guest, 0), Some((2, 0)));
        assert_eq!(place(&queue), (3, 3));
        let _ = guest.pop(&mut queue, 0);
        queue.complete_read(&guest.buf);
        assert_eq!(place(&queue), (3, 3));
    }
}

#[test]
fn one_segment_chains_have_a_short_way() {
    for layout in LAYOUTS {
        let mut guest = Guest::new(layout, 8);
        guest.write(DATA, b"abcd");
        guest.write(SECOND - 1, b"xy");
        post(&guest, 0, (DATA, 4), 0);
        post(&guest, 1, (DATA + 64, 4), WRITE);
        post(&guest, 2, (SECOND - 1, 2), 0);
        post(&guest, 3, (DATA, 2), NEXT);
        post(&guest, 4, (DATA + 2, 2), 0);
        if layout == Layout::Split {
            guest.avail(0, &[0, 1, 2, 3]);
        }
        let mut queue = guest.start();
        let chains = queue.pop(&mut guest.buf, 8);
        assert_eq!((chains.len(), chains.tokens().len()), (4, 4));
        assert!(chains.tokens().eq((0..4).map(|index| chains.token(index))));
        let lens =
            |first| chains.read_pieces(first).map(|(piece, _)| piece.len()).collect::<Vec<_>>();
        assert_eq!((lens(0), lens(3), lens(5)), (vec![4, 0, 0, 0], vec![0], vec![]));
        assert_eq!(chains.write_pieces(0).len(), 0, "the first chain is to be read");
        chains.read_pieces(0).for_each(|(_, later)| later.prefetch(2));
        chains.prefetch_read();
        chains.prefetch_write();
        assert_eq!(chains.read_pieces(0).next().unwrap().0.first(), Some(*b"abcd"));
        let store = chains.store();
        assert_eq!(store.one(chains.span(0, 1)).unwrap().first(), Some(*b"bcd"));
        assert!(store.one(chains.span(2, 0)).is_none());
        let mut both = [0; 2];
        assert_eq!(store.reader(chains.span(2, 0)).read(&mut both), 2);
        assert_eq!(&both, b"xy");
        assert_eq!(chains.writable(1).writer().write(b"efgh"), 4);
        assert_eq!(guest.u16(DATA + 66), u16::from_le_bytes(*b"gh"));
    }
}

#[test]
fn either_direction_has_its_pieces() {
    for layout in LAYOUTS {
        let guest = Guest::new(layout, 8);
        for index in 0..6u16 {
            // One chain of the other direction among them, one of another region.
            let flags = if index == 3 { 0 } else { WRITE };
            let at = if index == 2 { SECOND } else { DATA };
            post(&guest, index, (at + u64::from(index) * 64, 4), flags);
        }
        if layout == Layout::Split {
            guest.avail(0, &[0, 1, 2, 3, 4, 5]);
        }
        let mut queue = guest.start();
        let mut buf = ChainBuf::default();
        for (max, want) in [(1, &[4][..]), (5, &[4, 4, 0, 4, 4])] {
            let chains = queue.pop(&mut buf, max);
            assert_eq!(chains.read_pieces(0).len(), 0);
            assert!(chains.write_pieces(0).map(|(piece, _)| piece.len()).eq(want.iter().copied()));
            chains.write_pieces(0).for_each(|(_, later)| later.prefetch(2));
            assert!(chains.write_pieces(0).all(|(_, later)| later.len() == want[max - 1]));
            let spans = (0..max).map(|index| chains.span(index, 0).len);
            assert!(spans.eq(want.iter().map(|len| 4 - len)));
            for (index, (piece, _)) in chains.write_pieces(0).enumerate() {
                assert_eq!(piece.write_frame(b"ef", b"gh", None), !piece.is_empty());
                assert_eq!(chains.readable(index).len() + chains.writable(index).len(), 4);
            }
        }
        for index in [0, 1, 4, 5] {
            assert_eq!(guest.u16(DATA + index * 64 + 2), u16::from_le_bytes(*b"gh"));
        }
    }
}

#[test]
fn simple_and_odd_chains_keep_their_order() {
    for layout in LAYOUTS {
        let mut guest = Guest::new(layout, 256);
        // Every third one has a table, every fifth one is in the other region.
        for index in 0..100u16 {
            let at = if index % 5 == 0 { SECOND + 0x1000 } else { DATA + 0x1000 };
            let len = u32::from(index) + 1;
            if index % 3 == 0 {
                let table = DATA + u64::from(index) * 16;
                guest.raw(table, (at, len), 0, 0);
                post(&guest, index, (table, 16), INDIRECT);
            } else {
                post(&guest, index, (at, len), 0);
            }
        }
        for max in [1, 2, 7, 99, 100, 101] {
            let mut queue = guest.start();
            let mut have = Vec::new();
            loop {
                let (lens, fault) = guest.pop(&mut queue, max);
                assert_eq!(fault, None);
                assert!(lens.len() == max.min(100 - have.len()));
                if lens.is_empty() {
                    break;
                }
                have.extend(lens);
            }
            assert!(have.into_iter().eq((1..=100).map(|len| (len, 0))), "{layout:?} {max}");
        }
    }
}

#[test]
fn a_burst_ends_at_its_bound_of_segments() {
    for layout in LAYOUTS {
        let mut guest = Guest::new(layout, 32768);
        let count = 32768u32;
        for index in 0..count {
            let last = index + 1 == count;
            let flags = if last || layout == Layout::Packed { 0 } else { NEXT };
            let next = u16::try_from((index + 1) % count).unwrap();
            let at = DATA + u64::from(index) * 16;
            match layout {
                Layout::Split => guest.raw(at, (0, 1), flags, next),
                Layout::Packed => guest.raw(at, (0, 1), 0, flags),
            }
        }
        for index in 0..5 {
            post(&guest, index, (DATA, count * 16), INDIRECT);
        }
        let mut queue = guest.start();
        let whole = (count, 0);
        for _ in 0..5 {
            assert_eq!(guest.pop(&mut queue, 9), (vec![whole], None));
        }
        assert_eq!(guest.pop(&mut queue, 9), (vec![], None));
    }
}
