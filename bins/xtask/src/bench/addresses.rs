//! Frames between many addresses, while the forwarding table has more: one run.
//!
//! The guest is `causeway-guest --busy` on CPU 1, which sends from one port to the other as fast
//! as it can without an overflow. It is slower than DPDK's, so the cycles of a frame say more than
//! the frames.

use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::environment::host::hugepages;
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};
use serde::Deserialize;

use super::back_end::{BackEnd, sockets};
use super::case::Ring;
use super::machine::{cpu_mhz, guest_program};
use super::regime::{Regime, round_trip_ns};
use super::round::Run;
use super::watch::Watch;

/// Addresses behind one quiet port: below what a port may have by default.
const PER_PORT: u32 = 15_000;
/// Frames on their way at most: a ring of 256 never overflows.
const WINDOW: &str = "192";
const WARM_UP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(3);
const SLACK: Duration = Duration::from_secs(30);
const LEARN_TIMEOUT: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(50);

/// What the forwarding table has and what comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) ring: Ring,
    /// In the table.
    pub(crate) addresses: u32,
    /// Those of them that frames come from or go to.
    pub(crate) in_use: u32,
    pub(crate) kept: Kept,
}

/// What is kept for the case that the switch dies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kept {
    Nothing,
    /// The switch's record of ring positions.
    Record,
    /// The front end's file of what is in flight.
    Inflight,
}

/// Where the record is, while a switch runs.
#[derive(Debug)]
pub(crate) struct StateDir(Option<Scratch>);

/// What `causeway-guest --json --generate` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    rx_pps: f64,
    lost: Option<u64>,
}

impl Kept {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Record => "record",
            Self::Inflight => "in-flight file",
        }
    }

    /// A directory on tmpfs, if there is a record.
    pub(crate) fn state_dir(self) -> Result<StateDir> {
        let kept = (self == Self::Record).then(|| Scratch::in_memory("state"));
        Ok(StateDir(kept.transpose()?))
    }
}

impl StateDir {
    /// What the switch is told.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let place = self.0.as_ref().map(|kept| kept.folder().display().to_string());
        vec!["--state-dir".to_owned(), place.unwrap_or_else(|| "off".to_owned())]
    }
}

impl Load {
    pub(crate) fn case(self) -> String {
        let ring = if self.ring == Ring::Packed { "packed" } else { "split" };
        format!("64 B {ring}, one way")
    }

    /// Addresses on either side.
    fn stations(self) -> u32 {
        self.in_use.div_euclid(2).max(1)
    }

    /// Ports behind which the other addresses are, with how many each.
    fn others(self) -> Vec<u32> {
        let mut left = self.addresses.saturating_sub(self.stations().saturating_mul(2));
        let mut ports = Vec::new();
        while left > 0 {
            let here = left.min(PER_PORT);
            ports.push(here);
            left = left.saturating_sub(here);
        }
        ports
    }
}

/// Measures the switch, which is called `subject`, under that load.
pub(crate) fn measure(load: Load, subject: &str) -> Result<Run> {
    hugepages()?;
    let mut scratch = Scratch::new("addresses")?;
    match measure_in(load, &scratch) {
        Ok(run) => Ok(Run { subject: subject.to_owned(), ..run }),
        Err(error) => Err(error.context(format!("logs in {}", scratch.keep().display()))),
    }
}

fn measure_in(load: Load, scratch: &Scratch) -> Result<Run> {
    let state = load.kept.state_dir()?;
    let switch = start(load, &state, scratch)?;
    let others = announce_others(load, &switch, scratch)?;
    let mut back_end = BackEnd::of_switch(switch);
    let before_ns = round_trip_ns()?;
    let mut guest = Process::spawn(
        "causeway-guest",
        &mut generator(load, scratch)?,
        &scratch.path("guest.log"),
    )?;
    wait_learned(&back_end, load.addresses)?;
    sleep(WARM_UP);
    back_end.begin()?;
    let watch = Watch::start(&[guest.id(), back_end.id()])?;
    let top = back_end.top(LOOK)?;
    let disturbance = watch.finish();
    let account = back_end.account(top.as_ref(), cpu_mhz())?;
    let learned = addresses(&back_end)?;
    ensure!(learned >= load.addresses, "the table has only {learned} addresses after the run");
    let _ = guest.stop()?;
    let after_ns = round_trip_ns()?;
    drop(others);
    back_end.stop()?;
    let said = parse(&guest.output_from(0)?)?;
    let lost = said.lost.unwrap_or_default();
    let regime = Regime::of_run(before_ns, after_ns)
        .unless_disturbed(disturbance.share())
        .unless_starved(account.dropped);
    Ok(Run {
        case: load.case(),
        regime,
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited: disturbance.waited,
        stolen: disturbance.stolen,
        mpps: said.rx_pps / 1e6,
        looks: Vec::new(),
        cycles_per_frame: account.cycles_per_frame,
        guest_cycles_per_frame: None,
        busy_ratio: account.busy_ratio,
        dropped: account.dropped,
        guest_dropped: lost,
        spent: None,
        subject: String::new(),
    })
}

