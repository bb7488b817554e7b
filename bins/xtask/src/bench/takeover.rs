//! How long guests wait when another process takes the switch over.
//!
//! A guest sends a frame every 100 us to another one; the frame that waits longest tells the
//! outage, and what else the machine did to it. As many runs without a take-over say how much that
//! is. Not a frame may be lost.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};
use serde::{Deserialize, Serialize};

use super::machine::Versions;
use super::prepare;
use super::report::{Keep, Report};
use crate::steps::Steps;

const NAME: &str = "take-over";
/// From the first frame of a run to the take-over.
const BEFORE: Duration = Duration::from_millis(400);
const AFTER: Duration = Duration::from_millis(400);
const MICRO: f64 = 1e3;

/// Options of `cargo xtask bench take-over`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Take-overs, and runs without one
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Frames per second
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate_pps: u32,
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
    #[command(flatten)]
    keep: Keep,
}

/// One run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Run {
    packed: bool,
    rate_pps: u32,
    /// Whether the switch was taken over meanwhile.
    taken_over: bool,
    /// How long the frame waited that waited longest.
    longest_ns: u64,
    lost: u64,
}

/// What the runs come to, in microseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Summary {
    runs: usize,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    without_p50_us: f64,
    without_p99_us: f64,
    lost: u64,
}

/// What `causeway-guest --json --receive` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    rx_frames: u64,
    tx_frames: u64,
    lost: Option<u64>,
    latency: Option<Longest>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Longest {
    max_ns: u64,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, false)?;
    let mut versions = Versions::this()?;
    let mut runs: Vec<Run> = options.keep.earlier(NAME, &mut versions)?;
    let mut scratch = Scratch::new("take-over")?;
    let measured = measure(options, &scratch);
    runs.extend(measured.with_context(|| format!("logs in {}", scratch.keep().display()))?);
    let same = |run: &&Run| run.packed == options.packed && run.rate_pps == options.rate_pps;
    let compared: Vec<Run> = runs.iter().filter(same).copied().collect();
    let summary = summary(&compared).context("no runs")?;
    let report = Report::new("nanoseconds", versions, runs, Some(summary))?;
    for line in report.origin() {
        println!("{line}");
    }
    let json = options.keep.write_json(NAME, &report)?;
    let shown = format!(
        "{} take-overs: a frame waits {:.0} us (p50), {:.0} us (p99), {:.0} us (longest); without \
         one {:.0} us (p50), {:.0} us (p99); {} lost; {}",
        summary.runs,
        summary.p50_us,
        summary.p99_us,
        summary.max_us,
        summary.without_p50_us,
        summary.without_p99_us,
        summary.lost,
        json.display()
    );
    steps.note("take-over", Ok(shown));
    Ok(())
}

fn summary(runs: &[Run]) -> Option<Summary> {
    let sorted = |taken_over: bool| {
        let of_kind = runs.iter().filter(|run| run.taken_over == taken_over);
        let mut times: Vec<u64> = of_kind.map(|run| run.longest_ns).collect();
        times.sort_unstable();
        times
    };
    let (with, without) = (sorted(true), sorted(false));
    Some(Summary {
        runs: with.len(),
        p50_us: quantile_us(&with, 50)?,
        p99_us: quantile_us(&with, 99)?,
        max_us: quantile_us(&with, 100)?,
        without_p50_us: quantile_us(&without, 50)?,
        without_p99_us: quantile_us(&without, 99)?,
        lost: runs.iter().map(|run| run.lost).sum(),
    })
}

/// The smallest time that `percent` of all do not exceed, in microseconds.
#[expect(clippy::cast_precision_loss, reason = "for people")]
fn quantile_us(sorted: &[u64], percent: usize) -> Option<f64> {
    let rank = sorted.len().saturating_mul(percent).div_ceil(100).max(1);
    sorted.get(rank.saturating_sub(1)).map(|ns| *ns as f64 / MICRO)
}

