//! Frames whose transport checksum their sender left to a device that is not there.
//!
//! A local sender behind a veth leaves the sum of the pseudo header in the checksum's field, and
//! says so beside the frame; `AF_XDP` hands over the frame without what stood beside it. Such a
//! frame is recognised by that number. It may be there by chance, in one of 65536 frames with a
//! finished checksum: that one is finished again, which gives the number that was there unless the
//! frame was damaged on its way.
//!
//! A sender that puts its frames into a tunnel leaves the checksum inside undone, and finishes the
//! outer one, if there is any: where the outer one is not undone, one tunnel is looked into.
//!
//! **Limits.** IPv4 with options, IPv6 without extension headers, behind at most two tags; VXLAN,
//! GRE and IP in IP, one of them, with the inner checksum's place in the frame's head.

use packet::Checksum;
use port::Offload;

/// Bytes before the type of an Ethernet frame, and of a tag.
const TYPE_AT: usize = 12;
const TAG: usize = 4;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TRANSPARENT_ETHERNET: u16 = 0x6558;

const IP_IN_IP: u8 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;
/// Where in their headers the checksums are.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// The UDP port of VXLAN, and its flag of a valid VNI.
const VXLAN_PORT: u16 = 4789;
const VXLAN_VNI: u8 = 0x08;
/// GRE's flags (RFC 2890) of a word more each: checksum, key, sequence number.
const GRE_WORDS: [u16; 3] = [0x8000, 0x2000, 0x1000];
/// Routing of RFC 1701, and versions but 0: not looked into.
const GRE_UNKNOWN: u16 = 0x4007;

/// What is left to do on the frame that begins with `head`, if it is one of those.
#[inline]
pub(super) fn unfinished(head: &[u8]) -> Option<Offload> {
    let outer = Upper::of_frame(head, 0)?;
    match outer.protocol {
        TCP => outer.unfinished(head, TCP_CHECKSUM),
        UDP => outer.unfinished(head, UDP_CHECKSUM).or_else(|| outer.unfinished_inside(head)),
        _ => outer.unfinished_inside(head),
    }
}

/// What is behind an IP header.
struct Upper {
    start: usize,
    protocol: u8,
    /// Sum of the pseudo header.
    pseudo: Checksum,
}

impl Upper {
    /// Of the Ethernet frame at `at`.
    #[inline]
    fn of_frame(head: &[u8], at: usize) -> Option<Self> {
        let mut at = at.wrapping_add(TYPE_AT);
        let mut kind = two(head, at)?;
        for _ in 0..2 {
            if !matches!(kind, 0x8100 | 0x88a8) {
                break;
            }
            at = at.wrapping_add(TAG);
            kind = two(head, at)?;
        }
        Self::of_packet(head, at.wrapping_add(2), kind)
    }

    /// Of the packet at `at`.
    #[inline]
    fn of_packet(head: &[u8], at: usize, kind: u16) -> Option<Self> {
        let packet = head.get(at..)?;
        let (header, protocol, pseudo) = match kind {
            IPV4 => ipv4(packet)?,
            IPV6 => ipv6(packet)?,
            _ => return None,
        };
        Some(Self { start: at.wrapping_add(header), protocol, pseudo })
    }

    /// What is left to do on the checksum at `offset`, if it is.
    #[inline]
    fn unfinished(&self, head: &[u8], offset: usize) -> Option<Offload> {
        let field = two(head, self.start.wrapping_add(offset))?;
        // The complement of a checksum over the pseudo header is its sum. 0 and all ones are the
        // same number for it, but 0 in UDP's field is "no checksum".
        let left = field == !self.pseudo.finish();
        (left && field != 0).then(|| Offload {
            needs_csum: true,
            csum_start: u16::try_from(self.start).unwrap_or(0),
            csum_offset: u16::try_from(offset).unwrap_or(0),
            ..Offload::default()
        })
    }

