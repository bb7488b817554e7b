//! Which flow a frame belongs to, as a number: it picks the receiveq, so one flow stays in order.

use crate::ipv4::ip_protocol::{TCP, UDP};
use crate::{Ethernet, Ipv4, Ipv6, VlanTag, ethertype};

/// The most tags that are skipped.
const TAGS_MAX: usize = 2;

/// Hash of the flow of the frame whose first bytes are `head`.
///
/// The 5-tuple for TCP and UDP; addresses and protocol for other IP; the addresses alone for
/// fragments, of which only the first one has ports; the Ethernet addresses for the rest. Tags
/// do not count. 0 for less than an Ethernet header.
#[inline]
pub fn flow_hash(head: &[u8]) -> u32 {
    let Some(ethernet) = Ethernet::parse(head) else { return 0 };
    let (mut kind, mut payload) = (ethernet.ethertype(), ethernet.payload());
    for _ in 0..TAGS_MAX {
        if kind != ethertype::VLAN && kind != ethertype::SERVICE_VLAN {
            break;
        }
        let Some(tag) = VlanTag::parse(payload) else { break };
        (kind, payload) = (tag.ethertype(), tag.payload());
    }
    let ip = match kind {
        ethertype::IPV4 => Ipv4::parse(payload).map(|packet| hash_ipv4(&packet)),
        ethertype::IPV6 => Ipv6::parse(payload).map(|packet| hash_ipv6(&packet)),
        _ => None,
    };
    let hash = ip.unwrap_or_else(|| {
        mix(mix(0, ethernet.source().to_u64()), ethernet.destination().to_u64())
    });
    finish(hash)
}

fn hash_ipv4(packet: &Ipv4<'_>) -> u64 {
    let [a, b, c, d] = packet.source();
    let [e, f, g, h] = packet.destination();
    let hash = mix(4, u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    if packet.is_fragment() {
        return hash;
    }
    mix(hash, upper(packet.protocol(), packet.payload()))
}

fn hash_ipv6(packet: &Ipv6<'_>) -> u64 {
    let mut hash = 6;
    for address in [packet.source(), packet.destination()] {
        let whole = u128::from_ne_bytes(address);
        #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
        let halves = [whole as u64, (whole >> 64) as u64];
        hash = mix(mix(hash, halves[0]), halves[1]);
    }
    match packet.upper() {
        Some(part) if !part.fragment => mix(hash, upper(part.protocol, part.payload)),
        _ => hash,
    }
}

/// Protocol and ports as one number. TCP and UDP have their ports at the same place.
fn upper(protocol: u8, payload: &[u8]) -> u64 {
    let ports = match (protocol, payload) {
        (TCP | UDP, [a, b, c, d, ..]) => u32::from_ne_bytes([*a, *b, *c, *d]),
        _ => 0,
    };
    u64::from(ports) << 8 | u64::from(protocol)
}

/// Folded multiplication: every input bit reaches every output bit.
#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let product =
        u128::from(hash ^ word ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93_u128);
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    let folded = product as u64 ^ (product >> 64) as u64;
    folded
}

#[inline(always)]
fn finish(hash: u64) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    let folded = hash as u32 ^ (hash >> 32) as u32;
    folded
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::vec::Vec;

    use super::flow_hash;

    fn udp4(source_port: u16, fragment: u16) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        frame.extend([0x45, 0, 0, 36, 0, 0]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(source_port.to_be_bytes());
        frame.extend([0, 53, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        frame
    }

    fn tagged(mut frame: Vec<u8>, tag: [u8; 4]) -> Vec<u8> {
        drop(frame.splice(12..12, tag));
        frame
    }

    #[test]
    fn ports_tell_flows_apart() {
        let hashes: HashSet<_> = (0..1000).map(|port| flow_hash(&udp4(port, 0))).collect();
        assert!(hashes.len() > 990);
    }

    #[test]
    fn ports_spread_evenly_over_pairs() {
        let mut pairs = [0; 4];
        for port in 0..4000 {
            let hash = u64::from(flow_hash(&udp4(port, 0)));
            pairs[usize::try_from((hash * 4) >> 32).unwrap()] += 1;
        }
        assert!(pairs.iter().all(|n| (800..1200).contains(n)), "{pairs:?}");
    }

    #[test]
    fn fragments_of_a_packet_stay_together() {
        let first = flow_hash(&udp4(1, 0x2000));
        assert_eq!(first, flow_hash(&udp4(2, 0x0100)));
        assert_ne!(first, flow_hash(&udp4(1, 0)));
        assert_eq!(flow_hash(&udp4(1, 0x4000)), flow_hash(&udp4(1, 0)), "DF is no fragment");
    }

    #[test]
    fn tags_do_not_count() {
        let plain = udp4(7, 0);
        let once = tagged(plain.clone(), [0x81, 0, 0, 5]);
        assert_eq!(flow_hash(&plain), flow_hash(&once));
        assert_eq!(flow_hash(&plain), flow_hash(&tagged(once, [0x88, 0xa8, 0, 9])));
    }

    #[test]
    fn other_frames_go_by_their_addresses() {
        let mut arp = udp4(1, 0);
        arp[13] = 6;
        let mut other = arp.clone();
        other[20] = 99;
        assert_eq!(flow_hash(&arp), flow_hash(&other));
        other[11] = 77;
        assert_ne!(flow_hash(&arp), flow_hash(&other));
        assert_eq!(flow_hash(&arp[..13]), 0);
    }
}
