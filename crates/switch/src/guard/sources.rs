//! Whether a frame comes from who may send here.
//!
//! The Ethernet source must be the port's station; so must the sender of ARP and the link-layer
//! options of neighbour discovery. If addresses are given, the source of IPv4 and IPv6, the sender
//! of ARP and the target of a neighbour advertisement must be among them. Nobody's address (0.0.0.0
//! and ::) passes where a station has none yet: DHCP, and probes (ARP, duplicate address detection)
//! for an address that is among them: who probes for another's keeps it from using it. With any
//! IPv6 address comes the link-local one that is made from the MAC. A router's advertisement takes
//! others' default routes: it passes from an address that was given, not from that one.
//!
//! **Trust.** The head is a private copy; what does not parse is not let in.
//! **Limits.** At most two VLAN tags and [`packet`]'s bound of extension headers are looked
//! through, and the SNAP header that may stand in the place of a type (RFC 1042); what hides behind
//! more is refused. Of fragments only the IP source is checked: Linux
//! and others take no neighbour discovery in fragments (RFC 6980).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use packet::MacAddr;

/// The addresses that a port may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    pub(super) mac: MacAddr,
    /// Any, if there is none.
    pub(super) addresses: BTreeSet<IpAddr>,
}

const ETHERNET: usize = 14;
const TAG: usize = 4;
const TAGS_MAX: usize = 2;
/// The largest number that is a length in the place of a type.
const LENGTH_MAX: u16 = 0x05ff;
/// What a type stands behind then, but for the last byte, and bytes of all that.
const SNAP: [u8; 5] = [0xaa, 0xaa, 3, 0, 0];
/// The last byte: of RFC 1042, and of IEEE 802.1H, which wireless bridges take off as well.
const SNAP_ENDS: [u8; 2] = [0, 0xf8];
const SNAP_HEADER: usize = 8;
const IPV6_HEADER: usize = 40;
const FRAGMENT: u8 = 44;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

impl Sources {
    /// Whether a frame that begins with `head` may come from here.
    pub(super) fn allow(&self, head: &[u8]) -> bool {
        if head.get(6..12) != Some(&self.mac.0) {
            return false;
        }
        let mut at = ETHERNET;
        for _ in 0..=TAGS_MAX {
            let Some(ethertype) = at.checked_sub(2).and_then(|from| u16_at(head, from)) else {
                // A runt: dropped as one.
                return true;
            };
            let Some(packet) = head.get(at..) else { return true };
            match ethertype {
                0x8100 | 0x88a8 => at = at.saturating_add(TAG),
                0..=LENGTH_MAX if has_type(packet) => at = at.saturating_add(SNAP_HEADER),
                0x0800 => return self.allow_ipv4(packet),
                0x0806 => return self.allow_arp(packet),
                0x86dd => return self.allow_ipv6(packet).unwrap_or(false),
                _ => return true,
            }
        }
        false
    }

    fn has(&self, address: impl Into<IpAddr>) -> bool {
        self.addresses.is_empty() || self.addresses.contains(&address.into())
    }

    fn allow_arp(&self, packet: &[u8]) -> bool {
        let (Some(mac), Some(ip)) = (packet.get(8..14), packet.get(14..).and_then(four)) else {
            return false;
        };
        let target = packet.get(24..).and_then(four);
        let claimed = if ip.is_unspecified() { target } else { Some(ip) };
        mac == self.mac.0 && claimed.is_some_and(|address| self.has(address))
    }

    fn allow_ipv4(&self, packet: &[u8]) -> bool {
        let Some(source) = packet.get(12..).and_then(four) else { return false };
        if !source.is_unspecified() {
            return self.has(source);
        }
        self.addresses.is_empty() || is_dhcp(packet)
    }

    /// None if it does not parse.
    fn allow_ipv6(&self, packet: &[u8]) -> Option<bool> {
        let source = sixteen(packet.get(8..)?)?;
        let (protocol, message) = upper(packet)?;
        let discovery = protocol == ICMPV6 && matches!(message.first(), Some(133..=137));
        let ours = if source.is_unspecified() { protocol == ICMPV6 } else { self.has_v6(source) };
        Some(ours && (!discovery || self.allow_discovery(source, message)?))
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        self.has(address)
            || address == link_local(self.mac) && self.addresses.iter().any(IpAddr::is_ipv6)
    }

    /// Neighbour discovery (RFC 4861): its options name our MAC, what it claims is ours.
    fn allow_discovery(&self, source: Ipv6Addr, message: &[u8]) -> Option<bool> {
        let target = || Some(self.has_v6(sixteen(message.get(8..)?)?));
        let (skip, ours) = match message.first()? {
            // Router solicitation and advertisement.
            133 => (8, true),
            134 => (16, self.has(source)),
            // Neighbour solicitation and advertisement. From nowhere it asks whether the target is
            // free.
            135 => (24, !source.is_unspecified() || target()?),
            136 => (24, target()?),
            // A redirect: from routers only.
            _ => return Some(false),
        };
        Some(ours && self.allow_options(message.get(skip..)?))
    }

    /// As far as the head has them.
    fn allow_options(&self, mut options: &[u8]) -> bool {
        while let [kind, length, rest @ ..] = options {
            let link_layer = matches!(kind, 1 | 2);
            if link_layer && rest.get(..6) != Some(&self.mac.0) {
                return false;
            }
            let bytes = usize::from(*length).saturating_mul(8);
            let Some(next) = options.get(bytes..).filter(|_| bytes > 0) else { break };
            options = next;
        }
        true
    }
}

/// Whether a type stands behind a SNAP header.
fn has_type(packet: &[u8]) -> bool {
    packet.starts_with(&SNAP) && packet.get(5).is_some_and(|end| SNAP_ENDS.contains(end))
}

/// From port 68 to 67, of a station that has no address yet.
fn is_dhcp(packet: &[u8]) -> bool {
    let header = packet.first().map_or(0, |first| usize::from(first & 0x0f).saturating_mul(4));
    let udp = packet.get(header..).unwrap_or_default();
    packet.get(9) == Some(&UDP) && u16_at(udp, 0) == Some(68) && u16_at(udp, 2) == Some(67)
}

/// The protocol behind the extension headers, and what follows them.
fn upper(packet: &[u8]) -> Option<(u8, &[u8])> {
    let mut next = *packet.get(6)?;
    let mut at = IPV6_HEADER;
    for _ in 0..packet::EXTENSIONS_MAX {
        match next {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let header = packet.get(at..)?;
                let [following, length] = *header.first_chunk::<2>()?;
                next = following;
                at = at.checked_add(usize::from(length).checked_add(1)?.checked_mul(8)?)?;
            }
            // Authentication counts in other units.
            51 => {
                let header = packet.get(at..)?;
                let [following, length] = *header.first_chunk::<2>()?;
                next = following;
                at = at.checked_add(usize::from(length).checked_add(2)?.checked_mul(4)?)?;
            }
            FRAGMENT => return Some((FRAGMENT, &[])),
            protocol => return Some((protocol, packet.get(at..)?)),
        }
    }
    None
}

/// The link-local address that RFC 4291 makes from a MAC.
fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_be_bytes(*chunk))
}

fn four(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk::<4>().map(|chunk| Ipv4Addr::from(*chunk))
}

fn sixteen(bytes: &[u8]) -> Option<Ipv6Addr> {
    bytes.first_chunk::<16>().map(|chunk| Ipv6Addr::from(*chunk))
}
