//! `AF_XDP` on real veth pairs, in namespaces of their own.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test code"
)]

mod handover;
mod hosts;
mod large;
mod namespace;
mod opening;
#[path = "../common/pin.rs"]
mod pin;
mod restore;
mod umem;
#[path = "../common/wakes.rs"]
mod wakes;
mod whole;

use std::time::{Duration, Instant};

use namespace::{Namespace, open_with};
use packet::MacAddr;
use pin::pin;
use port::{
    Adapter, Batch, DropReason, Egress, FrameBuf, Ingress, Offload, OffloadSet, QueueCounters,
    QueueFault, QueueTotals, Way,
};
use uplink::af_xdp::{AfXdp, AfXdpEgress, AfXdpIngress, AfXdpSettings, Mode, Obtained, Steer};
use uplink::interface::LinkState;
use virtq::mem::{Pool, SegStore};
use wakes::wakes;

const LEFT_MAC: &str = "02:00:00:00:00:01";
const RIGHT_MAC: &str = "02:00:00:00:00:02";

fn totals(counters: &QueueCounters) -> QueueTotals {
    let mut totals = counters.read_ends();
    counters.read_rx(&mut totals);
    totals
}

/// Sends the frames, head and body, as one burst.
fn send(egress: &mut AfXdpEgress, wanted: &[Vec<u8>], offload: Offload) {
    let mut pool = Pool::new(64, 16_384).unwrap();
    let mut frames = FrameBuf::default();
    for (slot, bytes) in (0..).zip(wanted) {
        pool.slot_mut(slot).unwrap()[..bytes.len()].copy_from_slice(bytes);
        let span = Pool::span(slot, 0, bytes.len() as u32);
        let frame = frames.slot().unwrap();
        assert!(frame.fill(pool.store().reader(span), span, offload));
        frames.keep();
    }
    let picked: Vec<u16> = (0..wanted.len() as u16).collect();
    egress.send(&frames.batch(pool.store(), None), &picked).unwrap();
    let _ = egress.notify();
}

fn bytes_of(batch: &Batch<'_>, index: usize) -> Vec<u8> {
    let frame = &batch.frames()[index];
    let mut bytes = frame.head().to_vec();
    let mut body = vec![0; frame.body.len as usize];
    assert_eq!(batch.body(frame).read(&mut body), body.len());
    bytes.extend(body);
    bytes
}

/// Takes frames until there were `count`, or none came for a while: as an egress gets them that
/// takes nothing unfinished.
fn take(ingress: &mut AfXdpIngress, count: usize) -> Vec<Vec<u8>> {
    let (counters, mut adapter) = (QueueCounters::default(), Adapter::default());
    let way =
        Way { takes: OffloadSet::NONE, lost: DropReason::UplinkError, counters: &counters.egress };
    let mut frames = FrameBuf::default();
    let mut got = Vec::new();
    let mut last = Instant::now();
    while got.len() < count && last.elapsed() < Duration::from_secs(2) {
        let batch = ingress.receive(&mut frames);
        assert_eq!(batch.fault(), None);
        let picked: Vec<u16> = (0..batch.len() as u16).collect();
        let adapted = adapter.send(&batch, &picked, &way, |batch, picked| {
            got.extend(picked.iter().map(|index| bytes_of(batch, usize::from(*index))));
            Ok(())
        });
        adapted.unwrap();
        if !batch.is_empty() {
            last = Instant::now();
        }
        ingress.release();
        let _ = ingress.notify();
    }
    got
}

/// A frame of a local experiment, whose bytes depend on its length and `seed`.
fn frame(len: usize, seed: usize, tag: bool) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if tag {
        bytes.extend([0x81, 0, 0x20, 100]);
    }
    bytes.extend([0x88, 0xb5]);
    let rest = len - bytes.len();
    bytes.extend((0..rest).map(|i| (i * 7 + len + seed * 13) as u8));
    bytes
}

