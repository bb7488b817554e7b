//! `cargo xtask soak`: random things happen to a switch, valid and hostile, while a pair of guests
//! must not lose a frame.
//!
//! ```text
//!  seed ─► Plan: the same actions in the same order for the same seed
//!            │
//!            ▼
//!  World: switch ── g1 ⇄ g2      numbered frames all the time, in a VLAN of their own
//!                ── e1 .. e4     guests that come, go, die, begin anew, and lie
//!                ── v0, v1       DPDK's testpmd, which listens, with packed rings, as root
//!                ── tap, AF_XDP, packet_mmap   that go down and up, and are deleted
//!            │
//!            ▼
//!  checks: frames, ledger, fds, threads, memory, the log
//! ```
//!
//! The switch itself is taken over by others, and killed and started again. A crash may cost the
//! good pair a burst at each queue; the sender stands still until the receiver has found the new
//! process.
//!
//! **Limits.** Guests of QEMU are not among them: they have series of their own (`restart/`,
//! `takeover/` of the conformance tests).

mod checks;
mod hostile;
mod plan;
mod world;

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use conformance::Scratch;

use crate::steps::{Steps, build};
use plan::Plan;
use world::World;

/// Options of `cargo xtask soak`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Minutes
    #[arg(long, value_name = "N", default_value_t = 15,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    minutes: u32,
    /// Do what was done with this seed; without it another one is chosen and printed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// End after so many actions, wherever the time is
    #[arg(long, value_name = "N")]
    actions: Option<u32>,
    /// Tell of every action
    #[arg(long)]
    verbose: bool,
}

/// How long a soak is, and which.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Soak {
    pub(crate) time: Duration,
    pub(crate) seed: u64,
    pub(crate) actions: u32,
    pub(crate) verbose: bool,
}

impl Soak {
    /// One of so many seconds with a seed of its own.
    pub(crate) fn of_seconds(seconds: u64) -> Self {
        let time = Duration::from_secs(seconds);
        Self { time, seed: some_seed(), actions: u32::MAX, verbose: false }
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    if std::env::var_os("CAUSEWAY_BIN").is_none() {
        build(&["--release", "-p", "causeway", "-p", "causeway-guest"])?;
    }
    let soak = Soak {
        time: Duration::from_secs(u64::from(options.minutes).saturating_mul(60)),
        seed: options.seed.unwrap_or_else(some_seed),
        actions: options.actions.unwrap_or(u32::MAX),
        verbose: options.verbose,
    };
    step(steps, soak);
    Ok(())
}

/// Soaks, and notes what came of it.
pub(crate) fn step(steps: &mut Steps, soak: Soak) {
    println!("soak: seed {}", soak.seed);
    steps.note("soak", soak_with(soak));
}

fn soak_with(soak: Soak) -> Result<String> {
    let mut scratch = Scratch::new("soak")?;
    let result = World::start(&scratch).and_then(|world| act(world, soak));
    result.with_context(|| {
        let (seed, logs) = (soak.seed, scratch.keep().display());
        format!("again with `cargo xtask soak --seed {seed}`; logs are in {logs}")
    })
}

fn act(mut world: World, soak: Soak) -> Result<String> {
    let mut plan = Plan::new(soak.seed);
    let start = Instant::now();
    let mut count = 0u32;
    while start.elapsed() < soak.time && count < soak.actions {
        let (action, pause) = plan.next();
        count = count.saturating_add(1);
        if soak.verbose {
            println!("soak: action {count}: {action:?}");
        }
        world.act(&action).with_context(|| format!("action {count}, {action:?}"))?;
        std::thread::sleep(pause);
        world.looks_well().with_context(|| format!("after action {count}, {action:?}"))?;
    }
    let found = world.finish()?;
    let (seconds, seed) = (start.elapsed().as_secs(), soak.seed);
    Ok(format!("seed {seed}: {count} actions in {seconds} s, {found}"))
}

fn some_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = now.map_or(0, |time| u64::from(time.subsec_nanos()) ^ time.as_secs());
    nanos % 1_000_000_007
}
