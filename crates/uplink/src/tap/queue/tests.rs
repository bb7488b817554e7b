//! Queues over a datagram socket in the place of a tun device: no right is needed, and what the
//! kernel would refuse can be refused at will.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use port::{DropReason, Egress, FrameBuf, Ingress, OffloadSet, QueueCounters, QueueTotals};

use virtq::mem::{GatherBuf, Pool};

use super::{HEADER, Queue, TapEgress, TapIngress};

struct Bed {
    ingress: TapIngress,
    egress: TapEgress,
    host: UnixDatagram,
}

impl Bed {
    fn new() -> Self {
        Self::that_takes(OffloadSet::ALL)
    }

    fn that_takes(takes: OffloadSet) -> Self {
        let (ours, host) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let queue = Queue {
            fd: Arc::new(ours.into()),
            name: "t0".into(),
            mtu: Arc::new(AtomicU32::new(1500)),
            counters: Arc::default(),
            takes,
            found: None,
        };
        let ingress = TapIngress::new(queue.clone()).unwrap();
        Self { ingress, egress: TapEgress::new(queue), host }
    }

    fn counters(&self) -> &QueueCounters {
        self.ingress.counters()
    }

    fn totals(&self) -> QueueTotals {
        let mut totals = self.counters().read_ends();
        self.counters().read_rx(&mut totals);
        totals
    }

    /// The host sends: header and frame.
    fn give(&self, header: [u8; HEADER], frame: &[u8]) {
        let _ = self.host.send(&[&header, frame].concat()).unwrap();
    }
}

fn drops(totals: &QueueTotals, reason: DropReason) -> u64 {
    totals.drops[reason as usize]
}

#[test]
fn a_frame_goes_out_with_its_header_head_and_body() {
    let mut bed = Bed::new();
    let frame: Vec<u8> = (0..1000u32).map(|i| i.to_le_bytes()[0]).collect();
    bed.give([0; HEADER], &frame);
    let mut frames = FrameBuf::default();
    let batch = bed.ingress.receive(&mut frames);
    assert_eq!((batch.len(), batch.fault()), (1, None));
    bed.egress.send(&batch, &[0]).unwrap();
    let mut got = [0; 2000];
    let len = bed.host.recv(&mut got).unwrap();
    assert_eq!(&got[..HEADER], &[0; HEADER]);
    assert_eq!(&got[HEADER..len], &frame[..]);
    let totals = bed.totals();
    assert_eq!((totals.rx_bytes, totals.tx_bytes, totals.dropped()), (1000, 1000, 0));
}

#[test]
fn a_full_host_drops_with_its_reason() {
    let mut bed = Bed::new();
    let mut frames = FrameBuf::default();
    bed.give([0; HEADER], &[1; 1000]);
    let batch = bed.ingress.receive(&mut frames);
    let mut offered = 0;
    while drops(&bed.egress.counters().read_ends(), DropReason::UplinkBusy) == 0 {
        bed.egress.send(&batch, &[0]).unwrap();
        offered += 1;
    }
    let totals = bed.totals();
    assert_eq!(totals.tx_frames + totals.dropped(), offered);
    assert_eq!(totals.dropped(), 1);
    // As soon as there is room again, frames pass again.
    while bed.host.recv(&mut [0; 2000]).is_ok() {}
    let mut frames = FrameBuf::default();
    bed.give([0; HEADER], &[2; 60]);
    let batch = bed.ingress.receive(&mut frames);
    bed.egress.send(&batch, &[0]).unwrap();
    assert_eq!(bed.host.recv(&mut [0; 2000]).unwrap(), HEADER + 60);
}

#[test]
fn what_is_no_frame_is_counted_and_dropped() {
    let mut bed = Bed::new();
    bed.give([0; HEADER], &[1; 13]);
    let _ = bed.host.send(&[0; 5]).unwrap();
    let mut strange = [0; HEADER];
    strange[1] = 0x7f;
    bed.give(strange, &[1; 60]);
    bed.give([0; HEADER], &[1; 14]);
    let mut frames = FrameBuf::default();
    assert_eq!(bed.ingress.receive(&mut frames).len(), 1);
    let totals = bed.totals();
    assert_eq!((totals.rx_frames, totals.rx_bytes), (4, 13 + 60 + 14));
    assert_eq!(drops(&totals, DropReason::Runt), 2);
    assert_eq!(drops(&totals, DropReason::BadOffload), 1);
}

/// A TCP frame over IPv4 of `len` bytes, without checksums.
fn tcp(len: u16) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(len.saturating_sub(14).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.resize(usize::from(len), 7);
    frame
}

