//! Packed rings against ring contents written by hand.

use crate::config::RingPosition;
use crate::mem::GuestPhysAddr;
use crate::testing::{DATA, END, Guest, INDIRECT, NEXT, SECOND, WRITE};
use crate::{ChainError, Token, Virtq};

const USED_NOW: u16 = 1 << 7 | 1 << 15;

/// Runs one broken chain at slot 1, behind a good one, in a ring of 8.
fn fault_of(setup: impl FnOnce(&mut Guest)) -> ChainError {
    let mut guest = Guest::packed(8);
    guest.slot(0, (DATA, 60), (7, 0), true);
    setup(&mut guest);
    let mut queue = guest.start();
    let (chains, fault) = guest.pop(&mut queue, 8);
    assert_eq!(chains, [(60, 0)], "the chain before the broken one is good");
    let good = guest.tokens.clone();
    let fault = fault.expect("the second chain is broken");
    assert_eq!(guest.pop(&mut queue, 8), (vec![], Some(fault)), "and nothing comes after it");
    assert_eq!(queue.fault(), Some(fault));
    assert!(!queue.has_available());
    queue.complete_all(&good);
    queue.publish();
    assert_eq!(guest.slot_now(0), (0, 7, USED_NOW));
    let place = RingPosition::Packed { avail: 1, avail_wrap: true, used: 1, used_wrap: true };
    assert_eq!(queue.stop().position, place);
    fault
}

#[test]
fn each_broken_rule_has_its_own_fault() {
    let at = GuestPhysAddr;
    let slot = |buffer, id, flags| fault_of(|g| g.slot(1, buffer, (id, flags), true));
    let unmapped = slot((END - 10, 11), 0, 0);
    assert_eq!(unmapped, ChainError::Unmapped { addr: at(END - 10), len: 11 });
    let overflow = slot((u64::MAX - 5, 7), 0, 0);
    assert_eq!(overflow, ChainError::AddressOverflow { addr: at(u64::MAX - 5), len: 7 });
    assert_eq!(slot((DATA, 4), 8, 0), ChainError::BufferId { id: 8, size: 8 });
    assert_eq!(slot((DATA, 4), 0, NEXT), ChainError::NotAvailable { index: 2 });
    let id_of_a_chain = fault_of(|g| {
        g.slot(1, (DATA, 4), (0, NEXT), true);
        g.slot(2, (DATA, 4), (9, 0), true);
    });
    assert_eq!(id_of_a_chain, ChainError::BufferId { id: 9, size: 8 });
    let other_lap = fault_of(|g| {
        g.slot(1, (DATA, 4), (0, NEXT), true);
        g.slot(2, (DATA, 4), (0, 0), false);
    });
    assert_eq!(other_lap, ChainError::NotAvailable { index: 2 });
    let used = fault_of(|g| g.slot(1, (DATA, 4), (0, 1 << 15), true));
    assert_eq!(used, ChainError::WrapCounter { index: 1, wrap: true });
    let order = fault_of(|g| {
        g.slot(1, (DATA, 4), (0, NEXT | WRITE), true);
        g.slot(2, (DATA, 4), (0, 0), true);
    });
    assert_eq!(order, ChainError::ReadableAfterWritable { index: 2 });
    let total = fault_of(|g| {
        g.slot(1, (DATA, 4), (0, NEXT), true);
        g.slot(2, (DATA, u32::MAX), (0, 0), true);
    });
    assert_eq!(total, ChainError::TotalLength { total: 4 + u64::from(u32::MAX) });
    let long = fault_of(|g| {
        for index in 1..8 {
            g.slot(index, (DATA, 4), (0, NEXT), true);
        }
    });
    assert_eq!(long, ChainError::TooLong { count: 8, limit: 7 });
}

