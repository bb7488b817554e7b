#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::sync::atomic::{Ordering, fence};

use port::{BURST_MAX, DropReason, FrameBuf, Gso, HEAD_MAX, Ingress};
use rustix::event::{Timespec, epoll};
use virtq::{Layout, RingFeatures};

use super::Transmitq;
use crate::features::{CSUM, HOST_TSO4, HOST_TSO6, HOST_USO};
use crate::rig::{BOTH, Guest, Ledger, counter, options, pattern, transmitq};
use crate::{HeaderLen, QueueOptions};

/// Takes one burst: the bytes of each frame.
fn receive(queue: &mut Transmitq) -> Vec<Vec<u8>> {
    let mut buf = FrameBuf::default();
    let batch = queue.receive(&mut buf);
    assert_eq!(batch.fault(), None);
    let frames = batch.frames().iter().map(|frame| {
        let mut body = vec![0; frame.body.len as usize];
        assert_eq!(batch.body(frame).read(&mut body), body.len());
        [frame.head(), &body].concat()
    });
    frames.collect()
}

fn finish(queue: &mut Transmitq) {
    queue.release();
    fence(Ordering::SeqCst);
    let _ = queue.notify();
}

#[test]
fn frames_of_every_size_arrive_whole_and_their_chains_come_back() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 64);
        let mut queue = transmitq(&guest, options(0));
        let sizes = [14, 59, 60, 64, 95, 96, 127, 128, 129, 1514, 9014, 65535];
        let mut bytes = 0;
        for (seed, size) in sizes.iter().enumerate() {
            guest.transmit(&pattern(*size, seed));
            bytes += *size as u64;
        }
        let frames = receive(&mut queue);
        for (seed, size) in sizes.iter().enumerate() {
            assert_eq!(frames[seed], pattern(*size, seed), "{size} bytes");
        }
        assert!(guest.used().is_empty(), "buffers come back before the frames are delivered");
        finish(&mut queue);
        assert_eq!(guest.used().len(), sizes.len());
        Ledger { rx: (12, bytes), ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn the_framing_of_a_chain_does_not_matter() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 64);
        let mut queue = transmitq(&guest, options(0));
        let frame = pattern(600, 3);
        let chain = [&[0; 12], &frame[..]].concat();
        let cuts: [&[usize]; 6] =
            [&[], &[12], &[10, 2], &[12, 14], &[1; 30], &[12 + HEAD_MAX, 1, 100]];
        for cut in cuts {
            guest.offer(&chain, cut);
            assert_eq!(receive(&mut queue), std::slice::from_ref(&frame), "{cut:?}");
            finish(&mut queue);
        }
        assert_eq!(guest.used().len(), cuts.len());
    }
}

#[test]
fn a_legacy_header_has_ten_bytes() {
    let mut guest = Guest::plain(BOTH[0], 4);
    let legacy = QueueOptions { header_len: HeaderLen::Legacy, ..options(0) };
    let mut queue = transmitq(&guest, legacy);
    let frame = pattern(60, 1);
    guest.offer(&[&[0; 10], &frame[..]].concat(), &[10]);
    assert_eq!(receive(&mut queue), [frame]);
}

#[test]
fn a_burst_is_bounded_and_the_rest_comes_next() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 128);
        let mut queue = transmitq(&guest, options(0));
        for seed in 0..100 {
            guest.transmit(&pattern(60, seed));
        }
        let first = receive(&mut queue);
        assert_eq!(first.len(), BURST_MAX);
        finish(&mut queue);
        let second = receive(&mut queue);
        finish(&mut queue);
        for (seed, frame) in first.iter().chain(&second).enumerate() {
            assert_eq!(*frame, pattern(60, seed));
        }
        assert_eq!(first.len() + second.len(), 100);
        assert!(receive(&mut queue).is_empty());
        assert_eq!(guest.used().len(), 100);
    }
}

