//! Pop and complete, one descriptor, beside the crate `virtio-queue`: both devices on the same
//! memory in turns, so that what the machine does hits both; medians and their ratio.
//!
//! ```text
//! cargo bench -p virtqueue --bench beside
//! ```
//!
//! Fails if our split ring is not at least 5 times faster than theirs in batches of 32, as it is
//! meant to be. `virtio-queue` has no packed ring: ours is shown beside their split one (about 3
//! times faster), which is no comparison of equals.
#![expect(clippy::unwrap_used, reason = "a bench stops where its set-up fails")]

use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use virtq::Layout;
use virtqueue::{Ours, SIZE, Theirs, Variant, memory};

/// Measurements of each device; the median counts.
const RUNS: usize = 301;
/// Whole rings in one measurement.
const RINGS: u32 = 20;
const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const GOAL: f64 = 5.0;
const GOAL_BATCH: usize = 32;

fn main() -> ExitCode {
    // `cargo test --benches` runs this too, to see that it starts.
    let runs = if std::env::args().any(|arg| arg == "--bench") { RUNS } else { 1 };
    println!("ns a chain, medians of {runs} runs; virtio-queue translates no address\n");
    println!("batch    split   packed   virtio-queue   split is x faster   packed is");
    let mut reached = true;
    for batch in BATCHES {
        let [split, packed, theirs] = measure(batch, runs);
        let (by_split, by_packed) = (theirs / split, theirs / packed);
        println!(
            "{batch:5} {split:8.1} {packed:8.1} {theirs:14.1} {by_split:19.1} {by_packed:11.1}"
        );
        if batch == GOAL_BATCH && runs == RUNS {
            reached = by_split >= GOAL;
        }
    }
    if reached {
        return ExitCode::SUCCESS;
    }
    eprintln!("split: less than {GOAL} times faster in batches of {GOAL_BATCH}");
    ExitCode::FAILURE
}

/// Nanoseconds a chain: our split and packed ring, and theirs.
fn measure(batch: usize, runs: usize) -> [f64; 3] {
    let (of_split, of_packed) = (memory().unwrap(), memory().unwrap());
    let mut split = Ours::on(&of_split, Variant::plain(Layout::Split)).unwrap();
    let mut packed = Ours::on(&of_packed, Variant::plain(Layout::Packed)).unwrap();
    let mut theirs = Theirs::on(&of_split, false, false).unwrap();
    let mut times: [Vec<Duration>; 3] = std::array::from_fn(|_| Vec::new());
    for _ in 0..runs {
        let [of_split, of_packed, of_theirs] = &mut times;
        of_split.push(ours(&mut split, batch));
        of_packed.push(ours(&mut packed, batch));
        of_theirs.push(rounds(&mut theirs, |ring| {
            ring.offer(SIZE).unwrap();
            let start = Instant::now();
            let _ = black_box(ring.serve(batch).unwrap());
            let spent = start.elapsed();
            assert_eq!(ring.reclaim(), Ok(usize::from(SIZE)));
            spent
        }));
    }
    times.map(|mut times| {
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        median.as_secs_f64() * 1e9 / f64::from(RINGS) / f64::from(SIZE)
    })
}

fn ours(ring: &mut Ours, batch: usize) -> Duration {
    rounds(ring, |ring| {
        ring.offer(SIZE).unwrap();
        let start = Instant::now();
        let _ = black_box(ring.serve(batch));
        let spent = start.elapsed();
        assert_eq!(ring.reclaim(), Ok(usize::from(SIZE)));
        spent
    })
}

fn rounds<T>(ring: &mut T, mut round: impl FnMut(&mut T) -> Duration) -> Duration {
    (0..RINGS).map(|_| round(ring)).sum()
}
