//! Rings behind a vIOMMU: addresses that are missing, come, change and go.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{ASKED_MAX, Access, ENTRIES_MAX, Iotlb, IotlbEntry, IotlbMiss, Iova, RingIotlb};
use crate::config::Layout;
use crate::mem::GuestPhysAddr;
use crate::testing::{DATA, Guest, INDIRECT, NEXT, SECOND, WRITE};
use crate::{ChainError, Virtq};

const PAGE: u64 = 4096;
/// Where the device sees things: far from where they are.
const FAR: u64 = 0x7000_0000_0000;

fn entry(iova: u64, addr: u64, len: u64, access: Access) -> IotlbEntry {
    IotlbEntry { iova: Iova(iova), addr: GuestPhysAddr(addr), len, access }
}

fn miss(iova: u64, access: Access) -> IotlbMiss {
    IotlbMiss { iova: Iova(iova), access }
}

struct Bed {
    guest: Guest,
    tlb: Arc<Iotlb>,
    woken: Arc<AtomicUsize>,
    next: u16,
}

impl Bed {
    fn new(layout: Layout, access: Access) -> (Self, Virtq) {
        let guest = Guest::new(layout, 256);
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&woken);
        let wake = move || {
            let _ = counter.fetch_add(1, Ordering::Relaxed);
        };
        let tlb = Arc::new(Iotlb::new(&guest.map, Box::new(wake)));
        let mut queue = guest.start();
        queue.set_iotlb(Some(RingIotlb::new(Arc::clone(&tlb), access)));
        (Self { guest, tlb, woken, next: 0 }, queue)
    }

    fn knows(&self, entries: &[IotlbEntry]) {
        let _ = self.tlb.insert(entries);
    }

    /// One descriptor more.
    fn offer(&mut self, buffer: (u64, u32), flags: u16) {
        match self.guest.config.layout {
            Layout::Split => {
                self.guest.desc(self.next, buffer, flags, 0);
                self.guest.avail(self.next, &[self.next]);
            }
            Layout::Packed => self.guest.slot(self.next, buffer, (self.next, flags), true),
        }
        self.next += 1;
    }

    /// How many chains come, and the fault.
    fn pop(&mut self, queue: &mut Virtq) -> (usize, Option<ChainError>) {
        let (chains, fault) = self.guest.pop(queue, 64);
        (chains.len(), fault)
    }
}

fn both(test: impl Fn(Layout)) {
    test(Layout::Split);
    test(Layout::Packed);
}

#[test]
fn a_chain_with_an_unknown_address_waits_until_it_is_known() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.knows(&[entry(FAR, DATA, PAGE, Access::Read)]);
        bed.guest.write(DATA, b"known");
        bed.guest.write(DATA + 5 * PAGE, b"later");
        bed.offer((FAR, 5), 0);
        bed.offer((FAR + 9 * PAGE + 100, 5), 0);
        bed.offer((FAR + 2, 3), 0);
        assert_eq!(bed.pop(&mut queue), (1, None), "those before it come");
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + 9 * PAGE, Access::Read)]);
        assert_eq!(bed.woken.load(Ordering::Relaxed), 1);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert!(!queue.has_available() && !queue.enable_kicks(), "nothing to do but wait");
        assert_eq!(bed.tlb.take_misses(), [], "it is asked for once");
        let waited =
            bed.tlb.insert(&[entry(FAR + 9 * PAGE, DATA + 5 * PAGE - 100, PAGE, Access::Read)]);
        assert!(waited, "who runs the ring must be woken");
        assert!(queue.has_available());
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"later");
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"own");
        assert!(!bed.tlb.insert(&[entry(0, DATA, PAGE, Access::Read)]));
    });
}

