//! What is inside of a tunnel's packet.
//!
//! **Limits.** Only what the flow hash needs: nothing is verified, no checksum, no length.

use super::Packet;
use crate::ethertype;
use crate::ipv4::ip_protocol::UDP;

/// IPv4 in IP.
const IP_IN_IP: u8 = 4;
/// IPv6 in IP.
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;
/// `EtherType` of Ethernet inside of GRE.
const TRANSPARENT_ETHERNET: u16 = 0x6558;
/// The UDP port of VXLAN.
const VXLAN_PORT: u16 = 4789;
/// Bytes of VXLAN's header behind UDP's, and its flag of a valid VNI.
const VXLAN_LEN: usize = 8;
const VXLAN_VNI: u8 = 0x08;
const UDP_LEN: usize = 8;

/// GRE's flags (RFC 2890): a word more for each of the first three.
const CHECKSUM: u16 = 0x8000;
const KEY: u16 = 0x2000;
const SEQUENCE: u16 = 0x1000;
/// Routing of RFC 1701, and versions but 0: not looked into.
const UNKNOWN: u16 = 0x4007;

/// What a tunnel carries.
#[derive(Debug, Clone, Copy)]
pub(super) enum Inside<'a> {
    Packet(Packet<'a>),
    Frame(&'a [u8]),
}

impl<'a> Packet<'a> {
    /// What is inside, if this is a tunnel's packet and whole.
    #[inline]
    pub(super) fn inside(&self) -> Option<Inside<'a>> {
        let (protocol, payload) = match self {
            Self::V4(packet) if !packet.is_fragment() => (packet.protocol(), packet.payload()),
            Self::V6(packet) => {
                let upper = packet.upper().filter(|upper| !upper.fragment)?;
                (upper.protocol, upper.payload)
            }
            Self::V4(_) | Self::Other => return None,
        };
        match protocol {
            IP_IN_IP => packet(ethertype::IPV4, payload),
            IPV6_IN_IP => packet(ethertype::IPV6, payload),
            GRE => gre(payload),
            UDP => vxlan(payload),
            _ => None,
        }
    }
}

fn packet(kind: u16, bytes: &[u8]) -> Option<Inside<'_>> {
    match Packet::parse(kind, bytes) {
        Packet::Other => None,
        packet @ (Packet::V4(_) | Packet::V6(_)) => Some(Inside::Packet(packet)),
    }
}

fn gre(bytes: &[u8]) -> Option<Inside<'_>> {
    let (header, rest) = bytes.split_first_chunk::<4>()?;
    let flags = u16::from_be_bytes([header[0], header[1]]);
    if flags & UNKNOWN != 0 {
        return None;
    }
    let words = [CHECKSUM, KEY, SEQUENCE].iter().filter(|flag| flags & **flag != 0).count();
    let payload = rest.get(words.wrapping_mul(4)..)?;
    match u16::from_be_bytes([header[2], header[3]]) {
        TRANSPARENT_ETHERNET => frame(payload),
        kind => packet(kind, payload),
    }
}

fn vxlan(bytes: &[u8]) -> Option<Inside<'_>> {
    let (header, rest) = bytes.split_first_chunk::<UDP_LEN>()?;
    let (vxlan, payload) = rest.split_first_chunk::<VXLAN_LEN>()?;
    let port = u16::from_be_bytes([header[2], header[3]]);
    (port == VXLAN_PORT && vxlan[0] & VXLAN_VNI != 0).then(|| frame(payload)).flatten()
}

fn frame(bytes: &[u8]) -> Option<Inside<'_>> {
    (bytes.len() >= 14).then_some(Inside::Frame(bytes))
}
