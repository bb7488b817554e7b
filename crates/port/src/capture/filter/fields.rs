//! What filters look at, found in the head of a frame.

use std::net::IpAddr;

use super::Protocol;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const CUSTOMER_TAG: u16 = 0x8100;
const SERVICE_TAG: u16 = 0x88a8;
/// Headers that may stand between IPv6's and what it carries: hop-by-hop, routing, destination.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
const FRAGMENT: u8 = 44;
/// TCP, UDP, SCTP: the ports stand at the same place.
const WITH_PORTS: [u8; 3] = [6, 17, 132];

/// What was found; what is not there is none.
#[derive(Debug, Default)]
pub(super) struct Fields {
    /// The outer tag's VLAN.
    pub(super) vlan: Option<u16>,
    /// The type behind all tags.
    pub(super) ether_type: Option<u16>,
    /// What IP carries.
    protocol: Option<u8>,
    /// Source and destination; sender and target of ARP.
    pub(super) addresses: Option<(IpAddr, IpAddr)>,
    /// Source and destination.
    pub(super) ports: Option<(u16, u16)>,
}

impl Fields {
    pub(super) fn of(head: &[u8]) -> Self {
        let mut fields = Self::default();
        let mut at = 12usize;
        let mut ether_type = word(head, at);
        while let Some(CUSTOMER_TAG | SERVICE_TAG) = ether_type {
            let tag = word(head, at.wrapping_add(2));
            fields.vlan = fields.vlan.or(tag.map(|tag| tag & 0x0fff));
            at = at.wrapping_add(4);
            ether_type = word(head, at);
        }
        fields.ether_type = ether_type;
        let packet = head.get(at.wrapping_add(2)..).unwrap_or_default();
        match ether_type {
            Some(ARP) => fields.arp(packet),
            Some(IPV4) => fields.ipv4(packet),
            Some(IPV6) => fields.ipv6(packet),
            _ => {}
        }
        fields
    }

    pub(super) fn is(&self, protocol: Protocol) -> bool {
        let (is4, is6) = (self.ether_type == Some(IPV4), self.ether_type == Some(IPV6));
        match protocol {
            Protocol::Arp => self.ether_type == Some(ARP),
            Protocol::Ip => is4,
            Protocol::Ip6 => is6,
            Protocol::Over(number) => self.protocol == Some(number),
            Protocol::OverIp(number) => is4 && self.protocol == Some(number),
            Protocol::OverIp6(number) => is6 && self.protocol == Some(number),
        }
    }

    fn arp(&mut self, packet: &[u8]) {
        let pair = || Some((address4(packet, 14)?, address4(packet, 24)?));
        if word(packet, 2) == Some(IPV4) {
            self.addresses = pair();
        }
    }

    fn ipv4(&mut self, packet: &[u8]) {
        let Some(first) = packet.first() else { return };
        let header = usize::from(first & 0x0f).saturating_mul(4);
        let fragment = word(packet, 6).unwrap_or(0) & 0x1fff;
        self.protocol = packet.get(9).copied();
        self.addresses = address4(packet, 12).zip(address4(packet, 16));
        if fragment == 0 && header >= 20 {
            self.find_ports(packet.get(header..).unwrap_or_default());
        }
    }

    fn ipv6(&mut self, packet: &[u8]) {
        self.addresses = address6(packet, 8).zip(address6(packet, 24));
        let Some(mut next) = packet.get(6).copied() else { return };
        let mut rest = packet.get(40..).unwrap_or_default();
        loop {
            let size = match next {
                FRAGMENT => 8,
                _ if EXTENSIONS.contains(&next) => {
                    let eights = rest.get(1).copied().unwrap_or(0);
                    usize::from(eights).saturating_add(1).saturating_mul(8)
                }
                _ => break,
            };
            let later = next == FRAGMENT && word(rest, 2).unwrap_or(0) & 0xfff8 != 0;
            let Some(behind) = rest.get(size..) else { return };
            next = rest.first().copied().unwrap_or(u8::MAX);
            rest = behind;
            if later {
                self.protocol = Some(next);
                return;
            }
        }
        self.protocol = Some(next);
        self.find_ports(rest);
    }

    fn find_ports(&mut self, segment: &[u8]) {
        if self.protocol.is_some_and(|protocol| WITH_PORTS.contains(&protocol)) {
            self.ports = word(segment, 0).zip(word(segment, 2));
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

fn address4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    bytes.get(at..)?.first_chunk::<4>().copied().map(IpAddr::from)
}

fn address6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    bytes.get(at..)?.first_chunk::<16>().copied().map(IpAddr::from)
}
