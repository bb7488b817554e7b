//! Any bytes as a frame: no view panics, and no payload leaves the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use packet::{Arp, Ethernet, Icmp, Ipv4, Ipv6, Tcp, Udp, VlanTag, ethertype, ip_protocol};

fuzz_target!(|bytes: &[u8]| {
    let _ = packet::inner_flow_hash(bytes);
    let hash = packet::flow_hash(bytes);
    assert_eq!(hash, packet::flow_hash(bytes), "the hash depends on the bytes alone");
    let Some(ethernet) = Ethernet::parse(bytes) else { return };
    let (mut kind, mut payload) = (ethernet.ethertype(), ethernet.payload());
    while kind == ethertype::VLAN {
        let Some(tag) = VlanTag::parse(payload) else { return };
        assert!(tag.vlan().is_none_or(|vlan| vlan.get() == tag.tci() & 0xfff));
        (kind, payload) = (tag.ethertype(), tag.payload());
    }
    match kind {
        ethertype::ARP | ethertype::RARP => {
            if let Some(arp) = Arp::parse(payload) {
                let _ = (arp.operation(), arp.sender_mac(), arp.target_ip());
            }
        }
        ethertype::IPV4 => {
            let Some(packet) = Ipv4::parse(payload) else { return };
            assert!(packet.payload().len() <= usize::from(packet.total_len()));
            let _ = packet.checksum_ok();
            upper(packet.protocol(), packet.payload());
        }
        ethertype::IPV6 => {
            let Some(part) = Ipv6::parse(payload).and_then(|packet| packet.upper()) else { return };
            assert!(payload.len() >= 40 + part.payload.len());
            if !part.fragment {
                upper(part.protocol, part.payload);
            }
        }
        _ => {}
    }
});

fn upper(protocol: u8, payload: &[u8]) {
    let rest = match protocol {
        ip_protocol::TCP => Tcp::parse(payload).map(|segment| segment.payload()),
        ip_protocol::UDP => Udp::parse(payload).map(|datagram| datagram.payload()),
        ip_protocol::ICMP | ip_protocol::ICMPV6 => Icmp::parse(payload).map(|icmp| icmp.payload()),
        _ => None,
    };
    assert!(rest.is_none_or(|rest| rest.len() + 8 <= payload.len()));
}
