//! How near CPU 0 and CPU 1 are to each other at the moment.
//!
//! Virtual machines move: for seconds or minutes a cache line bounces between the two CPUs in
//! about 50 ns, then in about 400 ns, and every figure follows. So each run is tagged with the
//! regime before and after it, and only runs of equal regime are compared.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// Below this many nanoseconds the CPUs are near.
const NEAR_NS: f64 = 80.0;
/// Above this many they are far.
const FAR_NS: f64 = 300.0;
/// A run whose programs waited longer for their CPUs had to share them.
const WAITED_MOST: f64 = 0.02;
/// Bounces that are timed together: few enough that a block fits between two interruptions by
/// a peer that polls on the same CPU.
const BLOCK: u32 = 1_000;
const BLOCKS: u32 = 200;

/// The regime of a run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Regime {
    Near,
    Middle,
    Far,
    /// It changed while the run went on: the run is comparable with nothing.
    Changed,
    /// Other programs took one of the CPUs: nor is this.
    Disturbed,
    /// Frames were dropped, so that fewer went round than should: nor is this.
    Starved,
}

impl Regime {
    /// The regimes whose runs can be compared.
    pub(crate) const STEADY: [Self; 3] = [Self::Near, Self::Middle, Self::Far];

    /// The regime of a run with these round trips before and after it.
    pub(crate) fn of_run(before_ns: f64, after_ns: f64) -> Self {
        let (before, after) = (Self::at(before_ns), Self::at(after_ns));
        if before == after { before } else { Self::Changed }
    }

    /// The same, unless the guest or the back end waited for its CPU for this share of the run.
    pub(crate) fn unless_disturbed(self, waited: f64) -> Self {
        if waited > WAITED_MOST { Self::Disturbed } else { self }
    }

    /// The same, unless frames were lost.
    pub(crate) fn unless_starved(self, lost: u64) -> Self {
        if lost > 0 { Self::Starved } else { self }
    }

    fn at(round_trip_ns: f64) -> Self {
        if round_trip_ns < NEAR_NS {
            Self::Near
        } else if round_trip_ns > FAR_NS {
            Self::Far
        } else {
            Self::Middle
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Middle => "middle",
            Self::Far => "far",
            Self::Changed => "changed",
            Self::Disturbed => "disturbed",
            Self::Starved => "starved",
        }
    }
}

/// Checks that this process may use both CPUs.
pub(crate) fn check_cpus() -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    ensure!(
        allowed.is_set(0) && allowed.is_set(1),
        "the back end is measured on CPU 0 with a guest on CPU 1, and this process may not use both"
    );
    Ok(())
}

/// A cache line of its own, with its neighbour that the prefetcher fetches too.
#[repr(align(128))]
struct Line(AtomicU64);

/// The best round trip of a cache line between CPU 0 and CPU 1, in nanoseconds.
pub(crate) fn round_trip_ns() -> Result<f64> {
    let line = Line(AtomicU64::new(0));
    thread::scope(|scope| {
        let pong = scope.spawn(|| {
            let pinned = pin(1);
            for turn in (1..).step_by(2).take(turns()) {
                wait_for(&line, turn);
                pass(&line, turn.wrapping_add(1));
            }
            pinned
        });
        // Not this thread: what it starts later would inherit the CPU.
        let ping = scope.spawn(|| {
            let pinned = pin(0);
            // Also without its CPU a thread plays on, or the other would wait for ever.
            let best = best_block(&line);
            pinned.map(|()| best)
        });
        let (pinned, best) = (pong.join(), ping.join());
        ensure!(matches!(pinned, Ok(Ok(()))), "cannot run on CPU 1");
        match best {
            Ok(Ok(best)) => Ok(best),
            _ => anyhow::bail!("cannot run on CPU 0"),
        }
    })
}

fn turns() -> usize {
    usize::try_from(u64::from(BLOCK).saturating_mul(BLOCKS.into())).unwrap_or(usize::MAX)
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

fn best_block(line: &Line) -> f64 {
    let mut best = f64::INFINITY;
    let mut turn = 1;
    for _ in 0..BLOCKS {
        let start = Instant::now();
        for _ in 0..BLOCK {
            pass(line, turn);
            wait_for(line, turn.wrapping_add(1));
            turn = turn.wrapping_add(2);
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(BLOCK));
    }
    best
}

fn pass(line: &Line, turn: u64) {
    // ORDERING: release, pairs with the acquire of `wait_for` on the other CPU.
    line.0.store(turn, Ordering::Release);
}

fn wait_for(line: &Line, turn: u64) {
    // ORDERING: acquire, pairs with the release of `pass` on the other CPU.
    while line.0.load(Ordering::Acquire) != turn {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_tell_the_regime() {
        assert_eq!(Regime::of_run(45.0, 79.0), Regime::Near);
        assert_eq!(Regime::of_run(80.0, 300.0), Regime::Middle);
        assert_eq!(Regime::of_run(301.0, 400.0), Regime::Far);
    }

    #[test]
    fn a_change_makes_a_run_incomparable() {
        assert_eq!(Regime::of_run(50.0, 350.0), Regime::Changed);
        assert_eq!(Regime::of_run(350.0, 100.0), Regime::Changed);
        assert_eq!(Regime::Near.unless_disturbed(0.001), Regime::Near);
        assert_eq!(Regime::Near.unless_disturbed(0.2), Regime::Disturbed);
        assert_eq!(Regime::Far.unless_starved(0), Regime::Far);
        assert_eq!(Regime::Far.unless_starved(1), Regime::Starved);
        assert!(!Regime::STEADY.contains(&Regime::Starved));
        assert!(!Regime::STEADY.contains(&Regime::Changed));
        assert!(!Regime::STEADY.contains(&Regime::Disturbed));
    }

    #[test]
    fn a_line_bounces() {
        if check_cpus().is_ok() {
            let nanos = round_trip_ns().unwrap();
            assert!(nanos > 1.0 && nanos < 1e6, "{nanos}");
        }
    }
}
