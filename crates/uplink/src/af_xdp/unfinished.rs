//! Frames whose transport checksum their sender left to a device that is not there.
//!
//! A local sender behind a veth leaves the sum of the pseudo header in the checksum's field, and
//! says so beside the frame; `AF_XDP` hands over the frame without what stood beside it. Such a
//! frame is recognised by that number. It may be there by chance, in one of 65536 frames with a
//! finished checksum: that one is finished again, which gives the number that was there unless the
//! frame was damaged on its way.
//!
//! **Limits.** IPv4 with options, IPv6 without extension headers, behind at most two tags.

use packet::Checksum;
use port::Offload;

/// Bytes before the type of an Ethernet frame, and of a tag.
const TYPE_AT: usize = 12;
const TAG: usize = 4;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What is left to do on the frame that begins with `head`, if it is one of those.
#[inline]
pub(super) fn unfinished(head: &[u8]) -> Option<Offload> {
    let mut at = TYPE_AT;
    let mut kind = two(head, at)?;
    for _ in 0..2 {
        if !matches!(kind, 0x8100 | 0x88a8) {
            break;
        }
        at = at.wrapping_add(TAG);
        kind = two(head, at)?;
    }
    let packet = head.get(at.wrapping_add(2)..)?;
    let (header, protocol, sum) = match kind {
        0x0800 => ipv4(packet)?,
        0x86dd => ipv6(packet)?,
        _ => return None,
    };
    let offset = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let start = at.wrapping_add(2).wrapping_add(header);
    let field = two(head, start.wrapping_add(offset))?;
    // The complement of a checksum over the pseudo header is its sum. 0 and all ones are the same
    // number for it, but 0 in UDP's field is "no checksum".
    let left = field == !sum.finish();
    (left && field != 0).then(|| Offload {
        needs_csum: true,
        csum_start: u16::try_from(start).unwrap_or(0),
        csum_offset: u16::try_from(offset).unwrap_or(0),
        ..Offload::default()
    })
}

#[inline]
fn two(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map(|two| u16::from_be_bytes(*two))
}

/// Bytes of the header, the protocol, and the sum of the pseudo header.
#[inline]
fn ipv4(packet: &[u8]) -> Option<(usize, u8, Checksum)> {
    let fixed: &[u8; 20] = packet.first_chunk()?;
    let header = usize::from(fixed[0] & 0x0f).wrapping_mul(4);
    let fragment = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0;
    let whole = u16::from_be_bytes([fixed[2], fixed[3]]);
    if fixed[0] >> 4 != 4 || header < 20 || fragment {
        return None;
    }
    let payload = whole.checked_sub(u16::try_from(header).ok()?)?;
    let sum = pseudo(packet.get(12..20)?, u32::from(payload), fixed[9]);
    Some((header, fixed[9], sum))
}

#[inline]
fn ipv6(packet: &[u8]) -> Option<(usize, u8, Checksum)> {
    let fixed: &[u8; 40] = packet.first_chunk()?;
    let payload = u16::from_be_bytes([fixed[4], fixed[5]]);
    let sum = pseudo(fixed.get(8..40)?, u32::from(payload), fixed[6]);
    (fixed[0] >> 4 == 6).then_some((40, fixed[6], sum))
}

#[inline]
fn pseudo(addresses: &[u8], payload: u32, protocol: u8) -> Checksum {
    let mut sum = Checksum::default();
    sum.add(addresses);
    sum.add(&payload.to_be_bytes());
    sum.add(&[0, protocol]);
    sum
}

#[cfg(test)]
mod tests {
    #![expect(clippy::cast_possible_truncation, clippy::arithmetic_side_effects, reason = "tests")]

    use super::{TCP, UDP, unfinished};
    use packet::{Checksum, checksum};

    struct Made {
        bytes: Vec<u8>,
        start: usize,
        offset: usize,
        pseudo: Vec<u8>,
    }

    /// A frame whose checksum is left undone.
    fn made(tags: usize, v6: bool, options: usize, protocol: u8) -> Made {
        let offset = if protocol == TCP { 16 } else { 6 };
        let mut transport: Vec<u8> = (0..33).map(|i| i * 5 + protocol).collect();
        let len = transport.len() as u16;
        let mut bytes = vec![2; 12];
        for _ in 0..tags {
            bytes.extend([0x81, 0, 0, 5]);
        }
        let mut pseudo;
        if v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(len.to_be_bytes());
            bytes.extend([protocol, 64]);
            pseudo = (0..32).collect::<Vec<u8>>();
        } else {
            bytes.extend([8, 0, 0x45 + (options / 4) as u8, 0]);
            bytes.extend((20 + options as u16 + len).to_be_bytes());
            bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            pseudo = vec![10, 0, 0, 1, 10, 0, 0, 2];
        }
        bytes.extend(&pseudo);
        bytes.extend(vec![1; options]);
        pseudo.extend([0, protocol]);
        pseudo.extend(len.to_be_bytes());
        transport[offset..offset + 2].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
        let start = bytes.len();
        bytes.extend(transport);
        Made { bytes, start, offset, pseudo }
    }

    fn all() -> impl Iterator<Item = Made> {
        (0..3).flat_map(|tags| {
            [(false, 0), (false, 8), (true, 0)].into_iter().flat_map(move |(v6, options)| {
                [TCP, UDP].map(|protocol| made(tags, v6, options, protocol))
            })
        })
    }

    #[test]
    fn an_undone_checksum_is_found() {
        assert_eq!(all().count(), 18);
        for Made { bytes, start, offset, .. } in all() {
            let offload = unfinished(&bytes).unwrap();
            assert!(offload.needs_csum);
            let found = (offload.csum_start, offload.csum_offset);
            assert_eq!(found, (start as u16, offset as u16));
        }
    }

    #[test]
    fn a_finished_checksum_is_left_alone() {
        for Made { mut bytes, start, offset, pseudo } in all() {
            let place = start + offset;
            bytes[place..place + 2].fill(0);
            assert_eq!(unfinished(&bytes), None, "none at all");
            let mut sum = Checksum::default();
            sum.add(&pseudo);
            sum.add(&bytes[start..]);
            bytes[place..place + 2].copy_from_slice(&sum.finish().to_be_bytes());
            assert_eq!(unfinished(&bytes), None);
        }
    }

    #[test]
    fn other_frames_are_left_alone() {
        let Made { bytes, start, offset, .. } = made(0, false, 0, TCP);
        for (at, value) in [(12, 9), (14, 0x65), (14, 0x44), (20, 0x20), (21, 1), (23, 1), (17, 9)]
        {
            let mut other = bytes.clone();
            other[at] = value;
            assert_eq!(unfinished(&other), None, "byte {at}");
        }
        for len in 0..start + offset + 2 {
            assert_eq!(unfinished(&bytes[..len]), None, "{len} bytes");
        }
        assert!(unfinished(&bytes[..start + offset + 2]).is_some());
    }
}
