//! CPU time that the switch takes, as it polls by default, while its guests do nothing.
//!
//! The guests are Linux guests that QEMU has booted, with an address each. They are less quiet
//! than guests that are only attached: they ask for neighbours and routers now and then.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::{Environment, Guest, GuestSpec, Scratch, Switch};
use serde::{Deserialize, Serialize};

use super::machine::{Versions, qemu_version};
use super::prepare;
use super::quiet::Quiet;
use super::report::{Report, Series};
use super::summary::{Spread, spread};
use super::watch::Threads;
use crate::steps::Steps;

const NAME: &str = "idle";
/// A guest that has just booted still looks for routers.
const SETTLE_BOOTED: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(1);

/// Options of `cargo xtask bench idle`.
#[derive(Args, Debug)]
#[command(mut_arg("runs", |runs| runs.default_value("3")))]
pub(crate) struct Options {
    /// Guests that do nothing
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u8).range(1..=128))]
    guests: u8,
    /// Guests of `causeway-guest --receive`, which are only attached, instead of booted ones
    #[arg(long)]
    attached: bool,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    seconds: u16,
    #[command(flatten)]
    series: Series,
}

/// One run.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Run {
    guests: u8,
    /// Whether they had booted, or were only attached.
    booted: bool,
    seconds: f64,
    cpu_seconds: f64,
    /// Of one CPU.
    percent: f64,
}

/// The guests; dropped, they go.
enum Guests {
    Booted(Vec<Guest>),
    Attached(Quiet),
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, false)?;
    let mut versions = Versions::this()?;
    let mut runs: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    let environment = if options.attached { None } else { booted(steps, &mut versions)? };
    let mut scratch = Scratch::new("idle")?;
    let measured = measure(environment.as_ref(), options, &scratch);
    runs.extend(measured.with_context(|| format!("logs in {}", scratch.keep().display()))?);
    let booted = environment.is_some();
    let same = |run: &&Run| run.guests == options.guests && run.booted == booted;
    let percents: Vec<f64> = runs.iter().filter(same).map(|run| run.percent).collect();
    let summary: Option<Spread> = spread(&percents);
    let report = Report::new("percent of one CPU", versions, runs, summary)?;
    for line in report.origin() {
        println!("{line}");
    }
    let json = options.series.keep.write_json(NAME, &report)?;
    let shown = summary.map_or_else(String::new, |all| {
        format!("{:.3} % of a CPU ({:.3}-{:.3}); ", all.median, all.min, all.max)
    });
    let kind = if booted { "booted" } else { "attached" };
    let name = format!("idle, {} {kind} guests", options.guests);
    steps.note(&name, Ok(format!("{shown}{}", json.display())));
    Ok(())
}

/// What boots guests; without it they are only attached, which is noted.
fn booted(steps: &mut Steps, versions: &mut Versions) -> Result<Option<Environment>> {
    let environment = Environment::open()?;
    let had = environment.image().and_then(|_| qemu_version(&environment));
    match had {
        Ok(version) => {
            versions.qemu = Some(version);
            Ok(Some(environment))
        }
        Err(error) => {
            let reason = format!("QEMU or its guest cannot be had: {error:#}");
            println!("the guests are only attached: {reason}");
            steps.not_run("booted guests", &reason, false);
            Ok(None)
        }
    }
}

fn measure(
    environment: Option<&Environment>,
    options: &Options,
    scratch: &Scratch,
) -> Result<Vec<Run>> {
    let ports = Quiet::ports(options.guests.into(), scratch);
    let specs = ports
        .iter()
        .map(|(name, socket)| format!("vhost-user:name={name},socket={}", socket.display()));
    let switch = Switch::start(scratch.folder(), &specs.collect::<Vec<_>>())?;
    let guests = match environment {
        Some(environment) => {
            let mut guests = Vec::new();
            for ((_, socket), number) in ports.iter().zip(1..) {
                let spec = GuestSpec::new(number, socket.clone());
                guests.push(Guest::start(environment, &spec, scratch.folder())?);
            }
            guests.iter_mut().try_for_each(Guest::wait_up)?;
            println!("{} guests have booted", guests.len());
            sleep(SETTLE_BOOTED);
            Guests::Booted(guests)
        }
        None => {
            let quiet = Quiet::attach(&ports, &switch, scratch)?;
            sleep(SETTLE);
            Guests::Attached(quiet)
        }
    };
    let runs = (1..=options.series.runs)
        .map(|number| look(&switch, environment.is_some(), (options, number)));
    let runs = runs.collect::<Result<_>>()?;
    // A guest that ended meanwhile was not attached.
    let names: Vec<&str> = ports.iter().map(|(name, _)| name.as_str()).collect();
    switch.wait_ports_up(&names)?;
    match guests {
        Guests::Booted(guests) => guests.into_iter().try_for_each(Guest::power_off)?,
        Guests::Attached(quiet) => quiet.stop(&switch)?,
    }
    switch.stop()?;
    Ok(runs)
}

/// One run.
fn look(switch: &Switch, booted: bool, (options, number): (&Options, u16)) -> Result<Run> {
    let (before, start) = (Threads::of(switch.id())?.running(), Instant::now());
    sleep(Duration::from_secs(options.seconds.into()));
    let (after, seconds) = (Threads::of(switch.id())?.running(), start.elapsed().as_secs_f64());
    let cpu_seconds = after.saturating_sub(before).as_secs_f64();
    ensure!(seconds > 0.0, "no time has passed");
    let percent = 100.0 * cpu_seconds / seconds;
    println!(
        "idle, {} guests, run {number} of {}: {cpu_seconds:.4} CPU seconds in {seconds:.1} s \
         ({percent:.3} %)",
        options.guests, options.series.runs
    );
    Ok(Run { guests: options.guests, booted, seconds, cpu_seconds, percent })
}
