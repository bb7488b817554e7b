//! Time to pop and complete one chain of one descriptor: split and packed, direct and indirect,
//! in batches, beside `virtio-queue`; and of a frame's way from guest to guest, in one receive
//! buffer and in several.
//!
//! ```text
//! cargo bench -p virtqueue -- 'split/direct'
//! ```
#![expect(clippy::unwrap_used, reason = "a bench stops where its set-up fails")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use port::BURST_MAX;
use virtq::Layout;
use virtqueue::{Ours, Path, SIZE, Theirs, Variant};

const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// Runs whole rings until `chains` are done; the time per `chains` of the part that `round` times.
fn time(chains: u64, mut round: impl FnMut() -> Duration) -> Duration {
    let rounds = chains.div_ceil(u64::from(SIZE));
    let spent: Duration = (0..rounds).map(|_| round()).sum();
    let done = rounds.saturating_mul(u64::from(SIZE));
    spent.mul_f64(chains as f64 / done as f64)
}

fn ours(c: &mut Criterion, name: &str, variant: Variant) {
    let mut group = c.benchmark_group(name);
    for batch in BATCHES {
        let mut ring = Ours::new(variant).unwrap();
        let _ = group.bench_function(BenchmarkId::from_parameter(batch), |b| {
            b.iter_custom(|chains| {
                time(chains, || {
                    ring.offer(SIZE).unwrap();
                    let start = Instant::now();
                    let _ = black_box(ring.serve(batch));
                    let spent = start.elapsed();
                    assert_eq!(ring.reclaim(), Ok(usize::from(SIZE)));
                    spent
                })
            });
        });
    }
    group.finish();
}

fn theirs(c: &mut Criterion, name: &str, indirect: bool, translate: bool) {
    let mut group = c.benchmark_group(name);
    for batch in [1, 32, 256] {
        let mut ring = Theirs::new(indirect, translate).unwrap();
        let _ = group.bench_function(BenchmarkId::from_parameter(batch), |b| {
            b.iter_custom(|chains| {
                time(chains, || {
                    ring.offer(SIZE).unwrap();
                    let start = Instant::now();
                    let _ = black_box(ring.serve(batch).unwrap());
                    let spent = start.elapsed();
                    assert_eq!(ring.reclaim(), Ok(usize::from(SIZE)));
                    spent
                })
            });
        });
    }
    group.finish();
}

/// A frame's way from one guest's transmitq to another's receiveq, in one buffer or in several
/// that `MRG_RXBUF` merges.
fn path(c: &mut Criterion, name: &str, new: impl Fn() -> Path) {
    let mut group = c.benchmark_group(name);
    for batch in BATCHES.into_iter().filter(|batch| *batch <= BURST_MAX) {
        let mut path = new();
        let _ = group.bench_function(BenchmarkId::from_parameter(batch), |b| {
            b.iter_custom(|frames| {
                let rounds = frames.div_ceil(batch as u64);
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    path.offer(u16::try_from(batch).unwrap()).unwrap();
                    let start = Instant::now();
                    assert_eq!(path.serve().unwrap(), batch);
                    spent = spent.saturating_add(start.elapsed());
                    assert_eq!(path.reclaim().unwrap(), batch);
                }
                let done = rounds.saturating_mul(batch as u64);
                spent.mul_f64(frames as f64 / done as f64)
            });
        });
    }
    group.finish();
}

/// The driver's own part, which is not in the other figures.
fn driver(c: &mut Criterion, name: &str, variant: Variant) {
    let mut ring = Ours::new(variant).unwrap();
    let _ = c.bench_function(name, |b| {
        b.iter_custom(|chains| {
            time(chains, || {
                let start = Instant::now();
                ring.offer(SIZE).unwrap();
                let before = start.elapsed();
                let _ = black_box(ring.serve(32));
                let start = Instant::now();
                assert_eq!(ring.reclaim(), Ok(usize::from(SIZE)));
                before.saturating_add(start.elapsed())
            })
        });
    });
}

fn rings(c: &mut Criterion) {
    for (name, layout) in [("split", Layout::Split), ("packed", Layout::Packed)] {
        let plain = Variant::plain(layout);
        ours(c, &format!("{name}/direct"), plain);
        ours(c, &format!("{name}/indirect"), Variant { indirect: true, ..plain });
        ours(c, &format!("{name}/in_order"), Variant { in_order: true, ..plain });
        driver(c, &format!("{name}/driver"), plain);
    }
    for (name, layout) in [("split", Layout::Split), ("packed", Layout::Packed)] {
        path(c, &format!("{name}/path 64 B"), || Path::new(layout).unwrap());
        path(c, &format!("{name}/path 1500 B in 3 buffers"), || Path::mergeable(layout).unwrap());
    }
    theirs(c, "virtio-queue/direct", false, false);
    theirs(c, "virtio-queue/direct+translate", false, true);
    theirs(c, "virtio-queue/indirect", true, false);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20);
    targets = rings
}
criterion_main!(benches);
