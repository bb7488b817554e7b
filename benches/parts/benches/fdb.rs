//! The forwarding database with 100,000 stations, 10,000 of them in use: look a destination up,
//! note a source, learn an address.
#![expect(clippy::arithmetic_side_effects, reason = "small numbers")]
#![expect(clippy::unwrap_used, reason = "a bench stops where its set-up fails")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use packet::MacAddr;
use port::PortId;
use switch::FdbLimits;
use switch::bench::{Fdb, Stations};

const STATIONS: u64 = 100_000;
const IN_USE: u64 = 10_000;
const PORTS: u16 = 64;
/// Addresses learned under one hold of the lock: at most a burst's.
const BURST: u64 = 64;
/// Bursts that are learned before they are forgotten: fewer than a port's share.
const ROUNDS: u64 = 200;

/// Stations as they are numbered by people who make virtual machines: one after the other.
fn station(number: u64) -> MacAddr {
    MacAddr::from_u64(0x5254_0000_0000 + number)
}

fn port(number: u64) -> PortId {
    PortId(u16::try_from(number % u64::from(PORTS)).unwrap())
}

fn full(stations: u64) -> Fdb {
    let limits = FdbLimits { entries: 131_072, per_port: 16_384, age_secs: 300 };
    let fdb = Fdb::new(limits);
    for number in 0..stations {
        fdb.learn(&Stations::new(0, [station(number)].into_iter()), port(number), 1);
    }
    assert_eq!(fdb.len(), u32::try_from(stations).unwrap(), "all were learned");
    fdb
}

/// The stations in use, far from each other, in an order without a pattern.
fn in_use() -> impl Iterator<Item = u64> {
    (0..IN_USE).cycle().map(|n| n.wrapping_mul(7919) % IN_USE * (STATIONS / IN_USE))
}

fn fdb(c: &mut Criterion) {
    for stations in [2, STATIONS] {
        let fdb = full(stations);
        let mut group = c.benchmark_group(format!("fdb of {stations}"));
        let _ = group.throughput(Throughput::Elements(1));
        let mut known = in_use().map(|n| n % stations);
        let mut next = || known.next().unwrap_or_default();
        let _ = group.bench_function("lookup hit", |b| {
            b.iter(|| assert!(black_box(fdb.lookup(0, station(next()))).is_some()));
        });
        let mut unknown = STATIONS..;
        let _ = group.bench_function("lookup miss", |b| {
            b.iter(|| {
                let number = STATIONS + unknown.next().unwrap_or_default() % IN_USE;
                assert!(black_box(fdb.lookup(0, station(number))).is_none());
            });
        });
        let _ = group.bench_function("source known", |b| {
            b.iter(|| {
                let number = next();
                assert!(black_box(fdb.touch(0, station(number), port(number), 1)));
            });
        });
        group.finish();
    }
    learn(c);
}

fn learn(c: &mut Criterion) {
    let mut group = c.benchmark_group("fdb, learn");
    let _ = group.throughput(Throughput::Elements(BURST));
    for (name, stations) in [("into an empty one", 0), ("beside 100000", STATIONS)] {
        let fdb = full(stations);
        let mut rounds = 0;
        let _ = group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    // What the rounds before learned goes, so that there always is room.
                    if rounds % ROUNDS == 0 {
                        let _ = fdb.flush(PortId(PORTS));
                    }
                    rounds += 1;
                    let first = STATIONS + rounds % ROUNDS * BURST;
                    Stations::new(0, (first..first + BURST).map(station))
                },
                |keys| fdb.learn(black_box(&keys), PortId(PORTS), 1),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = fdb
}
criterion_main!(benches);
