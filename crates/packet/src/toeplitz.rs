//! Toeplitz hash of a packet, as receive side scaling defines it and virtio uses it (virtio 1.3,
//! section 5.1.6.5.6.4).
//!
//! ```text
//!  source address │ destination address │ source port │ destination port      (as on the wire)
//!       each bit that is set adds (XOR) the 32 bits of the key that begin at its place
//! ```
//!
//! **Not supported.** The kinds of hash that look at IPv6 extension headers (`_EX`): extension
//! headers are skipped, as the specification says for devices without them.

use crate::flow::Packet;
use crate::ip_protocol::{TCP, UDP};

/// Bytes of the longest key.
pub const HASH_KEY_MAX: usize = 40;
/// Bytes of the longest input: IPv6 addresses and ports.
const INPUT_MAX: usize = 36;
/// The last byte of the input needs the key's bits up to here.
const KEY_BYTES: usize = INPUT_MAX + 8;

/// What a hash covers; the number is virtio's `hash_report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum HashKind {
    /// Addresses of an IPv4 packet.
    Ipv4 = 1,
    /// Addresses and ports of TCP over IPv4.
    TcpV4 = 2,
    /// Addresses and ports of UDP over IPv4.
    UdpV4 = 3,
    /// Addresses of an IPv6 packet.
    Ipv6 = 4,
    /// Addresses and ports of TCP over IPv6.
    TcpV6 = 5,
    /// Addresses and ports of UDP over IPv6.
    UdpV6 = 6,
}

impl HashKind {
    /// All kinds, as a set of bits.
    pub const ALL: u32 = 0x3f;

    /// The bit that asks for this kind (`VIRTIO_NET_HASH_TYPE_*`).
    pub const fn bit(self) -> u32 {
        1 << ((self as u16).wrapping_sub(1))
    }
}

/// A key and the kinds of hash that are asked for.
#[derive(Clone, PartialEq, Eq)]
pub struct ReceiveHash {
    key: [u8; KEY_BYTES],
    kinds: u32,
}

impl core::fmt::Debug for ReceiveHash {
    /// Without the key, which is the guest's secret.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ReceiveHash").field("kinds", &self.kinds).finish_non_exhaustive()
    }
}

impl ReceiveHash {
    /// Hashes of these kinds ([`HashKind::bit`]) with this key, which counts as followed by zeros.
    /// None if the key is too long or a kind is unknown.
    pub fn new(key: &[u8], kinds: u32) -> Option<Self> {
        if key.len() > HASH_KEY_MAX || kinds & !HashKind::ALL != 0 {
            return None;
        }
        let mut whole = [0; KEY_BYTES];
        whole.get_mut(..key.len())?.copy_from_slice(key);
        Some(Self { key: whole, kinds })
    }

    /// The hash of the frame whose first bytes are `head`, and what it covers. None if the frame is
    /// of no kind that was asked for.
    pub fn of(&self, head: &[u8]) -> Option<(u32, HashKind)> {
        match Packet::of_frame(head)? {
            Packet::V4(packet) => {
                let whole = !packet.is_fragment();
                let upper = whole.then(|| (packet.protocol(), packet.payload()));
                let kinds = [HashKind::TcpV4, HashKind::UdpV4, HashKind::Ipv4];
                let (kind, ports) = self.choose(kinds, upper)?;
                Some((self.hash(&[&packet.source(), &packet.destination(), ports]), kind))
            }
            Packet::V6(packet) => {
                let upper = packet.upper().filter(|upper| !upper.fragment);
                let upper = upper.map(|upper| (upper.protocol, upper.payload));
                let kinds = [HashKind::TcpV6, HashKind::UdpV6, HashKind::Ipv6];
                let (kind, ports) = self.choose(kinds, upper)?;
                Some((self.hash(&[&packet.source(), &packet.destination(), ports]), kind))
            }
            Packet::Other => None,
        }
    }

    /// The most exact kind that was asked for and is there, and the bytes of the ports.
    fn choose<'a>(
        &self,
        [tcp, udp, ip]: [HashKind; 3],
        upper: Option<(u8, &'a [u8])>,
    ) -> Option<(HashKind, &'a [u8])> {
        let asked = |kind: HashKind| self.kinds & kind.bit() != 0;
        let exact = match upper {
            Some((TCP, payload)) if asked(tcp) => Some((tcp, payload)),
            Some((UDP, payload)) if asked(udp) => Some((udp, payload)),
            _ => None,
        };
        match exact.and_then(|(kind, payload)| Some((kind, payload.get(..4)?))) {
            None if asked(ip) => Some((ip, &[])),
            found => found,
        }
    }

