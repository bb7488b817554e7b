//! The round trip of a single frame between two guests, for each way of polling and the peers.
//!
//! The guest is `causeway-guest --busy` with two ports on CPU 1: it sends a frame from the first
//! to the second and back, then the next, as steadily as the back end lets it.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::environment::host::hugepages;
use conformance::process::{Process, tied_command};
use conformance::{Environment, Scratch};
use serde::{Deserialize, Serialize};

use super::back_end::{BackEnd, Subject, available, sockets};
use super::machine::{Threads, Versions, guest_program};
use super::prepare;
use super::regime::{Regime, round_trip_ns};
use super::report::{Report, table};
use super::summary::{Row, Sample, rows};
use super::turn::{self, Measured};
use crate::steps::Steps;

/// How long the guest may take to end after that.
const SLACK: Duration = Duration::from_secs(30);
const MICRO: f64 = 1e3;

/// Options of `cargo xtask bench latency`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What to compare with
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "ovs,testpmd")]
    peers: Vec<Subject>,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 7,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
}

/// What `causeway-guest --json --latency` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    lost: Option<u64>,
    latency: Option<Times>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Times {
    samples: u64,
    p50_ns: u32,
    p99_ns: u32,
    p99_9_ns: u32,
    max_ns: u64,
}

/// One run of one back end.
#[derive(Clone, Debug, Serialize)]
struct Run {
    subject: Subject,
    regime: Regime,
    before_ns: f64,
    after_ns: f64,
    /// The share of the time for which the guest or the back end, whichever did longer, waited
    /// for its CPU. Waking up is waiting too, so it says nothing of a back end that sleeps.
    waited: f64,
    lost: u64,
    #[serde(flatten)]
    times: Times,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    hugepages()?;
    let mut versions = Versions::this()?;
    let mut subjects = vec![Subject::CausewayBusy, Subject::Causeway, Subject::CausewayInterrupt];
    subjects.extend(available(steps, &environment, &options.peers, &mut versions));
    let mut done = Vec::new();
    for number in 1..=options.runs {
        for subject in &subjects {
            let what = format!("latency, {}, run {number}", subject.name());
            turn::take(steps, &what, &mut done, || measure(&environment, *subject, options));
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, done, versions)
}

fn measure(environment: &Environment, subject: Subject, options: &Options) -> Result<Run> {
    let mut scratch = Scratch::new("latency")?;
    let result = measure_in(environment, subject, options, &scratch);
    result.map_err(|error| error.context(format!("logs in {}", scratch.keep().display())))
}

fn measure_in(
    environment: &Environment,
    subject: Subject,
    options: &Options,
    scratch: &Scratch,
) -> Result<Run> {
    let back_end = BackEnd::start(subject, environment, scratch, 64)?;
    let before_ns = round_trip_ns()?;
    let log = scratch.path("guest.log");
    let mut command = guest(subject, options, scratch)?;
    let idle = Threads::of(back_end.id())?;
    let mut guest = Process::spawn("causeway-guest", &mut command, &log)?;
    let time = Duration::from_secs(options.seconds.into());
    sleep(time);
    // It measures for that long, so it is still there; if not, `finish` knows why.
    let guest_threads = Threads::of(guest.id()).unwrap_or_default();
    let mut waited = guest_threads.busiest_waited(&Threads::default());
    if subject.polls() {
        waited = waited.max(Threads::of(back_end.id())?.busiest_waited(&idle));
    }
    let waited = waited.as_secs_f64() / time.as_secs_f64();
    let status = guest.finish(SLACK)?;
    ensure!(status.success(), "causeway-guest ended with {status}\n{}", guest.tail());
    let after_ns = round_trip_ns()?;
    back_end.stop()?;
    let said = parse(&guest.output_from(0)?)?;
    Ok(Run {
        subject,
        regime: Regime::of_run(before_ns, after_ns).unless_disturbed(waited),
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited,
        lost: said.lost.unwrap_or_default(),
        times: said.latency.with_context(|| format!("no frame came back\n{}", guest.tail()))?,
    })
}

fn guest(subject: Subject, options: &Options, scratch: &Scratch) -> Result<Command> {
    let mut command = tied_command("taskset");
    let _ = command
        .args(["--cpu-list", "1"])
        .arg(guest_program()?)
        .args(["--latency", "--busy", "--hugepages", "--json"])
        .args(["--seconds", &options.seconds.to_string()]);
    if options.packed {
        let _ = command.arg("--packed");
    }
    if subject.guest_listens() {
        let _ = command.args(["--mode", "server"]);
    }
    for socket in sockets(scratch) {
        let _ = command.arg("--socket").arg(socket);
    }
    Ok(command)
}

/// The result is the last line; what stands before it is for people.
fn parse(log: &str) -> Result<Said> {
    let line = log.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("causeway-guest says: {log}"))?;
    serde_json::from_str(line).with_context(|| format!("causeway-guest says: {line}"))
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        let us = |ns: u32| f64::from(ns) / MICRO;
        let times = self.times;
        format!(
            "p50 {:.2} us, p99 {:.2} us, p99.9 {:.2} us, {} ({:.0}/{:.0} ns, waited {:.1} %), \
             {} lost",
            us(times.p50_ns),
            us(times.p99_ns),
            us(times.p99_9_ns),
            self.regime.name(),
            self.before_ns,
            self.after_ns,
            100.0 * self.waited,
            self.lost
        )
    }
}

impl Run {
    fn samples(&self) -> [Sample; 3] {
        let times = self.times;
        [("p50", times.p50_ns), ("p99", times.p99_ns), ("p99.9", times.p99_9_ns)].map(
            |(name, nanos)| Sample {
                case: format!("round trip {name}"),
                regime: self.regime,
                subject: self.subject,
                value: f64::from(nanos) / MICRO,
                cycles: None,
            },
        )
    }
}

fn publish(steps: &mut Steps, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().flat_map(Run::samples).collect();
    let summary: Vec<Row> = rows(&samples, Subject::CausewayBusy);
    let count = runs.len();
    let report = Report::new("microseconds", versions, runs, summary)?;
    println!("\nratio: of causeway busy to it, below 1 is less time");
    for line in report.origin().into_iter().chain(table("us", &report.summary, 2)) {
        println!("{line}");
    }
    ensure!(!report.summary.is_empty(), "no run can be compared, nothing is written");
    let json = report.write("latency")?;
    steps.note("latency", Ok(format!("{count} runs in {}", json.display())));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_result_is_its_last_line() {
        let log = "connected\n{\"tx_frames\":2,\"lost\":1,\"latency\":{\"samples\":9,\"min_ns\":1,\
                   \"mean_ns\":2,\"p50_ns\":2000,\"p99_ns\":3000,\"p99_9_ns\":4000,\
                   \"max_ns\":5}}\n";
        let said = parse(log).unwrap();
        assert_eq!((said.lost, said.latency.unwrap().p99_9_ns), (Some(1), 4000));
        assert!(parse("error: no socket").is_err());
    }
}
