//! What a hostile guest costs a good one that shares a worker with it.
//!
//! One worker on CPU 0 serves two ports between which `causeway-guest` keeps frames going (CPU 1)
//! and one with the hostile front end, which does one of the [`acts`] all the time. Runs with and
//! without it take turns. It shares its CPU with the good guest, so it pauses after each act: what
//! is measured is the switch, not the fight for CPU 1.

mod acts;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};
use serde::Deserialize;

use super::machine::guest_program;
use super::prepare;
use crate::steps::Steps;
use acts::{Act, Hostile};

/// How long the guest may take to end.
const SLACK: Duration = Duration::from_secs(30);
/// The good guest's frames under way: its receiveq never overflows.
const WINDOW: &str = "192";
/// What the good guest has to keep of its throughput.
const GOAL: f64 = 0.9;

/// Options of `cargo xtask bench hostile`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Runs of each act, and as many without it
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=60))]
    seconds: u16,
    /// Packed rings instead of split ones, of the hostile guest
    #[arg(long)]
    packed: bool,
}

/// What `causeway-guest --json` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    lost: u64,
    rx_pps: f64,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, false)?;
    let scratch = Scratch::new("hostile")?;
    let switch = start(&scratch)?;
    println!(
        "\nMfps of the good guest. The hostile one takes a share of its CPU: the second ratio is"
    );
    println!("to what is left of that");
    let head = ["alone", "beside", "ratio", "its CPU", "of the rest", "lost", "acts"];
    println!("{:34} {}", "", head.map(|text| format!("{text:>11}")).join(" "));
    let (mut worst, mut lost) = (f64::INFINITY, 0u64);
    for act in Act::ALL {
        let row = measure(&switch, &scratch, *act, options)?;
        let (whole, share) = (row.beside / row.alone, row.share);
        let ratio = whole / (1.0 - share);
        println!(
            "{:34} {:11.2} {:11.2} {whole:11.3} {share:11.3} {ratio:11.3} {:11} {:11}",
            act.name(),
            row.alone / 1e6,
            row.beside / 1e6,
            row.lost,
            row.acts
        );
        worst = worst.min(ratio);
        lost = lost.saturating_add(row.lost);
    }
    let text = format!("the worst ratio is {worst:.3} (goal {GOAL}), {lost} frames lost (goal 0)");
    ensure!(lost == 0, "{text}");
    let _ = switch.check_ledger()?;
    switch.stop()?;
    steps.note("hostile", Ok(text));
    Ok(())
}

/// Medians of frames per second, sums of the rest.
struct Row {
    alone: f64,
    beside: f64,
    /// What the hostile guest takes of the good one's CPU.
    share: f64,
    lost: u64,
    acts: u64,
}

fn measure(switch: &Switch, scratch: &Scratch, act: Act, options: &Options) -> Result<Row> {
    let (mut alone, mut beside, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    let (mut lost, mut acts) = (0u64, 0u64);
    for _ in 0..options.runs {
        let said = good(scratch, options)?;
        alone.push(said.rx_pps);
        lost = lost.saturating_add(said.lost);
        let stop = Arc::new(AtomicBool::new(false));
        let hostile = Hostile::new(scratch.path("evil.sock"), options.packed);
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || hostile.repeat(act, &asked));
        let said = good(scratch, options);
        stop.store(true, Ordering::Relaxed);
        let done = thread.join().map_err(|_| anyhow::anyhow!("the hostile guest panicked"))?;
        let done = done.with_context(|| act.name())?;
        acts = acts.saturating_add(done.count);
        shares.push(done.cpu_share);
        let said = said?;
        beside.push(said.rx_pps);
        lost = lost.saturating_add(said.lost);
        if switch.ctl(&["ports"])?.contains("quarantined") {
            let _ = switch.ctl(&["port", "reset", "evil"])?;
        }
    }
    let share = median(shares);
    Ok(Row { alone: median(alone), beside: median(beside), share, lost, acts })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn start(scratch: &Scratch) -> Result<Switch> {
    let spec = |name: &str, vlan: u8| {
        let socket = scratch.path(&format!("{name}.sock"));
        format!("vhost-user:name={name},vlan={vlan},socket={}", socket.display())
    };
    // What it floods is not to reach the good one: that is what VLANs are for.
    let ports = [spec("good0", 1), spec("good1", 1), spec("evil", 2)];
    let mut arguments = vec!["--workers", "0", "--log", "error"];
    arguments.extend(ports.iter().flat_map(|port| ["--port", port]));
    Switch::start_with(scratch.folder(), &arguments)
}

/// One run of the good guest.
fn good(scratch: &Scratch, options: &Options) -> Result<Said> {
    let mut command: Command = tied_command("taskset");
    let _ = command
        .args(["--cpu-list", "1"])
        .arg(guest_program()?)
        .args(["--generate", "--busy", "--verify", "--json", "--window", WINDOW])
        .args(["--seconds", &options.seconds.to_string()]);
    for name in ["good0.sock", "good1.sock"] {
        let _ = command.arg("--socket").arg(scratch.path(name));
    }
    let mut guest = Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))?;
    let status = guest.finish(SLACK)?;
    ensure!(status.success(), "causeway-guest ended with {status}\n{}", guest.tail());
    let log = guest.output_from(0)?;
    let line = log.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("causeway-guest says: {log}"))?;
    serde_json::from_str(line).with_context(|| format!("causeway-guest says: {line}"))
}