/// Both ends of a pair, opened with the same settings.
fn pair(queues: u16, mtu: u32, change: impl Fn(&mut AfXdpSettings)) -> (Namespace, [AfXdp; 2]) {
    pin();
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), queues, mtu);
    let open = |name| {
        let mut settings = AfXdpSettings { queues, ..namespace.settings(name) };
        change(&mut settings);
        open_with(&settings).unwrap()
    };
    let ends = [open("left0"), open("right0")];
    (namespace, ends)
}

#[test]
fn frames_of_all_sizes_cross_unchanged_in_order_both_ways() {
    for mode in [Mode::Auto, Mode::Copy, Mode::Generic] {
        let (_namespace, [mut left, mut right]) = pair(1, 9000, |settings| settings.mode = mode);
        // Of the pair, `generic` lets large frames pass whole.
        let obtained = if mode == Mode::Copy { Obtained::Copy } else { Obtained::Generic };
        assert_eq!((left.control.mode(), right.control.mode()), (obtained, obtained));
        let sizes: Vec<usize> = (60..200)
            .chain([1514, 1518, 1791, 1792, 1793, 1983, 1984, 1985, 2048, 3584, 4096, 9000, 9014])
            .collect();
        let wanted: Vec<_> =
            sizes.iter().enumerate().map(|(i, len)| frame(*len, i, i % 3 == 0)).collect();
        for _ in 0..2 {
            for burst in wanted.chunks(32) {
                send(&mut left.queues[0].1, burst, Offload::default());
                let got = take(&mut right.queues[0].0, burst.len());
                assert!(got == burst, "{mode:?}: {} of {} frames", got.len(), burst.len());
            }
            std::mem::swap(&mut left, &mut right);
        }
        for end in [&left, &right] {
            let totals = totals(end.queues[0].0.counters());
            let bytes = wanted.iter().map(|frame| frame.len() as u64).sum::<u64>();
            assert_eq!((totals.rx_frames, totals.rx_bytes), (wanted.len() as u64, bytes));
            assert_eq!((totals.tx_frames, totals.tx_bytes), (wanted.len() as u64, bytes));
            assert_eq!(totals.dropped(), 0);
            assert_eq!(
                end.control.kernel_drops().unwrap(),
                [uplink::af_xdp::KernelDrops::default()]
            );
        }
    }
}

#[test]
fn no_chunk_is_lost_in_a_hundred_rounds_of_the_ring() {
    let (_namespace, [mut left, mut right]) = pair(1, 9000, |_| {});
    for round in 0..1600 {
        let large = round % 7 == 0;
        let burst: Vec<_> =
            (0..64).map(|i| frame(if large { 8000 } else { 60 + i }, round, false)).collect();
        let parts = if large { 16 } else { 64 };
        for burst in burst.chunks(parts) {
            send(&mut left.queues[0].1, burst, Offload::default());
            assert!(take(&mut right.queues[0].0, burst.len()) == burst, "round {round}");
        }
    }
    // All chunks to send are free again: a full ring goes at once.
    let burst: Vec<_> = (0..64).map(|i| frame(60 + i, 1, false)).collect();
    for _ in 0..16 {
        send(&mut left.queues[0].1, &burst, Offload::default());
    }
    assert_eq!(take(&mut right.queues[0].0, 1024).len(), 1024);
    assert_eq!(totals(left.queues[0].1.counters()).dropped(), 0);
}

#[test]
fn frames_that_nobody_takes_are_dropped_by_the_kernel_and_counted() {
    let (_namespace, [mut left, mut right]) = pair(1, 1500, |_| {});
    let burst: Vec<_> = (0..64).map(|i| frame(60, i, false)).collect();
    for _ in 0..96 {
        send(&mut left.queues[0].1, &burst, Offload::default());
    }
    assert_eq!(totals(left.queues[0].1.counters()).tx_frames, 6144);
    let drops = right.control.kernel_drops().unwrap()[0];
    let reasons = drops.by_reason().map(|(_, count)| count);
    assert_eq!(reasons, [drops.ring_full, drops.no_buffer]);
    assert_eq!(drops.ring_full + drops.no_buffer, 2048, "{drops:?}");
    assert_eq!(take(&mut right.queues[0].0, 4096).len(), 4096);
    send(&mut left.queues[0].1, &burst, Offload::default());
    assert!(take(&mut right.queues[0].0, 64) == burst);
}