#[test]
fn addresses_of_later_chains_are_asked_for_along_with_it() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Write);
        for page in 0..100 {
            bed.offer((FAR + page * PAGE, 1500), WRITE);
        }
        assert_eq!(bed.pop(&mut queue), (0, None));
        let misses = bed.tlb.take_misses();
        assert_eq!(misses.len(), 64);
        assert!(misses.contains(&miss(FAR + 63 * PAGE, Access::Write)));
        let known = |n: u64| entry(FAR + n * PAGE, DATA + n * PAGE, PAGE, Access::Write);
        bed.knows(&(0..30).map(known).collect::<Vec<_>>());
        assert_eq!(bed.pop(&mut queue), (30, None));
        assert_eq!(bed.tlb.take_misses().len(), 30, "and as many as it goes on");
    });
}

#[test]
fn what_was_removed_is_unknown_again() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.knows(&[entry(FAR, DATA, 4 * PAGE, Access::ReadWrite)]);
        bed.offer((FAR, 5), 0);
        assert_eq!(bed.pop(&mut queue), (1, None));
        assert!(!bed.tlb.remove(Iova(FAR + 3 * PAGE), 1));
        assert!(bed.tlb.is_empty(), "an entry goes as a whole");
        bed.offer((FAR, 5), 0);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR, Access::Read)]);
        assert!(!bed.tlb.remove(Iova(FAR + PAGE), PAGE), "another page");
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), []);
        // Asked again after the removal of what was asked for: it may be elsewhere now.
        for _ in 0..2 {
            assert!(!bed.tlb.remove(Iova(0), u64::MAX), "who waits need not look again");
            assert_eq!(bed.tlb.take_misses(), [miss(FAR, Access::Read)]);
            assert_eq!(bed.pop(&mut queue), (0, None));
            assert_eq!(bed.tlb.take_misses(), []);
        }
    });
}

#[test]
fn a_buffer_may_span_entries_and_regions() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.guest.write(SECOND - 3, b"abcdef");
        bed.guest.write(DATA, b"ghi");
        bed.knows(&[entry(FAR, SECOND - PAGE, 2 * PAGE, Access::Read)]);
        bed.offer((FAR + PAGE - 3, 6), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"abcdef");
        bed.knows(&[entry(FAR + 2 * PAGE, DATA, PAGE, Access::Read)]);
        bed.guest.write(SECOND + PAGE - 2, b"xy");
        bed.offer((FAR + 2 * PAGE - 2, 5), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"xyghi");
        bed.offer((FAR + 3 * PAGE - 2, 5), 0);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + 3 * PAGE, Access::Read)], "the rest of it");
    });
}

#[test]
fn what_is_known_for_another_access_is_a_fault() {
    both(|layout| {
        for (have, want, flags) in
            [(Access::Read, Access::Write, WRITE), (Access::Write, Access::Read, 0)]
        {
            let (mut bed, mut queue) = Bed::new(layout, want);
            bed.knows(&[entry(FAR, DATA, PAGE, have)]);
            bed.offer((FAR + 8, 5), flags);
            let denied = ChainError::Denied { addr: GuestPhysAddr(FAR + 8) };
            assert_eq!(bed.pop(&mut queue), (0, Some(denied)));
            assert_eq!(bed.tlb.take_misses(), []);
        }
    });
}

#[test]
fn tables_are_read_also_where_buffers_are_written() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Write);
        bed.guest.raw(DATA, (FAR, 64), if layout == Layout::Split { WRITE } else { 0 }, {
            if layout == Layout::Split { 0 } else { WRITE }
        });
        bed.offer((FAR + PAGE, 16), INDIRECT);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + PAGE, Access::Read)]);
        bed.knows(&[entry(FAR + PAGE, DATA, PAGE, Access::Read)]);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR, Access::Write)]);
        bed.knows(&[entry(FAR, DATA + PAGE, PAGE, Access::Write)]);
        assert_eq!(bed.pop(&mut queue), (1, None));
        let _ = bed.tlb.remove(Iova(FAR + PAGE), PAGE);
        bed.offer((FAR + PAGE, 16), INDIRECT);
        assert_eq!(bed.pop(&mut queue), (0, None), "where tables are is forgotten, too");
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + PAGE, Access::Read)]);
    });
}

