//! Headers, flow hash and checksums: what a frame costs that is looked into.
#![expect(clippy::unwrap_used, reason = "a bench stops where its set-up fails")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use packet::{
    Ethernet, Ipv4, Ipv6, Tcp, Udp, VlanTag, checksum, ethertype, flow_hash, ip_protocol,
};
use port::{Adapter, DropReason, Finish, FrameBuf, Gso, Offload, OffloadSet, QueueCounters, Way};
use virtq::mem::Pool;

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
    // Of memory that is shared, as bodies are: there the CPU's widest vectors are used.
    let mut pool = Pool::new(1, 1 << 17).unwrap();
    pool.slot_mut(0).unwrap().fill(7);
    for len in [1460_u32, 9000, 65_536] {
        let _ = sum.throughput(Throughput::Bytes(u64::from(len)));
        let _ = sum.bench_function(BenchmarkId::new("of a body", len), |b| {
            b.iter(|| {
                let mut sum = packet::Checksum::default();
                port::sum_body(&mut sum, pool.store().reader(Pool::span(0, 0, black_box(len))));
                sum.finish()
            });
        });
    }
    sum.finish();
    // Beside it: what moving the same bytes takes.
    let mut copy = c.benchmark_group("memcpy");
    for len in [1460_usize, 9000, 65_536] {
        let (from, mut to) = (vec![7_u8; len], vec![0_u8; len]);
        let _ = copy.throughput(Throughput::Bytes(len as u64));
        let _ = copy.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
        });
    }
    copy.finish();
}

/// Bytes of the payload of a large frame, and of each of its segments.
const LARGE: usize = 65_160;
const SEGMENT: u16 = 1448;

/// A large TCP frame with a partial checksum.
fn large() -> (Vec<u8>, Offload) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0xfe, 0xd0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x30, 0x39, 0x14, 0x51, 0, 0, 0, 9, 0, 0, 0, 1, 0x80, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    let hdr_len = u16::try_from(frame.len()).unwrap();
    frame.extend((0..LARGE).map(|n| u8::try_from(n % 251).unwrap()));
    let offload = Offload {
        needs_csum: true,
        gso: Gso::TcpV4,
        gso_size: SEGMENT,
        hdr_len,
        csum_start: 34,
        csum_offset: 16,
        ..Offload::default()
    };
    (frame, offload)
}

/// Cutting a frame of 64 KiB for a guest that takes neither segmentation nor checksums, as its
/// receiveq does it, beside a copy and a checksum of the same bytes.
fn segmentation(c: &mut Criterion) {
    let (bytes, offload) = large();
    let len = u32::try_from(bytes.len()).unwrap();
    let mut group = c.benchmark_group("segmentation");
    let _ = group.throughput(Throughput::Bytes(LARGE as u64));
    let mut to = vec![0_u8; bytes.len()];
    let _ = group.bench_function("memcpy and checksum", |b| {
        b.iter(|| {
            black_box(&mut to).copy_from_slice(black_box(&bytes));
            checksum(black_box(&bytes))
        });
    });
    let mut source = Pool::new(1, 1 << 17).unwrap();
    source.slot_mut(0).unwrap().get_mut(..bytes.len()).unwrap().copy_from_slice(&bytes);
    let span = Pool::span(0, 0, len);
    let mut sink = Pool::new(64, 2048).unwrap();
    let (mut buf, mut adapter) = (FrameBuf::default(), Adapter::default());
    let counters = QueueCounters::default();
    let takes = OffloadSet { csum: true, ..OffloadSet::NONE };
    let way = Way { takes, lost: DropReason::PortDown, counters: &counters.egress };
    let _ = group.bench_function("64 KiB to segments of 1448 B", |b| {
        b.iter(|| {
            buf.clear();
            let frame = buf.slot().unwrap();
            assert!(frame.fill(source.store().reader(span), span, offload));
            buf.keep();
            let batch = buf.batch(source.store(), None);
            let mut slot = 0;
            let sent = adapter.send(&batch, &[0], &way, |batch, picked| {
                for index in picked {
                    let frame = batch.frames().get(usize::from(*index)).unwrap();
                    let writer = sink.writer(slot);
                    assert!(Finish::write(frame, batch, writer));
                    slot = slot.wrapping_add(1);
                }
                Ok(())
            });
            assert_eq!((sent, slot), (Ok(()), 45));
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = packets, segmentation
}
criterion_main!(benches);
