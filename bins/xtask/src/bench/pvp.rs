//! Frames per second from guest to guest and back, the switch and its peers in turn.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use conformance::{Environment, Scratch, Topology, VirtioUser, VirtioUserSpec};
use serde::Serialize;

use super::back_end::{BackEnd, Subject, available, sockets};
use super::machine::{Threads, Versions};
use super::regime::{Regime, round_trip_ns};
use super::report::{Report, table, write};
use super::summary::{Sample, median, rows};
use super::turn::{self, Measured};
use super::{chart, prepare};
use crate::steps::Steps;

/// Bursts of 32 frames that go round from either port.
const BURSTS: u32 = 4;
/// A ring of 256 has room for one burst of frames that need several buffers of 2 KiB each. A frame
/// that is dropped never comes back, and all figures after that would be too low.
const BURSTS_OF_LARGE: u32 = 1;
const LARGE: u16 = 2000;
const WARM_UP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: usize = 3;

/// Options of `cargo xtask bench pvp`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Bytes of a frame, without its check sequence
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "64,1500",
          value_parser = clap::value_parser!(u16).range(60..=9000))]
    sizes: Vec<u16>,
    /// What to compare with
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "ovs,testpmd")]
    peers: Vec<Subject>,
    /// Layouts of the rings
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "split,packed")]
    rings: Vec<Ring>,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 7,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
}

/// The layout of a ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Ring {
    Split,
    Packed,
}

/// A frame size on a kind of ring.
#[derive(Clone, Copy, Debug)]
struct Case {
    size: u16,
    ring: Ring,
}

/// One run of one back end.
#[derive(Clone, Debug, Serialize)]
struct Run {
    case: String,
    subject: Subject,
    regime: Regime,
    before_ns: f64,
    after_ns: f64,
    /// The share of the time for which the guest or the back end, whichever did longer, waited
    /// for its CPU.
    waited: f64,
    /// Frames per second that a port of the guest receives, in millions: the median of the looks.
    mpps: f64,
    looks: Vec<f64>,
    cycles_per_frame: Option<f64>,
    guest_cycles_per_frame: Option<f64>,
    busy_ratio: Option<f64>,
    dropped: Option<u64>,
}

impl Case {
    fn name(self) -> String {
        let ring = match self.ring {
            Ring::Split => "split",
            Ring::Packed => "packed",
        };
        format!("{} B {ring}", self.size)
    }

