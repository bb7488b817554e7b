//! Behind a vIOMMU: frames wait for the address of the buffer that they will be in.

use std::sync::Arc;

use port::backlog::Backlog;
use port::{DropReason, Egress, QueueFault};
use virtq::mem::GuestPhysAddr;
use virtq::{Access, Iotlb, IotlbEntry, Iova, Layout, RingIotlb};

use super::super::Receiveq;
use super::offloads::{LARGE, send_offload, tcp};
use super::{expect, pipe};
use crate::features::MRG_RXBUF;
use crate::rig::{BOTH, Guest, Ledger, options, pattern, receiveq};

/// Where the guest's buffers are, page by page.
const FIRST: u64 = 4 << 20;
const PAGE: u64 = 4096;

struct Bed {
    guest: Guest,
    iotlb: Arc<Iotlb>,
    queue: Receiveq,
}

impl Bed {
    /// A guest whose addresses are all unknown, with `buffers` of a page in a ring.
    fn new(layout: Layout, buffers: usize) -> Self {
        let mut guest = Guest::plain(layout, 1024);
        // Seven bytes are between two.
        guest.post(buffers, &[PAGE as u32 - 7]);
        let iotlb = Arc::new(Iotlb::new(&guest.map, Box::new(|| ())));
        let mut this = Self { queue: receiveq(&guest, options(MRG_RXBUF)), guest, iotlb };
        this.translate();
        this.queue.set_backlog(Backlog::new(8).unwrap());
        this
    }

    fn translate(&mut self) {
        let side = RingIotlb::new(Arc::clone(&self.iotlb), Access::Write);
        self.queue.parts.queue.set_iotlb(Some(side));
    }

    fn knows(&self, pages: std::ops::Range<u64>, access: Access) -> bool {
        let addr = FIRST + pages.start * PAGE;
        let (iova, len) = (Iova(addr), (pages.end - pages.start) * PAGE);
        self.iotlb.insert(&[IotlbEntry { iova, addr: GuestPhysAddr(addr), len, access }])
    }

    fn sent(&mut self, frames: &[usize], drops: &[(DropReason, u64)]) {
        let tx = (frames.len() as u64, frames.iter().sum::<usize>() as u64);
        Ledger { tx, drops: drops.to_vec(), ..Ledger::default() }.check(self.queue.counters());
    }
}

#[test]
fn what_is_in_the_ring_is_asked_for_at_its_beginning_and_not_before() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 3);
        assert_eq!(bed.iotlb.take_misses().len(), 0, "the ring itself may be missing");
        bed.queue.begin();
        assert_eq!(bed.iotlb.take_misses().len(), 3);
    }
}

const SOME: [usize; 5] = [60, 1514, 64, 9014, 200];

/// Frames that came while something about the ring changed.
#[test]
fn without_a_viommu_what_waits_already_is_sent_and_nothing_waits_again() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        pipe(layout, &mut bed.queue, &SOME).unwrap();
        let backlog = bed.queue.take_backlog().unwrap();
        let mut guest = Guest::plain(layout, 1024);
        guest.post(20, &[4096]);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        queue.set_backlog(backlog);
        assert_eq!(queue.held(), 5);
        queue.resume().unwrap();
        assert_eq!((queue.held(), guest.used().len()), (0, 7));
        assert!(queue.backlog.is_none());
        queue.set_backlog(Backlog::new(1).unwrap());
        assert!(queue.backlog.is_none(), "nothing waits");
    }
}

#[test]
fn frames_wait_for_the_address_of_a_buffer_and_keep_their_order() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        pipe(layout, &mut bed.queue, &SOME).unwrap();
        assert_eq!((bed.queue.held(), bed.guest.used().len()), (5, 0));
        bed.queue.resume().unwrap();
        assert_eq!(bed.queue.held(), 5, "nothing was said");
        bed.sent(&[], &[]);
        // The first three buffers: a frame of 9014 takes three.
        assert!(bed.knows(0..3, Access::ReadWrite), "somebody waits for it");
        bed.queue.resume().unwrap();
        assert_eq!(bed.queue.held(), 2);
        bed.sent(&SOME[..3], &[]);
        // These are behind the others, although the next buffer is known.
        let _ = bed.knows(3..4, Access::ReadWrite);
        pipe(layout, &mut bed.queue, &SOME).unwrap();
        assert_eq!(bed.queue.held(), 7);
        let _ = bed.knows(4..20, Access::ReadWrite);
        pipe(layout, &mut bed.queue, &SOME[..1]).unwrap();
        assert_eq!(bed.queue.held(), 0, "who sends looks, too");
        let all = [&SOME[..], &SOME, &SOME[..1]].concat();
        bed.sent(&all, &[]);
        let frames = bed.guest.received(12);
        let seeds = (0..5).chain(0..5).chain(0..1);
        for ((frame, size), seed) in frames.iter().zip(&all).zip(seeds) {
            assert_eq!(frame.1, pattern(*size, seed));
        }
        assert_eq!(frames.len(), all.len());
    }
}

