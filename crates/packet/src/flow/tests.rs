use std::collections::HashSet;
use std::vec::Vec;

use super::{flow_hash, inner_flow_hash};

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

/// The same conversation the other way.
fn turned(frame: &[u8]) -> Vec<u8> {
    let mut turned = frame.to_vec();
    turned[..6].copy_from_slice(&frame[6..12]);
    turned[6..12].copy_from_slice(&frame[..6]);
    turned[26..30].copy_from_slice(&frame[30..34]);
    turned[30..34].copy_from_slice(&frame[26..30]);
    turned[34..36].copy_from_slice(&frame[36..38]);
    turned[36..38].copy_from_slice(&frame[34..36]);
    turned
}

fn udp6(from: u8, to: u8, ports: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0, 0, 8, 17, 64]);
    for last in [from, to] {
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    frame.extend(ports);
    frame.extend([0, 8, 0, 0]);
    frame
}

#[test]
fn both_directions_are_one_flow() {
    for port in 0..200 {
        let frame = udp4(port, 0);
        assert_eq!(flow_hash(&frame), flow_hash(&turned(&frame)), "port {port}");
    }
    let there = udp6(1, 2, [9, 9, 0, 53]);
    assert_eq!(flow_hash(&there), flow_hash(&udp6(2, 1, [0, 53, 9, 9])));
    assert_ne!(flow_hash(&there), flow_hash(&udp6(2, 1, [9, 9, 0, 53])), "crossed ports");
    assert_ne!(flow_hash(&udp4(7, 0)), flow_hash(&udp4(8, 0)));
    let mut arp = udp4(1, 0);
    arp[13] = 6;
    assert_eq!(flow_hash(&arp), flow_hash(&turned(&arp)));
}

/// Makes a tunnel's packet of a frame: protocol and payload.
type Wrap = fn(&[u8]) -> (u8, Vec<u8>);

/// An outer packet of `protocol` around `inner`.
fn outer4(protocol: u8, payload: &[&[u8]]) -> Vec<u8> {
    let payload = payload.concat();
    let mut frame = udp4(1, 0);
    frame.truncate(34);
    frame[16..18]
        .copy_from_slice(&u16::try_from(payload.len().wrapping_add(20)).unwrap().to_be_bytes());
    frame[23] = protocol;
    frame.extend(payload);
    frame
}

#[test]
fn tunnels_are_told_apart_by_what_is_inside() {
    let inner = |port| udp4(port, 0);
    let vxlan: &[u8] = &[0xc0, 1, 0x12, 0xb5, 0, 60, 0, 0, 8, 0, 0, 0, 0, 0, 7, 0];
    let tunnels: [(&str, Wrap); 5] = [
        ("GRE with Ethernet", |frame| (47, [&[0, 0, 0x65, 0x58], frame].concat())),
        ("GRE with key and sequence", |frame| {
            (47, [&[0x30, 0, 0x65, 0x58, 0, 0, 0, 1, 0, 0, 0, 2], frame].concat())
        }),
        ("GRE with IP", |frame| (47, [&[0, 0, 8, 0], &frame[14..]].concat())),
        ("IP in IP", |frame| (4, frame[14..].to_vec())),
        ("IPv6 in IP", |_| (41, udp6(1, 2, [1, 2, 3, 4])[14..].to_vec())),
    ];
    for (what, wrap) in tunnels {
        let frame = |port| {
            let (protocol, payload) = wrap(&inner(port));
            outer4(protocol, &[&payload])
        };
        let same = flow_hash(&frame(1)) == flow_hash(&frame(2));
        assert!(same, "{what}: the outer flow is one");
        if !what.starts_with("IPv6") {
            assert_ne!(inner_flow_hash(&frame(1)), inner_flow_hash(&frame(2)), "{what}");
            assert_eq!(inner_flow_hash(&frame(1)), flow_hash(&inner(1)), "{what}");
        } else {
            assert_eq!(inner_flow_hash(&frame(1)), flow_hash(&udp6(1, 2, [1, 2, 3, 4])));
        }
    }
    let frame = |port| outer4(17, &[vxlan, &inner(port)]);
    assert_eq!(flow_hash(&frame(1)), flow_hash(&frame(2)));
    assert_eq!(inner_flow_hash(&frame(2)), flow_hash(&inner(2)), "VXLAN");
    let gre = |frame: &[u8]| outer4(47, &[&[0, 0, 0x65, 0x58], frame]);
    assert_eq!(inner_flow_hash(&gre(&frame(9))), flow_hash(&inner(9)), "VXLAN in GRE");
    let arp = |last| {
        let mut arp = inner(1);
        (arp[13], arp[11]) = (6, last);
        gre(&arp)
    };
    assert_ne!(inner_flow_hash(&arp(1)), inner_flow_hash(&arp(2)), "stations inside");
}

#[test]
fn what_is_no_whole_tunnel_goes_by_the_outer_flow() {
    let gre = |header: [u8; 4]| outer4(47, &[&header, &udp4(1, 0)]);
    for header in [[0x40, 0, 0x65, 0x58], [0, 1, 0x65, 0x58], [0, 0, 0x12, 0x34]] {
        let frame = gre(header);
        assert_eq!(inner_flow_hash(&frame), flow_hash(&frame), "{header:?}");
    }
    let whole = gre([0, 0, 0x65, 0x58]);
    for len in 14..52 {
        let cut = &whole[..len];
        assert_eq!(inner_flow_hash(cut), flow_hash(cut), "{len} bytes");
    }
    let mut fragment = whole.clone();
    fragment[20] = 0x20;
    assert_eq!(inner_flow_hash(&fragment), flow_hash(&fragment));
    let mut other_port = outer4(17, &[&[0xc0, 1, 0x12, 0xb6, 0, 60, 0, 0, 8, 0, 0, 0, 0, 0, 7, 0]]);
    other_port.extend(udp4(1, 0));
    assert_eq!(inner_flow_hash(&other_port), flow_hash(&other_port));
    assert_eq!(inner_flow_hash(&udp4(3, 0)), flow_hash(&udp4(3, 0)));
    assert_eq!(inner_flow_hash(&whole[..13]), 0);
}