#[test]
fn new_entries_take_the_place_of_what_they_overlap() {
    let (bed, _queue) = Bed::new(Layout::Split, Access::Read);
    let all = |len| bed.tlb.first_missing(Iova(FAR), len, Access::Read);
    bed.knows(&[entry(FAR, DATA, 3 * PAGE, Access::Read)]);
    bed.knows(&[entry(FAR + PAGE, DATA + 8 * PAGE, PAGE, Access::Read)]);
    assert_eq!((bed.tlb.len(), all(PAGE)), (1, Some(Iova(FAR))));
    assert_eq!(bed.tlb.translate(Iova(FAR + PAGE + 5)), Some(GuestPhysAddr(DATA + 8 * PAGE + 5)));
    assert_eq!(bed.tlb.translate(Iova(FAR)), None);
    // Entries of the whole address space, of nothing, and beyond the guest's memory.
    bed.knows(&[entry(0, 0, u64::MAX, Access::Read)]);
    assert_eq!((bed.tlb.len(), all(1)), (1, Some(Iova(FAR))), "but there is not so much memory");
    bed.knows(&[entry(FAR, DATA, 0, Access::Read)]);
    bed.knows(&[entry(u64::MAX - PAGE + 1, DATA, PAGE, Access::Read)]);
    assert_eq!(bed.tlb.first_missing(Iova(u64::MAX), 1, Access::Read), None);
    bed.knows(&[entry(FAR, u64::MAX - 10, 100, Access::Read)]);
    assert_eq!(all(1), Some(Iova(FAR)));
}

#[test]
fn entries_and_questions_have_a_limit() {
    let (bed, _queue) = Bed::new(Layout::Split, Access::Read);
    for n in 0..ENTRIES_MAX as u64 + 10 {
        bed.knows(&[entry(FAR + n * PAGE, DATA, PAGE, Access::Read)]);
    }
    assert_eq!(bed.tlb.len(), ENTRIES_MAX);
    assert_eq!(
        bed.tlb.first_missing(Iova(FAR), 1, Access::Read),
        Some(Iova(FAR)),
        "the oldest left"
    );
    for n in 0..ASKED_MAX as u64 + 10 {
        bed.tlb.ask(Iova(n * PAGE), Access::Read);
    }
    assert_eq!(bed.tlb.take_misses().len(), ASKED_MAX);
}

/// A driver that gives its buffers up unmaps them, and what is asked about them has no answer.
#[test]
fn what_was_asked_before_a_ring_ended_is_asked_again_after_it() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.offer((FAR, 5), 0);
        bed.offer((FAR + PAGE, 5), 0);
        assert_eq!(bed.pop(&mut queue), (0, None));
        let both = [miss(FAR, Access::Read), miss(FAR + PAGE, Access::Read)];
        assert_eq!(bed.tlb.take_misses(), both);
        assert!(!bed.tlb.remove(Iova(0), u64::MAX));
        assert_eq!(bed.tlb.take_misses(), [both[0]], "what was looked at ahead may be no buffer");
        assert!(bed.tlb.forget_questions(), "the ring may go on");
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [both[0]]);
        assert_eq!(bed.tlb.asks(), 3, "what is to be asked again is not new");
        bed.knows(&[entry(FAR, DATA, PAGE, Access::Read)]);
        bed.tlb.clear();
        assert!(bed.tlb.is_empty());
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), both);
    });
}

#[test]
fn who_asks_is_woken_when_there_was_nothing_to_ask_for() {
    let (bed, _queue) = Bed::new(Layout::Split, Access::Read);
    let woken = || bed.woken.swap(0, Ordering::Relaxed);
    let ask = |page: u64| bed.tlb.ask(Iova(page * PAGE), Access::Read);
    ask(1);
    assert_eq!(woken(), 1);
    ask(1);
    ask(2);
    assert_eq!(woken(), 0, "it will look");
    assert_eq!(bed.tlb.take_misses().len(), 2);
    ask(2);
    assert_eq!(woken(), 0);
    ask(3);
    assert_eq!(woken(), 1);
}

