#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::sync::atomic::{Ordering, fence};

use packet::{HashKind, ReceiveHash};
use port::{BURST_MAX, DropReason, Egress, FrameBuf, Ingress, Notified, QueueFault};
use virtq::{Layout, RingFeatures};

use super::Receiveq;
use crate::device::SharedHash;
use crate::features::{HASH_REPORT, MRG_RXBUF};
use crate::rig::{BOTH, Guest, Ledger, counter, options, pattern, receiveq, transmitq};
use crate::{HeaderLen, QueueOptions};

mod bounds;
mod offloads;
mod waiting;

const SIZES: [usize; 12] = [14, 42, 60, 64, 65, 100, 128, 129, 1514, 4096, 9014, 65535];

/// Sends frames of the sizes given through a transmitq into `queue`, as one burst.
fn pipe(layout: Layout, queue: &mut Receiveq, sizes: &[usize]) -> Result<(), QueueFault> {
    let mut sender = Guest::plain(layout, 64);
    let mut transmitq = transmitq(&sender, options(0));
    for (seed, size) in sizes.iter().enumerate() {
        sender.transmit(&pattern(*size, seed));
    }
    let mut buf = FrameBuf::default();
    let batch = transmitq.receive(&mut buf);
    let picked: Vec<u16> = (0..sizes.len() as u16).collect();
    let result = queue.send(&batch, &picked);
    transmitq.release();
    assert_eq!(sender.used().len(), sizes.len());
    result
}

fn sum(sizes: &[usize]) -> u64 {
    sizes.iter().sum::<usize>() as u64
}

fn expect(guest: &mut Guest, sizes: &[usize]) {
    let frames = guest.received(12);
    assert_eq!(frames.len(), sizes.len());
    for (seed, (frame, size)) in frames.iter().zip(sizes).enumerate() {
        assert_eq!(frame.0[..10], [0; 10]);
        assert_eq!(frame.1, pattern(*size, seed), "{size} bytes");
    }
}

