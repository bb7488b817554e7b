//! Split rings against ring contents written by hand.
#![expect(clippy::cast_possible_truncation, reason = "test code")]

use crate::ChainError;
use crate::config::RingPosition;
use crate::mem::GuestPhysAddr;
use crate::testing::{DATA, END, Guest, INDIRECT, NEXT, SECOND, WRITE};

/// Runs one broken chain with head 0 behind a good one, in a ring of 8.
fn fault_of(setup: impl FnOnce(&mut Guest)) -> ChainError {
    let mut guest = Guest::split(8);
    guest.desc(7, (DATA, 60), 0, 0);
    guest.avail(0, &[7, 0, 7]);
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
    assert_eq!((guest.used_idx(), guest.used(0)), (1, (7, 0)));
    assert_eq!(queue.stop().position, RingPosition::Split { avail: 1, used: 1 });
    fault
}

#[test]
fn each_broken_rule_has_its_own_fault() {
    let at = GuestPhysAddr;
    let unmapped = fault_of(|g| g.desc(0, (END - 10, 11), 0, 0));
    assert_eq!(unmapped, ChainError::Unmapped { addr: at(END - 10), len: 11 });
    let overflow = fault_of(|g| g.desc(0, (u64::MAX - 5, 7), 0, 0));
    assert_eq!(overflow, ChainError::AddressOverflow { addr: at(u64::MAX - 5), len: 7 });
    let last_byte = fault_of(|g| g.desc(0, (u64::MAX - 5, 6), 0, 0));
    assert_eq!(last_byte, ChainError::Unmapped { addr: at(u64::MAX - 5), len: 6 });
    let head = fault_of(|g| g.avail(0, &[7, 8]));
    assert_eq!(head, ChainError::Head { head: 8, size: 8 });
    let next = fault_of(|g| g.desc(0, (DATA, 4), NEXT, 8));
    assert_eq!(next, ChainError::Next { next: 8, table: 8 });
    let to_itself = fault_of(|g| g.desc(0, (DATA, 4), NEXT, 0));
    assert_eq!(to_itself, ChainError::Loop { head: 0, table: 8 });
    let round = fault_of(|g| {
        g.desc(0, (DATA, 4), NEXT, 3);
        g.desc(3, (DATA, 4), NEXT, 0);
    });
    assert_eq!(round, ChainError::Loop { head: 0, table: 8 });
    let order = fault_of(|g| {
        g.desc(0, (DATA, 4), NEXT | WRITE, 3);
        g.desc(3, (DATA, 4), 0, 0);
    });
    assert_eq!(order, ChainError::ReadableAfterWritable { index: 3 });
}

#[test]
fn total_length_ends_below_two_to_the_32() {
    // The lengths are summed up before the bytes are looked for.
    let fault = fault_of(|g| {
        for index in 0..3 {
            g.desc(index, (DATA, 0x10_0000), NEXT, index + 1);
        }
        g.desc(3, (DATA, u32::MAX), 0, 0);
    });
    assert_eq!(fault, ChainError::TotalLength { total: 0x30_0000 + u64::from(u32::MAX) });
}

