//! Frames per second from guest to guest and back, the switch and its peers in turn.

use anyhow::{Result, ensure};
use clap::Args;
use conformance::Environment;

use super::back_end::{Setup, Subject, available};
use super::case::Selection;
use super::machine::Versions;
use super::regime::Regime;
use super::report::{Keep, Report, Series};
use super::round::{self, Run};
use super::summary::{Sample, rows};
use super::{chart, prepare, turn};
use crate::steps::Steps;

const NAME: &str = "pvp";

/// Options of `cargo xtask bench pvp`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    selection: Selection,
    /// What to compare with
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "ovs,testpmd")]
    peers: Vec<Subject>,
    #[command(flatten)]
    series: Series,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    let mut subjects = vec![Subject::Causeway];
    subjects.extend(available(steps, &environment, &options.peers, &mut versions));
    for number in 1..=options.series.runs {
        for case in options.selection.cases() {
            for subject in &subjects {
                let what = format!("{}, {}, run {number}", case.name(), subject.name());
                let setup = Setup::new(*subject, case.size.into());
                turn::take(steps, &what, &mut done, || {
                    round::measure(&environment, &setup, (subject.name(), case), &mut versions)
                });
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let left_out = runs.iter().filter(|run| !Regime::STEADY.contains(&run.regime)).count();
    let summary = rows(&samples, Subject::Causeway.name());
    let count = runs.len();
    let report = Report::new("million frames per second, per direction", versions, runs, summary)?;
    let said = format!(
        "{left_out} of {count} runs left out: meanwhile the regime changed, other programs took a \
         CPU, or frames were dropped"
    );
    let json = keep.publish(NAME, &report, (&said, "Mpps"))?;
    let title = "Frames per second, guest to guest, one CPU for the switch";
    let drawn = chart::draw(title, "Mpps per direction", &report.summary, &report.origin());
    let svg = keep.write("pvp.svg", &drawn)?;
    steps.note(NAME, Ok(format!("{count} runs in {} and {}", json.display(), svg.display())));
    Ok(())
}
