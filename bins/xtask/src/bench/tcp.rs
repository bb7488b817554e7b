//! TCP between two Linux stacks through the switch and its peers, in turn.
//!
//! ```text
//!  namespace ─ veth or tap ─┐                     ┌─ veth or tap ─ namespace
//!  namespace ─ causeway-guest ─ vhost-user ─ back end ─ vhost-user ─ causeway-guest ─ namespace
//!  QEMU (TCG) guest ────────┘                     └──────── QEMU (TCG) guest
//! ```
//!
//! iperf3 is at both ends. All programs share the machine's CPUs as the kernel lets them: figures
//! say what a pair of guests gets out of the whole machine.

mod bed;

use anyhow::{Result, ensure};
use clap::Args;
use conformance::Environment;
use serde::{Deserialize, Serialize};

use super::machine::Versions;
use super::prepare;
use super::regime::Regime;
use super::report::{Keep, Report, Series};
use super::summary::{Sample, rows};
use super::turn::{self, Measured};
use crate::steps::Steps;
use bed::{ToGuest, Way};

const NAME: &str = "tcp";
/// The subject that the others are compared with.
const OURS: &str = "causeway";
const OVS: &str = "OVS-DPDK";
const OVS_TSO: &str = "OVS-DPDK, userspace TSO";

/// Options of `cargo xtask bench tcp`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Only cases whose name has this in it
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Seconds of a run
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u16).range(1..=60))]
    seconds: u16,
    #[command(flatten)]
    series: Series,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    case: String,
    subject: String,
    regime: Regime,
    before_ns: f64,
    after_ns: f64,
    /// Payload that arrived.
    gbit_per_s: f64,
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        format!("{:.2} Gbit/s, {}", self.gbit_per_s, self.regime.name())
    }
}

/// What is measured: the case, the subject, and what lies between the two stacks.
fn all() -> Vec<(&'static str, &'static str, Way)> {
    let veth = |case, kind| {
        [
            (case, OURS, Way::Uplinks(kind)),
            (case, "kernel bridge", Way::Bridge { large: true }),
            (case, "OVS, userspace", Way::OvsVeth),
        ]
    };
    let guests = |case, packed| {
        [
            (case, OURS, Way::Guests { packed, options: "", streams: 1 }),
            (case, OVS, Way::OvsGuests { packed, tso: false }),
            (case, OVS_TSO, Way::OvsGuests { packed, tso: true }),
        ]
    };
    let qemu = |case, packed| {
        [
            (case, OURS, Way::Qemu { packed }),
            (case, OVS, Way::OvsQemu { packed, tso: false }),
            (case, OVS_TSO, Way::OvsQemu { packed, tso: true }),
        ]
    };
    let two = Way::Guests { packed: false, options: "--queues 2", streams: 8 };
    let one = Way::Guests { packed: false, options: "", streams: 8 };
    let others = [
        ("8 flows", "causeway", two),
        ("8 flows", "causeway, 1 queue", one),
        ("UDP_SEGMENT", "causeway", Way::Datagrams { uso: true }),
        ("UDP_SEGMENT", "causeway without USO", Way::Datagrams { uso: false }),
    ];
    let mut all = Vec::new();
    all.extend(qemu("QEMU guests, split", false));
    all.extend(qemu("QEMU guests, packed", true));
    all.extend(guests("namespaces by causeway-guest, split", false));
    all.extend(guests("namespaces by causeway-guest, packed", true));
    all.extend(veth("namespaces by tap", "tap"));
    all.extend(veth("namespaces by packet-mmap", "packet-mmap"));
    all.extend(veth("namespaces by af-xdp", "af-xdp"));
    // What AF_XDP hands over is never larger: all that the kernel makes of such frames.
    let bound =
        ("namespaces by af-xdp", "kernel bridge, nothing large", Way::Bridge { large: false });
    all.push(bound);
    all.extend(others);
    all.extend(to_guest());
    all
}

/// From an uplink to a guest: what it gains by large frames that are made of what arrives, and by
/// flows that are spread over two workers.
fn to_guest() -> Vec<(&'static str, &'static str, Way)> {
    const WITHOUT: &str = ",offloads=csum+tso4+tso6+ecn+uso";
    let gro = ToGuest { kind: "af-xdp", uplink: "", guest: "", large: true, streams: 1 };
    let mmap = ToGuest { kind: "packet-mmap", large: false, ..gro };
    let spread = ToGuest { kind: "packet-mmap", uplink: ",spread=on", streams: 8, ..gro };
    let ways = [
        ("af-xdp to guest", OURS, gro),
        ("af-xdp to guest", "causeway without GRO", ToGuest { guest: WITHOUT, ..gro }),
        ("packet-mmap to guest, nothing large", OURS, mmap),
        (
            "packet-mmap to guest, nothing large",
            "causeway without GRO",
            ToGuest { guest: WITHOUT, ..mmap },
        ),
        ("8 flows, packet-mmap to guest, spread", OURS, spread),
        (
            "8 flows, packet-mmap to guest, spread",
            "causeway, not spread",
            ToGuest { uplink: "", ..spread },
        ),
    ];
    ways.map(|(case, subject, way)| (case, subject, Way::ToGuest(way))).to_vec()
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    versions.ovs = environment.ovs().and_then(|programs| programs.version()).ok();
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    let only = options.only.as_deref().unwrap_or_default();
    for number in 1..=options.series.runs {
        for (case, subject, way) in all().into_iter().filter(|(case, ..)| case.contains(only)) {
            let what = format!("{case}, {subject}, run {number}");
            turn::take(steps, &what, &mut done, || {
                let measured = bed::measure(&environment, way, options.seconds)?;
                let regime = Regime::of_run(measured.before_ns, measured.after_ns);
                Ok(Run {
                    case: case.to_owned(),
                    subject: subject.to_owned(),
                    regime,
                    before_ns: measured.before_ns.round(),
                    after_ns: measured.after_ns.round(),
                    gbit_per_s: measured.gbit_per_s,
                })
            });
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let sample = |run: &Run| Sample {
        case: run.case.clone(),
        regime: run.regime,
        subject: run.subject.clone(),
        value: run.gbit_per_s,
        cycles: None,
    };
    let summary = rows(&runs.iter().map(sample).collect::<Vec<_>>(), OURS);
    let count = runs.len();
    let report = Report::new("Gbit/s of payload", versions, runs, summary)?;
    let json = keep.publish(NAME, &report, ("", "Gbit/s"))?;
    steps.note(NAME, Ok(format!("{count} runs in {}", json.display())));
    Ok(())
}