/// Frames of 9000 bytes: 16 of them are below the bound of a burst, 17 are not.
#[test]
fn a_burst_is_bounded_by_bytes_too_and_the_rest_comes_next() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 128);
        let mut queue = transmitq(&guest, options(0));
        for seed in 0..40 {
            guest.transmit(&pattern(9000, seed));
        }
        let mut seed = 0;
        for expected in [16, 16, 8] {
            let burst = receive(&mut queue);
            assert_eq!(burst.len(), expected);
            assert!(burst.iter().zip(seed..).all(|(frame, seed)| *frame == pattern(9000, seed)));
            seed += expected;
            finish(&mut queue);
            assert_eq!(guest.used().len(), expected);
        }
        assert!(receive(&mut queue).is_empty());
        Ledger { rx: (40, 360_000), ..Ledger::default() }.check(queue.counters());
        // A frame that is larger by itself comes alone, and what was not released is in the end.
        guest.transmit(&pattern(60, 1));
        (0..3).for_each(|_| guest.transmit(&pattern(60_000, 2)));
        assert_eq!(receive(&mut queue).len(), 3);
        drop(queue.into_parts());
        assert_eq!(guest.used().len(), 3);
    }
}

#[test]
fn a_burst_takes_no_more_frames_than_it_may() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 64);
        let mut queue = transmitq(&guest, options(0));
        (0..10).for_each(|seed| guest.transmit(&pattern(60, seed)));
        let mut frames = FrameBuf::default();
        for (limit, expected) in [(3, 3), (0, 1), (100, 6)] {
            frames.limit(limit);
            assert_eq!(queue.receive(&mut frames).len(), expected);
            finish(&mut queue);
        }
        assert_eq!(guest.used().len(), 10);
    }
}

#[test]
fn short_frames_are_runts() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, options(0));
        guest.offer(&[0; 3], &[]);
        guest.offer(&[0; 12], &[]);
        guest.offer(&[0; 12 + 13], &[12]);
        guest.transmit(&pattern(14, 0));
        assert_eq!(receive(&mut queue), [pattern(14, 0)]);
        finish(&mut queue);
        assert_eq!(guest.used().len(), 4);
        let drops = vec![(DropReason::Runt, 3)];
        Ledger { rx: (4, 27), drops, ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn long_frames_are_oversize() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, QueueOptions { max_frame: 1518, ..options(0) });
        guest.transmit(&pattern(1519, 0));
        guest.transmit(&pattern(1518, 1));
        assert_eq!(receive(&mut queue), [pattern(1518, 1)]);
        finish(&mut queue);
        assert_eq!(guest.used().len(), 2);
        let drops = vec![(DropReason::Oversize, 1)];
        Ledger { rx: (2, 3037), drops, ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn frames_on_a_disabled_queue_are_taken_and_dropped() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, QueueOptions { enabled: false, ..options(0) });
        guest.transmit(&pattern(60, 0));
        guest.offer(&[0; 3], &[]);
        assert!(receive(&mut queue).is_empty());
        finish(&mut queue);
        assert_eq!(guest.used().len(), 2);
        let drops = vec![(DropReason::RingDisabled, 2)];
        Ledger { rx: (2, 60), drops, ..Ledger::default() }.check(queue.counters());
        queue.set_enabled(true);
        guest.transmit(&pattern(60, 1));
        assert_eq!(receive(&mut queue), [pattern(60, 1)]);
    }
}

/// A frame of `len` bytes that begins with the headers of TCP over IPv4.
fn tcp(len: usize) -> Vec<u8> {
    let mut frame = pattern(len, 0);
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
    frame[46..48].copy_from_slice(&[0x50, 0x10]);
    frame
}

/// The header of a frame that is to be cut into segments of `size` bytes of payload.
fn tso(size: u16) -> Vec<u8> {
    let [lo, hi] = size.to_le_bytes();
    vec![1, 1, 54, 0, lo, hi, 34, 0, 16, 0, 0, 0]
}

#[test]
fn offloads_that_were_not_negotiated_are_bad() {
    let frame = [tso(100), tcp(300)].concat();
    for layout in BOTH {
        for negotiated in [0, CSUM, HOST_TSO4, CSUM | HOST_TSO4] {
            let good = negotiated == CSUM | HOST_TSO4;
            let mut guest = Guest::plain(layout, 8);
            let mut queue = transmitq(&guest, options(negotiated));
            guest.offer(&frame, &[]);
            guest.transmit(&pattern(60, 1));
            let mut buf = FrameBuf::default();
            let batch = queue.receive(&mut buf);
            let offload = batch.frames()[0].offload;
            assert_eq!(batch.len(), if good { 2 } else { 1 });
            if good {
                let what = (offload.gso, offload.gso_size, offload.csum_start);
                assert_eq!(what, (Gso::TcpV4, 100, 34));
            }
            finish(&mut queue);
            assert_eq!(guest.used().len(), 2);
            let drops = vec![(DropReason::BadOffload, u64::from(!good))];
            Ledger { rx: (2, 360), drops, ..Ledger::default() }.check(queue.counters());
        }
    }
}

