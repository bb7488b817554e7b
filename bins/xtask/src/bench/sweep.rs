//! Burst sizes, prefetch distances and spin times, each against the others.
//!
//! A burst size or a prefetch distance is a constant of the build, so each value is a build of its
//! own (`--cfg sweep`, which nothing that is shipped has). Spin times are an option of `run`.
//! Bursts and distances are judged by frames that go round, spin times by single frames at a
//! pace, and by the CPU time that they cost.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use conformance::Environment;
use conformance::scratch::target_folder;
use serde::Serialize;

use super::back_end::{Setup, Subject};
use super::case::{Case, Frames};
use super::latency::{self, Trips};
use super::machine::Versions;
use super::readme::side_by_side;
use super::report::{Keep, Report, Series};
use super::summary::{Row, Sample, rows};
use super::turn::{self, Measured};
use super::{prepare, round};
use crate::steps::{Steps, cargo};

const NAME: &str = "sweep";
const FLAGS: &str = "--cfg sweep";

/// Options of `cargo xtask bench sweep`.
#[derive(Args, Debug)]
#[command(mut_arg("runs", |runs| runs.default_value("3")))]
pub(crate) struct Options {
    /// What to vary
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "burst,ahead,poll-us")]
    vary: Vec<Knob>,
    /// Frames that are taken from a queue at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "16,32,64,128,256",
          value_parser = clap::value_parser!(u16).range(8..=1024))]
    burst: Vec<u16>,
    /// Frames by which prefetches run ahead
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,4,8,16,32",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    ahead: Vec<u16>,
    /// Microseconds that an adaptive worker spins without work
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "5,20,50,100,200",
          value_parser = clap::value_parser!(u16).range(1..))]
    poll_us: Vec<u16>,
    /// Single frames per second while spin times are varied
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(1..))]
    rate_pps: u32,
    #[command(flatten)]
    frames: Frames,
    #[command(flatten)]
    series: Series,
}

/// What can be varied.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Knob {
    Burst,
    Ahead,
    PollUs,
}

/// The switch with one value that may not be the shipped one.
#[derive(Clone, Debug)]
struct Variant {
    name: String,
    setup: Setup,
}

/// One run of one variant.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Run {
    Round(round::Run),
    Trips(latency::Run),
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let (builds, spins) = variants(options)?;
    let mut done = Vec::new();
    for number in 1..=options.series.runs {
        for case in cases(options) {
            for variant in &builds {
                let what = format!("{}, {}, run {number}", case.name(), variant.name);
                let setup = Setup { frame_bytes: case.size.into(), ..variant.setup.clone() };
                turn::take(steps, &what, &mut done, || {
                    let at = (variant.name.as_str(), case);
                    round::measure(&environment, &setup, at, &mut versions).map(Run::Round)
                });
            }
        }
        let rate_pps = Some(options.rate_pps);
        let trips = Trips { seconds: 3, packed: false, rate_pps, beside: None };
        for variant in &spins {
            let what = format!("round trips, {}, run {number}", variant.name);
            turn::take(steps, &what, &mut done, || {
                latency::measure(&environment, &variant.setup, &variant.name, trips).map(Run::Trips)
            });
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn cases(options: &Options) -> Vec<Case> {
    let of_size = |size: &u16| {
        let size = *size;
        options.frames.layouts.rings.iter().map(move |ring| Case::usual(size, *ring))
    };
    options.frames.sizes.iter().flat_map(of_size).collect()
}

const SHIPPED: &str = "as shipped";

/// What is varied by builds, and what by an option. Before each stands what is shipped.
fn variants(options: &Options) -> Result<(Vec<Variant>, Vec<Variant>)> {
    let shipped = Variant { name: SHIPPED.to_owned(), setup: Setup::new(Subject::Causeway, 64) };
    let (mut builds, mut spins) = (Vec::new(), Vec::new());
    for knob in &options.vary {
        let (values, into) = match knob {
            Knob::Burst => (&options.burst, &mut builds),
            Knob::Ahead => (&options.ahead, &mut builds),
            Knob::PollUs => (&options.poll_us, &mut spins),
        };
        if into.is_empty() {
            into.push(shipped.clone());
        }
        for value in values {
            let name = format!("{} {value}", knob.name());
            let mut setup = shipped.setup.clone();
            match knob.constant() {
                Some(constant) => setup.program = Some(build(constant, *value)?),
                None => setup.arguments = vec!["--poll-us".to_owned(), value.to_string()],
            }
            into.push(Variant { name, setup });
        }
    }
    Ok((builds, spins))
}

impl Knob {
    fn name(self) -> &'static str {
        match self {
            Self::Burst => "burst",
            Self::Ahead => "ahead",
            Self::PollUs => "poll-us",
        }
    }

    /// What `swept!` calls it in the source, if it is a constant.
    fn constant(self) -> Option<&'static str> {
        match self {
            Self::Burst => Some("BURST"),
            Self::Ahead => Some("AHEAD"),
            Self::PollUs => None,
        }
    }
}