#[test]
fn frames_of_every_size_arrive_in_buffers_of_every_size() {
    let rings = BOTH.into_iter().flat_map(|from| BOTH.map(|to| (from, to)));
    for (from, to) in rings {
        for in_order in [false, true] {
            for buffer in [13, 26, 64, 128, 1000, 1526, 4096, 65547] {
                let features = RingFeatures { in_order, ..RingFeatures::default() };
                let mut guest = Guest::new(to, 8192, features);
                let mut queue = receiveq(&guest, options(MRG_RXBUF));
                let chains = (6 << 20) / (buffer as usize + 7);
                guest.post(chains.min(8000), &[buffer]);
                pipe(from, &mut queue, &SIZES).unwrap();
                expect(&mut guest, &SIZES);
                let tx = (SIZES.len() as u64, sum(&SIZES));
                Ledger { tx, ..Ledger::default() }.check(queue.counters());
            }
        }
    }
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain() {
    for layout in BOTH {
        for (header_len, bytes) in [(HeaderLen::V1, 12), (HeaderLen::Legacy, 10)] {
            let mut guest = Guest::plain(layout, 64);
            let plain = QueueOptions { header_len, mergeable: false, ..options(0) };
            let mut queue = receiveq(&guest, plain);
            guest.post(12, &[bytes as u32, 3, 65532]);
            pipe(layout, &mut queue, &SIZES).unwrap();
            let frames = guest.received(bytes);
            for (seed, (header, frame)) in frames.iter().enumerate() {
                assert_eq!(*frame, pattern(SIZES[seed], seed));
                assert_eq!(header[..10], [0; 10]);
                assert!(header.len() == 10 || header[10..] == [1, 0], "num_buffers is 1");
            }
            assert_eq!(frames.len(), 12);
        }
    }
}

#[test]
fn stale_header_bytes_are_overwritten() {
    let mut guest = Guest::plain(BOTH[0], 8);
    let mut queue = receiveq(&guest, options(MRG_RXBUF));
    guest.offer(&[0xff; 100], &[]);
    guest.queue.reset(|_| ()).unwrap();
    let stale = virtq::driver::Buffer { addr: virtq::mem::GuestPhysAddr(4 << 20), len: 100 };
    guest.queue.add_writable(&[stale], 77).unwrap();
    guest.queue.publish();
    pipe(BOTH[0], &mut queue, &[60]).unwrap();
    let used = guest.queue.poll_used().unwrap().unwrap();
    assert_eq!((used.cookie, used.len), (77, 72));
    guest.queue.add_readable(&[stale], 78).unwrap();
    guest.queue.publish();
    let chains = &mut virtq::ChainBuf::default();
    let mut parts = queue.into_parts();
    let chains = parts.queue.pop(chains, 1);
    let mut bytes = [0; 73];
    assert_eq!(chains.readable(0).reader().read(&mut bytes), 73);
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!((&bytes[12..72], bytes[72]), (&pattern(60, 0)[..], 0xff));
}

#[test]
fn indirect_chains_are_filled() {
    for layout in BOTH {
        let features = RingFeatures { indirect: true, ..RingFeatures::default() };
        let mut guest = Guest::new(layout, 8, features);
        let mut queue = receiveq(&guest, options(0));
        guest.post_indirect(&[12, 100, 1, 4000]);
        pipe(layout, &mut queue, &[1514]).unwrap();
        expect(&mut guest, &[1514]);
    }
}

#[test]
fn a_large_frame_is_dropped_without_mergeable_buffers_and_takes_no_chain() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, options(0));
        guest.post(2, &[1526]);
        pipe(layout, &mut queue, &[60, 1515, 1514]).unwrap();
        let frames = guest.received(12);
        assert_eq!(frames.len(), 2);
        assert_eq!((&frames[0].1, &frames[1].1), (&pattern(60, 0), &pattern(1514, 2)));
        let drops = vec![(DropReason::TooLarge, 1)];
        Ledger { tx: (2, 1574), drops, ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn no_room_is_a_counted_drop_and_a_small_frame_still_fits() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        guest.post(3, &[100]);
        // The second needs three buffers, two are left: all or nothing.
        pipe(layout, &mut queue, &[60, 280, 88, 88, 60]).unwrap();
        let frames = guest.received(12);
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1].1, pattern(88, 2));
        let drops = vec![(DropReason::NoBuffer, 2)];
        Ledger { tx: (3, 236), drops, ..Ledger::default() }.check(queue.counters());
        // The guest gives buffers: it goes on.
        guest.post(3, &[100]);
        pipe(layout, &mut queue, &[280]).unwrap();
        expect(&mut guest, &[280]);
    }
}

#[test]
fn an_empty_ring_drops_the_burst() {
    for (layout, mergeable) in BOTH.into_iter().flat_map(|l| [(l, 0), (l, MRG_RXBUF)]) {
        let guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, options(mergeable));
        pipe(layout, &mut queue, &[60, 61]).unwrap();
        let drops = vec![(DropReason::NoBuffer, 2)];
        Ledger { drops, ..Ledger::default() }.check(queue.counters());
        assert!(queue.starved);
    }
}

#[test]
fn a_guest_that_gives_buffers_late_is_waited_for() {
    let mut guest = Guest::plain(Layout::Split, 8);
    let patient = QueueOptions { retries: u32::MAX, ..options(MRG_RXBUF) };
    let mut queue = receiveq(&guest, patient);
    let delivery = std::thread::spawn(move || {
        pipe(Layout::Split, &mut queue, &[60, 61]).unwrap();
        queue
    });
    for seed in 0..2 {
        guest.post(1, &[2048]);
        let frame = std::iter::repeat_with(|| guest.received(12)).find(|f| !f.is_empty()).unwrap();
        assert_eq!(frame[0].1, pattern(60 + seed, seed));
    }
    let queue = delivery.join().unwrap();
    Ledger { tx: (2, 121), ..Ledger::default() }.check(queue.counters());
}

