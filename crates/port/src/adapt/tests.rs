#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use packet::{Checksum, Ipv4, Tcp, checksum};
use virtq::mem::Pool;

use super::{Adapter, Way};
use crate::{BURST_MAX, DropReason, FrameBuf, Gso, Offload, OffloadSet, QueueCounters, QueueFault};

const HEADERS: usize = 14 + 20 + 20;

/// A TCP frame over IPv4 whose checksum field holds the sum of the pseudo header.
fn tcp(payload: usize) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((40 + payload as u16).to_be_bytes());
    frame.extend([0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 9, 0, 0, 0, 1, 0x50, 0x18, 1, 2, 0, 0, 0, 0]);
    let mut pseudo = Checksum::default();
    pseudo.add(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 6]);
    pseudo.add(&(20 + payload as u16).to_be_bytes());
    frame[50..52].copy_from_slice(&pseudo.sum().to_be_bytes());
    frame.extend((0..payload).map(|i| (i * 31 + i / 256) as u8));
    frame
}

fn csum() -> Offload {
    Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() }
}

fn tso(gso_size: u16) -> Offload {
    Offload { gso: Gso::TcpV4, gso_size, hdr_len: 54, ..csum() }
}

fn is_right(frame: &[u8]) -> bool {
    let ip = Ipv4::parse(&frame[14..]).unwrap();
    let mut sum = Checksum::default();
    sum.add(&frame[26..34]);
    sum.add(&[0, 6]);
    sum.add(&((frame.len() - 34) as u16).to_be_bytes());
    sum.add(&frame[34..]);
    ip.checksum_ok() && usize::from(ip.total_len()) + 14 == frame.len() && sum.finish() == 0
}

/// What came of each call of the egress's own function.
type Runs = Vec<Vec<(Vec<u8>, Offload)>>;

/// Sends `frames` through an adapter to an egress that takes `takes`, and faults at call `fault`.
fn send(
    frames: &[(Vec<u8>, Offload)],
    takes: OffloadSet,
    fault: usize,
) -> (Runs, QueueCounters, Result<(), QueueFault>) {
    let mut pool = Pool::new(frames.len() as u32, 1 << 17).unwrap();
    let mut buf = FrameBuf::default();
    for (slot, (bytes, _)) in (0u32..).zip(frames) {
        pool.slot_mut(slot).unwrap()[..bytes.len()].copy_from_slice(bytes);
    }
    for (slot, (bytes, offload)) in (0u32..).zip(frames) {
        let span = Pool::span(slot, 0, bytes.len() as u32);
        assert!(buf.slot().unwrap().fill(pool.store().reader(span), span, *offload));
        buf.keep();
    }
    let batch = buf.batch(pool.store(), None);
    let picked: Vec<u16> = (0..frames.len() as u16).collect();
    let counters = QueueCounters::default();
    let way = Way { takes, lost: DropReason::PortDown, counters: &counters.egress };
    let mut runs = Runs::new();
    let result = Adapter::default().send(&batch, &picked, &way, |batch, picked| {
        if runs.len() == fault {
            counters.egress.dropped(DropReason::UplinkError, picked.len() as u64);
            return Err(QueueFault::Host { what: "send".into(), error: "gone".into() });
        }
        let one = |index: &u16| {
            let frame = &batch.frames()[usize::from(*index)];
            let mut bytes = frame.head().to_vec();
            let mut body = vec![0; frame.body.len as usize];
            assert_eq!(batch.body(frame).read(&mut body), body.len());
            bytes.extend(body);
            (bytes, frame.offload)
        };
        runs.push(picked.iter().map(one).collect());
        counters.egress.sent(picked.len() as u64, 0);
        Ok(())
    });
    // The law, for one egress.
    assert_eq!(counters.egress.ended(), frames.len() as u64);
    (runs, counters, result)
}