#[test]
fn what_is_available_at_the_start_is_asked_for_at_once() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Write);
        bed.offer((FAR, 1500), WRITE);
        bed.offer((FAR + 8 * PAGE, 1500), WRITE);
        queue.set_iotlb(Some(RingIotlb::new(Arc::clone(&bed.tlb), Access::Write)));
        assert_eq!(bed.tlb.take_misses(), [], "the ring may be missing still");
        queue.look_ahead();
        let both = [miss(FAR, Access::Write), miss(FAR + 8 * PAGE, Access::Write)];
        assert_eq!(bed.tlb.take_misses(), both);
    });
}

#[test]
fn every_page_of_a_buffer_is_asked_for_ahead() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.offer((FAR + PAGE - 1, 8193), 0);
        bed.knows(&[entry(FAR + PAGE, DATA, PAGE, Access::Read)]);
        assert_eq!(bed.pop(&mut queue), (0, None));
        let pages = [miss(FAR, Access::Read), miss(FAR + 2 * PAGE, Access::Read)];
        assert_eq!(bed.tlb.take_misses(), pages);
    });
}

/// Entries of one page each, the first `pages` of the data, in an order in which no two are in one
/// piece.
fn scattered(pages: u64) -> Vec<IotlbEntry> {
    let there = |n: u64| FAR + (n * 5 % pages) * PAGE;
    (0..pages).map(|n| entry(there(n), DATA + n * PAGE, PAGE, Access::ReadWrite)).collect()
}

#[test]
fn what_a_ring_found_is_forgotten_when_any_of_it_is_removed() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.knows(&scattered(7));
        let all = |bed: &mut Bed| (0..7).for_each(|n| bed.offer((FAR + n * PAGE, 5), 0));
        all(&mut bed);
        assert_eq!(bed.pop(&mut queue), (7, None));
        assert_eq!(bed.pop(&mut queue), (0, None), "nothing is known of an empty ring");
        // Another entry takes one's place, then one goes: neither is the one that was used last.
        bed.guest.write(DATA + 9 * PAGE, b"moved");
        bed.knows(&[entry(FAR + 2 * PAGE, DATA + 9 * PAGE, PAGE, Access::Read)]);
        bed.offer((FAR + 2 * PAGE, 5), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"moved");
        let _ = bed.tlb.remove(Iova(FAR + 4 * PAGE), PAGE);
        bed.offer((FAR + 4 * PAGE, 5), 0);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + 4 * PAGE, Access::Read)]);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert!(queue.is_waiting());
    });
}

#[test]
fn what_was_removed_is_asked_for_again_ahead() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Write);
        bed.knows(&scattered(7));
        (0..7).for_each(|n| bed.offer((FAR + n * PAGE, 1500), WRITE));
        let mut buf = crate::ChainBuf::default();
        assert_eq!(queue.pop(&mut buf, 2).len(), 2);
        let _ = bed.tlb.remove(Iova(FAR + 5 * PAGE), PAGE);
        assert_eq!(queue.pop(&mut buf, 1).len(), 1);
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + 5 * PAGE, Access::Write)]);
        assert_eq!(queue.pop(&mut buf, 1).len(), 1);
        assert_eq!(bed.tlb.take_misses(), []);
    });
}

#[test]
fn what_left_for_want_of_room_is_forgotten_by_rings_when_it_is_removed() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.knows(&[entry(FAR, DATA, PAGE, Access::Read)]);
        bed.offer((FAR, 5), 0);
        assert_eq!(bed.pop(&mut queue), (1, None));
        let others = (1..=ENTRIES_MAX as u64).map(|n| entry(FAR + n * PAGE, 0, PAGE, Access::Read));
        bed.knows(&others.collect::<Vec<_>>());
        assert_eq!(bed.tlb.translate(Iova(FAR)), None);
        assert!(!bed.tlb.remove(Iova(FAR), PAGE));
        bed.offer((FAR, 5), 0);
        assert_eq!(bed.pop(&mut queue), (0, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR, Access::Read)]);
    });
}

