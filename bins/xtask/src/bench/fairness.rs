//! What a guest at full rate costs one at about a hundredth of it that shares its worker.
//!
//! ```text
//!  CPU 0   one worker: ports g0, g1 of the slow guest, n0, n1 of the one at full rate
//!  CPU 1   one causeway-guest, one thread: round trips g0 ─► g1 ─► g0 at a steady rate, and
//!          between two looks for the reply a few frames n0 ─► n1, as many as the rings take
//! ```
//!
//! One thread plays both guests, because two processes on one CPU would wait for each other for
//! milliseconds. It adds its own steps between two looks to the round trip (less than a
//! microsecond), which the figure includes. Runs with and without the second guest take turns.

use anyhow::{Result, ensure};
use clap::Args;
use conformance::Environment;
use conformance::environment::host::hugepages;

use super::back_end::{Setup, Subject};
use super::case::{Frames, Ring};
use super::latency::{self, NEIGHBOURS, Run, Trips};
use super::machine::Versions;
use super::prepare;
use super::report::{Keep, Report, Series};
use super::summary::{Row, rows};
use super::turn;
use crate::steps::Steps;

const NAME: &str = "fairness";
const ALONE: &str = "alone";
const BESIDE: &str = "beside full rate";
/// How many times of alone the slow guest's p99 may be.
const GOAL: f64 = 2.0;

/// Options of `cargo xtask bench fairness`.
#[derive(Args, Debug)]
#[command(mut_arg("sizes", |sizes| sizes.help("Bytes of the other guest's frames")))]
pub(crate) struct Options {
    #[command(flatten)]
    frames: Frames,
    /// Round trips per second of the slow guest: two frames each
    #[arg(long, value_name = "N", default_value_t = 35_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate_pps: u32,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    #[command(flatten)]
    series: Series,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    hugepages()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    let more_ports = NEIGHBOURS.map(str::to_owned).to_vec();
    let setup = Setup { more_ports, ..Setup::new(Subject::Causeway, 9000) };
    for number in 1..=options.series.runs {
        for ring in &options.frames.layouts.rings {
            for size in &options.frames.sizes {
                // The same case twice: what differs is whether the other guest is there.
                let trips = Trips {
                    seconds: options.seconds,
                    packed: *ring == Ring::Packed,
                    rate_pps: Some(options.rate_pps),
                    beside: None,
                };
                for (name, beside) in [(BESIDE, Some(u32::from(*size))), (ALONE, None)] {
                    let trips = Trips { beside, ..trips };
                    let what = format!("{size} B {ring:?}, {name}, run {number}");
                    turn::take(steps, &what, &mut done, || {
                        let mut run = latency::measure(&environment, &setup, name, trips)?;
                        run.case = format!("{}, beside {size} B", run.case);
                        Ok(run)
                    });
                }
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<_> = runs.iter().flat_map(Run::samples).collect();
    let summary = rows(&samples, BESIDE);
    let (count, lost) = (runs.len(), runs.iter().map(|run| run.lost).sum::<u64>());
    let report = Report::new("microseconds", versions, runs, summary)?;
    let said = "ratio: of the line above, beside the other guest, to it, alone";
    let json = keep.publish(NAME, &report, (said, "us"))?;
    let text = verdict(&report.summary, lost);
    println!("{text}");
    steps.note(NAME, Ok(format!("{count} runs in {}: {text}", json.display())));
    Ok(())
}

fn verdict(rows: &[Row], lost: u64) -> String {
    let p99 = rows.iter().filter(|row| row.case.ends_with("p99")).filter_map(|row| row.ratio);
    let worst = p99.max_by(f64::total_cmp);
    let reached = worst.is_some_and(|worst| worst < GOAL) && lost == 0;
    let worst = worst.map_or_else(|| "unknown".to_owned(), |worst| format!("{worst:.2}x"));
    let goal = if reached { "reached" } else { "missed" };
    format!("worst p99 {worst} of alone, {lost} lost (goal below {GOAL}x and 0: {goal})")
}

#[cfg(test)]
mod tests {
    use super::super::regime::Regime;
    use super::super::summary::Sample;
    use super::*;

    #[test]
    fn the_worst_p99_decides() {
        let sample = |case: &str, subject: &str, value| Sample {
            case: case.to_owned(),
            regime: Regime::Near,
            subject: subject.to_owned(),
            value,
            cycles: None,
        };
        let samples = [
            sample("a, p50", BESIDE, 9.0),
            sample("a, p50", ALONE, 1.0),
            sample("a, p99", BESIDE, 3.0),
            sample("a, p99", ALONE, 2.0),
        ];
        let rows = rows(&samples, BESIDE);
        assert!(verdict(&rows, 0).starts_with("worst p99 1.50x of alone, 0 lost"));
        assert!(verdict(&rows, 0).ends_with("reached)") && verdict(&rows, 1).ends_with("missed)"));
        assert!(verdict(&[], 0).contains("unknown") && verdict(&[], 0).ends_with("missed)"));
    }
}