#[test]
fn each_broken_rule_of_indirect_tables_has_its_own_fault() {
    let table = |len: u32| {
        fault_of(|g| {
            g.desc(0, (DATA, len), INDIRECT, 0);
            g.raw(DATA, (DATA, 5), 0, 0);
        })
    };
    assert_eq!(table(0), ChainError::IndirectLength { len: 0 });
    assert_eq!(table(24), ChainError::IndirectLength { len: 24 });
    let limit = 65536 * 16;
    assert_eq!(table(limit + 16), ChainError::IndirectTooLarge { len: limit + 16, limit });
    let with_next = fault_of(|g| g.desc(0, (DATA, 16), INDIRECT | NEXT, 1));
    assert_eq!(with_next, ChainError::IndirectNext { index: 0 });
    let not_negotiated = fault_of(|g| {
        g.config.features.indirect = false;
        g.desc(0, (DATA, 16), INDIRECT, 0);
    });
    assert_eq!(not_negotiated, ChainError::IndirectNotNegotiated { index: 0 });
    let nested = fault_of(|g| {
        g.desc(0, (DATA, 32), INDIRECT, 0);
        g.raw(DATA, (DATA, 5), NEXT, 1);
        g.raw(DATA + 16, (DATA, 16), INDIRECT, 0);
    });
    assert_eq!(nested, ChainError::NestedIndirect { index: 1 });
    let next = fault_of(|g| {
        g.desc(0, (DATA, 32), INDIRECT, 0);
        g.raw(DATA, (DATA, 5), NEXT, 2);
    });
    assert_eq!(next, ChainError::Next { next: 2, table: 2 });
    let again = fault_of(|g| {
        g.desc(0, (DATA, 32), INDIRECT, 0);
        g.raw(DATA, (DATA, 5), NEXT, 1);
        g.raw(DATA + 16, (DATA, 5), NEXT, 0);
    });
    assert_eq!(again, ChainError::Loop { head: 0, table: 2 });
    let outside = fault_of(|g| g.desc(0, (END, 16), INDIRECT, 0));
    assert_eq!(outside, ChainError::TableUnmapped { addr: GuestPhysAddr(END) });
    let addr = u64::MAX - 14;
    let wraps = fault_of(|g| g.desc(0, (addr, 16), INDIRECT, 0));
    assert_eq!(wraps, ChainError::AddressOverflow { addr: GuestPhysAddr(addr), len: 16 });
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_and_no_longer() {
    let linked = |g: &Guest, count: u16| {
        g.desc(0, (DATA, u32::from(count) * 16), INDIRECT, 0);
        for index in 0..count {
            let flags = if index + 1 < count { NEXT } else { 0 };
            g.raw(DATA + u64::from(index) * 16, (DATA, 5), flags, index + 1);
        }
    };
    assert_eq!(fault_of(|g| linked(g, 9)), ChainError::TooLong { count: 9, limit: 8 });
    let mut guest = Guest::split(8);
    linked(&guest, 8);
    guest.avail(0, &[0]);
    assert_eq!(guest.pop(&mut guest.start(), 1), (vec![(40, 0)], None));
    for index in 0..8 {
        let flags = if index < 7 { NEXT } else { WRITE };
        guest.desc(index, (DATA, 5), flags, index + 1);
    }
    assert_eq!(guest.pop(&mut guest.start(), 1), (vec![(35, 5)], None));
}

#[test]
fn the_available_index_must_stay_within_the_queue() {
    let mut guest = Guest::split(8);
    guest.set_avail_idx(9);
    let fault = Some(ChainError::AvailIndex { ahead: 9, room: 8 });
    assert_eq!(guest.pop(&mut guest.start(), 8), (vec![], fault));
    guest.desc(0, (DATA, 4), 0, 0);
    guest.avail(0, &[0; 8]);
    let mut queue = guest.start();
    assert_eq!(guest.pop(&mut queue, 3).0.len(), 3);
    // Three are fetched and not used: the driver has five left.
    guest.set_avail_idx(9);
    let fault = Some(ChainError::AvailIndex { ahead: 6, room: 5 });
    assert_eq!(guest.pop(&mut queue, 8), (vec![], fault));
    let mut queue = guest.start();
    assert_eq!(
        guest.pop(&mut queue, 3),
        (vec![], Some(ChainError::AvailIndex { ahead: 9, room: 8 }))
    );
    guest.set_avail_idx(8);
    let mut queue = guest.start();
    assert_eq!(guest.pop(&mut queue, 3).0.len(), 3);
    guest.set_avail_idx(2);
    let fault = Some(ChainError::AvailIndex { ahead: u16::MAX, room: 5 });
    assert_eq!(guest.pop(&mut queue, 8), (vec![], fault), "backwards");
}

#[test]
fn a_buffer_over_adjacent_regions_is_read_in_order() {
    let mut guest = Guest::split(4);
    guest.write(SECOND - 3, b"abcdef");
    guest.desc(0, (SECOND - 3, 6), NEXT, 1);
    guest.desc(1, (SECOND - 1, 2), 0, 0);
    guest.avail(0, &[0]);
    assert_eq!(guest.pop_bytes(&mut guest.start()), b"abcdefcd");
    // An indirect table, unaligned, with a descriptor over the boundary.
    guest.raw(SECOND - 21, (SECOND, 2), NEXT, 1);
    guest.raw(SECOND - 5, (SECOND + 64, 2), 0, 0);
    guest.write(SECOND + 64, b"yz");
    let start = guest.u16(SECOND).to_le_bytes();
    guest.desc(0, (SECOND - 21, 32), INDIRECT, 0);
    assert_eq!(guest.pop_bytes(&mut guest.start()), [start.as_slice(), b"yz"].concat());
}

#[test]
fn direct_descriptors_may_stand_before_an_indirect_table() {
    let mut guest = Guest::split(4);
    guest.desc(2, (DATA, 3), NEXT, 3);
    guest.desc(3, (DATA + 64, 16), INDIRECT, 0);
    guest.raw(DATA + 64, (DATA, 100), WRITE, 0);
    guest.avail(0, &[2]);
    assert_eq!(guest.pop(&mut guest.start(), 9), (vec![(3, 100)], None));
}

#[test]
fn empty_buffers_need_no_memory() {
    let mut guest = Guest::split(4);
    guest.desc(0, (u64::MAX, 0), NEXT, 1);
    guest.desc(1, (DATA, 3), NEXT, 2);
    guest.desc(2, (DATA, 0), WRITE, 0);
    guest.avail(0, &[0]);
    assert_eq!(guest.pop(&mut guest.start(), 9), (vec![(3, 0)], None));
}

#[test]
fn every_size_wraps_around() {
    for power in 0..=15 {
        let size = 1u16 << power;
        let mut guest = Guest::split(size);
        let mut queue = guest.start();
        let mut done = 0u16;
        let rounds = if size == 1 { 70_000 } else { 4 };
        for round in 0..rounds {
            let burst = if round % 2 == 0 { size } else { size / 2 + 1 };
            let heads: Vec<u16> = (0..burst).map(|i| size - 1 - i).collect();
            for head in &heads {
                guest.desc(*head, (DATA + u64::from(*head), u32::from(*head) + 1), 0, 0);
            }
            guest.avail(done, &heads);
            let (lens, fault) = guest.pop(&mut queue, usize::MAX);
            assert_eq!(fault, None);
            let want: Vec<_> = heads.iter().map(|h| (u32::from(*h) + 1, 0)).collect();
            assert_eq!(lens, want, "size {size}");
            for (token, head) in guest.tokens.clone().iter().zip(&heads) {
                queue.complete(*token, u32::from(*head) + 7);
            }
            assert_eq!(guest.used_idx(), done, "not before publish");
            queue.publish();
            for (i, head) in heads.iter().enumerate() {
                let slot = done.wrapping_add(i as u16) % size;
                assert_eq!(guest.used(slot), (u32::from(*head), u32::from(*head) + 7));
            }
            done = done.wrapping_add(burst);
            assert_eq!(guest.used_idx(), done);
        }
    }
}

#[test]
fn in_order_one_entry_stands_for_a_batch() {
    let mut guest = Guest::split(8);
    guest.config.features.in_order = true;
    for head in 0..8 {
        guest.desc(head, (DATA, 4), 0, 0);
    }
    guest.avail(0, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 5);
    let tokens = guest.tokens.clone();
    queue.complete_all(&tokens[..3]);
    queue.complete(tokens[3], 9);
    queue.complete_all(&[]);
    queue.publish();
    assert_eq!((guest.used(0), guest.used(1), guest.used(2)), ((2, 0), (0, 0), (0, 0)));
    assert_eq!((guest.used(3), guest.used_idx()), ((3, 9), 4));
}

#[test]
fn unpop_gives_the_newest_chains_again() {
    let mut guest = Guest::split(8);
    for head in 0..8 {
        guest.desc(head, (DATA, u32::from(head) + 1), 0, 0);
    }
    guest.avail(0, &[0, 1, 2, 3, 4]);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 4);
    let tokens = guest.tokens.clone();
    queue.unpop(&tokens[2..]);
    assert_eq!(queue.position(), RingPosition::Split { avail: 2, used: 0 });
    assert_eq!(guest.pop(&mut queue, 8), (vec![(3, 0), (4, 0), (5, 0)], None));
    queue.complete_all(&tokens[..2]);
    // Three popped and not completed are handed back, what was completed is published.
    assert_eq!(queue.stop().position, RingPosition::Split { avail: 2, used: 2 });
    assert_eq!(guest.used_idx(), 2);
}