/// Whatever waits, a burst ends with the frame that reaches the bound of bytes.
#[test]
fn a_burst_of_jumbo_frames_has_a_bound_of_bytes() {
    const LEN: usize = 9000;
    let (_namespace, [mut left, mut right]) = pair(1, 9000, |_| {});
    let wanted: Vec<_> = (0..40).map(|seed| frame(LEN, seed, false)).collect();
    send(&mut left.queues[0].1, &wanted, Offload::default());
    let (mut buffer, mut bursts) = (FrameBuf::default(), Vec::new());
    let ingress = &mut right.queues[0].0;
    let start = Instant::now();
    while bursts.iter().sum::<usize>() < wanted.len() {
        assert!(start.elapsed() < Duration::from_secs(10), "{bursts:?}");
        let batch = ingress.receive(&mut buffer);
        assert_eq!(batch.fault(), None);
        bursts.extend(Some(batch.len()).filter(|count| *count > 0));
        ingress.release();
    }
    let bound = usize::try_from(port::BURST_BYTES).unwrap().div_ceil(LEN);
    assert!(bursts.iter().all(|count| *count <= bound), "{bursts:?}, {bound} are allowed");
}

#[test]
fn each_queue_has_its_own_way() {
    for queues in [1, 2, 4] {
        let (_namespace, [mut left, mut right]) = pair(queues, 1500, |_| {});
        assert_eq!(left.queues.len(), usize::from(queues));
        for queue in 0..usize::from(queues) {
            let burst: Vec<_> = (0..64).map(|i| frame(60 + i, queue, false)).collect();
            send(&mut left.queues[queue].1, &burst, Offload::default());
            for other in 0..usize::from(queues) {
                let ingress = &mut right.queues[other].0;
                if other == queue {
                    assert!(take(ingress, 64) == burst, "queue {queue} of {queues}");
                } else {
                    assert!(!ingress.arm(), "queue {other} got frames of {queue}");
                    ingress.disarm();
                }
            }
        }
    }
}

#[test]
fn zero_copy_is_refused_where_the_driver_has_none() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let settings = AfXdpSettings { mode: Mode::ZeroCopy, ..namespace.settings("left0") };
    let error = open_with(&settings).unwrap_err();
    assert_eq!(
        error.to_string(),
        "interface left0 (driver veth) has no zero-copy: use mode=copy or mode=auto"
    );
    assert!(!namespace.ip(&["link", "show", "left0"]).contains("xdp"));
}

#[test]
fn a_frame_above_the_mtu_is_dropped() {
    let (namespace, [mut left, mut right]) = pair(1, 1500, |_| {});
    let frames = [frame(1514, 1, false), frame(1515, 2, false), frame(1518, 3, true)];
    send(&mut left.queues[0].1, &frames, Offload::default());
    let got = take(&mut right.queues[0].0, 2);
    assert!(got == [frames[0].clone(), frames[2].clone()]);
    assert_eq!(totals(left.queues[0].1.counters()).drops[DropReason::Oversize as usize], 1);
    let _ = namespace.ip(&["link", "set", "left0", "mtu", "1600"]);
    let _ = namespace.ip(&["link", "set", "right0", "mtu", "1600"]);
    let _ = left.link.check();
    send(&mut left.queues[0].1, &frames[1..2], Offload::default());
    assert!(take(&mut right.queues[0].0, 1) == frames[1..2]);
}

#[test]
fn an_interface_that_is_down_drops_and_recovers() {
    let (namespace, [mut left, mut right]) = pair(1, 1500, |_| {});
    let burst: Vec<_> = (0..8).map(|i| frame(60, i, false)).collect();
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    for _ in 0..3 {
        send(&mut left.queues[0].1, &burst, Offload::default());
    }
    let drops = totals(left.queues[0].1.counters()).drops;
    assert_eq!(drops[DropReason::UplinkError as usize], 16, "all but the first burst");
    let _ = namespace.ip(&["link", "set", "left0", "up"]);
    send(&mut left.queues[0].1, &burst, Offload::default());
    // The first burst waited in the ring.
    let got = take(&mut right.queues[0].0, 16);
    assert!(got == [burst.clone(), burst].concat(), "{} frames", got.len());
}

