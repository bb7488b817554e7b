//! Headers, flow hash and checksums: what a frame costs that is looked into.
#![expect(clippy::unwrap_used, reason = "a bench stops where its set-up fails")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use packet::{
    Ethernet, Ipv4, Ipv6, Tcp, Udp, VlanTag, checksum, ethertype, flow_hash, ip_protocol,
};

const FRAME: usize = 128;

/// An Ethernet frame of `payload` behind `tag`.
fn ethernet(tag: Option<u16>, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if let Some(tci) = tag {
        frame.extend(ethertype::VLAN.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame.resize(FRAME, 0);
    frame
}

fn ipv4(protocol: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 100, 0, 1, 0x40, 0, 64, protocol, 0, 0];
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(layer4());
    packet
}

fn ipv6(protocol: u8) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 60, protocol, 64];
    packet.extend([0xfd; 15]);
    packet.push(1);
    packet.extend([0xfd; 15]);
    packet.push(2);
    packet.extend(layer4());
    packet
}

/// The start of a TCP header, which is the ports of a UDP header too.
fn layer4() -> Vec<u8> {
    let mut bytes = vec![0x30, 0x39, 0x14, 0x51, 0, 40, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0];
    bytes.resize(48, 0);
    bytes
}

/// The frames by name.
fn frames() -> [(&'static str, Vec<u8>); 4] {
    [
        ("IPv4 TCP", ethernet(None, ethertype::IPV4, &ipv4(ip_protocol::TCP))),
        ("VLAN IPv4 UDP", ethernet(Some(5), ethertype::IPV4, &ipv4(ip_protocol::UDP))),
        ("IPv6 TCP", ethernet(None, ethertype::IPV6, &ipv6(ip_protocol::TCP))),
        ("not IP", ethernet(None, 0x88b5, &[7; 64])),
    ]
}

/// The ports of a frame, through all its headers.
fn ports(frame: &[u8]) -> Option<(u16, u16)> {
    let outer = Ethernet::parse(frame)?;
    let (kind, payload) = match outer.ethertype() {
        ethertype::VLAN => {
            let tag = VlanTag::parse(outer.payload())?;
            (tag.ethertype(), tag.payload())
        }
        kind => (kind, outer.payload()),
    };
    let (protocol, payload) = match kind {
        ethertype::IPV4 => {
            let ip = Ipv4::parse(payload)?;
            (ip.protocol(), ip.payload())
        }
        ethertype::IPV6 => {
            let upper = Ipv6::parse(payload)?.upper()?;
            (upper.protocol, upper.payload)
        }
        _ => return None,
    };
    if protocol == ip_protocol::TCP {
        let tcp = Tcp::parse(payload)?;
        return Some((tcp.source(), tcp.destination()));
    }
    let udp = Udp::parse(payload)?;
    Some((udp.source(), udp.destination()))
}

fn packets(c: &mut Criterion) {
    let mut parse = c.benchmark_group("parse");
    for (name, frame) in frames() {
        assert_eq!(ports(&frame).is_some(), name != "not IP", "{name}");
        let _ = parse.bench_function(name, |b| b.iter(|| ports(black_box(&frame))));
    }
    parse.finish();
    let mut hash = c.benchmark_group("flow hash");
    for (name, frame) in frames() {
        let _ = hash.bench_function(name, |b| b.iter(|| flow_hash(black_box(&frame))));
    }
    hash.finish();
    let mut sum = c.benchmark_group("checksum");
    for len in [20_usize, 64, 1460, 9000, 65_536] {
        let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let _ = sum.throughput(Throughput::Bytes(len as u64));
        let _ = sum.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter(|| checksum(black_box(&bytes)));
        });
    }
    sum.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = packets
}
criterion_main!(benches);
