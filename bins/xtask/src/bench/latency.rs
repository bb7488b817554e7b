//! The round trip of a single frame between two guests, for each way of polling and the peers.
//!
//! The guest is `causeway-guest --busy` with two ports on CPU 1: it sends a frame from the first
//! to the second and back, then the next, as steadily as the back end lets it.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::environment::host::hugepages;
use conformance::process::{Process, tied_command};
use conformance::{Environment, Scratch};
use serde::{Deserialize, Serialize};

use super::back_end::{BackEnd, Setup, Subject, available, sockets};
use super::machine::{Versions, guest_program};
use super::prepare;
use super::regime::{Regime, round_trip_ns};
use super::report::{Keep, Report, Series};
use super::summary::{Row, Sample, rows};
use super::turn::{self, Measured};
use super::watch::{Threads, Watch};
use crate::steps::Steps;

/// How long the guest may take to end after that.
const SLACK: Duration = Duration::from_secs(30);
const MICRO: f64 = 1e3;
const NAME: &str = "latency";
/// Round trips that are not measured: OVS takes a second for other things when a guest connects.
const WARM_UP: Duration = Duration::from_secs(2);
/// The guest is still there when it has been watched.
const MARGIN: Duration = Duration::from_millis(300);

/// Options of `cargo xtask bench latency`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What to compare with
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "ovs,testpmd")]
    peers: Vec<Subject>,
    #[command(flatten)]
    trips: Trips,
    #[command(flatten)]
    series: Series,
}

/// The round trips of a run.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Trips {
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub(crate) seconds: u16,
    /// Packed rings instead of split ones
    #[arg(long)]
    pub(crate) packed: bool,
    /// Round trips per second [default: each begins when the one before has ended]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate_pps: Option<u32>,
    /// Bytes of the frames that another guest sends meanwhile, as fast as it can, between the ports
    /// [`NEIGHBOURS`].
    #[arg(skip)]
    pub(crate) beside: Option<u32>,
}

/// The ports of the other guest.
pub(crate) const NEIGHBOURS: [&str; 2] = ["n0", "n1"];

/// What `causeway-guest --json --latency` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    lost: Option<u64>,
    latency: Option<Times>,
    neighbour_pps: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Times {
    samples: u64,
    pub(crate) p50_ns: u32,
    pub(crate) p99_ns: u32,
    p99_9_ns: u32,
    max_ns: u64,
}

/// One run of one back end.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    /// Ring and rate.
    pub(crate) case: String,
    pub(crate) subject: String,
    pub(crate) regime: Regime,
    before_ns: f64,
    after_ns: f64,
    /// The share of the time for which the guest or the back end, whichever did longer, waited
    /// for its CPU. Waking up is waiting too, so it says nothing of a back end that sleeps.
    waited: f64,
    /// The share of the time for which the host had one of their CPUs.
    stolen: f64,
    /// The share of a CPU that the back end took.
    pub(crate) cpu: f64,
    pub(crate) lost: u64,
    /// Frames per second of the other guest, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    neighbour_pps: Option<f64>,
    #[serde(flatten)]
    pub(crate) times: Times,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    hugepages()?;
    let mut versions = Versions::this()?;
    let mut subjects = vec![Subject::CausewayBusy, Subject::Causeway, Subject::CausewayInterrupt];
    subjects.extend(available(steps, &environment, &options.peers, &mut versions));
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.series.runs {
        for subject in &subjects {
            let what = format!("latency, {}, run {number}", subject.name());
            let setup = Setup::new(*subject, 64);
            turn::take(steps, &what, &mut done, || {
                measure(&environment, &setup, subject.name(), options.trips)
            });
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

/// Measures the back end of `setup`, which is called `name`.
pub(crate) fn measure(
    environment: &Environment,
    setup: &Setup,
    name: &str,
    trips: Trips,
) -> Result<Run> {
    let mut scratch = Scratch::new("latency")?;
    let result = measure_in(environment, setup, trips, &scratch);
    let run =
        result.map_err(|error| error.context(format!("logs in {}", scratch.keep().display())))?;
    Ok(Run { subject: name.to_owned(), ..run })
}

fn measure_in(
    environment: &Environment,
    setup: &Setup,
    trips: Trips,
    scratch: &Scratch,
) -> Result<Run> {
    let back_end = BackEnd::start(setup, environment, scratch)?;
    let before_ns = round_trip_ns()?;
    let mut command = guest(setup.subject, trips, scratch)?;
    let mut guest = Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))?;
    sleep(WARM_UP);
    let mut programs = vec![guest.id()];
    // To wake up is to wait for a CPU too.
    programs.extend(setup.subject.polls().then(|| back_end.id()));
    // If the guest has ended, `finish` knows why.
    let watch = Watch::start(&programs).or_else(|_| Watch::start(&[]))?;
    let (start, ran) = (Instant::now(), Threads::of(back_end.id())?.running());
    sleep(Duration::from_secs(trips.seconds.into()).saturating_sub(MARGIN));
    let ran = Threads::of(back_end.id())?.running().saturating_sub(ran);
    let cpu = ran.as_secs_f64() / start.elapsed().as_secs_f64();
    let disturbance = watch.finish();
    let status = guest.finish(SLACK)?;
    ensure!(status.success(), "causeway-guest ended with {status}\n{}", guest.tail());
    let after_ns = round_trip_ns()?;
    back_end.stop()?;
    let said = parse(&guest.output_from(0)?)?;
    Ok(Run {
        case: trips.case(),
        subject: String::new(),
        regime: Regime::of_run(before_ns, after_ns).unless_disturbed(disturbance.share()),
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited: disturbance.waited,
        stolen: disturbance.stolen,
        cpu,
        lost: said.lost.unwrap_or_default(),
        neighbour_pps: said.neighbour_pps,
        times: said.latency.with_context(|| format!("no frame came back\n{}", guest.tail()))?,
    })
}

