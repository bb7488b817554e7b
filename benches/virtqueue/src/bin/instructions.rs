//! Pops and completes 100 000 chains of one descriptor, for instruction counts that repeat.
//!
//! ```text
//! cargo build --release -p virtqueue --bin instructions
//! valgrind --tool=callgrind --toggle-collect='virtqueue::*::serve' \
//!     target/release/instructions split 32
//! ```
//!
//! `--toggle-collect` counts the device's part only:
//!
//! | kinds | counted | what it is |
//! |---|---|---|
//! | `split`, `packed` and theirs | `virtqueue::Ours::serve` | pop and complete |
//! | `virtio-queue` and its | `virtqueue::Theirs::serve` | the same, of the crate `virtio-queue` |
//! | `path-*` | `virtqueue::Path::serve` | one guest's transmitq to another's receiveq |
//! | `switch-*` | `virtqueue::Pair::serve` | the same through the switch: a worker's whole turn |
//! | `iotlb-*` | `virtqueue::Translations::serve` | a message about a translation |
//! | `segments` | `virtqueue::Segments::serve` | a segment of a large frame, copied and summed |
//! | `merges` | `virtqueue::Merges::serve` | a segment that is put together with others, summed |
//! | `two-workers-*` | the same | two workers on two threads, each with a pair of its own |
//!
//! `offer` and `reclaim` are the driver's.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use virtq::Layout;
use virtqueue::{
    Merges, Ours, Pair, Path, SIZE, Segments, Theirs, Traffic, Translations, Variant, pairs,
};

