//! What a ring may cost who sends to it.

use port::{DropReason, Egress};
use virtq::RingFeatures;

use super::{expect, pipe, sum};
use crate::QueueOptions;
use crate::features::MRG_RXBUF;
use crate::receiveq::PIECES_MAX;
use crate::rig::{BOTH, Guest, Ledger, options, receiveq};

fn large(layout: virtq::Layout) -> Guest {
    Guest::new(layout, 32768, RingFeatures::default())
}

#[test]
fn useless_chains_are_given_back_a_part_at_a_time() {
    for layout in BOTH {
        let mut guest = large(layout);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        guest.post(16384, &[0, 0]);
        pipe(layout, &mut queue, &[60; 8]).unwrap();
        let first = guest.used().len();
        // Each one is a chain of two segments; the last look may go beyond the bound by itself.
        assert!((1..(PIECES_MAX + 6200) / 3).contains(&first), "{first} chains");
        let drops = vec![(DropReason::NoBuffer, 8)];
        Ledger { drops, ..Ledger::default() }.check(queue.counters());
        pipe(layout, &mut queue, &[60]).unwrap();
        guest.post(4, &[2048]);
        pipe(layout, &mut queue, &[60]).unwrap();
        assert_eq!(guest.received(12).len(), 1, "a good buffer behind them");
    }
}

#[test]
fn behind_a_chain_that_takes_long_to_read_nothing_is_tried() {
    for layout in BOTH {
        let mut guest = large(layout);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        guest.post(1, &[1; 32768]);
        pipe(layout, &mut queue, &[65535, 60, 60]).unwrap();
        assert_eq!(guest.used().len(), 0);
        let drops = vec![(DropReason::NoBuffer, 3)];
        Ledger { drops, ..Ledger::default() }.check(queue.counters());
        // It is a buffer like any other.
        pipe(layout, &mut queue, &[60]).unwrap();
        assert_eq!(guest.received(12).len(), 1);
    }
}

#[test]
fn what_one_look_does_not_give_the_next_one_does() {
    for layout in BOTH {
        let mut guest = large(layout);
        let once = QueueOptions { retries: 0, ..options(MRG_RXBUF) };
        let mut queue = receiveq(&guest, once);
        // More segments than one look gives.
        guest.post(64, &[16; 100]);
        let sizes = [1514; 64];
        pipe(layout, &mut queue, &sizes).unwrap();
        expect(&mut guest, &sizes);
        let tx = (64, sum(&sizes));
        Ledger { tx, ..Ledger::default() }.check(queue.counters());
    }
}
