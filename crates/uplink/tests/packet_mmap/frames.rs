//! Frames that arrive, and what is in them.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use port::{DropReason, Egress, FrameBuf, Ingress};

use uplink::packet_mmap::KernelDrops;

use crate::namespace::{Namespace, open_with};
use crate::wakes::wakes;
use crate::{Two, numbered, pin, plain, send, take, totals};

/// Says which frame is another one.
fn check(arrived: &[Vec<u8>], sent: &[Vec<u8>]) {
    for (number, (arrived, sent)) in arrived.iter().zip(sent).enumerate() {
        assert!(arrived == sent, "frame {number}: {arrived:x?} is not {sent:x?}");
    }
    assert_eq!(arrived.len(), sent.len());
}

#[test]
fn frames_of_all_sizes_cross_both_ways_unchanged_and_in_order() {
    cross(Two::new(9000));
}

#[test]
fn frames_cross_with_the_headers_of_old_kernels_too() {
    cross(Two::with(9000, |settings| settings.short_header = true));
}

fn cross(mut two: Two) {
    let sizes: Vec<usize> = (60..320).chain([1514, 2000, 4096, 8192, 9000, 9014]).collect();
    let frames: Vec<_> = sizes.iter().enumerate().map(|(n, len)| numbered(n, *len)).collect();
    for (from, to) in [(&mut two.left, &mut two.right)] {
        for burst in frames.chunks(64) {
            send(&mut from.queues[0].1, &plain(burst.to_vec()));
        }
        check(&take(&mut to.queues[0].0, frames.len()), &frames);
        for burst in frames.chunks(7) {
            send(&mut to.queues[0].1, &plain(burst.to_vec()));
        }
        check(&take(&mut from.queues[0].0, frames.len()), &frames);
    }
    for end in [&two.left, &two.right] {
        let totals = totals(end.queues[0].0.counters());
        let bytes = frames.iter().map(Vec::len).sum::<usize>() as u64;
        assert_eq!((totals.rx_frames, totals.rx_bytes), (frames.len() as u64, bytes));
        assert_eq!((totals.tx_frames, totals.tx_bytes), (frames.len() as u64, bytes));
        assert_eq!(totals.dropped(), 0);
    }
}

#[test]
fn the_rings_go_round_many_times() {
    let mut two = Two::new(1500);
    let mut number = 0;
    for burst in 0..400 {
        let frames: Vec<_> = (0..64).map(|n| numbered(number + n, 60 + (n * 97) % 1400)).collect();
        number += frames.len();
        send(&mut two.left.queues[0].1, &plain(frames.clone()));
        let arrived = take(&mut two.right.queues[0].0, frames.len());
        let drops = two.right.kernel[0].kernel_drops();
        assert_eq!(drops, KernelDrops::default(), "burst {burst}");
        assert_eq!(totals(two.left.queues[0].1.counters()).dropped(), 0, "burst {burst}");
        check(&arrived, &frames);
    }
}

#[test]
fn tags_are_where_they_were() {
    let mut two = Two::new(1500);
    let tagged = |tags: &[u8], len| {
        let mut frame = numbered(tags.len(), len);
        drop(frame.splice(12..12, tags.iter().copied()));
        frame
    };
    // Of tags, the MTU leaves out one, and only that of a customer.
    let frames: Vec<_> = [60, 110, 124, 125, 128, 200, 1514]
        .into_iter()
        .flat_map(|len| {
            [
                tagged(&[0x81, 0, 0x20, 5], len),
                tagged(&[0x88, 0xa8, 0, 9], len.min(1510)),
                tagged(&[0x88, 0xa8, 0, 9, 0x81, 0, 0xe0, 6], len.min(1506)),
                tagged(&[0x81, 0, 0, 0], len),
            ]
        })
        .collect();
    send(&mut two.left.queues[0].1, &plain(frames.clone()));
    check(&take(&mut two.right.queues[0].0, frames.len()), &frames);
    assert_eq!(totals(two.left.queues[0].1.counters()).dropped(), 0);
}

#[test]
fn a_frame_above_the_mtu_is_dropped() {
    let mut two = Two::new(1500);
    let mut tagged = numbered(3, 1514);
    drop(tagged.splice(12..12, [0x81, 0, 0, 5]));
    let frames = vec![numbered(0, 1514), numbered(1, 1515), tagged.clone(), numbered(2, 60)];
    send(&mut two.left.queues[0].1, &plain(frames.clone()));
    let arrived = take(&mut two.right.queues[0].0, 3);
    assert_eq!(arrived, [frames[0].clone(), tagged, frames[3].clone()]);
    let totals = totals(two.left.queues[0].1.counters());
    assert_eq!((totals.tx_frames, totals.drops[DropReason::Oversize as usize]), (3, 1));
}

#[test]
fn flows_are_spread_over_the_queues_and_each_stays_in_one() {
    for queues in [1, 2, 4] {
        let (near, far) = (Namespace::new(), Namespace::new());
        near.pair("near0", &far, "far0", 1500);
        let (mac, peer) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
        far.address("far0", (mac, "10.9.0.1"), (peer, "10.9.0.2"));
        let mut port = near.open("near0", queues).unwrap();
        let sockets: Vec<_> =
            (0..320).map(|n| far.udp(&format!("10.9.0.1:{}", 3000 + n))).collect();
        for socket in &sockets {
            let _ = socket.send_to(b"hello", "10.9.0.2:7").unwrap();
        }
        let mut frames = FrameBuf::default();
        let mut seen = HashMap::new();
        let mut last = Instant::now();
        // Some time longer, so that a frame that comes twice is seen.
        while last.elapsed() < Duration::from_millis(if seen.len() < 320 { 2000 } else { 20 }) {
            for (queue, (ingress, _)) in port.queues.iter_mut().enumerate() {
                let batch = ingress.receive(&mut frames);
                for frame in batch.frames() {
                    let source = u16::from_be_bytes([frame.head()[34], frame.head()[35]]);
                    let before = seen.insert(source, queue);
                    assert_eq!(before, None, "port {source} came twice");
                    last = Instant::now();
                }
                ingress.release();
            }
        }
        assert_eq!(seen.len(), 320, "{queues} queues");
        let used = seen.values().collect::<HashSet<_>>().len();
        // Of 320 flows each queue gets some, whatever they are hashed with.
        assert_eq!(used, usize::from(queues), "queues that were used");
    }
}

