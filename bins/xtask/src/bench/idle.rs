//! CPU time that the switch takes, as it polls by default, while its guests do nothing.
//!
//! The guests are the ports of one `causeway-guest --receive`, attached and asleep. A booted
//! Linux guest is less quiet than that: it asks for neighbours now and then.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};
use serde::Serialize;

use super::machine::{Threads, Versions, guest_program};
use super::prepare;
use super::report::Report;
use super::summary::{Spread, spread};
use crate::steps::Steps;

const SETTLE: Duration = Duration::from_secs(1);

/// Options of `cargo xtask bench idle`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Guests that do nothing
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u16).range(1..=128))]
    guests: u16,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    /// Runs
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
}

/// One run.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    guests: u16,
    seconds: f64,
    cpu_seconds: f64,
    /// Of one CPU.
    percent: f64,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, false)?;
    let versions = Versions::this()?;
    let mut runs = Vec::new();
    for number in 1..=options.runs {
        let run = measure(options)?;
        println!(
            "idle, {} guests, run {number} of {}: {:.4} CPU seconds in {:.1} s ({:.3} %)",
            run.guests, options.runs, run.cpu_seconds, run.seconds, run.percent
        );
        runs.push(run);
    }
    let percents: Vec<f64> = runs.iter().map(|run| run.percent).collect();
    let summary: Option<Spread> = spread(&percents);
    let report = Report::new("percent of one CPU", versions, runs, summary)?;
    for line in report.origin() {
        println!("{line}");
    }
    let json = report.write("idle")?;
    let shown = summary.map_or_else(String::new, |all| {
        format!("{:.3} % of a CPU ({:.3}-{:.3}); ", all.median, all.min, all.max)
    });
    let name = format!("idle, {} guests", options.guests);
    steps.note(&name, Ok(format!("{shown}{}", json.display())));
    Ok(())
}

fn measure(options: &Options) -> Result<Run> {
    let scratch = Scratch::new("idle")?;
    let sockets: Vec<_> =
        (0..options.guests).map(|number| scratch.path(&format!("i{number}"))).collect();
    let names: Vec<String> = (0..options.guests).map(|number| format!("i{number}")).collect();
    let named = names.iter().zip(&sockets);
    let ports: Vec<String> = named
        .map(|(name, socket)| format!("vhost-user:name={name},socket={}", socket.display()))
        .collect();
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut command = tied_command(guest_program()?);
    let _ = command.arg("--receive");
    for socket in &sockets {
        let _ = command.arg("--socket").arg(socket);
    }
    let mut guest = Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))?;
    switch.wait_ports_up(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    sleep(SETTLE);
    let (before, start) = (Threads::of(switch.id())?.running(), Instant::now());
    sleep(Duration::from_secs(options.seconds.into()));
    let (after, seconds) = (Threads::of(switch.id())?.running(), start.elapsed().as_secs_f64());
    // A guest that ended meanwhile was not attached.
    switch.wait_ports_up(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let _ = guest.stop()?;
    switch.stop()?;
    let cpu_seconds = after.saturating_sub(before).as_secs_f64();
    ensure!(seconds > 0.0, "no time has passed");
    Ok(Run { guests: options.guests, seconds, cpu_seconds, percent: 100.0 * cpu_seconds / seconds })
}