fn measure(options: &Options, scratch: &Scratch) -> Result<Vec<Run>> {
    let ports = ["g0", "g1"].map(|name| {
        let socket = scratch.path(&format!("{name}.sock"));
        format!("vhost-user:name={name},socket={}", socket.display())
    });
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let mut runs = Vec::new();
    for number in 1..=options.runs {
        for taken_over in [true, false] {
            let run = look(&mut switch, &ports, options, (scratch, taken_over))?;
            println!(
                "take-over, run {number} of {}: {} us{}",
                options.runs,
                run.longest_ns / 1000,
                if taken_over { "" } else { " without" }
            );
            runs.push(run);
        }
    }
    switch.stop()?;
    Ok(runs)
}

fn look(
    switch: &mut Switch,
    ports: &[String],
    options: &Options,
    (scratch, taken_over): (&Scratch, bool),
) -> Result<Run> {
    let rate = options.rate_pps.to_string();
    let mut receiver = guest(scratch, "g1", options.packed, &["--receive", "--verify"])?;
    switch.wait_ports_up(&["g1"])?;
    let mut sender = guest(scratch, "g0", options.packed, &["--generate", "--rate-pps", &rate])?;
    switch.wait_ports_up(&["g0"])?;
    sleep(BEFORE);
    if taken_over {
        switch.take_over_with(ports)?;
    }
    sleep(AFTER);
    let _ = sender.stop()?;
    sleep(Duration::from_millis(50));
    let _ = receiver.stop()?;
    let (sent, got) = (said(&sender)?, said(&receiver)?);
    let lost = sent.tx_frames.saturating_sub(got.rx_frames).max(got.lost.unwrap_or(0));
    let longest = got.latency.context("the receiver measured no latency")?;
    ensure!(got.rx_frames > 0, "no frame came: {}", switch.counters());
    Ok(Run {
        packed: options.packed,
        rate_pps: options.rate_pps,
        taken_over,
        longest_ns: longest.max_ns,
        lost,
    })
}

fn guest(scratch: &Scratch, name: &str, packed: bool, arguments: &[&str]) -> Result<Process> {
    let mut command = tied_command(conformance::switch::guest_program()?);
    let socket = scratch.path(&format!("{name}.sock"));
    let _ = command.arg("--json").arg("--socket").arg(socket).args(arguments);
    let _ = command.args(packed.then_some("--packed"));
    let log: &Path = &scratch.path(&format!("{name}.log"));
    Process::spawn(name, &mut command, log)
}

fn said(process: &Process) -> Result<Said> {
    let text = process.output_from(0)?;
    let line = text.lines().find(|line| line.starts_with('{')).context("no totals")?;
    serde_json::from_str(line).with_context(|| format!("{line} is not what was expected"))
}

#[cfg(test)]
mod tests {
    use super::{Run, quantile_us, summary};

    #[test]
    fn quantiles_are_times_that_were_measured() {
        let times: Vec<u64> = (1..=100).map(|n| n * 1000).collect();
        assert_eq!(quantile_us(&times, 50), Some(50.0));
        assert_eq!(quantile_us(&times, 99), Some(99.0));
        assert_eq!(quantile_us(&times, 100), Some(100.0));
        assert_eq!(quantile_us(&[7000], 99), Some(7.0));
        assert_eq!(quantile_us(&[], 50), None);
    }

    #[test]
    fn runs_with_and_without_are_told_apart() {
        let run = |taken_over, longest_ns| Run {
            packed: false,
            rate_pps: 1,
            taken_over,
            longest_ns,
            lost: 1,
        };
        let all = summary(&[run(true, 3000), run(false, 1000), run(true, 5000)]).unwrap();
        assert_eq!((all.runs, all.p50_us, all.p99_us, all.lost), (2, 3.0, 5.0, 3));
        assert_eq!((all.without_p50_us, all.without_p99_us), (1.0, 1.0));
        assert!(summary(&[run(true, 1)]).is_none());
    }
}
