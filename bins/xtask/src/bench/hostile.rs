//! What a hostile guest costs a good one that shares a worker with it.
//!
//! One worker on CPU 0 serves two ports between which `causeway-guest` keeps frames going (CPU 1)
//! and one with the hostile front end, which does one of the [`acts`] all the time, on CPU 1 too.
//!
//! ```text
//!  alone       the good guest
//!  beside      the good guest and the hostile one
//!  its CPU     the good guest and who takes CPU 1 as often and for as long as the hostile one did
//! ```
//!
//! The three take turns. Two CPUs are too few to keep the hostile guest's own work away from the
//! good one's: the second ratio, of `beside` to `its CPU`, is what the switch lets it do. The
//! control thread needs a CPU as well, the worker's or the guest's: its share is shown.

mod acts;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
    println!("\nMfps of the good guest: alone, beside the hostile one, beside its use of the CPU");
    let head = ["alone", "beside", "ratio", "its CPU", "ratio", "takes", "control", "lost", "acts"];
    println!("{:34} {}", "", head.map(|text| format!("{text:>8}")).join(" "));
    let (mut worst, mut raw, mut lost) = (f64::INFINITY, f64::INFINITY, 0u64);
    for act in Act::ALL {
        let row = measure(&switch, &scratch, *act, options)?;
        let (whole, ratio) = (row.beside / row.alone, row.beside / row.mimicked);
        println!(
            "{:34} {:8.2} {:8.2} {whole:8.3} {:8.2} {ratio:8.3} {:8.3} {:8.3} {:8} {:8}",
            act.name(),
            row.alone / 1e6,
            row.beside / 1e6,
            row.mimicked / 1e6,
            row.share,
            row.control,
            row.lost,
            row.acts
        );
        (worst, raw) = (worst.min(ratio), raw.min(whole));
        lost = lost.saturating_add(row.lost);
    }
    let text = format!(
        "worst ratio to its use of the CPU {worst:.3} (goal {GOAL}), to alone {raw:.3}; {lost} \
         frames lost (goal 0)"
    );
    ensure!(lost == 0, "{text}");
    let _ = switch.check_ledger()?;
    switch.stop()?;
    steps.note("hostile", Ok(text));
    Ok(())
}

/// Medians of frames per second and shares, sums of the rest.
struct Row {
    alone: f64,
    beside: f64,
    mimicked: f64,
    /// What the hostile guest takes of the good one's CPU.
    share: f64,
    /// What the switch takes of a CPU besides its worker.
    control: f64,
    lost: u64,
    acts: u64,
}

fn measure(switch: &Switch, scratch: &Scratch, act: Act, options: &Options) -> Result<Row> {
    let [mut alone, mut beside, mut mimicked] = [Vec::new(), Vec::new(), Vec::new()];
    let (mut shares, mut controls) = (Vec::new(), Vec::new());
    let (mut lost, mut acts) = (0u64, 0u64);
    for _ in 0..options.runs {
        let hostile = Hostile::new(scratch.path("evil.sock"), options.packed);
        let first = good(scratch, options)?;
        let (before, start) = (control_time(switch.id())?, Instant::now());
        let (second, done) = {
            let hostile = |stop: &AtomicBool| hostile.repeat(act, stop).context(act.name());
            with(hostile, || good(scratch, options))?
        };
        let control = control_time(switch.id())?.saturating_sub(before);
        controls.push(control.as_secs_f64() / start.elapsed().as_secs_f64());
        let (third, ()) = with(|stop| done.mimic(stop), || good(scratch, options))?;
        alone.push(first.rx_pps);
        beside.push(second.rx_pps);
        mimicked.push(third.rx_pps);
        shares.push(done.cpu_share());
        acts = acts.saturating_add(done.count);
        for said in [first, second, third] {
            lost = lost.saturating_add(said.lost);
        }
        if switch.ctl(&["ports"])?.contains("quarantined") {
            let _ = switch.ctl(&["port", "reset", "evil"])?;
        }
    }
    let [alone, beside, mimicked, share, control] =
        [alone, beside, mimicked, shares, controls].map(median);
    Ok(Row { alone, beside, mimicked, share, control, lost, acts })
}

/// What comes of `measured`, and of what `other` did in a thread meanwhile.
fn with<A, B: Send>(
    other: impl FnOnce(&AtomicBool) -> Result<B> + Send,
    measured: impl FnOnce() -> Result<A>,
) -> Result<(A, B)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| other(&stop));
        let found = measured();
        stop.store(true, Ordering::Relaxed);
        let done = thread.join().map_err(|_| anyhow::anyhow!("the other guest panicked"))?;
        Ok((found?, done?))
    })
}

/// CPU time of all threads of the switch that are no workers, so far.
fn control_time(process: u32) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?.path();
        // A thread may end meanwhile.
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else { continue };
        if name.starts_with("worker-") {
            continue;
        }
        let times = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        let running = times.split_whitespace().next().and_then(|word| word.parse().ok());
        sum = sum.saturating_add(Duration::from_nanos(running.unwrap_or(0)));
    }
    Ok(sum)
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