#[test]
fn more_completions_than_chains_are_not_written() {
    let mut guest = Guest::split(8);
    guest.desc(0, (DATA, 4), 0, 0);
    guest.avail(0, &[0]);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 4);
    let token = guest.tokens[0];
    queue.complete_all(&[token, token]);
    queue.unpop(&[token]);
    queue.publish();
    assert_eq!(queue.position(), RingPosition::Split { avail: 1, used: 1 });
    assert_eq!(guest.used_idx(), 1);
}

#[test]
fn a_queue_goes_on_where_another_one_stopped() {
    let mut guest = Guest::split(8);
    for head in 0..8 {
        guest.desc(head, (DATA, u32::from(head) + 1), 0, 0);
    }
    guest.config.position = RingPosition::Split { avail: 65535, used: 65533 };
    guest.avail(65533, &[0, 1, 2, 3]);
    let mut queue = guest.start();
    assert_eq!(guest.pop(&mut queue, 8), (vec![(3, 0), (4, 0)], None));
    queue.complete(guest.tokens[0], 0);
    queue.publish();
    assert_eq!((guest.used_idx(), guest.used(5)), (65534, (2, 0)));
    // After a crash: the used index says what is lost.
    guest.config = guest.config.resume_at_used(&guest.map).unwrap();
    assert_eq!(guest.config.position, RingPosition::Split { avail: 65534, used: 65534 });
    assert_eq!(guest.pop(&mut guest.start(), 8).0, [(2, 0), (3, 0), (4, 0)]);
}

