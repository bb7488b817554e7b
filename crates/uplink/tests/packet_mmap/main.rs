//! Packet sockets on real veth pairs in namespaces of their own. Needs root; says so if it is
//! missing.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test code"
)]

mod faults;
mod frames;
mod handover;
mod namespace;
mod offloads;
#[path = "../common/pin.rs"]
mod pin;
#[path = "../common/wakes.rs"]
mod wakes;

use std::time::{Duration, Instant};

use port::{
    Adapter, Batch, DropReason, Egress, Frame, FrameBuf, Ingress, Offload, OffloadSet,
    QueueCounters, QueueTotals, Way,
};
use uplink::packet_mmap::{PacketMmap, PacketMmapSettings};
use virtq::mem::Pool;

use namespace::{Namespace, open_with};
use pin::pin;

/// Both ends of a veth pair, each open.
struct Two {
    left: PacketMmap,
    right: PacketMmap,
    left_namespace: Namespace,
    _right_namespace: Namespace,
}

impl Two {
    fn new(mtu: u32) -> Self {
        Self::with(mtu, |_| ())
    }

    /// The same with other settings.
    fn with(mtu: u32, change: impl Fn(&mut PacketMmapSettings)) -> Self {
        pin();
        let (left_namespace, right_namespace) = (Namespace::new(), Namespace::new());
        left_namespace.pair("left0", &right_namespace, "right0", mtu);
        let open = |namespace: &Namespace, name: &str| {
            let mut settings = namespace.settings(name, 1);
            change(&mut settings);
            open_with(&settings).unwrap()
        };
        let left = open(&left_namespace, "left0");
        let right = open(&right_namespace, "right0");
        Self { left, right, left_namespace, _right_namespace: right_namespace }
    }
}

fn totals(counters: &QueueCounters) -> QueueTotals {
    let mut totals = counters.read_ends();
    counters.read_rx(&mut totals);
    totals
}

/// Sends frames in one burst.
fn send(to: &mut impl Egress, frames: &[(Vec<u8>, Offload)]) {
    let largest = frames.iter().map(|(bytes, _)| bytes.len()).max().unwrap_or(0);
    let slot = largest.next_multiple_of(64) as u32;
    let mut pool = Pool::new(frames.len() as u32, slot).unwrap();
    for (number, (bytes, _)) in frames.iter().enumerate() {
        pool.slot_mut(number as u32).unwrap()[..bytes.len()].copy_from_slice(bytes);
    }
    let mut buffer = FrameBuf::default();
    for (number, (bytes, offload)) in frames.iter().enumerate() {
        let span = Pool::span(number as u32, 0, bytes.len() as u32);
        let frame: &mut Frame = buffer.slot().unwrap();
        assert!(frame.fill(pool.store().reader(span), span, *offload));
        buffer.keep();
    }
    let picked: Vec<u16> = (0..frames.len() as u16).collect();
    to.send(&buffer.batch(pool.store(), None), &picked).unwrap();
}

fn plain(frames: impl IntoIterator<Item = Vec<u8>>) -> Vec<(Vec<u8>, Offload)> {
    frames.into_iter().map(|bytes| (bytes, Offload::default())).collect()
}

/// Takes frames until `count` came, or none came for long: as an egress gets them that takes
/// nothing unfinished.
fn take(from: &mut impl Ingress, count: usize) -> Vec<Vec<u8>> {
    let (counters, mut adapter) = (QueueCounters::default(), Adapter::default());
    let way =
        Way { takes: OffloadSet::NONE, lost: DropReason::UplinkError, counters: &counters.egress };
    let mut taken = Vec::new();
    until(from, |batch| {
        let picked: Vec<u16> = (0..batch.len() as u16).collect();
        let adapted = adapter.send(batch, &picked, &way, |batch, picked| {
            for index in picked {
                let frame = &batch.frames()[usize::from(*index)];
                assert!(frame.offload.is_none());
                taken.push(bytes_of(batch, frame));
            }
            Ok(())
        });
        adapted.unwrap();
        taken.len() >= count
    });
    taken
}

/// Takes `count` frames as they come, with what is left to do.
fn take_whole(from: &mut impl Ingress, count: usize) -> Vec<(Vec<u8>, Offload)> {
    let mut taken = Vec::new();
    until(from, |batch| {
        taken.extend(batch.frames().iter().map(|frame| (bytes_of(batch, frame), frame.offload)));
        taken.len() >= count
    });
    taken
}

/// Receives until `enough` says so of a batch, or nothing came for long.
fn until(from: &mut impl Ingress, mut enough: impl FnMut(&Batch<'_>) -> bool) {
    let mut buffer = FrameBuf::default();
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(2) {
        let batch = from.receive(&mut buffer);
        assert_eq!(batch.fault(), None);
        if !batch.is_empty() {
            last = Instant::now();
        }
        let done = enough(&batch);
        from.release();
        if done {
            return;
        }
    }
}

fn bytes_of(batch: &Batch<'_>, frame: &Frame) -> Vec<u8> {
    let mut bytes = frame.head().to_vec();
    let mut body = vec![0; frame.body.len as usize];
    assert_eq!(batch.body(frame).read(&mut body), body.len());
    bytes.extend(body);
    bytes
}

/// A frame of `len` bytes with a number in it.
fn numbered(number: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    frame.extend((14..len).map(|at| (at * 7 + number * 13 + at / 256) as u8));
    frame
}