#[test]
fn frames_that_the_host_sends_on_the_interface_are_not_taken() {
    for queues in [1, 2] {
        let (near, far) = (Namespace::new(), Namespace::new());
        near.pair("near0", &far, "far0", 1500);
        let (mac, peer) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
        near.address("near0", (mac, "10.9.0.1"), (peer, "10.9.0.2"));
        let mut port = near.open("near0", queues).unwrap();
        let socket = near.udp("10.9.0.1:9");
        for _ in 0..10 {
            let _ = socket.send_to(b"hello", "10.9.0.2:7").unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
        for (ingress, _) in &mut port.queues {
            assert!(!ingress.arm(), "{queues} queues");
            assert!(ingress.receive(&mut FrameBuf::default()).is_empty());
        }
    }
}

#[test]
fn what_nobody_takes_is_counted_once_by_the_kernel() {
    pin();
    let (near, far) = (Namespace::new(), Namespace::new());
    near.pair("near0", &far, "far0", 1500);
    let mut settings = near.settings("near0", 1);
    (settings.block_size, settings.blocks) = (16_384, 2);
    let mut port = open_with(&settings).unwrap();
    let mut other = far.open("far0", 1).unwrap();
    for burst in 0..10 {
        let frames = (0..64).map(|n| numbered(burst * 64 + n, 500));
        send(&mut other.queues[0].1, &plain(frames));
    }
    assert_eq!(totals(other.queues[0].1.counters()).tx_frames, 640);
    let drops = port.kernel[0].kernel_drops();
    assert!(drops.ring_full > 500 && drops.freezes > 0, "{drops:?}");
    assert_eq!(port.kernel[0].kernel_drops().ring_full, 0, "counted once");
    assert_eq!(port.kernel[0].freezes(), drops.freezes);
    let kept = 640 - drops.ring_full as usize;
    let first: Vec<_> = (0..kept).map(|n| numbered(n, 500)).collect();
    assert!(take(&mut port.queues[0].0, kept) == first, "the first ones were kept");
    let all = totals(port.queues[0].0.counters());
    assert_eq!((all.rx_frames, all.rx_bytes), (640, kept as u64 * 500));
    assert_eq!(all.drops[DropReason::KernelRingFull as usize], drops.ring_full);
    // And it goes on.
    send(&mut other.queues[0].1, &plain([numbered(7, 100)]));
    assert_eq!(take(&mut port.queues[0].0, 1), [numbered(7, 100)]);
}

#[test]
fn a_frame_that_a_block_cannot_hold_is_dropped_as_truncated() {
    pin();
    let (near, far) = (Namespace::new(), Namespace::new());
    near.pair("near0", &far, "far0", 9000);
    let mut settings = near.settings("near0", 1);
    (settings.block_size, settings.blocks) = (4096, 8);
    let mut port = open_with(&settings).unwrap();
    let mut other = far.open("far0", 1).unwrap();
    let frames = vec![numbered(0, 60), numbered(1, 5000), numbered(2, 3000)];
    send(&mut other.queues[0].1, &plain(frames.clone()));
    let arrived = take(&mut port.queues[0].0, 2);
    assert_eq!(arrived, [frames[0].clone(), frames[2].clone()]);
    let totals = totals(port.queues[0].0.counters());
    assert_eq!(totals.drops[DropReason::KernelTruncated as usize], 1);
    assert_eq!((totals.rx_frames, totals.dropped()), (3, 1));
}

#[test]
fn the_wake_up_says_whether_a_block_is_there() {
    let mut two = Two::new(1500);
    let ingress = &mut two.right.queues[0].0;
    assert!(!ingress.arm());
    let frames: Vec<_> = (0..70).map(|n| numbered(n, 60)).collect();
    for burst in frames.chunks(64) {
        send(&mut two.left.queues[0].1, &plain(burst.to_vec()));
    }
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        ingress.wake_fd().unwrap(),
        rustix::event::PollFlags::IN,
    )];
    let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&second)).unwrap(), 1);
    assert!(ingress.arm());
    let mut buffer = FrameBuf::default();
    let first = ingress.receive(&mut buffer).len();
    assert!((1..=64).contains(&first));
    ingress.release();
    assert_eq!(take(ingress, 70 - first).len(), 70 - first);
    assert!(!ingress.arm());
}

#[test]
fn frames_that_were_sent_wake_nobody() {
    let mut two = Two::new(1500);
    let (ingress, egress) = &mut two.left.queues[0];
    let frames: Vec<_> = (0..8).map(|number| numbered(number, 60)).collect();
    let wake = ingress.wake_fd().unwrap();
    assert!(!wakes(wake, Duration::ZERO, || send(egress, &plain(frames.clone()))));
    let (other, back) = &mut two.right.queues[0];
    assert_eq!(take(other, 8), frames);
    // It is the fd that frames come to, when the block is full or old enough.
    assert!(wakes(wake, Duration::from_secs(5), || send(back, &plain(frames))));
}