#[test]
fn flags_suppress_calls_and_kicks() {
    let mut guest = Guest::split(8);
    guest.config.features.event_idx = false;
    guest.desc(0, (DATA, 4), 0, 0);
    let mut queue = guest.start();
    queue.disable_kicks();
    assert_eq!(guest.used_flags(), 1);
    assert!(!queue.enable_kicks(), "nothing is there");
    assert_eq!(guest.used_flags(), 0);
    guest.avail(0, &[0, 0]);
    assert!(queue.enable_kicks() && queue.has_available());
    let _ = guest.pop(&mut queue, 1);
    assert!(queue.enable_kicks(), "the second one is there");
    assert!(!queue.needs_call(), "nothing was used");
    guest.set_avail_flags(1);
    queue.complete_all(&guest.tokens);
    queue.publish();
    assert!(!queue.needs_call(), "NO_INTERRUPT");
    let _ = guest.pop(&mut queue, 1);
    queue.complete_all(&guest.tokens);
    queue.publish();
    guest.set_avail_flags(0);
    assert!(queue.needs_call());
    assert!(!queue.needs_call(), "once is enough");
}

#[test]
fn event_index_suppresses_calls() {
    let mut guest = Guest::split(8);
    guest.desc(0, (DATA, 4), 0, 0);
    guest.config.position = RingPosition::Split { avail: 65534, used: 65534 };
    let mut queue = guest.start();
    let mut at = 65534u16;
    let mut step = |guest: &mut Guest, count: u16, event: u16| {
        guest.set_used_event(event);
        guest.set_avail_flags(1); // means nothing with EVENT_IDX
        guest.avail(at, &vec![0; usize::from(count)]);
        at = at.wrapping_add(count);
        let _ = guest.pop(&mut queue, 8);
        queue.complete_all(&guest.tokens);
        queue.publish();
        queue.needs_call()
    };
    assert!(step(&mut guest, 1, 17), "the first call after a start does not trust the event");
    assert!(!step(&mut guest, 1, 0), "65535 is used, 0 is the next");
    assert!(step(&mut guest, 1, 0));
    assert!(!step(&mut guest, 1, 0), "passed before");
    assert!(!step(&mut guest, 2, 4), "2 and 3 are used");
    assert!(step(&mut guest, 6, 6), "4 to 9");
    assert!(step(&mut guest, 1, 10));
}