#[test]
fn intent_that_contradicts_the_frame_is_bad() {
    for (at, value) in [(1, 4), (1, 5), (4, 0), (6, 33), (8, 6), (12 + 23, 17), (12 + 12, 9)] {
        let mut guest = Guest::plain(BOTH[0], 8);
        let mut queue = transmitq(&guest, options(CSUM | HOST_TSO4 | HOST_TSO6 | HOST_USO));
        let mut bytes = [tso(256), tcp(600)].concat();
        guest.offer(&bytes, &[]);
        bytes[at] = value;
        bytes[5] = u8::from(at != 4);
        guest.offer(&bytes, &[]);
        assert_eq!(receive(&mut queue), [tcp(600)], "{at}");
        let drops = vec![(DropReason::BadOffload, 1)];
        Ledger { rx: (2, 1200), drops, ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn a_large_frame_may_be_as_large_as_a_packet_but_not_its_segments() {
    let mut guest = Guest::plain(BOTH[1], 16);
    let limits = QueueOptions { max_frame: 1518, ..options(CSUM | HOST_TSO4) };
    let mut queue = transmitq(&guest, limits);
    guest.offer(&[tso(1464), tcp(65_549)].concat(), &[12, 54, 4096]);
    guest.offer(&[tso(1465), tcp(65_549)].concat(), &[12]);
    guest.offer(&[tso(1465), tcp(1519)].concat(), &[12]);
    guest.offer(&[tso(1465), tcp(1518)].concat(), &[12]);
    guest.offer(&[vec![0; 12], tcp(1519)].concat(), &[12]);
    guest.offer(&[tso(1464), pattern(65_598, 0)].concat(), &[12]);
    let lens: Vec<usize> = receive(&mut queue).iter().map(Vec::len).collect();
    assert_eq!(lens, [65_549, 1518]);
    // So many bytes are two bursts.
    finish(&mut queue);
    assert!(receive(&mut queue).is_empty());
    let rx = (6, 65_549 * 2 + 1519 * 2 + 1518 + 65_598);
    let drops = vec![(DropReason::Oversize, 4)];
    Ledger { rx, drops, ..Ledger::default() }.check(queue.counters());
}

#[test]
fn a_writable_part_is_left_alone() {
    let mut guest = Guest::plain(BOTH[0], 8);
    let mut queue = transmitq(&guest, options(0));
    guest.offer_mixed(&[&[0; 12], &pattern(60, 0)[..]].concat(), 100);
    assert_eq!(receive(&mut queue), [pattern(60, 0)]);
    finish(&mut queue);
    assert_eq!(guest.used(), [vec![]]);
}

#[test]
fn a_broken_chain_ends_the_queue_after_the_good_ones() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, options(0));
        guest.transmit(&pattern(60, 0));
        guest.post_broken();
        let mut buf = FrameBuf::default();
        let batch = queue.receive(&mut buf);
        assert_eq!(batch.len(), 1);
        assert!(batch.fault().is_some());
        finish(&mut queue);
        assert_eq!(guest.used().len(), 1);
        assert!(queue.receive(&mut buf).fault().is_some());
        Ledger { rx: (1, 60), ..Ledger::default() }.check(queue.counters());
    }
}

#[test]
fn kicks_are_asked_for_only_while_armed() {
    for layout in BOTH {
        for event_idx in [false, true] {
            let features = RingFeatures { event_idx, ..RingFeatures::default() };
            let mut guest = Guest::new(layout, 8, features);
            let mut queue = transmitq(&guest, options(0));
            assert!(!queue.arm());
            guest.transmit(&pattern(60, 0));
            assert!(guest.queue.needs_kick(), "{layout:?} {event_idx}");
            let kick = queue.parts.kick.clone().unwrap();
            super::notify::signal(&kick);
            queue.disarm();
            assert_eq!(counter(&kick), 1, "it is not read here");
            assert_eq!(receive(&mut queue).len(), 1);
            finish(&mut queue);
            guest.transmit(&pattern(60, 1));
            assert!(!guest.queue.needs_kick(), "{layout:?} {event_idx}");
            assert!(queue.arm(), "there is a frame already");
        }
    }
}