#[test]
fn entries_that_go_on_where_others_end_are_one_piece() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        // From the middle on, so that it is joined on both sides; the last one is elsewhere.
        for page in [3, 2, 4, 1, 5, 0] {
            bed.knows(&[entry(FAR + page * PAGE, DATA + page * PAGE, PAGE, Access::Read)]);
        }
        bed.knows(&[entry(FAR + 6 * PAGE, DATA, PAGE, Access::Read)]);
        bed.knows(&[entry(FAR + 7 * PAGE, DATA + PAGE, PAGE, Access::Write)]);
        bed.guest.write(DATA + 3 * PAGE - 3, b"abcdef");
        bed.offer((FAR + 3 * PAGE - 3, 6), 0);
        bed.offer((FAR + 100, 6 * 4096), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"abcdef");
        let mut buf = crate::ChainBuf::default();
        let chains = queue.pop(&mut buf, 64);
        let segments: Vec<u32> = chains.readable(0).segs.iter().map(|seg| seg.len()).collect();
        assert_eq!(segments, [6 * 4096 - 100, 100], "six pages, and the one behind them");
        bed.offer((FAR + 7 * PAGE - 1, 2), 0);
        let denied = ChainError::Denied { addr: GuestPhysAddr(FAR + 7 * PAGE) };
        assert_eq!(bed.pop(&mut queue), (0, Some(denied)), "not into what may not be read");
    });
}

#[test]
fn another_memory_is_used_from_the_next_burst_on() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Read);
        bed.knows(&scattered(2));
        bed.guest.write(DATA, b"old");
        bed.offer((FAR, 3), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"old");
        let other = Guest::new(layout, 256);
        other.write(DATA, b"new");
        bed.tlb.set_memory(&other.map);
        bed.offer((FAR, 3), 0);
        assert_eq!(bed.guest.pop_bytes(&mut queue), b"new");
    });
}

#[test]
fn chains_that_come_back_are_known_still() {
    both(|layout| {
        let (mut bed, mut queue) = Bed::new(layout, Access::Write);
        bed.knows(&scattered(7));
        (0..7).for_each(|n| bed.offer((FAR + n * PAGE, 1500), WRITE));
        let mut buf = crate::ChainBuf::default();
        assert_eq!(queue.pop(&mut buf, 5).len(), 5);
        queue.unpop_after(&buf, 2);
        bed.offer((FAR + 8 * PAGE, 1500), WRITE);
        assert_eq!(bed.pop(&mut queue), (5, None));
        assert_eq!(bed.tlb.take_misses(), [miss(FAR + 8 * PAGE, Access::Write)]);
    });
}

/// What a map of pages does, against a map by page that looks at all of it.
#[test]
fn entries_are_as_a_naive_map_has_them() {
    let (bed, _queue) = Bed::new(Layout::Split, Access::Read);
    let mut naive: Vec<IotlbEntry> = Vec::new();
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..20_000 {
        let (first, len) = (random(64), random(6) + 1);
        let overlaps = |e: &IotlbEntry| {
            e.iova.0 < FAR + (first + len) * PAGE && FAR + first * PAGE < e.iova.0 + e.len
        };
        naive.retain(|e| !overlaps(e));
        let iova = FAR + first * PAGE;
        if random(3) == 0 {
            let _ = bed.tlb.remove(Iova(iova), len * PAGE);
        } else {
            let access = match random(3) {
                0 => Access::Read,
                1 => Access::Write,
                _ => Access::ReadWrite,
            };
            let new = entry(iova, DATA + random(4) * PAGE, len * PAGE, access);
            bed.knows(&[new]);
            naive.push(new);
        }
        let at = FAR + random(64 * PAGE);
        let want = if random(2) == 0 { Access::Read } else { Access::Write };
        let found = naive.iter().find(|e| (e.iova.0..e.iova.0 + e.len).contains(&at));
        let here = found.map(|e| GuestPhysAddr(e.addr.0 + (at - e.iova.0)));
        assert_eq!(bed.tlb.translate(Iova(at)), here);
        let known = found.is_some_and(|e| e.access.allows(want));
        assert_eq!(bed.tlb.first_missing(Iova(at), 1, want), (!known).then_some(Iova(at)));
        assert_eq!(bed.tlb.len(), naive.len());
    }
}

