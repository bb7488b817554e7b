//! Any `virtio_net_hdr` over any frame: it is refused, or every kind of egress gets what it takes:
//! no segment larger than was said, and every checksum right, computed by plain means.
#![no_main]

use libfuzzer_sys::fuzz_target;
use port::{Adapter, DropReason, FrameBuf, Gso, Offload, OffloadSet, QueueCounters, Way};
use virtio_net::header;
use virtq::mem::Pool;

/// The sum of 16-bit words, an odd byte filled up with zeros: RFC 1071 word for word.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn sets() -> impl Iterator<Item = OffloadSet> {
    (0..32u8).map(|bits| {
        let bit = |n: u8| bits & 1 << n != 0;
        OffloadSet { csum: bit(0), tso4: bit(1), tso6: bit(2), ecn: bit(3), uso: bit(4) }
    })
}

fuzz_target!(|input: ([u8; 10], bool, &[u8])| {
    let (raw, tidy, bytes) = input;
    let mut raw = raw;
    let mut bytes = bytes.to_vec();
    if tidy {
        tidy_up(&mut raw, &mut bytes);
    }
    let Some(offload) = header::parse(&raw, OffloadSet::ALL) else { return };
    let len = u32::try_from(bytes.len()).unwrap();
    let mut pool = Pool::new(1, len.max(1)).unwrap();
    pool.slot_mut(0).unwrap()[..bytes.len()].copy_from_slice(&bytes);
    let span = Pool::span(0, 0, len);
    for takes in sets() {
        let mut buf = FrameBuf::default();
        let frame = buf.slot().unwrap();
        if !frame.fill(pool.store().reader(span), span, offload) || !frame.check_offload() {
            return;
        }
        let checked = frame.offload;
        buf.keep();
        let batch = buf.batch(pool.store(), None);
        let counters = QueueCounters::default();
        let way = Way { takes, lost: DropReason::PortDown, counters: &counters.egress };
        let mut payload = 0;
        let sent = Adapter::default().send(&batch, &[0], &way, |batch, picked| {
            for index in picked {
                let frame = &batch.frames()[usize::from(*index)];
                assert!(takes.takes(&frame.offload));
                let mut whole = frame.head().to_vec();
                let mut body = vec![0; frame.body.len as usize];
                assert_eq!(batch.body(frame).read(&mut body), body.len());
                whole.extend(body);
                payload += check(&whole, &frame.offload, &checked);
            }
            counters.egress.sent(picked.len() as u64, 0);
            Ok(())
        });
        assert!(sent.is_ok());
        assert_eq!(counters.egress.ended(), 1);
        assert_eq!(counters.read_ends().dropped(), 0, "what was checked can be adapted");
        if checked.gso != Gso::None {
            assert_eq!(payload, bytes.len() - usize::from(checked.hdr_len));
        }
    }
});

/// Checks a frame that came out; returns its bytes of payload if it is a segment.
fn check(whole: &[u8], now: &Offload, before: &Offload) -> usize {
    let start = usize::from(before.csum_start);
    if before.needs_csum && !now.needs_csum {
        let place = start + usize::from(before.csum_offset);
        // Only in UDP 0 stands for "no checksum"; in TCP it is a sum like any other.
        if before.csum_offset == 6 {
            assert_ne!(whole[place..place + 2], [0, 0], "\"no checksum\" in UDP");
        }
    }
    if before.gso == Gso::None {
        return 0;
    }
    let payload = whole.len() - usize::from(before.hdr_len);
    if now.gso == Gso::None {
        assert!(payload <= usize::from(before.gso_size));
    }
    if !now.needs_csum {
        let v6 = whole[start..].len() < whole.len() && is_v6(whole);
        let (l3, addresses) = network(whole, v6);
        let protocol = if before.gso == Gso::UdpL4 { 17 } else { 6 };
        let len = u16::try_from(whole.len() - start).unwrap();
        let mut all = whole[addresses].to_vec();
        all.extend([0, protocol]);
        all.extend(len.to_be_bytes());
        all.extend(&whole[start..]);
        assert_eq!(sum(&all), 0xffff, "the transport checksum");
        if !v6 {
            let header = usize::from(whole[l3] & 15) * 4;
            assert_eq!(sum(&whole[l3..l3 + header]), 0xffff, "the IPv4 checksum");
        }
    }
    payload
}

/// Where the tags end.
fn l3(whole: &[u8]) -> usize {
    let mut at = 12;
    while matches!(whole[at..at + 2], [0x81, 0] | [0x88, 0xa8]) {
        at += 4;
    }
    at + 2
}

fn is_v6(whole: &[u8]) -> bool {
    let at = l3(whole);
    whole[at - 2..at] == [0x86, 0xdd]
}

fn network(whole: &[u8], v6: bool) -> (usize, std::ops::Range<usize>) {
    let at = l3(whole);
    (at, if v6 { at + 8..at + 40 } else { at + 12..at + 20 })
}

/// Makes it likely that header and frame go together.
fn tidy_up(raw: &mut [u8; 10], bytes: &mut Vec<u8>) {
    if bytes.len() < 80 {
        return;
    }
    let (v6, tcp) = (bytes[0] & 1 != 0, bytes[1] & 1 != 0);
    let (kind, l4): (&[u8], usize) =
        if v6 { (&[0x86, 0xdd, 0x60], 54) } else { (&[8, 0, 0x45], 34) };
    bytes[12..15].copy_from_slice(kind);
    bytes[if v6 { 20 } else { 23 }] = if tcp { 6 } else { 17 };
    if !v6 {
        bytes[20..22].fill(0);
        bytes[16] |= 1;
    }
    if tcp {
        bytes[l4 + 12] = 0x50;
    }
    let again = bytes.clone();
    while bytes.len() < 4000 && raw[2] & 1 != 0 {
        bytes.extend(&again);
    }
    raw[0] = 1;
    raw[1] = match (tcp, v6) {
        _ if raw[2] & 2 != 0 => 0,
        (true, false) => 1,
        (true, true) => 4,
        (false, _) => 5,
    };
    raw[6..10].copy_from_slice(&[l4 as u8, 0, if tcp { 16 } else { 6 }, 0]);
}
