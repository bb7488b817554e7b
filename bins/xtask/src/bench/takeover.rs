//! How long guests wait when another process takes the switch over.
//!
//! ```text
//!   guests      g0 ── switch ── g1
//!   uplinks     g0 ── switch ── u0 ══ u1 ── switch ── g1     tap, AF_XDP, packet_mmap
//! ```
//!
//! A guest sends a frame every 100 us to another one; the frame that waits longest tells the
//! outage, and what else the machine did to it. As many runs without a take-over say how much that
//! is. The old process also says how long nobody served, by its own clock. Not a frame may be lost.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use conformance::environment::host::is_root;
use conformance::process::{Process, tied_command};
use conformance::{Looped, Scratch, Switch};
use serde::{Deserialize, Serialize};

use super::machine::Versions;
use super::prepare;
use super::report::{Keep, Report};
use crate::steps::Steps;

pub(super) const NAME: &str = "take-over";
/// From the first frame of a run to the take-over.
const BEFORE: Duration = Duration::from_millis(400);
const AFTER: Duration = Duration::from_millis(400);
/// How long the last frames may be on their way. With 100 ms, up to 90 ms of frames were missing in
/// 4 of 80 runs, and no gap was in what had come: a receiver without a CPU was ended too early.
const LAST: Duration = Duration::from_secs(1);
/// Entries of a guest's rings: one that the machine leaves without a CPU for a third of a second
/// loses nothing at the default rate, so what is lost was lost by somebody else.
const RING: &str = "4096";
const MICRO: f64 = 1e3;

/// Options of `cargo xtask bench take-over`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What is between the guests; `guests` is nothing else
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "guests,tap,af-xdp,packet-mmap"
    )]
    through: Vec<Through>,
    /// Take-overs of each, and runs without one
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

/// What is between the guests.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Through {
    Guests,
    Tap,
    AfXdp,
    PacketMmap,
}

/// One run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Run {
    through: Through,
    packed: bool,
    rate_pps: u32,
    /// Whether the switch was taken over meanwhile.
    taken_over: bool,
    /// How long the frame waited that waited longest.
    longest_ns: u64,
    /// How long nobody served, as the old process says.
    stopped_us: Option<u64>,
    frames: u64,
    lost: u64,
}

/// What the runs come to, in microseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Summary {
    through: Through,
    packed: bool,
    rate_pps: u32,
    runs: usize,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    stopped_p50_us: f64,
    stopped_p99_us: f64,
    without_p50_us: f64,
    without_p99_us: f64,
    frames: u64,
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
    for through in &options.through {
        if *through != Through::Guests && !is_root() {
            steps.not_run(through.name(), "only root may make interfaces", false);
            continue;
        }
        let mut scratch = Scratch::new("take-over")?;
        let measured = measure(options, *through, &scratch);
        runs.extend(measured.with_context(|| format!("logs in {}", scratch.keep().display()))?);
        let _ = std::fs::remove_dir_all(scratch.folder());
    }
    let summary = summaries(&runs);
    ensure!(!summary.is_empty(), "no runs");
    let report = Report::new("nanoseconds", versions, runs, summary)?;
    for line in report.origin() {
        println!("{line}");
    }
    println!("\n{}", table(&report.summary));
    let json = options.keep.write_json(NAME, &report)?;
    let lost: u64 = report.summary.iter().map(|one| one.lost).sum();
    let count: usize = report.summary.iter().map(|one| one.runs).sum();
    let shown = format!("{count} take-overs, {lost} frames lost, in {}", json.display());
    let lost_none = if lost == 0 { Ok(shown) } else { Err(anyhow::anyhow!(shown)) };
    steps.note("take-over", lost_none);
    Ok(())
}

/// One for each kind of way that has runs with and without a take-over.
fn summaries(runs: &[Run]) -> Vec<Summary> {
    let kind = |run: &Run| (run.through, run.packed, run.rate_pps);
    let mut kinds = Vec::new();
    for run in runs {
        if !kinds.contains(&kind(run)) {
            kinds.push(kind(run));
        }
    }
    let of_kind = |wanted| {
        let same: Vec<Run> = runs.iter().filter(|run| kind(run) == wanted).copied().collect();
        summary(&same)
    };
    kinds.into_iter().filter_map(of_kind).collect()
}

