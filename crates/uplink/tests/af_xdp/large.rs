//! Frames above the MTU, which go by a packet socket beside the ring.

use packet::{Checksum, checksum};
use port::{Egress, FrameBuf, Gso, Offload};
use uplink::af_xdp::{AfXdpEgress, Mode};
use virtq::mem::Pool;

use crate::hosts::{Hosts, hosts};
use crate::{handover, pair, take, totals};

const CSUM: Offload = Offload {
    needs_csum: true,
    data_valid: false,
    ecn: false,
    gso: Gso::None,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 6,
};
/// Datagrams of 1000 bytes each.
pub(crate) const CUT: Offload = Offload { gso: Gso::UdpL4, gso_size: 1000, hdr_len: 42, ..CSUM };

pub(crate) fn payload(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed * 13) as u8).collect()
}

/// An IPv4 packet of `protocol` between the two hosts, whose transport header begins with `upper`
/// and has its checksum at `place`, left undone.
fn frame(protocol: u8, (upper, place): (&[u8], usize), id: u16, data: &[u8]) -> Vec<u8> {
    let len = (upper.len() + data.len()) as u16;
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    bytes.extend((20 + len).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend([0x40, 0, 64, protocol, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
    let sum = checksum(&bytes[14..34]).to_be_bytes();
    bytes[24..26].copy_from_slice(&sum);
    let mut pseudo = vec![10, 9, 0, 1, 10, 9, 0, 2, 0, protocol];
    pseudo.extend(len.to_be_bytes());
    bytes.extend(upper);
    bytes[34 + place..36 + place].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub(crate) fn datagram(data: &[u8]) -> Vec<u8> {
    let mut upper = vec![0x12, 0x34, 0, 53];
    upper.extend((8 + data.len() as u16).to_be_bytes());
    upper.extend([0, 0]);
    frame(17, (&upper, 6), 0, data)
}

/// Segment number `number` of a stream, of `len` bytes.
fn segment(number: u16, len: u16) -> Vec<u8> {
    let mut upper = vec![0x12, 0x34, 0, 7];
    upper.extend((u32::from(number) * u32::from(len) + 77).to_be_bytes());
    upper.extend([0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame(6, (&upper, 16), 500 + number, &payload(len.into(), number.into()))
}

/// Sends frames as one burst, each with its intent.
pub(crate) fn send(egress: &mut AfXdpEgress, wanted: &[(Vec<u8>, Offload)]) {
    let mut pool = Pool::new(64, 65_536).unwrap();
    let mut frames = FrameBuf::default();
    for (slot, (bytes, offload)) in (0..).zip(wanted) {
        pool.slot_mut(slot).unwrap()[..bytes.len()].copy_from_slice(bytes);
        let span = Pool::span(slot, 0, bytes.len() as u32);
        assert!(frames.slot().unwrap().fill(pool.store().reader(span), span, *offload));
        frames.keep();
    }
    let picked: Vec<u16> = (0..wanted.len() as u16).collect();
    egress.send(&frames.batch(pool.store(), None), &picked).unwrap();
    let _ = egress.notify();
}

/// Datagrams before, in and behind a large frame reach a host in their order.
#[test]
fn a_large_frame_reaches_a_host_in_its_place() {
    let Hosts { right, ends: [_, mut far], left: _left, .. } = hosts(1500, Mode::Auto);
    let receiver = right.udp("10.9.0.2:53");
    let all: Vec<_> = [300, 60_500, 400, 1472, 30_000].map(|len| payload(len, len)).to_vec();
    let burst: Vec<_> = all
        .iter()
        .map(|data| (datagram(data), if data.len() > 1472 { CUT } else { CSUM }))
        .collect();
    for _ in 0..2 {
        send(&mut far.queues[0].1, &burst);
        for part in all.iter().flat_map(|data| match data.len() {
            0..=1472 => data.chunks(1472),
            _ => data.chunks(1000),
        }) {
            let mut got = [0; 2000];
            let count = receiver.recv(&mut got).unwrap_or(0);
            assert!(got[..count] == *part, "{count} bytes instead of {}", part.len());
        }
        let counted = totals(far.queues[0].1.counters());
        assert_eq!((counted.tx_frames, counted.segments_added, counted.dropped()), (5, 0, 0));
        // In other hands the same, which count anew.
        far = handover::other_hands(far);
    }
    assert_eq!(right.snmp("Udp", "InCsumErrors"), 0);
}

/// With several transmit queues nobody knows in which order they would leave.
#[test]
fn where_order_is_not_sure_large_frames_are_cut_by_us() {
    let (_namespace, [mut left, mut right]) = pair(2, 1500, |_| {});
    let data = payload(9500, 1);
    send(&mut left.queues[0].1, &[(datagram(&data), CUT)]);
    let got = take(&mut right.queues[0].0, 10);
    assert!(got.iter().map(|frame| &frame[42..]).eq(data.chunks(1000)));
    let counted = totals(left.queues[0].1.counters());
    assert_eq!((counted.tx_frames, counted.segments_added, counted.dropped()), (10, 9, 0));
}

/// The segments of a burst go as one large frame; the kernel cuts it at an interface that takes
/// none, and what arrives is what was sent.
#[test]
fn segments_put_together_arrive_as_they_were() {
    // A burst is more pieces than one call takes.
    for (count, len) in [(40, 1400), (64, 1000)] {
        let (_namespace, [mut left, mut right]) = pair(1, 1500, |_| {});
        let tcp = Offload { csum_offset: 16, ..CSUM };
        let sent: Vec<_> = (0..count).map(|number| segment(number, len)).collect();
        let burst: Vec<_> = sent.iter().map(|frame| (frame.clone(), tcp)).collect();
        send(&mut left.queues[0].1, &burst);
        let counted = totals(left.queues[0].1.counters());
        let merged = u64::from(count) - 1;
        assert_eq!((counted.tx_frames, counted.merged, counted.dropped()), (1, merged, 0));
        let got = take(&mut right.queues[0].0, count.into());
        assert_eq!(got.len(), usize::from(count));
        for (mut sent, got) in sent.into_iter().zip(got) {
            let mut sum = Checksum::default();
            sum.add(&sent[34..]);
            let value = sum.finish().to_be_bytes();
            sent[50..52].copy_from_slice(&value);
            assert!(sent == got);
        }
    }
}

#[test]
fn segments_above_the_mtu_are_oversize() {
    let (_namespace, [mut left, mut right]) = pair(1, 1500, |_| {});
    let large = Offload { gso_size: 1473, ..CUT };
    send(&mut left.queues[0].1, &[(datagram(&payload(20_000, 1)), large)]);
    let counted = totals(left.queues[0].1.counters());
    assert_eq!((counted.tx_frames, counted.dropped()), (0, 1));
    assert_eq!(counted.drops[port::DropReason::Oversize as usize], 1);
    let fits = Offload { gso_size: 1472, ..CUT };
    send(&mut left.queues[0].1, &[(datagram(&payload(20_000, 1)), fits)]);
    assert_eq!(take(&mut right.queues[0].0, 14).len(), 14);
}
