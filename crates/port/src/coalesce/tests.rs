#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use packet::{CUT_HEADER_MAX, Checksum, Cut, checksum};
use virtq::mem::Pool;

use super::Coalescer;
use crate::lane::Parcel;
use crate::{Batch, FrameBuf, Gso, Offload, OffloadSet, QueueCounters};

/// A TCP frame over IPv4 or IPv6 of flow `flow`, its checksum left undone.
fn tcp(flow: u8, v6: bool, payload: usize) -> Vec<u8> {
    let mut frame = vec![2; 12];
    if v6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((20 + payload as u16).to_be_bytes());
        frame.extend([6, 64]);
        frame.extend([7; 32]);
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + payload as u16).to_be_bytes());
        frame.extend([0, 7, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    frame.extend([0x12, flow, 0, 80, 0, 0, 0, 9, 0, 0, 0, 1, 0x50, 0x10, 1, 2, 0, 0, 0, 0]);
    let mut pseudo = Checksum::default();
    pseudo.add(if v6 { &frame[22..54] } else { &frame[26..34] });
    pseudo.add(&[0, 6]);
    pseudo.add(&(20 + payload as u16).to_be_bytes());
    let at = frame.len() - 4;
    frame[at..at + 2].copy_from_slice(&pseudo.sum().to_be_bytes());
    frame.extend((0..payload).map(|i| (i * 31 + i / 256 + usize::from(flow)) as u8));
    frame
}

/// The segments of a frame, with their checksums.
fn cut(frame: &[u8], size: u16) -> Vec<(Vec<u8>, Offload)> {
    let cut =
        Cut::new(&frame[..frame.len().min(CUT_HEADER_MAX)], frame.len() as u32, size).unwrap();
    let segment = |index| {
        let range = cut.range(index);
        let payload = &frame[range.start as usize..range.end as usize];
        let mut sum = Checksum::default();
        sum.add(payload);
        ([cut.header(index, sum).bytes(), payload].concat(), Offload::default())
    };
    (0..cut.count()).map(segment).collect()
}

fn large(v6: bool, size: u16) -> Offload {
    let csum_start = if v6 { 54 } else { 34 };
    Offload {
        needs_csum: true,
        gso: if v6 { Gso::TcpV6 } else { Gso::TcpV4 },
        gso_size: size,
        hdr_len: csum_start + 20,
        csum_start,
        csum_offset: 16,
        ..Offload::default()
    }
}

/// Sends `frames` through a coalescer: what came out, and how many were merged. Those that come
/// from another thread fare the same.
fn send(frames: &[(Vec<u8>, Offload)], takes: OffloadSet) -> (Vec<(Vec<u8>, Offload)>, u64) {
    let mut pool = Pool::new(frames.len() as u32, 1 << 17).unwrap();
    let mut buf = FrameBuf::default();
    for (slot, (bytes, _)) in (0u32..).zip(frames) {
        pool.slot_mut(slot).unwrap()[12..12 + bytes.len()].copy_from_slice(bytes);
    }
    for (slot, (bytes, offload)) in (0u32..).zip(frames) {
        let span = Pool::span(slot, 12, bytes.len() as u32);
        assert!(buf.slot().unwrap().fill(pool.store().reader(span), span, *offload));
        buf.keep();
    }
    let batch = buf.batch(pool.store(), None);
    let mut parcel = Parcel::new().unwrap();
    let mut of_parcel = FrameBuf::default();
    assert!(batch.frames().iter().all(|frame| parcel.put(&batch, frame)));
    let direct = coalesce(&batch, takes);
    assert_eq!(coalesce(&parcel.batch(0, &mut of_parcel), takes), direct, "by way of a parcel");
    direct
}

fn coalesce(batch: &Batch<'_>, takes: OffloadSet) -> (Vec<(Vec<u8>, Offload)>, u64) {
    let count = batch.frames().len();
    let picked: Vec<u16> = (0..count as u16).collect();
    let counters = QueueCounters::default();
    let mut sent = Vec::new();
    let mut coalescer = Coalescer::default();
    let result = coalescer.send(batch, &picked, (takes, &counters.egress), |batch, picked| {
        for index in picked {
            let frame = &batch.frames()[usize::from(*index)];
            let mut bytes = frame.head().to_vec();
            let mut body = vec![0; frame.body.len as usize];
            assert_eq!(batch.body(frame).read(&mut body), body.len());
            bytes.extend(body);
            sent.push((bytes, frame.offload));
        }
        counters.egress.sent(picked.len() as u64, 0);
        Ok(())
    });
    assert_eq!(result, Ok(()));
    assert_eq!(counters.egress.ended(), count as u64, "the law");
    (sent, counters.read_ends().merged)
}

#[test]
fn segments_of_one_flow_become_the_frame_that_they_were() {
    for v6 in [false, true] {
        for (payload, size) in [(3000, 1000), (3100, 1000), (60_000, 1448), (300, 200)] {
            let frame = tcp(1, v6, payload);
            let segments = cut(&frame, size);
            let (sent, merged) = send(&segments, OffloadSet::ALL);
            assert_eq!(sent.len(), 1, "{payload} by {size}");
            assert_eq!(merged, segments.len() as u64 - 1);
            assert!(sent[0].0 == frame && sent[0].1 == large(v6, size));
        }
    }
}

#[test]
fn checksums_must_be_right_verified_or_left_to_others() {
    let (start, offset) = (34, 16);
    let frame = tcp(1, false, 3000);
    let segments = cut(&frame, 1000);
    let mut wrong = segments.clone();
    wrong[1].0[900] ^= 1;
    assert_eq!(send(&wrong, OffloadSet::ALL).1, 0, "between two good ones");
    assert_eq!(send(&wrong, OffloadSet::ALL).0, wrong, "and goes on as it is");
    for segment in &mut wrong {
        segment.1.data_valid = true;
    }
    assert_eq!(send(&wrong, OffloadSet::ALL).1, 2, "somebody knows better");
    for segment in &mut wrong {
        segment.1 = Offload {
            needs_csum: true,
            csum_start: start,
            csum_offset: offset,
            ..Offload::default()
        };
    }
    assert_eq!(send(&wrong, OffloadSet::ALL).1, 2, "not computed yet");
    for segment in &mut wrong {
        segment.1.csum_offset = 18;
    }
    assert_eq!(send(&wrong, OffloadSet::ALL).1, 0, "another checksum is left undone");
}

#[test]
fn only_what_the_egress_takes_is_put_together() {
    let segments = |v6| cut(&tcp(1, v6, 3000), 1000);
    for (takes, v4, v6) in [
        (OffloadSet::NONE, 0, 0),
        (OffloadSet { tso4: false, ..OffloadSet::ALL }, 0, 2),
        (OffloadSet { tso6: false, ..OffloadSet::ALL }, 2, 0),
        (OffloadSet { csum: false, ..OffloadSet::ALL }, 0, 0),
        (OffloadSet { uso: false, ecn: false, ..OffloadSet::ALL }, 2, 2),
    ] {
        assert_eq!((send(&segments(false), takes).1, send(&segments(true), takes).1), (v4, v6));
    }
    let mut cwr = tcp(1, false, 3000);
    cwr[47] |= 0x80;
    let segments = cut(&cwr, 1000);
    assert_eq!(send(&segments, OffloadSet { ecn: false, ..OffloadSet::ALL }).1, 1, "behind it");
    let (sent, merged) = send(&segments, OffloadSet::ALL);
    assert!(merged == 2 && sent[0].1.ecn);
}

#[test]
fn flows_are_told_apart_and_keep_their_order() {
    let [a, b] = [1, 2].map(|flow| cut(&tcp(flow, false, 3000), 1000));
    let other = (vec![9; 300], Offload::default());
    let mixed: Vec<_> = (0..3).flat_map(|n| [a[n].clone(), b[n].clone()]).collect();
    let (sent, merged) = send(&mixed, OffloadSet::ALL);
    assert_eq!((sent.len(), merged), (2, 4));
    assert!(sent[0].0 == tcp(1, false, 3000) && sent[1].0 == tcp(2, false, 3000));
    // What is no segment is overtaken by nothing.
    let broken = [a[0].clone(), a[1].clone(), other.clone(), a[2].clone()];
    let (sent, merged) = send(&broken, OffloadSet::ALL);
    assert_eq!((sent.len(), merged), (3, 1));
    assert_eq!((&sent[1], &sent[2]), (&other, &a[2]));
    // A gap ends a train, and begins another.
    let (sent, merged) = send(&[a[0].clone(), a[2].clone(), a[1].clone()], OffloadSet::ALL);
    assert_eq!((sent, merged), (vec![a[0].clone(), a[2].clone(), a[1].clone()], 0));
}

/// A datagram over IPv4 or IPv6 from port `flow`, number `number` of its flow, its checksum left
/// undone.
fn udp(flow: u8, v6: bool, (number, payload): (u8, usize)) -> (Vec<u8>, Offload) {
    let mut frame = tcp(flow, v6, payload);
    let l4 = if v6 { 54 } else { 34 };
    if v6 {
        frame[20] = 17;
    } else {
        frame[20] = 0x40;
        (frame[23], frame[24], frame[25]) = (17, 0, 0);
        let sum = checksum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    let len = (20 + payload as u16).to_be_bytes();
    frame[l4 + 4..l4 + 8].copy_from_slice(&[len[0], len[1], 1, 1]);
    frame[l4 + 8..].fill(number);
    let csum_start = l4 as u16;
    (frame, Offload { needs_csum: true, csum_start, csum_offset: 6, ..Offload::default() })
}

/// What is of another family, or a short one, ends no train but its own.
#[test]
fn datagrams_of_a_flow_keep_their_order() {
    let (a, b, c) = ((1, true), (2, false), (3, false));
    for short in 0..7 {
        let order = [(b, 1), (c, 1), (a, 1), (c, 2), (c, 3), (c, 4), (c, 5)];
        let frames = order.iter().enumerate().map(|(at, ((flow, v6), number))| {
            udp(*flow, *v6, (*number, if at == short { 500 } else { 1000 }))
        });
        let (sent, merged) = send(&frames.collect::<Vec<_>>(), OffloadSet::ALL);
        assert!(merged > 0, "{short}");
        let of_c: Vec<u8> = sent
            .iter()
            .filter(|(frame, _)| frame[12] == 8 && frame[35] == 3)
            .flat_map(|(frame, _)| frame[42..].chunks(500).map(|part| part[0]))
            .collect();
        assert!(of_c.is_sorted() && of_c.ends_with(&[5]), "{short} is short: {of_c:?}");
    }
}

#[test]
fn a_look_in_vain_is_followed_by_a_pause() {
    let mut pool = Pool::new(1, 4096).unwrap();
    let bytes = vec![3; 600];
    pool.slot_mut(0).unwrap()[..600].copy_from_slice(&bytes);
    let span = Pool::span(0, 0, 600);
    let mut buf = FrameBuf::default();
    for _ in 0..3 {
        assert!(buf.slot().unwrap().fill(pool.store().reader(span), span, Offload::default()));
        buf.keep();
    }
    let batch = buf.batch(pool.store(), None);
    let counters = QueueCounters::default();
    let mut coalescer = Coalescer::default();
    assert!(!coalescer.wants(&batch, &[0]), "nothing to put it together with");
    let mut looks = 0;
    for _ in 0..80 {
        if coalescer.wants(&batch, &[0, 1, 2]) {
            looks += 1;
            let way = (OffloadSet::ALL, &*counters.egress);
            coalescer.send(&batch, &[0, 1, 2], way, |_, _| Ok(())).unwrap();
        }
    }
    assert_eq!(looks, 10);
}