#[test]
fn a_lap_of_all_indexes_between_two_looks_calls() {
    let mut guest = Guest::split(32768);
    guest.desc(0, (DATA, 4), 0, 0);
    let mut queue = guest.start();
    let mut at = 0u16;
    let mut lap = |guest: &mut Guest, queue: &mut crate::Virtq| {
        at = at.wrapping_add(32768);
        guest.set_avail_idx(at);
        assert_eq!(guest.pop(queue, usize::MAX).0.len(), 32768);
        queue.complete_all(&guest.tokens);
        queue.publish();
    };
    lap(&mut guest, &mut queue);
    assert!(queue.needs_call());
    guest.set_used_event(40_000);
    lap(&mut guest, &mut queue);
    lap(&mut guest, &mut queue);
    assert!(queue.needs_call(), "65536 entries: the difference of the indexes is zero");
}

#[test]
fn event_index_asks_for_kicks_where_the_device_stands() {
    let mut guest = Guest::split(8);
    guest.desc(0, (DATA, 4), 0, 0);
    guest.avail(0, &[0, 0, 0]);
    let mut queue = guest.start();
    queue.disable_kicks();
    assert_eq!((guest.avail_event(), guest.used_flags()), (0, 0));
    let _ = guest.pop(&mut queue, 2);
    assert!(queue.enable_kicks());
    assert_eq!(guest.avail_event(), 2);
    let _ = guest.pop(&mut queue, 2);
    assert_eq!(guest.avail_event(), 2, "popping writes nothing");
    assert!(!queue.enable_kicks());
    assert_eq!((guest.avail_event(), guest.used_flags()), (3, 0));
}

#[test]
fn nothing_is_written_before_the_first_completion() {
    let mut guest = Guest::split(8);
    guest.set_used_idx(77);
    guest.desc(0, (DATA, 4), 0, 0);
    guest.avail(0, &[0]);
    let mut queue = guest.start();
    let _ = guest.pop(&mut queue, 8);
    queue.publish();
    let config = queue.stop();
    assert_eq!((guest.used_idx(), config), (77, guest.config));
}

#[test]
fn the_largest_table_is_reached_to_its_end() {
    let mut guest = Guest::split(2);
    guest.desc(0, (DATA, 65536 * 16), INDIRECT, 0);
    guest.raw(DATA, (0, 3), NEXT, 65535);
    guest.raw(SECOND - 16, (0, 4), WRITE, 0);
    guest.avail(0, &[0]);
    assert_eq!(guest.pop(&mut guest.start(), 1), (vec![(3, 4)], None));
}

#[test]
fn kicks_are_disabled_once() {
    let mut guest = Guest::split(8);
    guest.config.features.event_idx = false;
    let mut queue = guest.start();
    queue.disable_kicks();
    guest.write(0x18_0000, &[9; 2]);
    queue.disable_kicks();
    assert_eq!(guest.used_flags(), 0x0909, "not written again");
    assert!(!queue.enable_kicks());
    queue.disable_kicks();
    assert_eq!(guest.used_flags(), 1);
}
