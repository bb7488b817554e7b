//! What a burst may cost.

use crate::chain::BURST_SEGS;
use crate::config::Layout;
use crate::testing::{DATA, Guest, INDIRECT, NEXT};

/// A ring in which 64 chains are one and the same: `count` descriptors of no bytes, nowhere.
fn endless(layout: Layout, count: u16) -> Guest {
    let guest = Guest::new(layout, 32768);
    let nothing = (u64::MAX, 0);
    for index in 0..count {
        let more = if index.wrapping_add(1) < count { NEXT } else { 0 };
        match layout {
            Layout::Split => guest.desc(index, nothing, more, index.wrapping_add(1)),
            Layout::Packed => guest.raw(DATA + u64::from(index) * 16, nothing, 0, 0),
        }
    }
    match layout {
        Layout::Split => guest.avail(0, &[0; 64]),
        Layout::Packed => {
            let table = (DATA, u32::from(count) * 16);
            (0..64).for_each(|id| guest.slot(id, table, (id, INDIRECT), true));
        }
    }
    guest
}

#[test]
fn a_burst_ends_when_it_has_walked_enough_descriptors_of_no_bytes() {
    for layout in [Layout::Split, Layout::Packed] {
        for count in [2u16, 100, 5000, 32768] {
            let mut guest = endless(layout, count);
            let mut queue = guest.start();
            let most = BURST_SEGS.div_euclid(usize::from(count)).saturating_add(1).min(64);
            let (chains, fault) = guest.pop(&mut queue, 64);
            assert_eq!((chains, fault), (vec![(0, 0); most], None), "{count}");
            assert_eq!(guest.buf.is_full(), most < 64);
            assert_eq!(guest.buf.pieces(), most * (usize::from(count) + 1));
            // The others are there.
            assert_eq!(guest.pop(&mut queue, 1).0.len(), usize::from(most < 64));
        }
    }
}