/// Builds the switch with another value of a constant.
fn build(constant: &str, value: u16) -> Result<PathBuf> {
    let folder = target_folder().join(NAME);
    let variable = format!("CAUSEWAY_SWEEP_{constant}");
    println!("building the switch with {constant} {value}");
    let mut command = cargo();
    let status = command
        .args(["build", "--quiet", "--release", "-p", "causeway"])
        .env("CARGO_TARGET_DIR", &folder)
        .env("RUSTFLAGS", FLAGS)
        .env(&variable, value.to_string())
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the build with {variable}={value} failed");
    let built = folder.join("release/causeway");
    let kept = folder.join(format!("causeway-{constant}-{value}"));
    copy(&built, &kept)?;
    Ok(kept)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    // A program that still runs keeps its own file.
    let _ = fs::remove_file(to);
    let copied = fs::copy(from, to);
    copied.map(drop).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

impl Measured for Run {
    fn regime(&self) -> super::regime::Regime {
        match self {
            Self::Round(run) => run.regime,
            Self::Trips(run) => run.regime,
        }
    }

    fn line(&self) -> String {
        match self {
            Self::Round(run) => run.line(),
            Self::Trips(run) => run.line(),
        }
    }
}

impl Run {
    fn samples(&self) -> Vec<Sample> {
        match self {
            Self::Round(run) => {
                let sample = run.sample();
                vec![Sample { case: format!("{}, Mpps", sample.case), ..sample }]
            }
            Self::Trips(run) => {
                let figures = [
                    ("p50, us", f64::from(run.times.p50_ns) / 1e3),
                    ("p99, us", f64::from(run.times.p99_ns) / 1e3),
                    ("CPU, %", 100.0 * run.cpu),
                ];
                let sample = |(what, value)| Sample {
                    case: format!("{}, {what}", run.case),
                    regime: run.regime,
                    subject: run.subject.clone(),
                    value,
                    cycles: None,
                };
                figures.into_iter().map(sample).collect()
            }
        }
    }
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().flat_map(Run::samples).collect();
    let summary: Vec<Row> = rows(&samples, SHIPPED);
    let count = runs.len();
    let report = Report::new("see the case", versions, runs, summary)?;
    let said = "ratio: of the build as shipped to it";
    let json = keep.publish(NAME, &report, (said, "value"))?;
    let text = keep.write("sweep.md", &markdown(&report))?;
    steps.note(NAME, Ok(format!("{count} runs in {} and {}", json.display(), text.display())));
    Ok(())
}

/// Bursts, distances and spin times have tables of their own.
fn markdown(report: &Report<Run, Vec<Row>>) -> String {
    let mut text = format!("# Sweep\n\n{}  \n{}\n", report.origin().join("  \n"), report.command);
    text.push_str("\nMedians; the ratio is that of what is shipped to it.\n");
    for knob in [Knob::Burst, Knob::Ahead, Knob::PollUs] {
        let start = format!("{} ", knob.name());
        let varied: Vec<&Row> =
            report.summary.iter().filter(|row| row.subject.starts_with(&start)).collect();
        let fits = |row: &&Row| {
            let same = |other: &&Row| (&other.case, other.regime) == (&row.case, row.regime);
            row.subject.starts_with(&start) || row.subject == SHIPPED && varied.iter().any(same)
        };
        let rows: Vec<Row> = report.summary.iter().filter(fits).cloned().collect();
        if !varied.is_empty() {
            text.push_str(&format!("\n## {}\n\n{}", knob.name(), side_by_side(&rows)));
        }
    }
    text
}
