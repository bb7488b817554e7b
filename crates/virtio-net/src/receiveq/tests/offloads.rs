//! What is left to a driver, what is done for it, and what is put together for it.

use packet::{CUT_HEADER_MAX, Checksum, Cut};
use port::{DropReason, Egress, FrameBuf, Gso, Offload};
use virtq::Layout;
use virtq::mem::Pool;

use super::super::Receiveq;
use crate::QueueOptions;
use crate::device::{Mac, RxFilter, SharedFilter, SharedOffloads};
use crate::features::{GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, MRG_RXBUF};
use crate::rig::{BOTH, Guest, Ledger, options, pattern, receiveq};

/// A TCP frame of `payload` bytes over IPv4, with a partial checksum.
pub(super) fn tcp(payload: usize) -> Vec<u8> {
    let mut frame = pattern(54 + payload, 1);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..16].copy_from_slice(&[0x45, 0]);
    frame[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
    frame[46..48].copy_from_slice(&[0x50, 0x10]);
    let mut pseudo = Checksum::default();
    pseudo.add(&frame[26..34]);
    pseudo.add(&[0, 6]);
    pseudo.add(&(20 + payload as u16).to_be_bytes());
    frame[50..52].copy_from_slice(&pseudo.sum().to_be_bytes());
    frame
}

/// Whether the TCP checksum of a frame made by [`tcp`] is finished.
fn is_finished(frame: &[u8]) -> bool {
    let mut sum = Checksum::default();
    sum.add(&frame[26..34]);
    sum.add(&[0, 6]);
    sum.add(&(frame.len() as u16 - 34).to_be_bytes());
    sum.add(&frame[34..]);
    sum.finish() == 0
}

/// Sends `frame` with an offload behind and before an ordinary frame.
pub(super) fn send_offload(queue: &mut Receiveq, frame: &[u8], offload: Offload) {
    let mut pool = Pool::new(1, 1 << 17).unwrap();
    pool.slot_mut(0).unwrap()[..frame.len()].copy_from_slice(frame);
    let span = Pool::span(0, 0, frame.len() as u32);
    let mut buf = FrameBuf::default();
    buf.slot().unwrap().fill_private(&pattern(60, 0));
    buf.keep();
    assert!(buf.slot().unwrap().fill(pool.store().reader(span), span, offload));
    buf.keep();
    let batch = buf.batch(pool.store(), None);
    queue.send(&batch, &[0, 1, 0]).unwrap();
}

const CSUM: Offload = Offload {
    needs_csum: true,
    data_valid: false,
    ecn: false,
    gso: Gso::None,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
};

#[test]
fn checksums_are_left_to_drivers_that_negotiated_it_and_finished_for_others() {
    for mergeable in [0, MRG_RXBUF] {
        for negotiated in [0, GUEST_CSUM] {
            let mut guest = Guest::plain(Layout::Split, 8);
            let mut queue = receiveq(&guest, options(mergeable | negotiated));
            guest.post(3, &[2048]);
            send_offload(&mut queue, &tcp(500), CSUM);
            let frames = guest.received(12);
            assert_eq!((&frames[0].1, &frames[2].1), (&pattern(60, 0), &pattern(60, 0)));
            if negotiated == 0 {
                assert_eq!(frames[1].0[..10], [0; 10]);
                assert!(is_finished(&frames[1].1));
            } else {
                assert_eq!(frames[1].0, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0]);
                assert_eq!(frames[1].1, tcp(500));
            }
            Ledger { tx: (3, 674), ..Ledger::default() }.check(queue.counters());
        }
    }
}

