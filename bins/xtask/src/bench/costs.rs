//! What the sandbox and limits that are never hit cost: frames a second with both and without.
//!
//! Frames go round as in `pvp`. The two kinds of switch take turns.

use anyhow::{Result, ensure};
use clap::Args;
use conformance::Environment;

use super::back_end::{Setup, Subject};
use super::case::Selection;
use super::machine::Versions;
use super::report::{Keep, Report, Series};
use super::round::{self, Run};
use super::summary::{Row, Sample, rows};
use super::{prepare, turn};
use crate::steps::Steps;

const NAME: &str = "costs";
const WITH: &str = "sandbox, limits";
const WITHOUT: &str = "neither";
/// Of what goes through without them.
const GOAL: f64 = 0.97;
/// Far above what one CPU carries.
const LIMITS: &str = ",rate-mbps=1000000,rate-kpps=1000000,storm-kpps=1000";

/// Options of `cargo xtask bench costs`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    series: Series,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.series.runs {
        for case in options.selection.cases() {
            let usual = Setup::new(Subject::Causeway, case.size.into());
            let without = vec!["--sandbox".to_owned(), "off".to_owned()];
            let with = Setup { port_keys: LIMITS.to_owned(), ..usual.clone() };
            let without = Setup { arguments: without, ..usual };
            for (name, setup) in [(WITH, with), (WITHOUT, without)] {
                let what = format!("{}, {name}, run {number}", case.name());
                turn::take(steps, &what, &mut done, || {
                    round::measure(&environment, &setup, (name, case), &mut versions)
                });
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let summary = rows(&samples, WITH);
    let count = runs.len();
    let unit = "million frames per second, per direction";
    let report = Report::new(unit, versions, runs, summary)?;
    let said = "ratio: of the line above, with sandbox and limits, to it, with neither";
    let json = keep.publish(NAME, &report, (said, "Mpps"))?;
    let text = verdict(&report.summary);
    println!("{text}");
    steps.note(NAME, Ok(format!("{count} runs in {}: {text}", json.display())));
    Ok(())
}

fn verdict(rows: &[Row]) -> String {
    let worst = rows.iter().filter_map(|row| row.ratio).min_by(f64::total_cmp);
    let goal = if worst.is_some_and(|worst| worst >= GOAL) { "reached" } else { "missed" };
    let worst = worst.map_or_else(|| "unknown".to_owned(), |worst| format!("{worst:.3}"));
    format!("the worst ratio is {worst} (goal {GOAL}: {goal})")
}