#[test]
fn what_contradicts_the_frame_is_dropped() {
    let mut bed = Bed::new();
    let right = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    // IPv6, a checksum elsewhere, in the addresses, outside of the frame's head.
    for (at, value) in [(1, 4), (8, 6), (6, 26), (6, 200), (4, 0)] {
        let mut wrong = right;
        wrong[at] = value;
        wrong[5] &= if at == 4 { 0 } else { 0xff };
        bed.give(wrong, &tcp(9000));
    }
    bed.give(right, &tcp(9000));
    let mut frames = FrameBuf::default();
    assert_eq!(bed.ingress.receive(&mut frames).len(), 1);
    assert_eq!(drops(&bed.totals(), DropReason::BadOffload), 5);
}

#[test]
fn a_frame_above_the_mtu_needs_a_tag_or_offload_to_pass() {
    let mut bed = Bed::new();
    let mut frames = FrameBuf::default();
    let mut tagged = vec![0; 1518];
    tagged[12..14].copy_from_slice(&[0x81, 0]);
    // TCP over IPv4, to be cut into segments of 1448 bytes.
    let large = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    bed.give([0; HEADER], &[1; 1515]);
    bed.give([0; HEADER], &tagged);
    bed.give(large, &tcp(9000));
    let mut too_large = large;
    too_large[4] += 13;
    bed.give(too_large, &tcp(9000));
    let batch = bed.ingress.receive(&mut frames);
    bed.egress.send(&batch, &[0, 1, 2, 3]).unwrap();
    let totals = bed.totals();
    assert_eq!((totals.tx_frames, drops(&totals, DropReason::Oversize)), (2, 2));
    let mut got = [0; 10_000];
    assert_eq!(bed.host.recv(&mut got).unwrap(), HEADER + 1518);
    assert_eq!(bed.host.recv(&mut got).unwrap(), HEADER + 9000);
    assert_eq!(&got[..HEADER], &large);
    assert_eq!(bed.host.recv(&mut got).unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// A guest may have given it in as many buffers, or frames were put together.
#[test]
fn a_large_frame_of_many_pieces_goes_out_whole() {
    let large = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    for pieces in [40, 61, 62, 63, 64, 100, 200] {
        let mut bed = Bed::new();
        let mut bytes = tcp(9000);
        bytes.iter_mut().skip(54).zip(0u32..).for_each(|(byte, i)| *byte = i.to_le_bytes()[0]);
        let (mut pool, mut gather) = (Pool::new(pieces, 256).unwrap(), GatherBuf::default());
        let each = bytes.len().div_ceil(usize::try_from(pieces).unwrap());
        let mut lens = Vec::new();
        for (slot, part) in (0..).zip(bytes.chunks(each)) {
            pool.slot_mut(slot).unwrap()[..part.len()].copy_from_slice(part);
            lens.push(u32::try_from(part.len()).unwrap());
        }
        let mut gather = gather.begin(pool.store());
        let parts = (0..).zip(&lens).map(|(slot, len)| gather.push(Pool::span(slot, 0, *len)));
        let len = parts.sum();
        let (whole, mut frames) = (gather.span(0, len), FrameBuf::default());
        let store = gather.finish();
        let offload = super::vnet::decode(&large).unwrap();
        assert!(frames.slot().unwrap().fill(store.reader(whole), whole, offload));
        frames.keep();
        bed.egress.send(&frames.batch(store, None), &[0]).unwrap();
        assert_eq!(bed.totals().dropped(), 0, "{pieces} pieces");
        let mut got = [0; 10_000];
        let count = bed.host.recv(&mut got).unwrap();
        assert!(got[HEADER..count] == bytes, "{pieces} pieces: {count} bytes");
    }
}

#[test]
fn a_kernel_without_uso_gets_datagrams() {
    let mut bed = Bed::that_takes(OffloadSet { uso: false, ..OffloadSet::ALL });
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0, 0x0b, 0xd4, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 7, 0, 7, 0x0b, 0xc0, 0, 0]);
    frame.resize(14 + 20 + 8 + 3000, 5);
    // USO with datagrams of 1000 bytes, behind headers of 42.
    bed.give([1, 5, 42, 0, 0xe8, 3, 34, 0, 6, 0, 0, 0], &frame);
    let mut frames = FrameBuf::default();
    let batch = bed.ingress.receive(&mut frames);
    bed.egress.send(&batch, &[0]).unwrap();
    for _ in 0..3 {
        let mut got = [0; 4000];
        assert_eq!(bed.host.recv(&mut got).unwrap(), HEADER + 42 + 1000);
        assert_eq!(got[1], 0, "no USO");
    }
    let totals = bed.totals();
    assert_eq!((totals.tx_frames, totals.segments_added, totals.dropped()), (3, 2, 0));
}