#[test]
fn large_frames_go_whole_to_drivers_that_negotiated_it_and_in_segments_to_others() {
    for (negotiated, whole, finished) in [
        (GUEST_CSUM | GUEST_TSO4, true, false),
        (GUEST_CSUM | GUEST_TSO6, false, false),
        (GUEST_CSUM, false, false),
        (0, false, true),
    ] {
        let mut guest = Guest::plain(Layout::Packed, 128);
        let mut queue = receiveq(&guest, options(MRG_RXBUF | negotiated));
        guest.post(100, &[1526]);
        send_offload(&mut queue, &tcp(60_001), LARGE);
        let frames = guest.received(12);
        if whole {
            assert_eq!(frames.len(), 3);
            assert_eq!(frames[1].0[..10], [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0]);
            assert_eq!(frames[1].1, tcp(60_001));
            continue;
        }
        assert_eq!(frames.len(), 63);
        for (header, frame) in &frames[1..62] {
            assert_eq!(header[0], u8::from(!finished));
            assert_eq!(is_finished(frame), finished);
        }
        let payload: Vec<u8> = frames[1..62].iter().flat_map(|f| f.1[54..].to_vec()).collect();
        assert!(payload == tcp(60_001)[54..]);
        let mut totals = queue.counters().read_ends();
        queue.counters().read_rx(&mut totals);
        assert_eq!((totals.tx_frames, totals.segments_added), (63, 60));
    }
}

#[test]
fn segments_that_find_no_room_are_counted_one_by_one() {
    let mut guest = Guest::plain(Layout::Split, 64);
    let mut queue = receiveq(&guest, options(MRG_RXBUF));
    guest.post(10, &[1526]);
    send_offload(&mut queue, &tcp(60_001), LARGE);
    assert_eq!(guest.received(12).len(), 10);
    let mut totals = queue.counters().read_ends();
    queue.counters().read_rx(&mut totals);
    assert_eq!((totals.tx_frames, totals.segments_added), (10, 60));
    assert_eq!(totals.drops[DropReason::NoBuffer as usize], 53);
    assert_eq!(queue.counters().egress.ended(), 3);
}

/// The large frame that most tests send.
pub(super) const LARGE: Offload = Offload { gso: Gso::TcpV4, gso_size: 1000, hdr_len: 54, ..CSUM };

#[test]
fn without_mergeable_buffers_a_large_frame_takes_a_large_one() {
    for layout in BOTH {
        let mut guest = Guest::plain(layout, 256);
        let mut queue = receiveq(&guest, options(GUEST_CSUM | GUEST_TSO4));
        // As Linux posts them: a page for each descriptor.
        guest.post(3, &[[4096; 16].as_slice(), &[128]].concat());
        send_offload(&mut queue, &tcp(60_001), LARGE);
        let frames = guest.received(12);
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1].0, [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0, 1, 0]);
        assert!(frames[1].1 == tcp(60_001));
    }
}

#[test]
fn in_small_buffers_a_large_frame_arrives_in_segments() {
    for layout in BOTH {
        for size in [1066, 1065] {
            let mut guest = Guest::plain(layout, 128);
            let mut queue = receiveq(&guest, options(GUEST_CSUM | GUEST_TSO4));
            guest.post(100, &[size]);
            send_offload(&mut queue, &tcp(60_001), LARGE);
            let frames = guest.received(12);
            let mut totals = queue.counters().read_ends();
            queue.counters().read_rx(&mut totals);
            assert_eq!(totals.segments_added, 60);
            // Without room for a segment there is nothing to do, and the guest can be told what.
            let lost = if size == 1066 { 0 } else { 60 };
            assert_eq!(totals.drops[DropReason::TooLarge as usize], lost);
            assert_eq!(frames.len() as u64, 63 - lost);
            assert!(frames[1].0[..2] == [1, 0], "its checksum is left to it");
        }
    }
}

#[test]
fn a_ring_that_is_too_small_for_a_large_frame_gets_what_fits() {
    let mut guest = Guest::plain(Layout::Packed, 16);
    let mut queue = receiveq(&guest, options(MRG_RXBUF | GUEST_CSUM | GUEST_TSO4));
    guest.post(16, &[1526]);
    send_offload(&mut queue, &tcp(60_001), LARGE);
    assert_eq!(guest.received(12).len(), 16);
    let mut totals = queue.counters().read_ends();
    queue.counters().read_rx(&mut totals);
    assert_eq!((totals.tx_frames, totals.segments_added), (16, 60));
    assert_eq!(totals.drops[DropReason::NoBuffer as usize], 47);
    assert_eq!(queue.counters().egress.ended(), 3);
}