    /// The same of what is in a tunnel.
    fn unfinished_inside(&self, head: &[u8]) -> Option<Offload> {
        let inner = match self.protocol {
            UDP => self.in_vxlan(head)?,
            GRE => self.in_gre(head)?,
            IP_IN_IP => Self::of_packet(head, self.start, IPV4)?,
            IPV6_IN_IP => Self::of_packet(head, self.start, IPV6)?,
            _ => return None,
        };
        match inner.protocol {
            TCP => inner.unfinished(head, TCP_CHECKSUM),
            UDP => inner.unfinished(head, UDP_CHECKSUM),
            _ => None,
        }
    }

    fn in_vxlan(&self, head: &[u8]) -> Option<Self> {
        let bytes: &[u8; 16] = head.get(self.start..)?.first_chunk()?;
        let port = u16::from_be_bytes([bytes[2], bytes[3]]);
        let is_vxlan = port == VXLAN_PORT && bytes[8] & VXLAN_VNI != 0;
        is_vxlan.then(|| Self::of_frame(head, self.start.wrapping_add(bytes.len())))?
    }

    fn in_gre(&self, head: &[u8]) -> Option<Self> {
        let flags = two(head, self.start)?;
        if flags & GRE_UNKNOWN != 0 {
            return None;
        }
        let words = GRE_WORDS.iter().filter(|flag| flags & **flag != 0).count();
        let at = self.start.wrapping_add(4).wrapping_add(words.wrapping_mul(4));
        match two(head, self.start.wrapping_add(2))? {
            TRANSPARENT_ETHERNET => Self::of_frame(head, at),
            kind => Self::of_packet(head, at, kind),
        }
    }
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

    /// In VXLAN, GRE with and without a key, and IP in IP; the outer checksum is none or finished.
    #[test]
    fn an_undone_checksum_in_a_tunnel_is_found_and_a_finished_one_left_alone() {
        let ip = |protocol: u8, payload: usize| {
            let mut bytes = vec![2; 12];
            bytes.extend([8, 0, 0x45, 0]);
            bytes.extend((20 + payload as u16).to_be_bytes());
            bytes.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 7, 0, 1, 10, 7, 0, 2]);
            bytes
        };
        let vxlan = |sum: [u8; 2]| {
            [&[0x80, 1, 0x12, 0xb5, 0, 0][..], &sum, &[8, 0, 0, 0, 0, 0, 5, 0]].concat()
        };
        for Made { bytes, start, offset, .. } in all() {
            let kind = [bytes[12], bytes[13]];
            let packet = bytes[14..].to_vec();
            let mut ways = vec![
                (17, vxlan([0, 0]), bytes.clone()),
                (17, vxlan([0x12, 0x34]), bytes.clone()),
                (47, vec![0, 0, 0x65, 0x58], bytes.clone()),
                (47, vec![0x20, 0, 0x65, 0x58, 0, 0, 0, 5], bytes.clone()),
            ];
            if kind != [0x81, 0] {
                let inner = if kind == [8, 0] { 4 } else { 41 };
                ways.push((47, [&[0xb0, 0][..], &kind, &[7; 12]].concat(), packet.clone()));
                ways.push((inner, Vec::new(), packet));
            }
            for (protocol, header, inner) in ways {
                let mut whole = ip(protocol, header.len() + inner.len());
                whole.extend(&header);
                let at = whole.len() + start - (bytes.len() - inner.len());
                whole.extend(&inner);
                let found = unfinished(&whole).map(|left| (left.csum_start, left.csum_offset));
                assert_eq!(found, Some((at as u16, offset as u16)), "{protocol} {header:?}");
                for len in 0..at + offset + 2 {
                    assert_eq!(unfinished(&whole[..len]), None, "{len} bytes");
                }
                whole[at + offset] ^= 1;
                assert_eq!(unfinished(&whole), None, "another number");
            }
            // Another port, no VNI, routing in GRE, another version: no tunnel that is known.
            for (protocol, place, value) in [(17, 37, 9), (17, 42, 0), (47, 34, 0x40), (47, 35, 1)]
            {
                let header = if protocol == 17 { vxlan([0, 0]) } else { vec![0, 0, 0x65, 0x58] };
                let mut whole = ip(protocol, header.len() + bytes.len());
                whole.extend(header.iter().chain(&bytes));
                assert!(unfinished(&whole).is_some());
                whole[place] = value;
                assert_eq!(unfinished(&whole), None, "{protocol} byte {place}");
            }
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