#[test]
fn what_fits_is_sent_as_it_is_in_one_run() {
    let frames = [(tcp(10), csum()), (tcp(5000), tso(1000)), (tcp(3), Offload::default())];
    let (runs, counters, _) = send(&frames, OffloadSet::ALL, usize::MAX);
    assert_eq!(runs, [frames.to_vec()]);
    assert_eq!(counters.read_ends().dropped(), 0);
}

#[test]
fn a_partial_checksum_is_finished_for_who_takes_none() {
    for payload in [0, 1, 60, 74, 75, 1000, 1449, 9000] {
        let frames = [(tcp(payload), csum())];
        let (runs, ..) = send(&frames, OffloadSet::NONE, usize::MAX);
        let (bytes, offload) = &runs[0][0];
        assert!(is_right(bytes) && *offload == Offload::default(), "{payload} bytes");
        assert_eq!(bytes[HEADERS..], frames[0].0[HEADERS..]);
    }
}

#[test]
fn a_large_frame_is_cut_for_who_takes_none() {
    for size in [1, 7, 74, 75, 536, 1000, 1448, 8948, 40_000] {
        let whole = if size < 500 { 600 } else { 64_000 };
        let plain = (tcp(4), Offload::default());
        let frames = [plain.clone(), (tcp(whole), tso(size)), plain.clone(), (tcp(99), csum())];
        for (takes, partial) in [
            (OffloadSet::NONE, false),
            (OffloadSet { csum: true, ..OffloadSet::NONE }, true),
            (OffloadSet { tso4: false, ..OffloadSet::ALL }, true),
            (OffloadSet { csum: false, ..OffloadSet::ALL }, false),
        ] {
            let (runs, counters, _) = send(&frames, takes, usize::MAX);
            assert!(runs.iter().all(|run| run.len() <= BURST_MAX));
            let all: Vec<_> = runs.concat();
            let count = whole.div_ceil(usize::from(size));
            assert_eq!(all.len(), count + 3);
            assert_eq!((&all[0], &all[count + 1]), (&plain, &plain));
            let mut payload: Vec<u8> = Vec::new();
            for (bytes, offload) in &all[1..=count] {
                assert!(bytes.len() <= HEADERS + usize::from(size));
                assert_eq!(Tcp::parse(&bytes[34..]).unwrap().sequence(), 9 + payload.len() as u32);
                payload.extend(&bytes[HEADERS..]);
                if partial {
                    assert_eq!(*offload, csum());
                    assert_eq!(bytes[50..52], tcp(bytes.len() - HEADERS)[50..52]);
                } else {
                    assert!(is_right(bytes), "{size}");
                    assert_eq!(*offload, Offload::default());
                }
            }
            assert!(payload == frames[1].0[HEADERS..]);
            let mut totals = counters.read_ends();
            counters.read_rx(&mut totals);
            assert_eq!(totals.segments_added, count as u64 - 1);
            assert_eq!(totals.tx_frames, count as u64 + 3);
        }
    }
}

#[test]
fn what_a_fault_leaves_is_counted_whole_frames_and_segments() {
    let frames = [(tcp(9), csum()), (tcp(64_000), tso(100)), (tcp(9), csum())];
    for fault in 0..11 {
        let (runs, counters, result) = send(&frames, OffloadSet::NONE, fault);
        assert_eq!((runs.len(), result.is_err()), (fault, true));
        assert!(counters.read_ends().dropped() > 0, "{fault}");
    }
    let (runs, _, result) = send(&frames, OffloadSet::NONE, 11);
    assert_eq!((runs.len(), result), (11, Ok(())));
}

#[test]
fn what_cannot_be_adapted_is_dropped_and_counted() {
    let outside = Offload { csum_start: 126, ..csum() };
    let frames = [(tcp(900), outside), (tcp(9), csum()), (tcp(900), tso(0))];
    let (runs, counters, _) = send(&frames, OffloadSet::NONE, usize::MAX);
    assert_eq!(runs.concat().len(), 1);
    assert_eq!(counters.read_ends().drops[DropReason::BadOffload as usize], 2);
}
