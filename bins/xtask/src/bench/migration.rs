//! How long a QEMU guest stands still when it moves between two back ends on this machine: two
//! switches, and two testpmds in their place, in turns.
//!
//! ```text
//!   g2 (iperf3 -s) ── back end before ── g1 ══ moves ══► g1 ── back end after
//! ```
//!
//! The time is QEMU's: from the moment that it stops the guest until the other QEMU lets it go on.
//! Rings are stopped, asked for their positions, and started within it. The guest sends TCP
//! meanwhile, so that memory is written until its end.
//!
//! **Limits.** Guests without offloads: testpmd passes frames on as they are, and does not finish
//! checksums. Two CPUs carry two back ends and three QEMUs; testpmd polls, so its two share a CPU.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use conformance::qmp::Qmp;
use conformance::{Environment, Forwarder, Guest, GuestSpec, Scratch, Switch};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::machine::{Versions, qemu_version};
use super::prepare;
use super::report::{Report, Series};
use super::summary::{Spread, spread};
use crate::steps::Steps;

pub(super) const NAME: &str = "migration";
/// What the issue allows the switch to take longer than testpmd.
const GOAL_MS: f64 = 20.0;
/// What QEMU is asked to keep within, and bytes per second.
const DOWNTIME_MS: u64 = 20;
const BANDWIDTH: u64 = 1 << 32;
/// From the first byte of TCP to the migration.
const BEFORE: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// testpmd finishes no checksum, and QEMU tells no back end of changes.
const PLAIN: [&str; 11] = [
    "ctrl_guest_offloads=off",
    "csum=off",
    "gso=off",
    "guest_csum=off",
    "guest_tso4=off",
    "guest_tso6=off",
    "guest_ecn=off",
    "host_tso4=off",
    "host_tso6=off",
    "host_ecn=off",
    "host_ufo=off",
];

/// Options of `cargo xtask bench migration`.
#[derive(Args, Debug)]
#[command(mut_arg("runs", |runs| runs.default_value("5")))]
pub(crate) struct Options {
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
    #[command(flatten)]
    series: Series,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Subject {
    Causeway,
    Testpmd,
}

/// One migration.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Run {
    subject: Subject,
    packed: bool,
    downtime_ms: u64,
    total_ms: u64,
}

/// Milliseconds of downtime.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Summary {
    pub(super) packed: bool,
    pub(super) causeway: Spread,
    pub(super) testpmd: Spread,
}

impl Summary {
    fn of(runs: &[Run], packed: bool) -> Option<Self> {
        let of = |subject| {
            let of_kind = runs.iter().filter(|r| r.subject == subject && r.packed == packed);
            let times = of_kind.map(|run| f64::from(u32::try_from(run.downtime_ms).unwrap_or(0)));
            spread(&times.collect::<Vec<_>>())
        };
        Some(Self { packed, causeway: of(Subject::Causeway)?, testpmd: of(Subject::Testpmd)? })
    }

    /// The figures in one line.
    pub(super) fn line(&self) -> String {
        let (ours, theirs) = (self.causeway, self.testpmd);
        let ring = if self.packed { "packed" } else { "split" };
        let longer = ours.median - theirs.median;
        format!(
            "{ring}: causeway {:.0} ms ({:.0}-{:.0}, n={}), testpmd {:.0} ms ({:.0}-{:.0}, n={}): \
             {longer:+.0} ms, {GOAL_MS:.0} are allowed",
            ours.median,
            ours.min,
            ours.max,
            ours.runs,
            theirs.median,
            theirs.min,
            theirs.max,
            theirs.runs
        )
    }
}

/// One place of the guest.
enum Place {
    Switch(Switch),
    Testpmd(Forwarder),
}

impl Place {
    /// A back end for `g1` and for `g2`, with its sockets in `folder`.
    fn start(subject: Subject, environment: &Environment, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let sockets = ["g1", "g2"].map(|name| folder.join(name));
        match subject {
            Subject::Causeway => {
                let port = |name: &str| {
                    format!("vhost-user:name={name},socket={}", folder.join(name).display())
                };
                Ok(Self::Switch(Switch::start(folder, &[port("g1"), port("g2")])?))
            }
            Subject::Testpmd => {
                let forwarder = Forwarder::between_sockets(environment, &sockets, folder)?;
                Ok(Self::Testpmd(forwarder))
            }
        }
    }