/// Frames one by one, each of which may come while the device is about to sleep.
fn sleep_and_kick(layout: Layout, event_idx: bool, frames: usize) {
    let features = RingFeatures { event_idx, ..RingFeatures::default() };
    let mut guest = Guest::new(layout, 8, features);
    let mut queue = transmitq(&guest, options(0));
    let kick = queue.parts.kick.clone().unwrap();
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&set, &kick, epoll::EventData::new_u64(0), edges).unwrap();
    let theirs = std::sync::Arc::clone(&kick);
    let driver = std::thread::spawn(move || {
        for number in 0..frames {
            guest.transmit(&pattern(60, number));
            if guest.queue.needs_kick() {
                super::notify::signal(&theirs);
            }
            while guest.used().is_empty() {
                std::thread::yield_now();
            }
        }
    });
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    let (mut got, mut slept) = (0, 0);
    while got < frames {
        if !queue.arm() {
            let mut events = Vec::with_capacity(1);
            let space = rustix::buffer::spare_capacity(&mut events);
            let woken = epoll::wait(&set, space, Some(&patience)).unwrap();
            assert_eq!(woken, 1, "{layout:?} {event_idx}: asleep after {got} frames");
            slept += 1;
        }
        queue.disarm();
        got += receive(&mut queue).len();
        finish(&mut queue);
    }
    driver.join().unwrap();
    let kicks = counter(&kick);
    assert!(kicks > 0 && slept > 0, "{kicks} kicks, {slept} sleeps");
}

#[test]
fn no_kick_is_lost_though_nobody_reads_them() {
    for layout in BOTH {
        for event_idx in [false, true] {
            sleep_and_kick(layout, event_idx, 25_000);
        }
    }
}

#[test]
fn calls_are_made_only_when_the_driver_wants_them() {
    for layout in BOTH {
        for event_idx in [false, true] {
            let features = RingFeatures { event_idx, ..RingFeatures::default() };
            let mut guest = Guest::new(layout, 8, features);
            let mut queue = transmitq(&guest, options(0));
            let call = queue.parts.call.clone().unwrap();
            for wanted in [true, false, true, false] {
                if wanted {
                    assert!(!guest.queue.enable_calls());
                } else {
                    guest.queue.disable_calls();
                }
                for _ in 0..2 {
                    let _ = counter(&call);
                    guest.transmit(&pattern(60, 0));
                    assert_eq!(receive(&mut queue).len(), 1);
                    finish(&mut queue);
                    assert_eq!(guest.used().len(), 1);
                    // EVENT_IDX: the driver said once which entry it wants to hear of.
                    if !event_idx {
                        assert_eq!(counter(&call), u64::from(wanted), "{layout:?}");
                    }
                }
                if event_idx {
                    let _ = counter(&call);
                }
            }
        }
    }
}

#[test]
fn a_full_call_eventfd_does_not_block() {
    let mut guest = Guest::plain(BOTH[0], 8);
    let mut queue = transmitq(&guest, options(0));
    let call = queue.parts.call.clone().unwrap();
    let full = (u64::MAX - 1).to_ne_bytes();
    assert_eq!(rustix::io::write(&call, &full).unwrap(), 8);
    guest.transmit(&pattern(60, 0));
    assert_eq!(receive(&mut queue).len(), 1);
    finish(&mut queue);
    assert!(counter(&call) >= u64::MAX - 1, "the kernel's own signal counts one further");
}

#[test]
fn what_was_not_released_is_when_the_queue_is_taken_apart() {
    let mut guest = Guest::plain(BOTH[1], 8);
    let mut queue = transmitq(&guest, options(0));
    guest.transmit(&pattern(60, 0));
    assert_eq!(receive(&mut queue).len(), 1);
    let parts = queue.into_parts();
    assert_eq!(guest.used().len(), 1);
    let config = parts.queue.stop();
    let mut queue = super::Transmitq::new(super::TransmitqParts {
        watch: Default::default(),
        queue: config.activate(&guest.map).unwrap(),
        kick: parts.kick,
        call: parts.call,
        counters: parts.counters,
        options: parts.options,
    });
    guest.transmit(&pattern(60, 1));
    assert_eq!(receive(&mut queue), [pattern(60, 1)]);
}
