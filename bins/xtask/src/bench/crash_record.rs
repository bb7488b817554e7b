//! What it costs to be ready for a crash: frames per second with the record of ring positions, with
//! the front end's in-flight file, and with neither.
//!
//! ```text
//!   record      testpmd, guest to guest and back; causeway-guest, one way    goal 0.97x
//!   in-flight   causeway-guest, one way: DPDK's front end keeps no file      target 0.85x
//! ```
//!
//! The record is on tmpfs, as the default one in `/run` is.

use anyhow::{Result, ensure};
use clap::Args;
use conformance::Environment;

use super::addresses::{self, Kept, Load};
use super::back_end::{Setup, Subject};
use super::case::{Case, Layouts};
use super::machine::Versions;
use super::report::{Keep, Report, Series};
use super::round::{self, Run};
use super::summary::{Row, Sample, rows};
use super::{prepare, turn};
use crate::steps::Steps;

pub(super) const NAME: &str = "crash-record";
const SIZE: u16 = 64;

/// Options of `cargo xtask bench crash-record`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    layouts: Layouts,
    #[command(flatten)]
    series: Series,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.series.runs {
        for ring in &options.layouts.rings {
            for kept in [Kept::Record, Kept::Nothing] {
                let case = Case::usual(SIZE, *ring);
                let what = format!("{}, {}, run {number}", case.name(), kept.name());
                turn::take(steps, &what, &mut done, || {
                    round_trip(&environment, kept, case, &mut versions)
                });
            }
            for kept in [Kept::Record, Kept::Inflight, Kept::Nothing] {
                let load = Load { ring: *ring, addresses: 2, in_use: 2, kept };
                let what = format!("{}, {}, run {number}", load.case(), kept.name());
                turn::take(steps, &what, &mut done, || addresses::measure(load, kept.name()));
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn round_trip(
    environment: &Environment,
    kept: Kept,
    case: Case,
    versions: &mut Versions,
) -> Result<Run> {
    let state = kept.state_dir()?;
    let setup = Setup {
        arguments: state.arguments(),
        ..Setup::new(Subject::Causeway, u32::from(case.size))
    };
    round::measure(environment, &setup, (kept.name(), case), versions)
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let summary = summarise(&samples);
    let count = runs.len();
    let report = Report::new("million frames per second", versions, runs, summary)?;
    let said = "ratio: of the line above, which keeps something, to the one that keeps nothing";
    let json = keep.publish(NAME, &report, (said, "Mpps"))?;
    steps.note(NAME, Ok(format!("{count} runs in {}", json.display())));
    Ok(())
}

/// What is kept stands above nothing, and the ratio is that of the two.
fn summarise(samples: &[Sample]) -> Vec<Row> {
    let of_pair = |more: Kept| {
        let both_there = |sample: &&Sample| {
            let has = |kept: Kept| {
                let same = |other: &&Sample| {
                    other.case == sample.case
                        && other.regime == sample.regime
                        && other.subject == kept.name()
                };
                samples.iter().any(|other| same(&other))
            };
            has(more) && has(Kept::Nothing)
        };
        let of_two = |sample: &&Sample| {
            [more, Kept::Nothing].iter().any(|kept| kept.name() == sample.subject)
        };
        let pair: Vec<Sample> = samples.iter().filter(of_two).filter(both_there).cloned().collect();
        rows(&pair, more.name())
    };
    [Kept::Record, Kept::Inflight].into_iter().flat_map(of_pair).collect()
}

#[cfg(test)]
mod tests {
    use super::super::regime::Regime;
    use super::*;

    #[test]
    fn each_is_compared_with_nothing() {
        let sample = |case: &str, kept: Kept, value| Sample {
            case: case.to_owned(),
            regime: Regime::Near,
            subject: kept.name().to_owned(),
            value,
            cycles: None,
        };
        let samples = [
            sample("round", Kept::Nothing, 10.0),
            sample("round", Kept::Record, 9.9),
            sample("one way", Kept::Nothing, 5.0),
            sample("one way", Kept::Record, 4.5),
            sample("one way", Kept::Inflight, 4.0),
            // Alone it is compared with nothing.
            sample("other", Kept::Record, 1.0),
        ];
        let rows = summarise(&samples);
        let seen: Vec<_> =
            rows.iter().map(|row| (row.case.as_str(), row.subject.as_str(), row.ratio)).collect();
        let expected = [
            ("round", "record", None),
            ("round", "nothing", Some(0.99)),
            ("one way", "record", None),
            ("one way", "nothing", Some(0.9)),
            ("one way", "in-flight file", None),
            ("one way", "nothing", Some(0.8)),
        ];
        assert_eq!(seen, expected);
    }
}
