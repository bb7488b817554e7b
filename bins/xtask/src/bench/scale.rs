//! What many guests and many addresses cost a busy pair of guests.
//!
//! * **Idle guests**: frames go round as in `pvp`, with 64 guests attached besides and without.
//! * **Addresses**: `causeway-guest --generate --stations` sends from one port to the other, from
//!   5000 addresses to 5000 others in turn, while the table has 90,000 more, which quiet guests
//!   have announced; and from one address to one other with a table that has no more.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use conformance::Environment;

use super::addresses::{self, Kept, Load};
use super::back_end::{Setup, Subject};
use super::case::{Case, Layouts, Ring};
use super::machine::Versions;
use super::report::{Report, Series};
use super::round::{self, Run};
use super::summary::{Row, Sample, rows};
use super::{prepare, turn};
use crate::steps::Steps;

const NAME: &str = "scale";

/// Options of `cargo xtask bench scale`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What to measure
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "guests,addresses")]
    parts: Vec<Part>,
    /// Guests that do nothing
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(1..=128))]
    guests: u16,
    /// Addresses in the forwarding table
    #[arg(long, value_name = "N", default_value_t = 100_000,
          value_parser = clap::value_parser!(u32).range(100..=130_000))]
    addresses: u32,
    /// Those of them that frames come from or go to
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(2..=30_000))]
    in_use: u32,
    #[command(flatten)]
    layouts: Layouts,
    #[command(flatten)]
    series: Series,
}

/// What can be scaled up.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    Guests,
    Addresses,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    ensure!(
        options.in_use <= options.addresses,
        "--in-use {} is more than --addresses {}",
        options.in_use,
        options.addresses
    );
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.series.runs {
        for part in &options.parts {
            for ring in &options.layouts.rings {
                let at = (*ring, number);
                match part {
                    Part::Guests => {
                        beside_guests(steps, (options, at), &environment, &mut versions, &mut done);
                    }
                    Part::Addresses => among_addresses(steps, (options, at), &mut done),
                }
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, options, done, versions)
}

/// One run with idle guests and one without.
fn beside_guests(
    steps: &mut Steps,
    (options, (ring, number)): (&Options, (Ring, u16)),
    environment: &Environment,
    versions: &mut Versions,
    done: &mut Vec<Run>,
) {
    let case = Case::usual(64, ring);
    for guests in [options.guests, 0] {
        let subject = if guests > 0 { beside(guests) } else { ALONE.to_owned() };
        let setup = Setup { quiet_guests: guests, ..Setup::new(Subject::Causeway, 64) };
        let what = format!("{}, {subject}, run {number}", case.name());
        turn::take(steps, &what, done, || {
            round::measure(environment, &setup, (&subject, case), versions)
        });
    }
}

/// One run with many addresses and one with few.
fn among_addresses(
    steps: &mut Steps,
    (options, (ring, number)): (&Options, (Ring, u16)),
    done: &mut Vec<Run>,
) {
    let kept = Kept::Record;
    let many = Load { ring, addresses: options.addresses, in_use: options.in_use, kept };
    let few = Load { ring, addresses: 2, in_use: 2, kept };
    for load in [many, few] {
        let subject = among(load.addresses);
        let what = format!("{}, {subject}, run {number}", load.case());
        turn::take(steps, &what, done, || addresses::measure(load, &subject));
    }
}

const ALONE: &str = "causeway alone";

fn beside(guests: u16) -> String {
    format!("causeway, {guests} idle")
}

fn among(addresses: u32) -> String {
    format!("causeway, {addresses} MACs")
}

fn publish(steps: &mut Steps, options: &Options, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let summary = summarise(&samples, options);
    let count = runs.len();
    let report = Report::new("million frames per second", versions, runs, summary)?;
    let said = "ratio: of the line above, with more, to it, with less; above 1 is faster with more";
    let json = options.series.keep.publish(NAME, &report, (said, "Mpps"))?;
    steps.note(NAME, Ok(format!("{count} runs in {}", json.display())));
    Ok(())
}

/// With more of something stands above with less, and the ratio is that of the two.
fn summarise(samples: &[Sample], options: &Options) -> Vec<Row> {
    let pairs = [[beside(options.guests), ALONE.to_owned()], [among(options.addresses), among(2)]];
    let of_pair = |pair: &[String; 2]| {
        let [more, _] = pair;
        let fits = |sample: &&Sample| pair.contains(&sample.subject);
        let samples: Vec<Sample> = samples.iter().filter(fits).cloned().collect();
        rows(&samples, more)
    };
    pairs.iter().flat_map(of_pair).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::regime::Regime;
    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn the_ratio_is_that_of_more_to_less() {
        let options = Cli::try_parse_from(["x"]).unwrap_or_else(|e| panic!("{e}")).options;
        let sample = |case: &str, subject: &str, value| Sample {
            case: case.to_owned(),
            regime: Regime::Near,
            subject: subject.to_owned(),
            value,
            cycles: None,
        };
        let samples = [
            sample("a", "causeway alone", 10.0),
            sample("b", "causeway, 2 MACs", 5.0),
            sample("a", "causeway, 64 idle", 9.5),
            sample("b", "causeway, 100000 MACs", 4.0),
        ];
        let rows = summarise(&samples, &options);
        let seen: Vec<_> = rows.iter().map(|row| (row.subject.as_str(), row.ratio)).collect();
        let expected = [
            ("causeway, 64 idle", None),
            ("causeway alone", Some(0.95)),
            ("causeway, 100000 MACs", None),
            ("causeway, 2 MACs", Some(0.8)),
        ];
        assert_eq!(seen, expected);
    }
}
