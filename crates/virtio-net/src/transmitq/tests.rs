use std::sync::atomic::{Ordering, fence};

use port::{BURST_MAX, DropReason, FrameBuf, Gso, HEAD_MAX, Ingress};
use virtq::RingFeatures;

use super::Transmitq;
use crate::features::{CSUM, HOST_TSO4};
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

#[test]
fn offloads_that_were_not_negotiated_are_bad() {
    let header = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
    let frame = [&header[..], &pattern(300, 0)].concat();
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, options(0));
        guest.offer(&frame, &[]);
        guest.transmit(&pattern(60, 1));
        assert_eq!(receive(&mut queue), [pattern(60, 1)]);
        finish(&mut queue);
        assert_eq!(guest.used().len(), 2);
        let drops = vec![(DropReason::BadOffload, 1)];
        Ledger { rx: (2, 360), drops, ..Ledger::default() }.check(queue.counters());

        let mut guest = Guest::plain(layout, 8);
        let mut queue = transmitq(&guest, options(CSUM | HOST_TSO4));
        guest.offer(&frame, &[]);
        let mut buf = FrameBuf::default();
        let batch = queue.receive(&mut buf);
        let offload = batch.frames()[0].offload;
        assert_eq!((offload.gso, offload.gso_size, offload.csum_start), (Gso::TcpV4, 100, 34));
    }
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
            super::notify::signal(Some(&kick));
            queue.disarm();
            assert_eq!(counter(&kick), 0, "the kick is still there");
            assert_eq!(receive(&mut queue).len(), 1);
            finish(&mut queue);
            guest.transmit(&pattern(60, 1));
            assert!(!guest.queue.needs_kick(), "{layout:?} {event_idx}");
            assert!(queue.arm(), "there is a frame already");
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
    assert_eq!(counter(&call), u64::MAX - 1);
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
        queue: config.activate(&guest.map).unwrap(),
        kick: parts.kick,
        call: parts.call,
        counters: parts.counters,
        options: parts.options,
    });
    guest.transmit(&pattern(60, 1));
    assert_eq!(receive(&mut queue), [pattern(60, 1)]);
}