fn guest(subject: Subject, trips: Trips, scratch: &Scratch) -> Result<Command> {
    let mut command = tied_command("taskset");
    let _ = command
        .args(["--cpu-list", "1"])
        .arg(guest_program()?)
        .args(["--latency", "--busy", "--hugepages", "--json"])
        .args(["--warm-up", &WARM_UP.as_secs().to_string()])
        .args(["--seconds", &trips.seconds.to_string()]);
    if trips.packed {
        let _ = command.arg("--packed");
    }
    if let Some(rate) = trips.rate_pps {
        let _ = command.args(["--rate-pps", &rate.to_string()]);
    }
    if let Some(size) = trips.beside {
        let _ = command.args(["--neighbour-size", &size.to_string()]);
        for name in NEIGHBOURS {
            let _ = command.arg("--neighbour").arg(scratch.path(name));
        }
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

impl Trips {
    fn case(self) -> String {
        let ring = if self.packed { "packed" } else { "split" };
        let rate = self.rate_pps.map(|rate| format!(", {rate} a second")).unwrap_or_default();
        format!("round trip {ring}{rate}")
    }
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        let us = |ns: u32| f64::from(ns) / MICRO;
        let times = self.times;
        let mpps = |pps: f64| format!(", beside {:.2} Mpps", pps / 1e6);
        let beside = self.neighbour_pps.map(mpps).unwrap_or_default();
        format!(
            "p50 {:.2} us, p99 {:.2} us, p99.9 {:.2} us, {} ({:.0}/{:.0} ns, waited {:.1} %, \
             stolen {:.1} %), {:.1} % of a CPU, {} lost{beside}",
            us(times.p50_ns),
            us(times.p99_ns),
            us(times.p99_9_ns),
            self.regime.name(),
            self.before_ns,
            self.after_ns,
            100.0 * self.waited,
            100.0 * self.stolen,
            100.0 * self.cpu,
            self.lost
        )
    }
}

impl Run {
    pub(crate) fn samples(&self) -> [Sample; 3] {
        let times = self.times;
        [("p50", times.p50_ns), ("p99", times.p99_ns), ("p99.9", times.p99_9_ns)].map(
            |(name, nanos)| Sample {
                case: format!("{}, {name}", self.case),
                regime: self.regime,
                subject: self.subject.clone(),
                value: f64::from(nanos) / MICRO,
                cycles: None,
            },
        )
    }
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().flat_map(Run::samples).collect();
    let summary: Vec<Row> = rows(&samples, Subject::CausewayBusy.name());
    let count = runs.len();
    let report = Report::new("microseconds", versions, runs, summary)?;
    let said = "ratio: of causeway busy to it, below 1 is less time";
    let json = keep.publish(NAME, &report, (said, "us"))?;
    steps.note(NAME, Ok(format!("{count} runs in {}", json.display())));
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