/// The kernel takes frames without a carrier, and drops them one a call. They were counted as sent:
/// each becomes a drop when another frame is sent, so that no counter ever falls.
#[test]
fn without_a_carrier_frames_are_dropped_and_not_sent() {
    let (namespace, [mut left, mut right]) = pair(1, 9000, |_| {});
    let wanted: Vec<_> = [60, 8000, 1514].map(|len| frame(len, 1, false)).into();
    let counts = |end: &AfXdp| {
        let totals = totals(end.queues[0].1.counters());
        (totals.tx_frames, totals.tx_bytes, totals.drops[DropReason::UplinkError as usize])
    };
    let at_kernel = |end: &AfXdp| end.link.tx_dropped().unwrap();
    send(&mut left.queues[0].1, &wanted[..1], Offload::default());
    assert!(take(&mut right.queues[0].0, 1) == wanted[..1]);
    let _ = namespace.ip(&["link", "set", "right0", "down"]);
    // Nobody has told the queues.
    send(&mut left.queues[0].1, &wanted, Offload::default());
    assert_eq!((counts(&left), at_kernel(&left)), ((4, 60 + 9574, 0), 3));
    // Now they know: no call to the kernel.
    assert_eq!(left.link.check(), LinkState::NoCarrier);
    send(&mut left.queues[0].1, &wanted, Offload::default());
    assert_eq!((counts(&left), at_kernel(&left)), ((4, 60 + 9574, 3), 3));
    // What waits in the ring is lost to who looks after it.
    let _ = namespace.ip(&["link", "set", "right0", "up"]);
    assert_eq!(left.link.check(), LinkState::Up);
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    send(&mut left.queues[0].1, &wanted, Offload::default());
    assert_eq!(counts(&left), (4, 60 + 9574, 6));
    let _ = namespace.ip(&["link", "set", "right0", "down"]);
    let _ = namespace.ip(&["link", "set", "left0", "up"]);
    for _ in 0..2 {
        left.control.nudge();
    }
    let _ = namespace.ip(&["link", "set", "right0", "up"]);
    assert_eq!(left.link.check(), LinkState::Up);
    send(&mut left.queues[0].1, &wanted[..1], Offload::default());
    assert!(take(&mut right.queues[0].0, 2) == [wanted[2].clone(), wanted[0].clone()]);
    let frames_and_drops = |end: &AfXdp| {
        let (frames, _, dropped) = counts(end);
        (frames, dropped)
    };
    assert_eq!((frames_and_drops(&left), at_kernel(&left)), ((4, 7), 5));
    for expected in [(4, 8), (5, 8)] {
        send(&mut left.queues[0].1, &wanted[..1], Offload::default());
        assert_eq!(frames_and_drops(&left), expected);
    }
}

#[test]
fn a_deleted_interface_is_a_host_fault_on_both_ways() {
    let (namespace, [mut left, _right]) = pair(1, 1500, |_| {});
    let _ = namespace.ip(&["link", "del", "left0"]);
    let (ingress, egress) = &mut left.queues[0];
    assert!(ingress.arm(), "there is a fault to be told");
    let mut frames = FrameBuf::default();
    let fault = ingress.receive(&mut frames).fault().cloned().unwrap();
    let QueueFault::Host { what, error } = fault else { panic!("{fault}") };
    assert_eq!(what, "receive from interface left0");
    assert!(error.starts_with("No such device or address"), "{error}");
    let mut result = Ok(());
    for _ in 0..2 {
        frames.clear();
        frames.slot().unwrap().fill_private(&[2; 60]);
        frames.keep();
        result = egress.send(&frames.batch(SegStore::empty(), None), &[0]);
        let _ = egress.notify();
    }
    let QueueFault::Host { what, .. } = result.unwrap_err() else { panic!("not a host fault") };
    assert_eq!(what, "send to interface left0");
}