#[test]
fn each_broken_rule_of_indirect_tables_has_its_own_fault() {
    let table = |len: u32, flags: u16| {
        fault_of(|g| {
            g.slot(1, (DATA, len), (0, INDIRECT | flags), true);
            g.raw(DATA, (DATA, 5), 0, 0);
            g.raw(DATA + 16, (DATA, 5), 0, INDIRECT);
        })
    };
    assert_eq!(table(0, 0), ChainError::IndirectLength { len: 0 });
    assert_eq!(table(17, 0), ChainError::IndirectLength { len: 17 });
    let limit = 65536 * 16;
    assert_eq!(table(limit + 16, 0), ChainError::IndirectTooLarge { len: limit + 16, limit });
    assert_eq!(table(16, NEXT), ChainError::IndirectNext { index: 1 });
    assert_eq!(table(32, 0), ChainError::NestedIndirect { index: 1 });
    let not_negotiated = fault_of(|g| {
        g.config.features.indirect = false;
        g.slot(1, (DATA, 16), (0, INDIRECT), true);
    });
    assert_eq!(not_negotiated, ChainError::IndirectNotNegotiated { index: 1 });
    let long = fault_of(|g| g.slot(1, (DATA, 9 * 16), (0, INDIRECT), true));
    assert_eq!(long, ChainError::TooLong { count: 9, limit: 8 });
    let addr = u64::MAX - 14;
    let wraps = fault_of(|g| g.slot(1, (addr, 16), (0, INDIRECT), true));
    assert_eq!(wraps, ChainError::AddressOverflow { addr: GuestPhysAddr(addr), len: 16 });
    let outside = fault_of(|g| g.slot(1, (END, 16), (0, INDIRECT), true));
    assert_eq!(outside, ChainError::TableUnmapped { addr: GuestPhysAddr(END) });
}

#[test]
fn next_means_nothing_in_an_indirect_table() {
    let mut guest = Guest::packed(3);
    guest.slot(0, (DATA, 48), (2, INDIRECT), true);
    guest.raw(DATA, (DATA, 5), 0, NEXT);
    guest.raw(DATA + 16, (DATA, 6), 9, WRITE);
    guest.raw(DATA + 32, (DATA, 7), 9, WRITE | NEXT);
    let mut queue = guest.start();
    assert_eq!(guest.pop(&mut queue, 9), (vec![(5, 13)], None));
    queue.complete(guest.tokens[0], 10);
    queue.publish();
    assert_eq!(guest.slot_now(0), (10, 2, USED_NOW | WRITE));
    assert!(matches!(queue.position(), RingPosition::Packed { avail: 1, used: 1, .. }));
}

#[test]
fn tables_of_a_queue_that_is_only_read_are_readable() {
    // DPDK 22.11 makes its transmit tables with WRITE set, and clears it where it happens to.
    let table = |g: &mut Guest, slot: u16| {
        g.slot(slot, (DATA, 64), (0, INDIRECT), true);
        for (index, flags) in [(0, WRITE), (1, 0), (2, WRITE), (3, 0)] {
            g.raw(DATA + 16 * index, (DATA, 5), 0, flags);
        }
    };
    let order = fault_of(|g| table(g, 1));
    assert_eq!(order, ChainError::ReadableAfterWritable { index: 1 });
    let mut guest = Guest::packed(4);
    table(&mut guest, 0);
    let mut queue = guest.start();
    queue.read_only();
    assert_eq!(guest.pop(&mut queue, 4), (vec![(20, 0)], None));
}

#[test]
fn a_buffer_over_adjacent_regions_is_read_in_order() {
    let mut guest = Guest::packed(4);
    guest.write(SECOND - 3, b"abcdef");
    guest.slot(0, (SECOND - 3, 6), (3, NEXT), true);
    guest.slot(1, (SECOND - 1, 2), (1, 0), true);
    let mut queue = guest.start();
    assert_eq!(guest.pop_bytes(&mut queue), b"abcdefcd");
    queue.complete_all(&guest.tokens);
    queue.publish();
    assert_eq!(guest.slot_now(0), (0, 1, USED_NOW), "the id is the last descriptor's");
}