#[test]
fn a_disabled_queue_is_never_filled() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, QueueOptions { enabled: false, ..options(MRG_RXBUF) });
        guest.post(4, &[2048]);
        pipe(layout, &mut queue, &[60]).unwrap();
        assert!(guest.used().is_empty());
        let drops = vec![(DropReason::PortDown, 1)];
        Ledger { drops, ..Ledger::default() }.check(queue.counters());
        queue.set_enabled(true);
        pipe(layout, &mut queue, &[60]).unwrap();
        expect(&mut guest, &[60]);
    }
}

#[test]
fn buffers_too_small_for_the_header_go_back_unwritten() {
    for (layout, mergeable) in BOTH.into_iter().flat_map(|l| [(l, 0), (l, MRG_RXBUF)]) {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, options(mergeable));
        guest.post(1, &[11]);
        guest.offer(&[1, 2, 3], &[]);
        guest.offer_mixed(&[1, 2, 3], 2048);
        pipe(layout, &mut queue, &[60]).unwrap();
        let used = guest.used();
        assert_eq!(used.iter().map(Vec::len).collect::<Vec<_>>(), [0, 0, 72]);
        Ledger { tx: (1, 60), ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn a_broken_ring_ends_with_a_fault_and_every_frame_counted() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        guest.post(1, &[2048]);
        guest.post_broken();
        let result = pipe(layout, &mut queue, &[60, 61, 62]);
        assert!(matches!(result, Err(QueueFault::Ring(_))));
        expect(&mut guest, &[60]);
        let drops = vec![(DropReason::PortDown, 2)];
        Ledger { tx: (1, 60), drops, ..Ledger::default() }.check(queue.counters());
        assert!(pipe(layout, &mut queue, &[60]).is_err());
    }
}

#[test]
fn picked_frames_come_in_their_order_and_more_than_once_in_a_flood() {
    let mut guest = Guest::plain(Layout::Packed, 8);
    let mut queue = receiveq(&guest, options(MRG_RXBUF));
    guest.post(3, &[2048]);
    let mut sender = Guest::plain(Layout::Split, 4);
    let mut transmitq = transmitq(&sender, options(0));
    for seed in 0..3 {
        sender.transmit(&pattern(200, seed));
    }
    let mut buf = FrameBuf::default();
    let batch = transmitq.receive(&mut buf);
    queue.send(&batch, &[2, 0, 2, 99]).unwrap();
    let frames: Vec<_> = guest.received(12).into_iter().map(|f| f.1).collect();
    assert_eq!(frames, [pattern(200, 2), pattern(200, 0), pattern(200, 2)]);
}

#[test]
fn calls_are_suppressed_and_kicks_never_asked_for() {
    for layout in BOTH {
        for event_idx in [false, true] {
            let features = RingFeatures { event_idx, ..RingFeatures::default() };
            let mut guest = Guest::new(layout, 64, features);
            let mut queue = receiveq(&guest, options(MRG_RXBUF));
            let call = queue.parts.call.clone().unwrap();
            guest.post(1, &[2048]);
            let _ = guest.queue.needs_kick();
            guest.queue.disable_calls();
            let mut calls = Vec::new();
            for wanted in [false, true, false, false] {
                guest.post(1, &[2048]);
                assert!(!guest.queue.needs_kick(), "{layout:?} {event_idx}");
                if wanted {
                    let _ = guest.queue.enable_calls();
                } else {
                    guest.queue.disable_calls();
                }
                pipe(layout, &mut queue, &[60]).unwrap();
                fence(Ordering::SeqCst);
                let notified = [queue.notify(), queue.notify()];
                expect(&mut guest, &[60]);
                calls.push(counter(&call));
                let sent = notified.iter().filter(|n| **n == Notified::Called).count();
                assert_eq!(calls.last(), Some(&(sent as u64)));
            }
            let counted = queue.counters().read_ends().tx_calls;
            assert_eq!(counted.sent, calls.iter().sum::<u64>());
            assert_eq!(counted.sent + counted.suppressed, 8);
            // A device may call once before it knows what the driver wants of a fresh ring.
            assert!(calls[0] <= u64::from(event_idx), "{layout:?} {event_idx}");
            assert_eq!(calls[1..], [1, 0, 0], "{layout:?} {event_idx}");
        }
    }
}