    fn stop(self) -> Result<()> {
        match self {
            Self::Switch(switch) => switch.stop(),
            Self::Testpmd(forwarder) => forwarder.stop(),
        }
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut runs: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    versions.qemu = Some(qemu_version(&environment)?);
    for number in 1..=options.series.runs {
        for subject in [Subject::Causeway, Subject::Testpmd] {
            let mut scratch = Scratch::new("migration")?;
            let moved = migrate(&environment, &scratch, (subject, options.packed));
            let run = moved.with_context(|| format!("logs in {}", scratch.keep().display()))?;
            println!(
                "migration, run {number} of {}, {subject:?}: down {} ms of {} ms",
                options.series.runs, run.downtime_ms, run.total_ms
            );
            runs.push(run);
        }
    }
    let layouts = [false, true].into_iter();
    let summary: Vec<Summary> = layouts.filter_map(|packed| Summary::of(&runs, packed)).collect();
    let report = Report::new("milliseconds", versions, runs, summary.clone())?;
    for line in report.origin() {
        println!("{line}");
    }
    let json = options.series.keep.write_json(NAME, &report)?;
    let lines: Vec<String> = summary.iter().map(Summary::line).collect();
    steps.note("migration", Ok(format!("{}; {}", lines.join("; "), json.display())));
    Ok(())
}

fn guest(socket: &Path, name: &str, packed: bool) -> GuestSpec {
    let number = if name == "g2" { 2 } else { 1 };
    let mut spec = GuestSpec::new(number, socket.to_owned());
    spec.name = name.to_owned();
    spec.properties = PLAIN.map(str::to_owned).to_vec();
    spec.properties.extend(packed.then(|| "packed=on".to_owned()));
    spec
}

fn migrate(
    environment: &Environment,
    scratch: &Scratch,
    (subject, packed): (Subject, bool),
) -> Result<Run> {
    let place = |name: &str| Place::start(subject, environment, &scratch.path(name));
    let (before, after) = (place("before")?, place("after")?);
    let start = |spec: &GuestSpec| Guest::start(environment, spec, scratch.folder());
    let monitor = scratch.path("qmp");
    let mut spec = guest(&scratch.path("before/g1"), "g1-before", packed);
    spec.arguments = Qmp::arguments(&monitor).to_vec();
    let (mut old, mut peer) =
        (start(&spec)?, start(&guest(&scratch.path("before/g2"), "g2", packed))?);
    peer.wait_up()?;
    old.wait_up()?;
    old.wait_reachable(&peer.address())?;
    peer.iperf_server()?;
    let sender = format!("iperf3 --forceflush -c {} -t 300", peer.address());
    let _ = old.run(&format!("({sender} >/tmp/iperf 2>&1 &)"))?;
    let incoming = scratch.path("incoming");
    let uri = format!("unix:{}", incoming.display());
    let mut spec = guest(&scratch.path("after/g1"), "g1-after", packed);
    spec.arguments = ["-incoming", &uri].map(str::to_owned).to_vec();
    let new = start(&spec)?;
    let began = Instant::now();
    while !incoming.exists() {
        ensure!(began.elapsed() < TIMEOUT, "the new place never listened");
        sleep(POLL);
    }
    sleep(BEFORE);
    let said = old.run("cat /tmp/iperf")?;
    ensure!(said.contains("bits/sec"), "the guest sends nothing: {said}");
    let mut qmp = Qmp::connect(&monitor)?;
    qmp.set_migration(DOWNTIME_MS, BANDWIDTH)?;
    qmp.migrate(&uri)?;
    let moved = qmp.wait_migration(&["completed"], TIMEOUT)?;
    let _ = qmp.ask("quit", &json!({}));
    new.power_off()?;
    peer.power_off()?;
    before.stop()?;
    after.stop()?;
    Ok(Run { subject, packed, downtime_ms: moved.downtime_ms, total_ms: moved.total_ms })
}

#[cfg(test)]
mod tests {
    use super::{Run, Subject, Summary};

    #[test]
    fn back_ends_and_layouts_are_told_apart() {
        let run = |subject, packed, downtime_ms| Run { subject, packed, downtime_ms, total_ms: 1 };
        let runs = [
            run(Subject::Causeway, false, 30),
            run(Subject::Testpmd, false, 25),
            run(Subject::Causeway, false, 34),
            run(Subject::Causeway, true, 90),
        ];
        let summary = Summary::of(&runs, false).unwrap();
        let line = summary.line();
        assert!(line.starts_with("split: causeway 32 ms (30-34, n=2), testpmd 25 ms"), "{line}");
        assert!(line.contains("+7 ms, 20 are allowed"), "{line}");
        assert!(Summary::of(&runs, true).is_none(), "nothing to compare with");
    }
}