    fn hash(&self, parts: &[&[u8]]) -> u32 {
        let mut hash = 0;
        let mut key = self.key.as_slice();
        for byte in parts.iter().copied().flatten() {
            let Some(window) = key.first_chunk::<8>() else { break };
            let window = u64::from_be_bytes(*window);
            for bit in 0..8u32 {
                if byte & (0x80 >> bit) != 0 {
                    let part = (window.wrapping_shl(bit) >> 32) as u32;
                    hash ^= part;
                }
            }
            key = key.get(1..).unwrap_or_default();
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::vec::Vec;

    use super::{HASH_KEY_MAX, HashKind, ReceiveHash};

    /// The key of Microsoft's "Verifying the RSS Hash Calculation".
    const KEY: [u8; HASH_KEY_MAX] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// Source, destination, their ports, the hash of the addresses, and that with the ports: its
    /// published results.
    const PUBLISHED: [(&str, &str, u16, u16, u32, u32); 8] = [
        ("66.9.149.187", "161.142.100.80", 2794, 1766, 0x323e_8fc2, 0x51cc_c178),
        ("199.92.111.2", "65.69.140.83", 14230, 4739, 0xd718_262a, 0xc626_b0ea),
        ("24.19.198.95", "12.22.207.184", 12898, 38024, 0xd2d0_a5de, 0x5c2b_394a),
        ("38.27.205.30", "209.142.163.6", 48228, 2217, 0x8298_9176, 0xafc7_327f),
        ("153.39.163.191", "202.188.127.2", 44251, 1303, 0x5d18_09c5, 0x10e8_28a2),
        ("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", 2794, 1766, 0x2cc1_8cd5, 0x4020_7d3d),
        ("3ffe:501:8::260:97ff:fe40:efab", "ff02::1", 14230, 4739, 0x0f0c_461c, 0xdde5_1bbf),
        (
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            "fe80::200:f8ff:fe21:67cf",
            44251,
            38024,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    fn frame(from: &str, to: &str, protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = Vec::from([0; 12]);
        match (from.parse().unwrap(), to.parse().unwrap()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend([8, 0, 0x45, 0, 0, 48, 0, 0, 0, 0, 64, protocol, 0, 0]);
                frame.extend(Ipv4Addr::octets(&from));
                frame.extend(Ipv4Addr::octets(&to));
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 28, protocol, 64]);
                frame.extend(Ipv6Addr::octets(&from));
                frame.extend(Ipv6Addr::octets(&to));
            }
            other => panic!("{other:?}"),
        }
        frame.extend(ports[0].to_be_bytes());
        frame.extend(ports[1].to_be_bytes());
        frame.extend([0; 24]);
        frame
    }

    #[test]
    fn published_results() {
        let all = ReceiveHash::new(&KEY, HashKind::ALL).unwrap();
        let addresses = HashKind::Ipv4.bit() | HashKind::Ipv6.bit();
        let addresses = ReceiveHash::new(&KEY, addresses).unwrap();
        for (from, to, source, destination, short, long) in PUBLISHED {
            let v6 = from.contains(':');
            let pick = |v4, other| if v6 { other } else { v4 };
            for (protocol, kind) in [
                (6, pick(HashKind::TcpV4, HashKind::TcpV6)),
                (17, pick(HashKind::UdpV4, HashKind::UdpV6)),
            ] {
                let frame = frame(from, to, protocol, [source, destination]);
                assert_eq!(all.of(&frame), Some((long, kind)), "{from}");
                let ip = pick(HashKind::Ipv4, HashKind::Ipv6);
                assert_eq!(addresses.of(&frame), Some((short, ip)), "{from}");
                let one = ReceiveHash::new(&KEY, kind.bit()).unwrap();
                assert_eq!(one.of(&frame), Some((long, kind)));
            }
            let icmp = frame(from, to, 1, [source, destination]);
            let ip = pick(HashKind::Ipv4, HashKind::Ipv6);
            assert_eq!(all.of(&icmp), Some((short, ip)));
            let ports = HashKind::ALL & !(HashKind::Ipv4.bit() | HashKind::Ipv6.bit());
            assert_eq!(ReceiveHash::new(&KEY, ports).unwrap().of(&icmp), None);
        }
    }

    #[test]
    fn fragments_go_by_their_addresses_and_tags_do_not_count() {
        let all = ReceiveHash::new(&KEY, HashKind::ALL).unwrap();
        let (from, to, source, destination, short, long) = PUBLISHED[0];
        let mut frame = frame(from, to, 6, [source, destination]);
        let mut tagged = frame.clone();
        drop(tagged.splice(12..12, [0x81, 0, 0, 5]));
        assert_eq!(all.of(&tagged), Some((long, HashKind::TcpV4)));
        frame[20] = 0x20;
        assert_eq!(all.of(&frame), Some((short, HashKind::Ipv4)));
        frame[20] = 0;
        assert_eq!(all.of(&frame[..36]), Some((short, HashKind::Ipv4)), "ports are cut off");
        frame[13] = 6;
        assert_eq!(all.of(&frame), None, "ARP");
        assert_eq!(all.of(&frame[..10]), None);
    }

    #[test]
    fn keys_and_kinds_have_limits() {
        assert!(ReceiveHash::new(&[0; HASH_KEY_MAX + 1], 0).is_none());
        assert!(ReceiveHash::new(&KEY, HashKind::ALL + 1).is_none());
        let short = ReceiveHash::new(&KEY[..8], HashKind::ALL).unwrap();
        assert_ne!(Some(short), ReceiveHash::new(&KEY, HashKind::ALL));
    }
}