#[test]
fn the_same_script_gives_the_same_frames_on_both_rings() {
    let script = |layout: Layout| {
        let mut guest = Guest::plain(layout, 256);
        let mut queue = receiveq(&guest, options(MRG_RXBUF));
        let mut frames = Vec::new();
        for round in 0..20 {
            guest.post(5 + round % 7, &[64 + 97 * (round as u32 % 5), 30]);
            let sizes: Vec<usize> = (0..(round * 5) % BURST_MAX).map(|n| 60 + n * 31).collect();
            pipe(layout, &mut queue, &sizes).unwrap();
            frames.extend(guest.received(12));
        }
        let totals = queue.counters().read_ends();
        (frames, totals)
    };
    let (split, packed) = (script(Layout::Split), script(Layout::Packed));
    assert_eq!(split.1, packed.1);
    assert!(split.0 == packed.0, "the frames differ");
    assert!(split.0.len() > 50);
}

#[test]
fn the_frames_hash_is_reported() {
    let hash = ReceiveHash::new(&[0x6d; 40], HashKind::UdpV4.bit()).unwrap();
    let mut udp = vec![0; 1000];
    udp[12..24].copy_from_slice(&[8, 0, 0x45, 0, 3, 0xda, 0, 0, 0, 0, 64, 17]);
    udp[26..38].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 53]);
    let arp = [&[0; 12][..], &[8, 6], &[1; 46]].concat();
    let (value, _) = hash.of(&udp).unwrap();
    let [a, b, c, d] = value.to_le_bytes();
    for layout in BOTH {
        for (features, buffer, buffers) in [(MRG_RXBUF, 300, 4), (0, 2048, 1)] {
            let mut guest = Guest::plain(layout, 64);
            let mut queue = receiveq(&guest, options(HASH_REPORT | features));
            let shared = SharedHash::default();
            queue.report_hash(shared.clone());
            guest.post(20, &[buffer]);
            let mut pass = |hash: Option<ReceiveHash>| {
                shared.set(hash);
                let mut sender = Guest::plain(layout, 64);
                let mut transmitq = transmitq(&sender, options(HASH_REPORT));
                for frame in [&udp, &arp] {
                    sender.offer(&[&[0; 20], frame.as_slice()].concat(), &[]);
                }
                let mut buf = FrameBuf::default();
                let batch = transmitq.receive(&mut buf);
                queue.send(&batch, &[0, 1]).unwrap();
                let frames = guest.received(20);
                assert_eq!([&frames[0].1, &frames[1].1], [&udp, &arp]);
                [frames[0].0.clone(), frames[1].0.clone()]
            };
            let [first, second] = pass(Some(hash.clone()));
            let kind = HashKind::UdpV4 as u8;
            assert_eq!(first[10..], [buffers, 0, a, b, c, d, kind, 0, 0, 0]);
            assert_eq!(second[10..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0], "no hash");
            let [first, _] = pass(None);
            assert_eq!(first[10..], [buffers, 0, 0, 0, 0, 0, 0, 0, 0, 0], "not configured yet");
        }
    }
    let guest = Guest::plain(Layout::Split, 8);
    assert_eq!(receiveq(&guest, options(HASH_REPORT)).options().header_len, HeaderLen::Hash);
}