fn summary(runs: &[Run]) -> Option<Summary> {
    let sorted = |taken_over: bool| {
        let of_kind = runs.iter().filter(|run| run.taken_over == taken_over);
        let mut times: Vec<u64> = of_kind.map(|run| run.longest_ns).collect();
        times.sort_unstable();
        times
    };
    let (with, without) = (sorted(true), sorted(false));
    let mut stopped: Vec<u64> =
        runs.iter().filter_map(|run| run.stopped_us?.checked_mul(1000)).collect();
    stopped.sort_unstable();
    let first = runs.first()?;
    Some(Summary {
        through: first.through,
        packed: first.packed,
        rate_pps: first.rate_pps,
        runs: with.len(),
        p50_us: quantile_us(&with, 50)?,
        p99_us: quantile_us(&with, 99)?,
        max_us: quantile_us(&with, 100)?,
        stopped_p50_us: quantile_us(&stopped, 50)?,
        stopped_p99_us: quantile_us(&stopped, 99)?,
        without_p50_us: quantile_us(&without, 50)?,
        without_p99_us: quantile_us(&without, 99)?,
        frames: runs.iter().map(|run| run.frames).sum(),
        lost: runs.iter().map(|run| run.lost).sum(),
    })
}

/// The smallest time that `percent` of all do not exceed, in microseconds.
#[expect(clippy::cast_precision_loss, reason = "for people")]
fn quantile_us(sorted: &[u64], percent: usize) -> Option<f64> {
    let rank = sorted.len().saturating_mul(percent).div_ceil(100).max(1);
    sorted.get(rank.saturating_sub(1)).map(|ns| *ns as f64 / MICRO)
}