#[test]
fn the_wake_up_says_whether_frames_are_there() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    for busy_poll in [false, true] {
        let (_namespace, [mut left, mut right]) =
            pair(1, 1500, |settings| settings.busy_poll = busy_poll);
        let ingress = &mut right.queues[0].0;
        let readable = |ingress: &AfXdpIngress| {
            let fd = ingress.wake_fd().unwrap();
            let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&wait)).unwrap() > 0
        };
        assert!(!ingress.arm());
        assert!(!readable(ingress));
        let burst: Vec<_> = (0..40).map(|i| frame(60 + i, i, false)).collect();
        send(&mut left.queues[0].1, &burst, Offload::default());
        send(&mut left.queues[0].1, &burst, Offload::default());
        assert!(readable(ingress) && ingress.arm());
        ingress.disarm();
        let mut frames = FrameBuf::default();
        // A poll of the driver is for 64 frames, and another CPU may be at it just now.
        let mut got = 0;
        while got < 80 {
            assert!(ingress.arm() || readable(ingress), "{got} of 80");
            let count = ingress.receive(&mut frames).len();
            assert!(busy_poll || count == 80.min(got + 64) - got, "{count} behind {got}");
            got += count;
            ingress.release();
        }
        assert_eq!(got, 80);
        assert!(!ingress.arm() && !readable(ingress));
    }
}

#[test]
fn with_steer_mac_the_kernel_keeps_what_is_not_ours() {
    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 9];
    let (left, middle) = (Namespace::new(), Namespace::new());
    left.veth("host0", (&middle, "left0"), 1, 1500);
    left.address("host0", LEFT_MAC, "10.9.0.1/24");
    middle.address("left0", RIGHT_MAC, "10.9.0.2/24");
    left.neighbour("host0", "10.9.0.2", RIGHT_MAC);
    left.neighbour("host0", "10.9.0.9", "02:00:00:00:00:09");
    left.neighbour("host0", "10.9.0.8", "02:00:00:00:00:08");
    let settings = AfXdpSettings { steer: Steer::Mac, ..middle.settings("left0") };
    let mut end = open_with(&settings).unwrap();
    let kernel = middle.udp("10.9.0.2:7");
    let sender = left.udp("10.9.0.1:7");
    sender.set_broadcast(true).unwrap();
    let seen = |end: &mut AfXdp| {
        for to in ["10.9.0.2:7", "10.9.0.9:7", "10.9.0.8:7", "10.9.0.255:7"] {
            let _ = sender.send_to(to.as_bytes(), to).unwrap();
        }
        let mut got = [0; 100];
        let count = kernel.recv(&mut got).unwrap();
        assert_eq!(&got[..count], b"10.9.0.2:7");
        assert!(kernel.recv(&mut got).is_err(), "one datagram was for the kernel");
        let mut frames = FrameBuf::default();
        let batch = end.queues[0].0.receive(&mut frames);
        let got: Vec<[u8; 6]> =
            batch.frames().iter().map(|frame| *frame.head().first_chunk().unwrap()).collect();
        drop(batch);
        end.queues[0].0.release();
        got
    };
    assert_eq!(seen(&mut end), [[0xff; 6]]);
    end.control.set_macs(&[MacAddr(OURS), MacAddr([2, 0, 0, 0, 0, 7])]).unwrap();
    assert_eq!(seen(&mut end), [OURS, [0xff; 6]]);
    end.control.set_macs(&[MacAddr([2, 0, 0, 0, 0, 8])]).unwrap();
    assert_eq!(seen(&mut end), [[2, 0, 0, 0, 0, 8], [0xff; 6]]);
}

#[test]
fn frames_that_were_sent_wake_nobody() {
    let (_namespace, [mut left, mut right]) = pair(1, 1500, |_| ());
    let (ingress, egress) = &mut left.queues[0];
    let frames = [frame(60, 1, false), frame(1514, 2, false)];
    let wake = ingress.wake_fd().unwrap();
    assert!(!wakes(wake, Duration::ZERO, || send(egress, &frames, Offload::default())));
    assert_eq!(take(&mut right.queues[0].0, 2), frames);
    // It is the fd that frames come to.
    let back = &mut right.queues[0].1;
    assert!(wakes(wake, Duration::from_secs(5), || send(back, &frames, Offload::default())));
}