#[test]
fn what_is_not_translated_in_time_is_dropped_for_that_and_nothing_else_is() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 600);
        let burst = [60; 64];
        for sent in 0..10u64 {
            pipe(layout, &mut bed.queue, &burst).unwrap();
            assert_eq!(bed.queue.held(), (64 * (sent + 1)).min(512));
        }
        bed.sent(&[], &[(DropReason::NotTranslated, 128)]);
        let _ = bed.knows(0..600, Access::ReadWrite);
        bed.queue.resume().unwrap();
        bed.sent(&[60; 512], &[(DropReason::NotTranslated, 128)]);
        assert_eq!(bed.queue.held(), 0);
        pipe(layout, &mut bed.queue, &burst).unwrap();
        bed.sent(&[60; 576], &[(DropReason::NotTranslated, 128)]);
        assert_eq!(bed.guest.used().len(), 576);
        // Without buffers nothing is waited for.
        pipe(layout, &mut bed.queue, &burst).unwrap();
        let drops = [(DropReason::NotTranslated, 128), (DropReason::NoBuffer, 40)];
        bed.sent(&[60; 600], &drops);
        assert_eq!(bed.queue.held(), 0);
    }
}

#[test]
fn a_refusal_breaks_the_ring_and_what_waits_is_counted() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        // More than one burst.
        pipe(layout, &mut bed.queue, &[60; 40]).unwrap();
        pipe(layout, &mut bed.queue, &[60; 40]).unwrap();
        assert!(bed.knows(0..20, Access::Read), "not for this");
        assert!(matches!(bed.queue.resume(), Err(QueueFault::Ring(_))));
        bed.sent(&[], &[(DropReason::PortDown, 80)]);
        assert_eq!(bed.queue.held(), 0);
        assert!(pipe(layout, &mut bed.queue, &SOME).is_err());
        bed.sent(&[], &[(DropReason::PortDown, 85)]);
    }
}

#[test]
fn what_waits_goes_on_in_the_next_queue() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        pipe(layout, &mut bed.queue, &SOME).unwrap();
        let backlog = bed.queue.take_backlog().unwrap();
        assert_eq!((bed.queue.held(), backlog.frames()), (0, 5));
        bed.queue = receiveq(&bed.guest, options(MRG_RXBUF));
        bed.translate();
        bed.queue.set_backlog(backlog);
        let _ = bed.knows(0..20, Access::ReadWrite);
        bed.queue.resume().unwrap();
        bed.sent(&SOME, &[]);
        expect(&mut bed.guest, &SOME);
    }
}

#[test]
fn segments_wait_before_the_frames_behind_them() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        // A frame, a large one of four segments, which the driver does not take, and a frame.
        send_offload(&mut bed.queue, &tcp(4000), LARGE);
        let mut held = vec![bed.queue.held()];
        for known in 0..6 {
            let _ = bed.knows(known..known + 1, Access::ReadWrite);
            bed.queue.resume().unwrap();
            held.push(bed.queue.held());
        }
        assert_eq!(held, [3, 5, 4, 3, 2, 1, 0], "whole, and then in segments");
        let sizes: Vec<usize> = bed.guest.received(12).iter().map(|(_, f)| f.len()).collect();
        assert_eq!(sizes, [60, 1054, 1054, 1054, 1054, 60]);
        assert_eq!(bed.queue.counters().read_ends().dropped(), 0);
    }
}

#[test]
fn a_queue_without_a_place_for_them_drops_them() {
    for layout in BOTH {
        let mut bed = Bed::new(layout, 20);
        let _ = bed.queue.take_backlog();
        pipe(layout, &mut bed.queue, &SOME).unwrap();
        bed.sent(&[], &[(DropReason::NoBuffer, 5)]);
    }
}
