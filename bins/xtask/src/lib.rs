//! Every job of a developer and of CI is one `cargo xtask` command, so that local is CI.
//!
//! ```text
//!  ci ──► lint (fmt, clippy, rustdoc, tidy) ──► test ──► bench instructions, two-workers
//!     ──► aarch64 ──► fuzz
//!  test ──► cargo test, loom ──► conformance (QEMU, DPDK)
//!  bench ──► criterion, callgrind; pvp, latency, scale, idle, sweep: the whole switch, and peers
//!  soak ──► actions from one seed against a switch and its guests
//!  demo ──► build ──► two QEMU guests and the host on one switch
//! ```
#![forbid(unsafe_code)]

mod aarch64;
mod bench;
mod ci;
mod demo;
mod fuzz;
mod lint;
mod soak;
mod steps;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::steps::Steps;

/// Developer commands of the Causeway tree.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot two QEMU guests on the switch and let them talk to each other and to the host
    Demo {
        /// Run the guests inside the process instead: needs neither QEMU nor root
        #[arg(long)]
        embedded: bool,
    },
    /// Run every test: unit, model, loom, examples and conformance
    Test(test::Options),
    /// Random things happen to a switch, while a pair of guests must not lose a frame
    Soak(soak::Options),
    /// Run what CI runs
    Ci,
    /// Check formatting, clippy, rustdoc and the house style
    Lint,
    /// Check the mechanical part of the house style
    Tidy,
    /// Build for 64-bit Arm and run unit tests in an emulator
    Aarch64,
    /// Fuzz one target, or each in turn
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// A file of `fuzz/fuzz_targets`, without `.rs`
        target: Option<String>,
    },
    /// Measure
    Bench {
        #[command(subcommand)]
        kind: bench::Kind,
    },
}

/// Runs the command of this process's arguments and prints the steps with their results.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let mut steps = Steps::new();
    match dispatch(cli.command, &mut steps) {
        Ok(()) => steps.summary(),
        Err(error) => {
            let _ = steps.summary();
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command, steps: &mut Steps) -> Result<()> {
    match command {
        Command::Demo { embedded } => demo::run(embedded),
        Command::Test(options) => test::run(steps, &options),
        Command::Soak(options) => soak::run(steps, &options),
        Command::Ci => ci::run(steps),
        Command::Lint => lint::run(steps),
        Command::Tidy => lint::tidy(steps),
        Command::Aarch64 => aarch64::run(steps),
        Command::Fuzz { seconds, target } => fuzz::run(steps, seconds, target.as_deref()),
        Command::Bench { kind } => bench::run(steps, &kind),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
