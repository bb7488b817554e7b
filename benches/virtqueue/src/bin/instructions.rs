//! Pops and completes 100 000 chains of one descriptor, for instruction counts that repeat.
//!
//! ```text
//! cargo build --release -p virtqueue --bin instructions
//! valgrind --tool=callgrind --toggle-collect='*::serve' target/release/instructions split 32
//! ```
//!
//! `--toggle-collect` counts the device's part only (`virtqueue::Ours::serve`,
//! `virtqueue::Theirs::serve`, and for `path-*`, which takes frames from one guest's transmitq to
//! another's receiveq, `virtqueue::Path::serve`); `offer` and `reclaim` are the driver's.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use virtq::Layout;
use virtqueue::{Ours, Path, SIZE, Theirs, Variant};

/// Chains per run: divide callgrind's count by it.
const CHAINS: u32 = 100_000;
const KINDS: &str = "split, packed, split-indirect, packed-indirect, split-in-order, \
                     packed-in-order, path-split, path-packed, virtio-queue, \
                     virtio-queue-indirect";

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
    let mut bytes = 0u64;
    if kind.starts_with("virtio-queue") {
        let mut ring = Theirs::new(indirect, false)?;
        for count in rounds() {
            ring.offer(count)?;
            bytes = bytes.wrapping_add(ring.serve(batch)?);
            anyhow::ensure!(ring.reclaim()? == usize::from(count), "chains are missing");
        }
    } else if let Some(layout) = kind.strip_prefix("path-") {
        let layout = if layout == "packed" { Layout::Packed } else { Layout::Split };
        let batch = u16::try_from(batch.min(port::BURST_MAX))?;
        let mut path = Path::new(layout)?;
        let mut left = CHAINS;
        while left > 0 {
            let count = batch.min(u16::try_from(left).unwrap_or(batch));
            path.offer(count)?;
            anyhow::ensure!(path.serve()? == usize::from(count), "frames are missing");
            bytes = bytes.wrapping_add(u64::from(count).wrapping_mul(64));
            anyhow::ensure!(path.reclaim()? == usize::from(count), "chains are missing");
            left = left.saturating_sub(u32::from(count));
        }
    } else {
        let layout = if kind.starts_with("packed") { Layout::Packed } else { Layout::Split };
        let in_order = kind.ends_with("-in-order");
        let mut ring = Ours::new(Variant { layout, indirect, in_order })?;
        for count in rounds() {
            ring.offer(count)?;
            bytes = bytes.wrapping_add(ring.serve(batch));
            anyhow::ensure!(ring.reclaim()? == usize::from(count), "chains are missing");
        }
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