fn start(load: Load, state: &StateDir, scratch: &Scratch) -> Result<Switch> {
    let mut ports: Vec<(String, PathBuf)> =
        ["g0", "g1"].into_iter().map(str::to_owned).zip(sockets(scratch)).collect();
    ports.extend(others(load, scratch).map(|(name, socket, _)| (name, socket)));
    let specs = ports
        .iter()
        .map(|(name, socket)| format!("vhost-user:name={name},socket={}", socket.display()));
    let specs: Vec<String> = specs.collect();
    let mut arguments = vec!["--workers", "0"];
    arguments.extend(specs.iter().flat_map(|spec| ["--port", spec]));
    let state = state.arguments();
    arguments.extend(state.iter().map(String::as_str));
    Switch::start_with(scratch.folder(), &arguments)
}

/// Name, socket and number of addresses of each port behind which the other addresses are.
fn others(load: Load, scratch: &Scratch) -> impl Iterator<Item = (String, PathBuf, u32)> {
    load.others().into_iter().enumerate().map(|(number, count)| {
        let name = format!("o{number}");
        let socket = scratch.path(&name);
        (name, socket, count)
    })
}

/// The quiet guests; they end when they are dropped.
fn announce_others(load: Load, switch: &Switch, scratch: &Scratch) -> Result<Vec<Process>> {
    let mut guests = Vec::new();
    for (name, socket, count) in others(load, scratch) {
        let mut command = tied_command("taskset");
        let _ = command.args(["--cpu-list", "1"]).arg(guest_program()?);
        let _ = command.args(["--receive", "--stations", &count.to_string(), "--socket"]);
        let log = scratch.path(&format!("{name}.log"));
        guests.push(Process::spawn("causeway-guest", command.arg(&socket), &log)?);
        switch.wait_ports_up(&[&name])?;
    }
    Ok(guests)
}

fn generator(load: Load, scratch: &Scratch) -> Result<Command> {
    let mut command = tied_command("taskset");
    let _ = command
        .args(["--cpu-list", "1"])
        .arg(guest_program()?)
        .args(["--generate", "--busy", "--hugepages", "--json", "--window", WINDOW])
        .args(["--stations", &load.stations().to_string()])
        .args(["--seconds", &SLACK.as_secs().to_string()]);
    if load.ring == Ring::Packed {
        let _ = command.arg("--packed");
    }
    if load.kept == Kept::Inflight {
        let _ = command.arg("--inflight");
    }
    for socket in sockets(scratch) {
        let _ = command.arg("--socket").arg(socket);
    }
    Ok(command)
}

/// Waits until the table has so many addresses.
fn wait_learned(back_end: &BackEnd, count: u32) -> Result<()> {
    let start = Instant::now();
    loop {
        let learned = addresses(back_end)?;
        if learned >= count {
            return Ok(());
        }
        ensure!(start.elapsed() < LEARN_TIMEOUT, "only {learned} of {count} addresses are learned");
        sleep(TICK);
    }
}

/// Addresses in the forwarding table.
fn addresses(back_end: &BackEnd) -> Result<u32> {
    #[derive(Deserialize)]
    struct Stats {
        switch: Table,
    }
    #[derive(Deserialize)]
    struct Table {
        fdb_entries: u32,
    }
    let shown = back_end.ctl(&["--json", "stats"])?;
    let stats: Stats =
        serde_json::from_str(&shown).with_context(|| format!("ctl --json stats says: {shown}"))?;
    Ok(stats.switch.fdb_entries)
}

/// The result is the last line; what stands before it is for people.
fn parse(log: &str) -> Result<Said> {
    let line = log.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("causeway-guest says: {log}"))?;
    serde_json::from_str(line).with_context(|| format!("causeway-guest says: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_have_a_place() {
        let load =
            |addresses, in_use| Load { ring: Ring::Split, addresses, in_use, kept: Kept::Record };
        let large = load(100_000, 10_000);
        let others = large.others();
        assert_eq!(others.iter().sum::<u32>() + 2 * large.stations(), 100_000);
        assert!(others.iter().all(|count| *count <= PER_PORT));
        assert_eq!((load(2, 2).stations(), load(2, 2).others()), (1, Vec::new()));
    }

    #[test]
    fn the_guest_says_what_arrived() {
        let said = parse("up\n{\"rx_pps\":3500000.5,\"lost\":0,\"tx_pps\":1.0}\n").unwrap();
        assert!((said.rx_pps - 3_500_000.5).abs() < 1e-3 && said.lost == Some(0));
        assert!(parse("error").is_err());
    }
}
