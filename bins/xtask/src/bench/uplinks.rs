//! Frames per second between a guest and an uplink, each way, the switch and its peers in turn.
//!
//! ```text
//!  CPU 1                    CPU 0                          CPU 1
//!  testpmd, virtio-user ──► back end ──► uplink ──► kernel counts      "to tap"
//!  testpmd, virtio-user ◄── back end ◄── uplink ◄── the same testpmd   "from tap"
//!                    └───── a frame that came goes out again ─────┘    (net_af_packet)
//! ```
//!
//! *To* an uplink the guest sends as fast as it can, and the interface behind the uplink says what
//! arrives. *From* an uplink one testpmd is both generator and guest: frames that its guest port
//! receives go out through `net_af_packet` on the far side of the uplink, so that about a ring of
//! frames goes round in that one direction and nothing has to be thrown away. Its work on the far
//! side is the same for every back end, and may be what bounds the rate.

mod guest;
mod wire;

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use conformance::{Environment, Forwarder, Scratch, Switch};

use super::back_end::{BackEnd, Subject};
use super::machine::Versions;
use super::regime::{Regime, round_trip_ns};
use super::report::{Keep, Report, table};
use super::round::Run;
use super::summary::{Sample, median, rows};
use super::watch::Watch;
use super::{chart, prepare, turn};
use crate::steps::Steps;
use guest::Guest;
use wire::Wire;

const NAME: &str = "uplinks";
const WARM_UP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 3;
/// What a peer takes many times less for, after it says that it is ready.
const SETTLE: Duration = Duration::from_millis(500);

/// Options of `cargo xtask bench uplinks`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Kinds of uplink
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "tap,af-xdp,packet-mmap"
    )]
    kinds: Vec<UplinkKind>,
    /// Which way frames go
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "to,from")]
    ways: Vec<Way>,
    /// Bytes of a frame, without its check sequence
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "64,1500",
          value_parser = clap::value_parser!(u16).range(60..=1514))]
    sizes: Vec<u16>,
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 7,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    #[command(flatten)]
    keep: Keep,
}

/// A kind of uplink, as its SPEC says it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum UplinkKind {
    Tap,
    AfXdp,
    PacketMmap,
}

/// Which way frames go, as the uplink sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Way {
    /// From the guest to the uplink
    To,
    /// From the uplink to the guest
    From,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: UplinkKind,
    way: Way,
    size: u16,
}

impl UplinkKind {
    fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::AfXdp => "af-xdp",
            Self::PacketMmap => "packet-mmap",
        }
    }

    /// DPDK's driver of this kind, as `--vdev` takes it.
    fn device(self, wire: &Wire) -> String {
        let near = wire.near();
        match self {
            Self::Tap => format!("net_tap0,iface={near}"),
            Self::AfXdp => format!("net_af_xdp0,iface={near}"),
            Self::PacketMmap => format!("net_af_packet0,iface={near},{}", guest::AF_PACKET),
        }
    }
}

impl Case {
    fn all(options: &Options) -> Vec<Self> {
        let mut cases = Vec::new();
        for kind in options.kinds.iter().copied() {
            for way in options.ways.iter().copied() {
                cases.extend(options.sizes.iter().map(|size| Self { kind, way, size: *size }));
            }
        }
        cases
    }