    fn bursts(self) -> u32 {
        if self.size > LARGE { BURSTS_OF_LARGE } else { BURSTS }
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut subjects = vec![Subject::Causeway];
    subjects.extend(available(steps, &environment, &options.peers, &mut versions));
    let mut done = Vec::new();
    for number in 1..=options.runs {
        for case in cases(options) {
            for subject in &subjects {
                let what = format!("{}, {}, run {number}", case.name(), subject.name());
                turn::take(steps, &what, &mut done, || {
                    measure(&environment, *subject, case, &mut versions)
                });
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, done, versions)
}

fn cases(options: &Options) -> Vec<Case> {
    let of_size = |size: &u16| {
        let size = *size;
        options.rings.iter().map(move |ring| Case { size, ring: *ring })
    };
    options.sizes.iter().flat_map(of_size).collect()
}

fn measure(
    environment: &Environment,
    subject: Subject,
    case: Case,
    versions: &mut Versions,
) -> Result<Run> {
    let mut scratch = Scratch::new("pvp")?;
    match measure_in(environment, subject, case, &scratch) {
        Ok((run, dpdk)) => {
            versions.dpdk = versions.dpdk.take().or(dpdk);
            Ok(run)
        }
        Err(error) => Err(error.context(format!("logs in {}", scratch.keep().display()))),
    }
}

fn measure_in(
    environment: &Environment,
    subject: Subject,
    case: Case,
    scratch: &Scratch,
) -> Result<(Run, Option<String>)> {
    let mut back_end = BackEnd::start(subject, environment, scratch, case.size.into())?;
    let spec = guest(subject, case, scratch);
    let mut guest = VirtioUser::start(environment, &spec, scratch.folder())?;
    guest.wait_up()?;
    back_end.wait_connected()?;
    let before_ns = round_trip_ns()?;
    guest.circulate(case.size.into(), case.bursts())?;
    let programs = [guest.id(), back_end.id()];
    let (looks, waited) = look(&mut guest, programs)?;
    let cycles = guest.stop_forwarding()?;
    let after_ns = round_trip_ns()?;
    let account = back_end.account(cycles.map(|cycles| cycles.mhz))?;
    let dpdk = guest.version()?;
    guest.quit()?;
    back_end.stop()?;
    let mpps = median(&looks).filter(|mpps| *mpps > 0.0).context("no frames came back")?;
    let run = Run {
        case: case.name(),
        subject,
        regime: Regime::of_run(before_ns, after_ns).unless_disturbed(waited),
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited,
        mpps,
        looks,
        cycles_per_frame: account.cycles_per_frame,
        guest_cycles_per_frame: cycles.map(|cycles| cycles.per_frame),
        busy_ratio: account.busy_ratio,
        dropped: account.dropped,
    };
    Ok((run, dpdk))
}

fn guest(subject: Subject, case: Case, scratch: &Scratch) -> VirtioUserSpec {
    VirtioUserSpec {
        sockets: sockets(scratch).into(),
        topology: Topology::Pairs,
        server: subject.guest_listens(),
        packed: case.ring == Ring::Packed,
        mrg_rxbuf: true,
        in_order: false,
        vectorized: false,
        queues: 1,
        largest_frame: case.size.into(),
    }
}

/// The guest's rates while the frames go round, the mean of its ports in millions, and the share
/// of the time for which one of the programs waited for its CPU.
fn look(guest: &mut VirtioUser, programs: [u32; 2]) -> Result<(Vec<f64>, f64)> {
    sleep(WARM_UP);
    // The first look has the start in it.
    let _ = guest.rates()?;
    let (before, start) = (threads(programs)?, Instant::now());
    let mut looks = Vec::new();
    for _ in 0..LOOKS {
        sleep(LOOK);
        looks.push(mean_in_millions(&guest.rates()?));
    }
    let (after, time) = (threads(programs)?, start.elapsed());
    let waited =
        after.iter().zip(&before).map(|(after, before)| after.busiest_waited(before)).max();
    Ok((looks, waited.unwrap_or_default().as_secs_f64() / time.as_secs_f64()))
}

fn threads(programs: [u32; 2]) -> Result<[Threads; 2]> {
    let [guest, back_end] = programs;
    Ok([Threads::of(guest)?, Threads::of(back_end)?])
}

#[expect(clippy::cast_precision_loss, reason = "rates are far below 2^52")]
fn mean_in_millions(rates: &[u64]) -> f64 {
    let sum: u64 = rates.iter().sum();
    sum as f64 / rates.len().max(1) as f64 / 1e6
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        let cycles = |cycles: Option<f64>| cycles.map_or_else(|| "-".into(), |c| format!("{c:.0}"));
        let mut line = format!(
            "{:.2} Mpps, {} ({:.0}/{:.0} ns, waited {:.1} %), {} cycles a frame, the guest {}",
            self.mpps,
            self.regime.name(),
            self.before_ns,
            self.after_ns,
            100.0 * self.waited,
            cycles(self.cycles_per_frame),
            cycles(self.guest_cycles_per_frame),
        );
        if let Some(dropped) = self.dropped.filter(|dropped| *dropped > 0) {
            line.push_str(&format!(", {dropped} frames dropped"));
        }
        line
    }
}

impl Run {
    fn sample(&self) -> Sample {
        Sample {
            case: self.case.clone(),
            regime: self.regime,
            subject: self.subject,
            value: self.mpps,
            cycles: self.cycles_per_frame,
        }
    }
}

fn publish(steps: &mut Steps, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let left_out = runs.iter().filter(|run| !Regime::STEADY.contains(&run.regime)).count();
    let summary = rows(&samples, Subject::Causeway);
    let count = runs.len();
    let report = Report::new("million frames per second, per direction", versions, runs, summary)?;
    println!();
    for line in report.origin().into_iter().chain(table("Mpps", &report.summary, 2)) {
        println!("{line}");
    }
    println!(
        "{left_out} of {count} runs left out: meanwhile the regime changed, or other programs took \
         a CPU"
    );
    ensure!(!report.summary.is_empty(), "no run can be compared, nothing is written");
    let json = report.write("pvp")?;
    let title = "Frames per second, guest to guest, one CPU for the switch";
    let drawn = chart::draw(title, "Mpps per direction", &report.summary, &report.origin());
    let svg = write("pvp.svg", &drawn)?;
    steps.note("pvp", Ok(format!("{count} runs in {} and {}", json.display(), svg.display())));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_meets_every_ring() {
        let rings = vec![Ring::Split, Ring::Packed];
        let options = Options { sizes: vec![64, 1500], peers: Vec::new(), rings, runs: 1 };
        let names: Vec<String> = cases(&options).iter().map(|case| case.name()).collect();
        assert_eq!(names, ["64 B split", "64 B packed", "1500 B split", "1500 B packed"]);
    }

    #[test]
    fn a_rate_is_per_port() {
        assert!((mean_in_millions(&[15_000_000, 14_000_000]) - 14.5).abs() < 1e-9);
        assert!(mean_in_millions(&[]).abs() < 1e-9);
    }
}