/// The figures in milliseconds.
pub(super) fn table(summaries: &[Summary]) -> String {
    let mut text =
        "| between the guests | take-overs | a frame waits, p50 | p99 | longest | without \
                    a take-over, p50 | p99 | nobody serves, p50 | p99 | frames lost |\n"
            .to_owned();
    text.push_str("|---|---|---|---|---|---|---|---|---|---|\n");
    for one in summaries {
        let ms = |us: f64| format!("{:.2} ms", us / MICRO);
        let ring = if one.packed { "packed" } else { "split" };
        let cells = [
            format!("{}, {ring}, {} frames/s", one.through.name(), one.rate_pps),
            one.runs.to_string(),
            ms(one.p50_us),
            format!("**{}**", ms(one.p99_us)),
            ms(one.max_us),
            ms(one.without_p50_us),
            ms(one.without_p99_us),
            ms(one.stopped_p50_us),
            ms(one.stopped_p99_us),
            format!("{} of {}", one.lost, one.frames),
        ];
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text
}

/// The ports of the switch, and what they are wired with.
fn bed(through: Through, scratch: &Scratch) -> Result<(Vec<String>, Option<Looped>)> {
    let guests = ["g0", "g1"].map(|name| {
        let socket = scratch.path(&format!("{name}.sock"));
        format!("vhost-user:name={name},socket={}", socket.display())
    });
    if through == Through::Guests {
        return Ok((guests.into(), None));
    }
    let [g0, g1] = guests;
    let wire = Looped::new(through.name())?;
    let mut ports = vec![format!("{g0},vlan=10"), format!("{g1},vlan=20")];
    ports.extend(wire.ports());
    Ok((ports, Some(wire)))
}

fn measure(options: &Options, through: Through, scratch: &Scratch) -> Result<Vec<Run>> {
    let (ports, _wire) = bed(through, scratch)?;
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let mut runs = Vec::new();
    for number in 1..=options.runs {
        for taken_over in [true, false] {
            let run = look(&mut switch, (through, &ports), options, (scratch, taken_over))?;
            println!(
                "take-over, {}, run {number} of {}: {} us{}{}",
                through.name(),
                options.runs,
                run.longest_ns / 1000,
                run.stopped_us.map_or_else(|| " without".to_owned(), |us| format!(" ({us} us)")),
                if run.lost > 0 { format!(", {} LOST", run.lost) } else { String::new() },
            );
            runs.push(run);
        }
    }
    switch.stop()?;
    Ok(runs)
}

fn look(
    switch: &mut Switch,
    (through, ports): (Through, &[String]),
    options: &Options,
    (scratch, taken_over): (&Scratch, bool),
) -> Result<Run> {
    let rate = options.rate_pps.to_string();
    let mut receiver = guest(scratch, "g1", options.packed, &["--receive", "--verify"])?;
    switch.wait_ports_up(&["g1"])?;
    let mut sender = guest(scratch, "g0", options.packed, &["--generate", "--rate-pps", &rate])?;
    switch.wait_ports_up(&["g0"])?;
    sleep(BEFORE);
    let mut stopped_us = None;
    if taken_over {
        switch.take_over_with(ports)?;
        stopped_us = Some(outage_us(switch.predecessors_log())?);
    }
    sleep(AFTER);
    let _ = sender.stop()?;
    sleep(LAST);
    let _ = receiver.stop()?;
    let (sent, got) = (said(&sender)?, said(&receiver)?);
    let lost = sent.tx_frames.saturating_sub(got.rx_frames).max(got.lost.unwrap_or(0));
    let longest = got.latency.context("the receiver measured no latency")?;
    ensure!(got.rx_frames > 0, "no frame came: {}", switch.counters());
    if lost > 0 {
        println!("{lost} frames are lost: {}", switch.counters());
    }
    Ok(Run {
        through,
        packed: options.packed,
        rate_pps: options.rate_pps,
        taken_over,
        longest_ns: longest.max_ns,
        stopped_us,
        frames: sent.tx_frames,
        lost,
    })
}

/// What a process that handed over says of how long nobody served: from when it began to stop until
/// it heard that the new one runs.
fn outage_us(log: &str) -> Result<u64> {
    let found = log.lines().find(|line| line.contains("handed over")).and_then(|line| {
        let (_, rest) = line.split_once("outage_us=")?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    });
    found.with_context(|| format!("the old process does not say how long it took: {log}"))
}

fn guest(scratch: &Scratch, name: &str, packed: bool, arguments: &[&str]) -> Result<Process> {
    let mut command = tied_command(conformance::switch::guest_program()?);
    let socket = scratch.path(&format!("{name}.sock"));
    let _ = command.arg("--json").arg("--socket").arg(socket).args(arguments);
    let _ = command.args(["--queue-size", RING]).args(packed.then_some("--packed"));
    let log: &Path = &scratch.path(&format!("{name}.log"));
    Process::spawn(name, &mut command, log)
}

fn said(process: &Process) -> Result<Said> {
    let text = process.output_from(0)?;
    let line = text.lines().find(|line| line.starts_with('{')).context("no totals")?;
    serde_json::from_str(line).with_context(|| format!("{line} is not what was expected"))
}

impl Through {
    /// The kind of the uplinks.
    fn name(self) -> &'static str {
        match self {
            Self::Guests => "guests",
            Self::Tap => "tap",
            Self::AfXdp => "af-xdp",
            Self::PacketMmap => "packet-mmap",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(through: Through, taken_over: bool, longest_ns: u64) -> Run {
        let stopped_us = taken_over.then_some(700);
        Run {
            through,
            packed: false,
            rate_pps: 1,
            taken_over,
            longest_ns,
            stopped_us,
            frames: 10,
            lost: 1,
        }
    }

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
    fn runs_are_told_apart_by_what_was_done() {
        let runs = [
            run(Through::Tap, true, 3000),
            run(Through::Guests, true, 9_000_000),
            run(Through::Tap, false, 1000),
            run(Through::Tap, true, 5000),
        ];
        // Nothing is said of guests: there is no run without.
        let all = summaries(&runs);
        assert_eq!(all.len(), 1);
        let tap = all[0];
        assert_eq!((tap.through, tap.runs, tap.lost, tap.frames), (Through::Tap, 2, 3, 30));
        assert_eq!((tap.p50_us, tap.p99_us), (3.0, 5.0));
        assert_eq!((tap.without_p50_us, tap.without_p99_us), (1.0, 1.0));
        assert_eq!((tap.stopped_p50_us, tap.stopped_p99_us), (700.0, 700.0));
        let shown = table(&all);
        let last = shown.lines().last().unwrap();
        let cells = "| tap, split, 1 frames/s | 2 | 0.00 ms | **0.01 ms** | 0.01 ms | 0.00 ms | \
                     0.00 ms | 0.70 ms | 0.70 ms | 3 of 30 |";
        assert_eq!(last, cells);
    }

    #[test]
    fn the_old_process_says_how_long_it_took() {
        let log = "INFO listening\nINFO handed over, leaving pid=1 outage_us=1234\nINFO stopping";
        assert_eq!(outage_us(log).unwrap(), 1234);
        assert!(outage_us("INFO listening").is_err());
    }
}