/// Pops, a burst after the other, until there are no more.
fn pop_all(guest: &mut Guest, queue: &mut Virtq) -> Vec<Token> {
    let mut all = Vec::new();
    loop {
        assert_eq!(guest.pop(queue, usize::MAX).1, None);
        if guest.tokens.is_empty() {
            return all;
        }
        all.append(&mut guest.tokens);
    }
}

#[test]
fn every_size_wraps_around() {
    for size in [1u16, 2, 3, 5, 7, 8, 13, 100, 255, 256, 1000, 32767, 32768] {
        let mut guest = Guest::packed(size);
        let mut queue = guest.start();
        let (mut at, mut wrap) = (0u16, true);
        for round in 0..8 {
            let burst = if round % 2 == 0 { size } else { size / 2 + 1 };
            let mut places = Vec::new();
            for i in 0..burst {
                let id = size - 1 - i;
                let flags = if i % 2 == 0 { 0 } else { WRITE };
                guest.slot(at, (DATA + u64::from(id), u32::from(id) + 1), (id, flags), wrap);
                places.push((at, wrap, id));
                at += 1;
                if at == size {
                    (at, wrap) = (0, !wrap);
                }
            }
            let tokens = pop_all(&mut guest, &mut queue);
            assert_eq!(tokens.len(), usize::from(burst), "size {size}");
            assert_eq!(guest.pop(&mut queue, 1).0, [], "a full ring is not read twice");
            let _ = queue.stop();
            // The same again, this time to the end.
            queue = guest.start();
            for (token, (_, _, id)) in pop_all(&mut guest, &mut queue).iter().zip(&places) {
                queue.complete(*token, u32::from(*id % 2));
            }
            let (first, first_wrap, _) = places[0];
            let state = guest.slot_now(first).2 & USED_NOW;
            assert_eq!(state, if first_wrap { 1 << 7 } else { 1 << 15 }, "not before publish");
            queue.publish();
            for (place, wrap, id) in places {
                let flags = if wrap { USED_NOW } else { 0 } | if id % 2 == 1 { WRITE } else { 0 };
                assert_eq!(guest.slot_now(place), (u32::from(id % 2), id, flags));
            }
            guest.config.position = queue.position();
        }
    }
}

#[test]
fn chains_wrap_around_inside() {
    let mut guest = Guest::packed(5);
    let mut queue = guest.start();
    let (mut at, mut wrap) = (0u16, true);
    for round in 0..10u16 {
        let head = (at, wrap);
        for i in 0..3 {
            let flags = if i < 2 { NEXT } else { 0 };
            guest.slot(at, (DATA, 10), (round % 5, flags), wrap);
            at += 1;
            if at == 5 {
                (at, wrap) = (0, !wrap);
            }
        }
        assert_eq!(guest.pop(&mut queue, 9), (vec![(30, 0)], None));
        let token = guest.tokens[0];
        assert_eq!(guest.pop(&mut queue, 9), (vec![], None), "leftovers are not chains");
        queue.complete(token, 0);
        queue.publish();
        let flags = if head.1 { USED_NOW } else { 0 };
        assert_eq!(guest.slot_now(head.0), (0, round % 5, flags));
        let place = RingPosition::Packed { avail: at, avail_wrap: wrap, used: at, used_wrap: wrap };
        assert_eq!(queue.position(), place);
    }
}

#[test]
fn a_batch_is_published_by_its_first_flags() {
    let mut guest = Guest::packed(8);
    for index in 0..4 {
        guest.slot(index, (DATA, 4), (index, WRITE), true);
    }
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 8);
    let tokens = guest.tokens.clone();
    for token in &tokens[..3] {
        queue.complete(*token, 4);
    }
    assert_eq!(guest.slot_now(0).2, 1 << 7 | WRITE);
    assert_eq!(guest.slot_now(1).2, USED_NOW | WRITE);
    queue.publish();
    assert_eq!(guest.slot_now(0), (4, 0, USED_NOW | WRITE));
    queue.complete(tokens[3], 4);
    assert_eq!(guest.slot_now(3).2, 1 << 7 | WRITE);
    queue.publish();
    assert_eq!(guest.slot_now(3).2, USED_NOW | WRITE);
}