#[test]
fn a_checksum_is_finished_across_buffers_of_any_size() {
    for size in [13, 30, 66, 100, 200, 1526] {
        for payload in [0, 1, 100, 701] {
            let mut guest = Guest::plain(Layout::Split, 256);
            let mut queue = receiveq(&guest, options(MRG_RXBUF));
            guest.post(250, &[size]);
            send_offload(&mut queue, &tcp(payload), CSUM);
            let frames = guest.received(12);
            assert!(is_finished(&frames[1].1), "{payload} bytes in {size}");
            assert_eq!(frames[1].1[54..], tcp(payload)[54..]);
            assert_eq!(frames[1].0[..10], [0; 10]);
        }
    }
}

/// Sends the segments of a frame as one burst.
fn send_segments(queue: &mut Receiveq, frame: &[u8]) {
    let cut = Cut::new(&frame[..CUT_HEADER_MAX], frame.len() as u32, 1000).unwrap();
    let mut pool = Pool::new(cut.count(), 2048).unwrap();
    let mut buf = FrameBuf::default();
    for index in 0..cut.count() {
        let range = cut.range(index);
        let payload = &frame[range.start as usize..range.end as usize];
        let mut sum = Checksum::default();
        sum.add(payload);
        let bytes = [cut.header(index, sum).bytes(), payload].concat();
        pool.slot_mut(index).unwrap()[..bytes.len()].copy_from_slice(&bytes);
    }
    for index in 0..cut.count() {
        let range = cut.range(index);
        let span = Pool::span(index, 0, 54 + range.end - range.start);
        assert!(buf.slot().unwrap().fill(pool.store().reader(span), span, Offload::default()));
        buf.keep();
    }
    let batch = buf.batch(pool.store(), None);
    let picked: Vec<u16> = (0..cut.count() as u16).collect();
    queue.send(&batch, &picked).unwrap();
}

#[test]
fn segments_come_together_for_drivers_that_take_large_frames_unless_they_are_not_to() {
    for layout in BOTH {
        for (negotiated, coalesce, count) in [
            (GUEST_CSUM | GUEST_TSO4, true, 1),
            (GUEST_CSUM | GUEST_TSO4, false, 31),
            (GUEST_CSUM | GUEST_TSO6, true, 31),
            (GUEST_CSUM, true, 31),
        ] {
            let mut guest = Guest::plain(layout, 128);
            let all = options(MRG_RXBUF | negotiated);
            let mut queue = receiveq(&guest, QueueOptions { coalesce, ..all });
            guest.post(100, &[1526]);
            // A correct IPv4 header, or nobody would believe it.
            let mut whole = tcp(30_100);
            whole[24..26].fill(0);
            let sum = packet::checksum(&whole[14..34]);
            whole[24..26].copy_from_slice(&sum.to_be_bytes());
            send_segments(&mut queue, &whole);
            let frames = guest.received(12);
            assert_eq!(frames.len(), count);
            if count == 1 {
                assert_eq!(frames[0].0[..10], [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0]);
                assert!(frames[0].1 == whole);
            }
            let totals = queue.counters().read_ends();
            assert_eq!((totals.tx_frames, totals.merged), (count as u64, 31 - count as u64));
            assert_eq!(queue.counters().egress.ended(), 31);
        }
    }
}

#[test]
fn what_the_driver_of_an_embedded_device_switches_off_is_done_for_it() {
    let mut guest = Guest::plain(Layout::Split, 256);
    let mut queue = receiveq(&guest, options(MRG_RXBUF | GUEST_CSUM | GUEST_TSO4));
    queue.set_filter(Some(SharedFilter::new(promiscuous())));
    let offloads = SharedOffloads::default();
    queue.follow_offloads(offloads.clone());
    for (bits, count, first) in [
        (GUEST_CSUM | GUEST_TSO4, 3, [1, 1]),
        (GUEST_CSUM, 63, [1, 0]),
        (0, 63, [0, 0]),
        (GUEST_CSUM | GUEST_TSO4, 3, [1, 1]),
    ] {
        offloads.set(bits);
        guest.post(100, &[1526]);
        send_offload(&mut queue, &tcp(60_001), LARGE);
        let frames = guest.received(12);
        assert_eq!((frames.len(), &frames[1].0[..2]), (count, &first[..]), "{bits:#x}");
    }
}

fn promiscuous() -> RxFilter {
    let mut filter = RxFilter::new(Mac([2, 0, 0, 0, 0, 7]));
    filter.promiscuous = true;
    filter
}
