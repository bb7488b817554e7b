//! What a hostile guest costs a good one that shares a worker with it.
//!
//! One worker on CPU 0 serves two ports between which `causeway-guest` keeps frames going (CPU 1)
//! and one with the hostile front end, which does one of the [`acts`] all the time, on CPU 1 too.
//!
//! ```text
//!  alone       the good guest
//!  beside      the good guest and the hostile one, which began some time before
//!  its CPU     the good guest and who takes CPU 1 as often and for as long as the hostile one did
//! ```
//!
//! A run is the three one after the other, with one process of the good guest, and has ratios of
//! its own. Two CPUs are too few to keep the hostile guest's own work away from the good one's:
//! what it costs to have such a neighbour at all is the third, and the ratio of `beside` to it is
//! what the switch lets it do. The control thread runs on CPU 1: its share of it is shown.
//!
//! **Limits.** A run takes 9 s: 3 runs of 13 acts with two kinds of rings 12 minutes, up to three
//! times as long where the machine is disturbed.

mod acts;
mod measure;
mod table;
mod viommu;

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::Scratch;
use serde::{Deserialize, Serialize};

use super::case::{Layouts, Ring};
use super::machine::Versions;
use super::regime::Regime;
use super::report::{Report, Series};
use super::turn::{self, Measured};
use super::{prepare, regime};
use crate::steps::Steps;
use acts::Act;
pub(super) use table::{Summary, markdown};

pub(super) const NAME: &str = "hostile";
/// What the good guest has to keep of its throughput.
const GOAL: f64 = 0.9;

/// Options of `cargo xtask bench hostile`.
#[derive(Args, Debug)]
#[command(mut_arg("runs", |runs| runs.default_value("3")))]
#[command(mut_arg("rings", |rings| rings.help("Layouts of the hostile guest's rings")))]
pub(crate) struct Options {
    /// What the hostile guest does
    #[arg(long, value_name = "LIST", value_delimiter = ',',
          default_values_t = Act::ALL.to_vec(), value_enum)]
    acts: Vec<Act>,
    /// Bytes of the good guest's frames
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(60..=9000))]
    size: u16,
    /// Seconds of each part of a run
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=60))]
    seconds: u16,
    #[command(flatten)]
    layouts: Layouts,
    #[command(flatten)]
    series: Series,
}

/// One run: the good guest three times.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Run {
    act: Act,
    packed: bool,
    size: u16,
    regime: Regime,
    before_ns: f64,
    after_ns: f64,
    /// Frames per second.
    alone_pps: f64,
    beside_pps: f64,
    twin_pps: f64,
    /// The share of its CPU that the hostile guest took while the good one ran beside it.
    taken: f64,
    /// The share of a CPU that the switch took besides its worker.
    control: f64,
    /// The share of the time for which the worker waited for its CPU.
    waited: f64,
    /// What the hostile guest did, in a second.
    acts_per_s: f64,
    /// Of all three.
    lost: u64,
}

impl Run {
    fn of_alone(&self) -> f64 {
        self.beside_pps / self.alone_pps
    }

    fn of_twin(&self) -> f64 {
        self.beside_pps / self.twin_pps
    }
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        format!(
            "{:.3} of {:.2} Mpps alone, {:.3} of its use of the CPU ({:.1} %), control {:.1} %, \
             worker waited {:.2} %, {:.0} acts a second, {} lost, {}",
            self.of_alone(),
            self.alone_pps / 1e6,
            self.of_twin(),
            100.0 * self.taken,
            100.0 * self.control,
            100.0 * self.waited,
            self.acts_per_s,
            self.lost,
            self.regime.name()
        )
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, false)?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    let scratch = Scratch::new("hostile")?;
    let switch = measure::start(&scratch)?;
    for number in 1..=options.series.runs {
        for act in &options.acts {
            for ring in &options.layouts.rings {
                let packed = *ring == Ring::Packed;
                let what = format!("{}, {ring:?}, run {number}", act.name());
                turn::take(steps, &what, &mut done, || {
                    let before_ns = regime::round_trip_ns()?;
                    let run = measure::run(&switch, &scratch, (*act, packed), options)?;
                    let after_ns = regime::round_trip_ns()?;
                    let regime = Regime::of_run(before_ns, after_ns).unless_disturbed(run.waited);
                    Ok(Run { regime, before_ns, after_ns, ..run })
                });
            }
        }
    }
    let _ = switch.check_ledger()?;
    switch.stop()?;
    publish(steps, options, done, versions)
}

fn publish(steps: &mut Steps, options: &Options, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let summary = Summary::all(&runs);
    let worst = |of: fn(&Summary) -> f64| summary.iter().map(of).min_by(f64::total_cmp);
    let twin = worst(|one| one.of_twin.median).context("no run can be compared")?;
    let alone = worst(|one| one.of_alone.median).context("no run can be compared")?;
    let lost: u64 = runs.iter().map(|run| run.lost).sum();
    let count = runs.len();
    let report = Report::new("frames per second", versions, runs, summary)?;
    for line in report.origin() {
        println!("{line}");
    }
    println!("\n{}", markdown(&report.summary));
    let json = options.series.keep.write_json(NAME, &report)?;
    let text = format!(
        "{count} runs in {}: worst ratio to its use of the CPU {twin:.3} (goal {GOAL}), to alone \
         {alone:.3}; {lost} frames lost (goal 0)",
        json.display()
    );
    ensure!(lost == 0, "{text}");
    steps.note(NAME, Ok(text));
    Ok(())
}