#[test]
fn in_order_one_descriptor_stands_for_a_batch() {
    let mut guest = Guest::packed(8);
    guest.config.features.in_order = true;
    guest.slot(0, (DATA, 4), (5, 0), true);
    guest.slot(1, (DATA, 4), (6, NEXT), true);
    guest.slot(2, (DATA, 4), (6, 0), true);
    guest.slot(3, (DATA, 4), (7, 0), true);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 8);
    let tokens = guest.tokens.clone();
    queue.complete_all(&tokens[..2]);
    queue.complete_all(&[]);
    queue.publish();
    assert_eq!(guest.slot_now(0), (0, 6, USED_NOW));
    assert_eq!(guest.slot_now(1).2 & USED_NOW, 1 << 7, "skipped");
    queue.complete(tokens[2], 3);
    queue.publish();
    assert_eq!(guest.slot_now(3), (3, 7, USED_NOW | WRITE));
    assert!(matches!(queue.position(), RingPosition::Packed { used: 4, .. }));
}

#[test]
fn unpop_gives_the_newest_chains_again() {
    let mut guest = Guest::packed(3);
    guest.config.position =
        RingPosition::Packed { avail: 2, avail_wrap: true, used: 2, used_wrap: true };
    guest.slot(2, (DATA, 4), (0, NEXT), true);
    guest.slot(0, (DATA, 5), (0, 0), false);
    guest.slot(1, (DATA, 6), (1, 0), false);
    let mut queue = guest.start();
    assert_eq!(guest.pop(&mut queue, 8).0, [(9, 0), (6, 0)]);
    let tokens = guest.tokens.clone();
    queue.unpop(&tokens[1..]);
    assert_eq!(guest.pop(&mut queue, 8).0, [(6, 0)]);
    queue.unpop(&tokens);
    assert_eq!(queue.position(), guest.config.position);
    queue.unpop(&tokens);
    assert_eq!(queue.position(), guest.config.position, "there is nothing more");
    assert_eq!(guest.pop(&mut queue, 8).0, [(9, 0), (6, 0)]);
    queue.complete(tokens[0], 0);
    // One popped and not completed is handed back, what was completed is published.
    let place = RingPosition::Packed { avail: 1, avail_wrap: false, used: 1, used_wrap: false };
    assert_eq!(queue.stop().position, place);
    assert_eq!(guest.slot_now(2), (0, 0, USED_NOW));
}

#[test]
fn more_completions_than_chains_are_not_written() {
    let mut guest = Guest::packed(4);
    guest.slot(0, (DATA, 4), (0, 0), true);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 4);
    let token = guest.tokens[0];
    queue.complete_all(&[token, token]);
    queue.publish();
    assert!(matches!(queue.position(), RingPosition::Packed { avail: 1, used: 1, .. }));
    assert_eq!(guest.slot_now(1), (0, 0, 0));
}

#[test]
fn a_queue_goes_on_where_another_one_stopped() {
    let mut guest = Guest::packed(4);
    for index in 0..3 {
        guest.slot(index, (DATA, u32::from(index) + 1), (index, 0), false);
    }
    guest.slot(3, (DATA, 9), (3, 0), true);
    guest.config.position =
        RingPosition::Packed { avail: 1, avail_wrap: false, used: 3, used_wrap: true };
    let mut queue = guest.start();
    // Slots 3 and 0 are fetched, so two are left.
    assert_eq!(guest.pop(&mut queue, 8), (vec![(2, 0), (3, 0)], None));
    assert_eq!(guest.pop(&mut queue, 8), (vec![], None));
    drop(queue);
    guest.config = guest.config.resume_at_used(&guest.map).unwrap();
    assert_eq!(guest.pop(&mut guest.start(), 8).0, [(9, 0), (1, 0), (2, 0), (3, 0)]);
}