    fn name(self) -> String {
        let way = match self.way {
            Way::To => "to",
            Way::From => "from",
        };
        format!("{} B {way} {}", self.size, self.kind.name())
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let environment = Environment::open()?;
    let mut versions = Versions::this()?;
    let mut done: Vec<Run> = options.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.runs {
        for case in Case::all(options) {
            for subject in [Subject::Causeway, Subject::Testpmd] {
                let what =
                    format!("{}, {}, run {number}", case.name(), subject_name(subject, case));
                turn::take(steps, &what, &mut done, || {
                    measure(&environment, subject, case, &mut versions)
                });
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.keep, done, versions)
}

fn subject_name(subject: Subject, case: Case) -> &'static str {
    match (subject, case.kind) {
        (Subject::Testpmd, UplinkKind::Tap) => "testpmd net_tap",
        (Subject::Testpmd, UplinkKind::AfXdp) => "testpmd net_af_xdp",
        (Subject::Testpmd, UplinkKind::PacketMmap) => "testpmd net_af_packet",
        _ => subject.name(),
    }
}

fn measure(
    environment: &Environment,
    subject: Subject,
    case: Case,
    versions: &mut Versions,
) -> Result<Run> {
    let mut scratch = Scratch::new(NAME)?;
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
    let wire = Wire::new(case.kind == UplinkKind::Tap)?;
    let socket = scratch.path("v0");
    let mut back_end = start(environment, (subject, case.kind), (&wire, &socket), scratch)?;
    wire.bring_up()?;
    let far = (case.way == Way::From).then(|| wire.far().to_owned());
    let mut guest = Guest::start(environment, &socket, far.as_deref(), scratch.folder())?;
    if let BackEnd::Switch { switch, .. } = &back_end {
        switch.wait_ports_up(&["g0", "u"])?;
    }
    sleep(SETTLE);
    let before_ns = round_trip_ns()?;
    match case.way {
        Way::To => guest.send(case.size)?,
        Way::From => guest.circulate(case.size)?,
    }
    sleep(WARM_UP);
    back_end.begin()?;
    let watch = Watch::start(&[guest.id(), back_end.id()])?;
    let mut looks = Vec::new();
    let mut before = guest.arrived(&wire)?;
    for _ in 0..LOOKS {
        let start = std::time::Instant::now();
        sleep(LOOK);
        let now = guest.arrived(&wire)?;
        looks.push(millions(now.saturating_sub(before)) / start.elapsed().as_secs_f64());
        before = now;
    }
    let disturbance = watch.finish();
    let said = guest.stop_forwarding()?;
    let after_ns = round_trip_ns()?;
    let account = back_end.account(None, said.cycles.map(|cycles| cycles.mhz))?;
    let dpdk = guest.version()?;
    guest.quit()?;
    back_end.stop()?;
    let regime = Regime::of_run(before_ns, after_ns).unless_disturbed(disturbance.share());
    let run = Run {
        case: case.name(),
        subject: subject_name(subject, case).to_owned(),
        regime,
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited: disturbance.waited,
        stolen: disturbance.stolen,
        mpps: median(&looks).filter(|mpps| *mpps > 0.0).context("no frames arrived")?,
        looks,
        cycles_per_frame: account.cycles_per_frame,
        guest_cycles_per_frame: None,
        busy_ratio: account.busy_ratio,
        dropped: account.dropped,
        guest_dropped: said.dropped,
    };
    Ok((run, dpdk))
}

fn start(
    environment: &Environment,
    (subject, kind): (Subject, UplinkKind),
    (wire, socket): (&Wire, &Path),
    scratch: &Scratch,
) -> Result<BackEnd> {
    let folder = scratch.folder();
    if subject == Subject::Testpmd {
        let vhost = format!("net_vhost0,iface={},queues=1", socket.display());
        return Forwarder::start(environment, [vhost, kind.device(wire)], folder)
            .map(BackEnd::Testpmd);
    }
    let guest = format!("vhost-user:name=g0,socket={}", socket.display());
    let uplink = format!("{}:name=u,ifname={}", kind.name(), wire.near());
    let arguments = ["--workers", "0", "--port", &guest, "--port", &uplink];
    Switch::start_with(folder, &arguments).map(BackEnd::of_switch)
}

#[expect(clippy::cast_precision_loss, reason = "counts of seconds are far below 2^52")]
fn millions(frames: u64) -> f64 {
    frames as f64 / 1e6
}

fn publish(steps: &mut Steps, keep: &Keep, runs: Vec<Run>, versions: Versions) -> Result<()> {
    let samples: Vec<Sample> = runs.iter().map(Run::sample).collect();
    let left_out = runs.iter().filter(|run| !Regime::STEADY.contains(&run.regime)).count();
    let summary = rows(&samples, Subject::Causeway.name());
    let count = runs.len();
    let report = Report::new("million frames per second, one way", versions, runs, summary)?;
    println!();
    for line in report.origin().into_iter().chain(table("Mpps", &report.summary, 3)) {
        println!("{line}");
    }
    println!(
        "{left_out} of {count} runs left out: meanwhile the regime changed, or other programs took \
         a CPU"
    );
    ensure!(!report.summary.is_empty(), "no run can be compared, nothing is written");
    let json = keep.write_json(NAME, &report)?;
    let title = "Frames per second between a guest and an uplink, one CPU for the switch";
    let drawn = chart::draw(title, "Mpps", &report.summary, &report.origin());
    let svg = keep.write("uplinks.svg", &drawn)?;
    steps.note(NAME, Ok(format!("{count} runs in {} and {}", json.display(), svg.display())));
    Ok(())
}