/// Chains per run: divide callgrind's count by it.
const CHAINS: u32 = 100_000;
const KINDS: &str = "split, packed, split-indirect, packed-indirect, split-in-order, \
                     packed-in-order, path-split, path-packed, switch-split, switch-packed, \
                     switch-split-vlan, switch-packed-vlan, switch-split-mixed, \
                     switch-packed-mixed, switch-split-multiqueue, \
                     switch-split-iommu, switch-packed-iommu, \
                     switch-split-pages, switch-packed-pages, iotlb-few, iotlb-full, \
                     switch-split-logged, switch-packed-logged, \
                     switch-split-unlogged, switch-packed-unlogged, \
                     switch-split-limits, switch-packed-limits, switch-split-spread, \
                     two-workers-split, two-workers-packed, virtio-queue, virtio-queue-indirect, \
                     segments, merges";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let kind = args.next().unwrap_or_else(|| "split".into());
    let batch = args.next().unwrap_or_else(|| "32".into());
    let batch = batch.parse::<usize>().ok().filter(|batch| (1..=256).contains(batch));
    let (Some(batch), true) = (batch, KINDS.split(", ").any(|known| known == kind)) else {
        eprintln!("usage: instructions KIND BATCH; KIND is one of {KINDS}; BATCH is 1 to 256");
        return ExitCode::from(2);
    };
    match run(&kind, batch) {
        Ok(bytes) => {
            println!("{kind}, batches of {batch}: {CHAINS} chains, {bytes} bytes");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{kind}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(kind: &str, batch: usize) -> anyhow::Result<u64> {
    let indirect = kind.ends_with("-indirect");
    let burst = u16::try_from(batch.min(port::BURST_MAX))?;
    let layout = if kind.contains("packed") { Layout::Packed } else { Layout::Split };
    if kind.starts_with("virtio-queue") {
        let mut ring = Theirs::new(indirect, false)?;
        chains(|count| {
            ring.offer(count)?;
            Ok((ring.serve(batch)?, ring.reclaim()?))
        })
    } else if kind.starts_with("iotlb-") {
        let mut translations = Translations::new(kind == "iotlb-full")?;
        frames(CHAINS, burst, |count| {
            translations.serve(count);
            Ok(())
        })
    } else if kind == "segments" {
        let mut segments = Segments::new(burst)?;
        frames(CHAINS, burst, |count| {
            anyhow::ensure!(segments.serve() == u32::from(burst), "segments are missing");
            anyhow::ensure!(count == burst, "{CHAINS} is no multiple of {burst}");
            Ok(())
        })
    } else if kind == "merges" {
        let mut merges = Merges::new(burst)?;
        frames(CHAINS, burst, |count| {
            anyhow::ensure!(merges.serve() == 1, "segments were not put together");
            anyhow::ensure!(count == burst, "{CHAINS} is no multiple of {burst}");
            Ok(())
        })
    } else if kind.starts_with("path-") {
        let mut path = Path::new(layout)?;
        frames(CHAINS, burst, |count| {
            path.offer(count)?;
            anyhow::ensure!(path.serve()? == usize::from(count), "frames are missing");
            anyhow::ensure!(path.reclaim()? == usize::from(count), "chains are missing");
            Ok(())
        })
    } else if kind.starts_with("switch-") || kind.starts_with("two-workers-") {
        let traffic = match kind.rsplit('-').next() {
            Some("vlan") => Traffic::Vlan,
            Some("limits") => Traffic::Limits,
            Some("mixed") => Traffic::Mixed,
            Some("spread") => Traffic::Spread,
            Some("multiqueue") => Traffic::Multiqueue,
            Some("iommu") => Traffic::Iommu,
            Some("pages") => Traffic::Pages,
            Some("logged") => Traffic::Logged,
            Some("unlogged") => Traffic::LogOff,
            _ => Traffic::Plain,
        };
        let workers = if kind.starts_with("two-workers-") { 2 } else { 1 };
        switched(pairs(layout, traffic, workers)?, burst)
    } else {
        let in_order = kind.ends_with("-in-order");
        let mut ring = Ours::new(Variant { layout, indirect, in_order })?;
        chains(|count| {
            ring.offer(count)?;
            Ok((ring.serve(batch), ring.reclaim()?))
        })
    }
}

/// Each pair on a thread of its own, its share of the frames in bursts.
fn switched(mut pairs: Vec<Pair>, burst: u16) -> anyhow::Result<u64> {
    let share = CHAINS.checked_div(u32::try_from(pairs.len())?).unwrap_or_default();
    let bytes = std::thread::scope(|scope| {
        let run = |pair| {
            let pair: &mut Pair = pair;
            scope.spawn(move || frames(share, burst, |count| pair.round(count)))
        };
        let threads: Vec<_> = pairs.iter_mut().map(run).collect();
        let mut bytes = 0u64;
        for thread in threads {
            let served = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            bytes = bytes.wrapping_add(served?);
        }
        anyhow::Ok(bytes)
    })?;
    let dropped = pairs.first().map_or(0, Pair::drops);
    anyhow::ensure!(dropped == 0, "{dropped} frames were dropped");
    Ok(bytes)
}

/// Frames of 64 bytes, in bursts.
fn frames(
    frames: u32,
    burst: u16,
    mut round: impl FnMut(u16) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut left = frames;
    while left > 0 {
        let count = burst.min(u16::try_from(left).unwrap_or(burst));
        round(count)?;
        left = left.saturating_sub(u32::from(count));
    }
    Ok(u64::from(frames).wrapping_mul(64))
}

/// All chains, in whole rings; `round` says how many bytes and chains went round.
fn chains(mut round: impl FnMut(u16) -> anyhow::Result<(u64, usize)>) -> anyhow::Result<u64> {
    let mut bytes = 0u64;
    for count in rounds() {
        let (served, reclaimed) = round(count)?;
        anyhow::ensure!(reclaimed == usize::from(count), "chains are missing");
        bytes = bytes.wrapping_add(served);
    }
    Ok(bytes)
}

/// Whole rings, and what is left in the last one.
fn rounds() -> impl Iterator<Item = u16> {
    let size = u32::from(SIZE);
    (0..CHAINS.div_ceil(size)).map(move |round| {
        let left = CHAINS.wrapping_sub(round.wrapping_mul(size));
        u16::try_from(left.min(size)).unwrap_or(SIZE)
    })
}