#[test]
fn flags_suppress_calls_and_kicks() {
    let mut guest = Guest::packed(8);
    guest.config.features.event_idx = false;
    let mut queue = guest.start();
    queue.disable_kicks();
    assert_eq!(guest.device_event().1, 1);
    assert!(!queue.enable_kicks(), "nothing is there");
    assert_eq!(guest.device_event().1, 0);
    for index in 0..3 {
        guest.slot(index, (DATA, 4), (index, 0), true);
    }
    assert!(queue.enable_kicks() && queue.has_available());
    let step = |guest: &mut Guest, queue: &mut crate::Virtq| {
        let _ = guest.pop(queue, 1);
        queue.complete_all(&guest.tokens);
        queue.publish();
        queue.needs_call()
    };
    guest.set_driver_event(0, false, 1);
    assert!(!queue.needs_call(), "nothing was used");
    assert!(!step(&mut guest, &mut queue), "DISABLE");
    guest.set_driver_event(0, false, 0);
    assert!(step(&mut guest, &mut queue), "ENABLE");
    assert!(!queue.needs_call(), "once is enough");
    guest.set_driver_event(7, false, 2);
    assert!(step(&mut guest, &mut queue), "DESC without EVENT_IDX says nothing");
}

#[test]
fn event_positions_suppress_calls() {
    let mut guest = Guest::packed(3);
    let mut queue = guest.start();
    let (mut at, mut wrap) = (0u16, true);
    let mut step = |guest: &mut Guest, count: u16, event: (u16, bool)| {
        guest.set_driver_event(event.0, event.1, 2);
        for _ in 0..count {
            guest.slot(at, (DATA, 4), (0, 0), wrap);
            at += 1;
            if at == 3 {
                (at, wrap) = (0, !wrap);
            }
        }
        assert_eq!(guest.pop(&mut queue, 8).0.len(), usize::from(count));
        queue.complete_all(&guest.tokens);
        queue.publish();
        queue.needs_call()
    };
    assert!(step(&mut guest, 1, (2, false)), "the first call does not trust the event");
    assert!(!step(&mut guest, 1, (2, true)), "1 is used, 2 is the next");
    assert!(step(&mut guest, 1, (2, true)), "2, the last of the lap");
    assert!(!step(&mut guest, 1, (2, true)), "passed before");
    assert!(!step(&mut guest, 1, (2, false)));
    assert!(step(&mut guest, 2, (2, false)), "2 and 0 of the next lap");
    assert!(!step(&mut guest, 2, (0, false)), "the lap after");
    assert!(step(&mut guest, 3, (1, false)), "0, 1, 2 of it");
    assert!(step(&mut guest, 3, (2, true)), "a whole lap passes each position");
    assert!(!step(&mut guest, 3, (2, true)), "but not one of the lap before");
}

#[test]
fn event_position_asks_for_kicks_where_the_device_stands() {
    let mut guest = Guest::packed(3);
    let mut queue = guest.start();
    assert!(!queue.enable_kicks());
    assert_eq!(guest.device_event(), (1 << 15, 2));
    for index in 0..3 {
        guest.slot(index, (DATA, 4), (index, 0), true);
    }
    let _ = guest.pop(&mut queue, 2);
    assert!(queue.enable_kicks());
    assert_eq!(guest.device_event(), (2 | 1 << 15, 2));
    let _ = guest.pop(&mut queue, 2);
    queue.disable_kicks();
    assert_eq!(guest.device_event().1, 1);
    assert!(!queue.enable_kicks(), "a ring that is fetched whole has nothing");
    assert_eq!(guest.device_event(), (0, 2));
}

#[test]
fn kicks_are_disabled_once() {
    let mut guest = Guest::packed(3);
    let mut queue = guest.start();
    queue.disable_kicks();
    guest.write(0x18_0000, &[9; 4]);
    queue.disable_kicks();
    assert_eq!(guest.device_event(), (0x0909, 0x0909), "not written again");
    assert!(!queue.enable_kicks());
    queue.disable_kicks();
    assert_eq!(guest.device_event().1, 1);
    assert_eq!(guest.pop(&mut queue, 1), (vec![], None));
}