/// Two rings, 2 and 5, of one device.
fn two(layout: Layout) -> ([Bed; 2], [Virtq; 2]) {
    let (first, mut one) = Bed::new(layout, Access::Write);
    let (second, mut other) = Bed::new(layout, Access::Write);
    for (number, queue) in [(2, &mut one), (5, &mut other)] {
        let side = RingIotlb::new(Arc::clone(&first.tlb), Access::Write);
        queue.set_iotlb(Some(side.of_ring(number)));
    }
    ([first, second], [one, other])
}

#[test]
fn only_rings_whose_next_chain_has_its_answer_are_ready() {
    both(|layout| {
        let ([mut first, mut second], [mut one, mut other]) = two(layout);
        first.offer((FAR, 1500), WRITE);
        first.offer((FAR + 3 * PAGE, 1500), WRITE);
        second.offer((FAR + 9 * PAGE, 1500), WRITE);
        assert_eq!(first.pop(&mut one), (0, None));
        assert_eq!(second.pop(&mut other), (0, None));
        let tlb = Arc::clone(&first.tlb);
        let known = |n: u64| [entry(FAR + n * PAGE, DATA, PAGE, Access::Write)];
        assert!(tlb.insert(&known(3)), "it was asked for");
        assert!(tlb.take_ready().is_empty(), "ahead only");
        assert!(!tlb.insert(&known(4)));
        assert!(tlb.insert(&known(0)));
        assert_eq!(Vec::from_iter(tlb.take_ready()), [2]);
        assert!(!tlb.insert(&known(0)));
        assert!(tlb.take_ready().is_empty(), "once");
        assert!(!tlb.remove(Iova(FAR + 9 * PAGE), PAGE), "it is asked for again");
        assert!(tlb.take_ready().is_empty());
        assert!(tlb.insert(&known(9)));
        assert_eq!(Vec::from_iter(tlb.take_ready()), [5]);
    });
}

#[test]
fn a_ring_whose_question_had_no_room_asks_when_there_is_some() {
    both(|layout| {
        let ([mut first, _second], [mut one, _]) = two(layout);
        for n in 0..ASKED_MAX as u64 {
            first.tlb.ask(Iova(n * PAGE), Access::Read);
        }
        assert_eq!(first.tlb.take_misses().len(), ASKED_MAX);
        first.offer((FAR, 1500), WRITE);
        assert_eq!(first.pop(&mut one), (0, None));
        assert_eq!(first.tlb.take_misses(), []);
        assert!(first.tlb.insert(&[entry(0, DATA, PAGE, Access::Read)]));
        assert_eq!(Vec::from_iter(first.tlb.take_ready()), [2]);
        assert_eq!(first.pop(&mut one), (0, None));
        assert_eq!(first.tlb.take_misses(), [miss(FAR, Access::Write)]);
    });
}

#[test]
fn a_chain_in_very_many_pieces_breaks_the_ring() {
    both(|layout| {
        for count in [1u16, 2] {
            let (bed, mut queue) = Bed::new(layout, Access::Read);
            // Each byte is somewhere else.
            let bytes = ENTRIES_MAX as u64;
            let one = |n| entry(FAR + n, DATA + 2 * n, 1, Access::Read);
            bed.knows(&(0..bytes).map(one).collect::<Vec<_>>());
            let mut guest = bed.guest;
            for index in 0..count {
                let more = if index + 1 < count { NEXT } else { 0 };
                let buffer = (FAR, u32::try_from(bytes).unwrap());
                match layout {
                    Layout::Split => guest.desc(index, buffer, more, index + 1),
                    Layout::Packed => guest.slot(index, buffer, (0, more), true),
                }
            }
            if layout == Layout::Split {
                guest.avail(0, &[0]);
            }
            let (chains, fault) = guest.pop(&mut queue, 64);
            let scattered = ChainError::Scattered { segments: 8192, limit: 4098 };
            assert_eq!(chains.len(), usize::from(count == 1));
            assert_eq!(fault, (count > 1).then_some(scattered));
        }
    });
}
