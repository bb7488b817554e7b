//! Which flow a frame belongs to, as a number: it picks the receiveq, so one flow stays in order.
//!
//! Both directions of a conversation have one number: what a guest sends says where it wants the
//! answers.

use crate::ipv4::ip_protocol::{TCP, UDP};
use crate::{Ethernet, Ipv4, Ipv6, VlanTag, ethertype};

mod tunnel;

/// The most tags that are skipped.
const TAGS_MAX: usize = 2;
/// The most tunnels that are looked into, one inside of the other.
const TUNNELS_MAX: usize = 2;

/// Hash of the flow of the frame whose first bytes are `head`, the same in both directions.
///
/// The 5-tuple for TCP and UDP; addresses and protocol for other IP; the addresses alone for
/// fragments, of which only the first one has ports; the Ethernet addresses for the rest. Tags
/// do not count. 0 for less than an Ethernet header.
#[inline]
pub fn flow_hash(head: &[u8]) -> u32 {
    let Some(ethernet) = Ethernet::parse(head) else { return 0 };
    let hash = Packet::of(&ethernet).hash();
    finish(hash.unwrap_or_else(|| of_stations(&ethernet)))
}

/// As [`flow_hash`], but of what travels inside of a tunnel, if the frame is one: GRE (with or
/// without Ethernet, key, checksum and sequence number), VXLAN, IP in IP, over IPv4 and IPv6.
/// One tunnel inside of another is looked into too.
///
/// Of a tunnel's fragments, and of what is cut off in `head`, the outer flow counts.
#[inline]
pub fn inner_flow_hash(head: &[u8]) -> u32 {
    let Some(ethernet) = Ethernet::parse(head) else { return 0 };
    let mut packet = Packet::of(&ethernet);
    let mut hash = packet.hash();
    let mut stations = of_stations(&ethernet);
    for _ in 0..TUNNELS_MAX {
        match packet.inside() {
            Some(tunnel::Inside::Packet(inner)) => packet = inner,
            Some(tunnel::Inside::Frame(frame)) => {
                let Some(ethernet) = Ethernet::parse(frame) else { break };
                packet = Packet::of(&ethernet);
                stations = of_stations(&ethernet);
                hash = None;
            }
            None => break,
        }
        hash = packet.hash().or(hash);
    }
    finish(hash.unwrap_or(stations))
}

/// Two Ethernet addresses as a flow.
#[inline]
fn of_stations(ethernet: &Ethernet<'_>) -> u64 {
    both(0, ethernet.source().to_u64(), ethernet.destination().to_u64())
}

/// What stands behind an Ethernet header and its tags.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Packet<'a> {
    V4(Ipv4<'a>),
    V6(Ipv6<'a>),
    Other,
}

impl<'a> Packet<'a> {
    /// What is in the frame whose first bytes are `head`.
    pub(crate) fn of_frame(head: &'a [u8]) -> Option<Self> {
        Some(Self::of(&Ethernet::parse(head)?))
    }

    #[inline]
    fn of(ethernet: &Ethernet<'a>) -> Self {
        let (mut kind, mut payload) = (ethernet.ethertype(), ethernet.payload());
        for _ in 0..TAGS_MAX {
            if kind != ethertype::VLAN && kind != ethertype::SERVICE_VLAN {
                break;
            }
            let Some(tag) = VlanTag::parse(payload) else { break };
            (kind, payload) = (tag.ethertype(), tag.payload());
        }
        Self::parse(kind, payload)
    }

    #[inline]
    fn parse(kind: u16, bytes: &'a [u8]) -> Self {
        let packet = match kind {
            ethertype::IPV4 => Ipv4::parse(bytes).map(Self::V4),
            ethertype::IPV6 => Ipv6::parse(bytes).map(Self::V6),
            _ => None,
        };
        packet.unwrap_or(Self::Other)
    }

    #[inline]
    fn hash(&self) -> Option<u64> {
        match self {
            Self::V4(packet) => Some(hash_ipv4(packet)),
            Self::V6(packet) => Some(hash_ipv6(packet)),
            Self::Other => None,
        }
    }
}

#[inline]
fn hash_ipv4(packet: &Ipv4<'_>) -> u64 {
    let end = |address, port| u64::from(u32::from_be_bytes(address)) << 16 | u64::from(port);
    let (mut kind, mut ports) = (4, [0, 0]);
    if !packet.is_fragment() {
        kind |= u64::from(packet.protocol()) << 8;
        ports = ports_of(packet.protocol(), packet.payload());
    }
    both(kind, end(packet.source(), ports[0]), end(packet.destination(), ports[1]))
}

fn hash_ipv6(packet: &Ipv6<'_>) -> u64 {
    let (mut kind, mut ports) = (6, [0, 0]);
    if let Some(part) = packet.upper().filter(|part| !part.fragment) {
        kind |= u64::from(part.protocol) << 8;
        ports = ports_of(part.protocol, part.payload);
    }
    let from = (u128::from_be_bytes(packet.source()), ports[0]);
    let to = (u128::from_be_bytes(packet.destination()), ports[1]);
    let (low, high) = if from <= to { (from, to) } else { (to, from) };
    let mut hash = mix(kind, u64::from(low.1) << 16 | u64::from(high.1));
    for (address, _) in [low, high] {
        #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
        let halves = [address as u64, (address >> 64) as u64];
        hash = mix(mix(hash, halves[0]), halves[1]);
    }
    hash
}

/// Source and destination port: TCP and UDP have them at the same place.
#[inline]
fn ports_of(protocol: u8, payload: &[u8]) -> [u16; 2] {
    match (protocol, payload) {
        (TCP | UDP, [a, b, c, d, ..]) => {
            [u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])]
        }
        _ => [0, 0],
    }
}

/// Both ends of a conversation, whichever one sent.
#[inline(always)]
fn both(kind: u64, from: u64, to: u64) -> u64 {
    mix(mix(kind, from.min(to)), from.max(to))
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
mod tests;
