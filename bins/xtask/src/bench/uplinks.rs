//! Frames per second between a guest and an uplink, each way, the switch and its peers in turn.
//!
//! ```text
//!  CPU 1                      CPU 0                           CPU 1
//!  testpmd, virtio-user ────► back end ──► uplink ──► kernel counts          "to tap"
//!  causeway-guest --receive ◄ back end ◄── uplink ◄── the same causeway-guest  "from tap"
//! ```
//!
//! *To* an uplink the guest sends as fast as it can, and the interface behind the uplink says what
//! arrives. *From* an uplink one causeway-guest is both generator and guest (`--receive --inject`):
//! bursts go into the far side of the uplink as fast as the kernel takes them, in an open loop, and
//! what arrives at the guest is counted; what does not was dropped on the way, for want of a back
//! end that is fast enough. Its work is the same for every back end, and may be what bounds it.
//!
//! The back end is the switch, testpmd, or, for taps, cloud-hypervisor's `vhost_user_net`, which
//! the user has to build: `--vhost-user-net PATH`.
//!
//! With each rate stands where the time of the back end's polling thread went: in the kernel (its
//! system calls, and what the network stack does in them), and in its own code, waiting included.

mod guest;
mod injected;
mod wire;

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use conformance::{Environment, Forwarder, Scratch, Switch, VhostUserNet, vhost_user_net};

use super::back_end::{BackEnd, Subject};
use super::machine::Versions;
use super::regime::{Regime, round_trip_ns};
use super::report::{Keep, Report, Series, table};
use super::round::Run;
use super::summary::{Sample, median, rows};
use super::watch::{Disturbance, Spent, Watch};
use super::{chart, prepare, turn};
use crate::steps::Steps;
use guest::Guest;
use injected::Injected;
use wire::Wire;

const NAME: &str = "uplinks";
const WARM_UP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 3;
/// Above this share of a run in which a program waited for its CPU, the run was disturbed: the
/// kernel's own threads take some 4 % while frames pass its network stack.
const WAITED_MOST: f64 = 0.08;
/// The guest is still there when it has been watched.
const MARGIN: Duration = Duration::from_millis(300);
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
        default_value = "tap,af-xdp,af-xdp-polled,packet-mmap"
    )]
    kinds: Vec<UplinkKind>,
    /// Which way frames go
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "to,from")]
    ways: Vec<Way>,
    /// Bytes of a frame, without its check sequence
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "64,1500",
          value_parser = clap::value_parser!(u16).range(60..=1514))]
    sizes: Vec<u16>,
    /// Measure cloud-hypervisor's `vhost_user_net` too, between a guest and a tap
    ///
    /// PATH is the program. Nobody packages it: benches/results/README.md says how to build it.
    #[arg(long, value_name = "PATH")]
    vhost_user_net: Option<PathBuf>,
    #[command(flatten)]
    series: Series,
}

/// A kind of uplink, as its SPEC says it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum UplinkKind {
    Tap,
    AfXdp,
    /// Ours with `busy-poll=on`; DPDK's driver polls by itself
    AfXdpPolled,
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
            Self::AfXdpPolled => "af-xdp,busy-poll=on",
            Self::PacketMmap => "packet-mmap",
        }
    }

    /// The SPEC of the uplink.
    fn spec(self, wire: &Wire) -> String {
        let near = wire.near();
        match self {
            Self::Tap => format!("tap:name=u,ifname={near}"),
            Self::AfXdp => format!("af-xdp:name=u,ifname={near}"),
            Self::AfXdpPolled => format!("af-xdp:name=u,ifname={near},busy-poll=on"),
            Self::PacketMmap => format!("packet-mmap:name=u,ifname={near}"),
        }
    }

    /// DPDK's driver of this kind, as `--vdev` takes it.
    fn device(self, wire: &Wire) -> String {
        let near = wire.near();
        match self {
            Self::Tap => format!("net_tap0,iface={near}"),
            Self::AfXdp | Self::AfXdpPolled => format!("net_af_xdp0,iface={near}"),
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

    /// DPDK's `net_tap` has a signal sent to itself for each frame that arrives, which its threads
    /// on both CPUs take: that is its own way, and no disturbance.
    fn waits_for_itself(self, subject: Subject) -> bool {
        (subject, self.kind, self.way) == (Subject::Testpmd, UplinkKind::Tap, Way::From)
    }

    /// Who takes part: `vhost_user_net` does if there is the program, and knows taps only.
    fn subjects(self, vhost_user_net: Option<&Path>) -> Vec<Subject> {
        let mut subjects = vec![Subject::Causeway, Subject::Testpmd];
        let knows = self.kind == UplinkKind::Tap && vhost_user_net.is_some();
        subjects.extend(knows.then_some(Subject::VhostUserNet));
        subjects
    }

    fn name(self) -> String {
        let way = match self.way {
            Way::To => "to",
            Way::From => "from",
        };
        format!("{} B {way} {}", self.size, self.kind.name())
    }
}

/// Where programs come from.
struct Means {
    environment: Environment,
    vhost_user_net: Option<PathBuf>,
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    prepare(steps, true)?;
    let means =
        Means { environment: Environment::open()?, vhost_user_net: options.vhost_user_net.clone() };
    let mut versions = Versions::this()?;
    if let Some(program) = &means.vhost_user_net {
        versions.vhost_user_net = Some(vhost_user_net::version(program)?);
    }
    let mut done: Vec<Run> = options.series.keep.earlier(NAME, &mut versions)?;
    for number in 1..=options.series.runs {
        for case in Case::all(options) {
            for subject in case.subjects(means.vhost_user_net.as_deref()) {
                let what =
                    format!("{}, {}, run {number}", case.name(), subject_name(subject, case));
                turn::take(steps, &what, &mut done, || {
                    measure(&means, subject, case, &mut versions)
                });
            }
        }
    }
    ensure!(!done.is_empty(), "no run succeeded");
    publish(steps, &options.series.keep, done, versions)
}

fn subject_name(subject: Subject, case: Case) -> &'static str {
    match (subject, case.kind) {
        (Subject::Testpmd, UplinkKind::Tap) => "testpmd net_tap",
        (Subject::Testpmd, UplinkKind::AfXdp | UplinkKind::AfXdpPolled) => "testpmd net_af_xdp",
        (Subject::Testpmd, UplinkKind::PacketMmap) => "testpmd net_af_packet",
        _ => subject.name(),
    }
}

fn measure(means: &Means, subject: Subject, case: Case, versions: &mut Versions) -> Result<Run> {
    let mut scratch = Scratch::new(NAME)?;
    match measure_in(means, subject, case, &scratch) {
        Ok((run, dpdk)) => {
            versions.dpdk = versions.dpdk.take().or(dpdk);
            Ok(run)
        }
        Err(error) => Err(error.context(format!("logs in {}", scratch.keep().display()))),
    }
}

fn measure_in(
    means: &Means,
    subject: Subject,
    case: Case,
    scratch: &Scratch,
) -> Result<(Run, Option<String>)> {
    let wire = Wire::new(case.kind == UplinkKind::Tap)?;
    let socket = scratch.path("v0");
    let mut back_end = start(means, (subject, case.kind), (&wire, &socket), scratch)?;
    wire.bring_up()?;
    let (measured, dpdk) = match case.way {
        Way::To => to(means, &mut back_end, (&wire, &socket, case.size), scratch)?,
        Way::From => (from(&mut back_end, (&wire, &socket, case.size), scratch)?, None),
    };
    let account = back_end.account(None, None)?;
    back_end.stop()?;
    let Measured { before_ns, after_ns, disturbance, spent, frames, mpps, looks } = measured;
    let waited = if case.waits_for_itself(subject) { 0.0 } else { disturbance.waited };
    let disturbed = waited > WAITED_MOST || disturbance.stolen > WAITED_MOST;
    let regime = Regime::of_run(before_ns, after_ns);
    let run = Run {
        case: case.name(),
        subject: subject_name(subject, case).to_owned(),
        regime: if disturbed { Regime::Disturbed } else { regime },
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited: disturbance.waited,
        stolen: disturbance.stolen,
        mpps: Some(mpps).filter(|mpps| *mpps > 0.0).context("no frames arrived")?,
        looks,
        cycles_per_frame: None,
        guest_cycles_per_frame: None,
        busy_ratio: None,
        dropped: account.dropped,
        guest_dropped: 0,
        spent: spent.per_frame(frames),
    };
    Ok((run, dpdk))
}

/// What a run has shown.
struct Measured {
    before_ns: f64,
    after_ns: f64,
    disturbance: Disturbance,
    /// The time of the back end's polling thread, and the frames that arrived meanwhile.
    spent: Spent,
    frames: f64,
    mpps: f64,
    looks: Vec<f64>,
}

fn to(
    means: &Means,
    back_end: &mut BackEnd,
    (wire, socket, size): (&Wire, &Path, u16),
    scratch: &Scratch,
) -> Result<(Measured, Option<String>)> {
    let mut guest = Guest::start(&means.environment, socket, scratch.folder())?;
    wait_up(back_end)?;
    let before_ns = round_trip_ns()?;
    guest.send(size)?;
    sleep(WARM_UP);
    back_end.begin()?;
    let watch = Watch::start(&[guest.id(), back_end.id()])?;
    let spent = Spent::of(back_end.id())?;
    let mut looks = Vec::new();
    let first = wire.arrived()?;
    let mut before = first;
    for _ in 0..LOOKS {
        let start = std::time::Instant::now();
        sleep(LOOK);
        let now = wire.arrived()?;
        looks.push(millions(now.saturating_sub(before)) / start.elapsed().as_secs_f64());
        before = now;
    }
    let spent = Spent::of(back_end.id())?.since(spent);
    let disturbance = watch.finish();
    guest.stop_forwarding()?;
    let after_ns = round_trip_ns()?;
    let dpdk = guest.version()?;
    guest.quit()?;
    let mpps = median(&looks).unwrap_or_default();
    let frames = millions(before.saturating_sub(first)) * 1e6;
    Ok((Measured { before_ns, after_ns, disturbance, spent, frames, mpps, looks }, dpdk))
}

fn from(
    back_end: &mut BackEnd,
    (wire, socket, size): (&Wire, &Path, u16),
    scratch: &Scratch,
) -> Result<Measured> {
    let time = LOOK.saturating_mul(LOOKS);
    let before_ns = round_trip_ns()?;
    let all = WARM_UP.saturating_add(time);
    let guest = Injected::start(socket, wire.far(), (size, all), scratch)?;
    sleep(WARM_UP);
    back_end.begin()?;
    // If the guest has ended, `finish` knows why.
    let watch = Watch::start(&[guest.id(), back_end.id()]).or_else(|_| Watch::start(&[]))?;
    let spent = Spent::of(back_end.id())?;
    let start = std::time::Instant::now();
    sleep(time.saturating_sub(MARGIN));
    let spent = Spent::of(back_end.id())?.since(spent);
    let seconds = start.elapsed().as_secs_f64();
    let disturbance = watch.finish();
    let rate = guest.finish()?;
    let after_ns = round_trip_ns()?;
    let (mpps, looks) = (rate / 1e6, vec![rate / 1e6]);
    let frames = rate * seconds;
    Ok(Measured { before_ns, after_ns, disturbance, spent, frames, mpps, looks })
}

fn wait_up(back_end: &BackEnd) -> Result<()> {
    if let BackEnd::Switch { switch, .. } = back_end {
        switch.wait_ports_up(&["g0", "u"])?;
    }
    sleep(SETTLE);
    Ok(())
}

fn start(
    means: &Means,
    (subject, kind): (Subject, UplinkKind),
    (wire, socket): (&Wire, &Path),
    scratch: &Scratch,
) -> Result<BackEnd> {
    let folder = scratch.folder();
    match subject {
        Subject::Causeway | Subject::CausewayBusy | Subject::CausewayInterrupt => {
            let guest = format!("vhost-user:name=g0,socket={}", socket.display());
            let uplink = kind.spec(wire);
            let arguments = ["--workers", "0", "--port", &guest, "--port", &uplink];
            Switch::start_with(folder, &arguments).map(BackEnd::of_switch)
        }
        Subject::Testpmd => {
            let vhost = format!("net_vhost0,iface={},queues=1", socket.display());
            let devices = [vhost, kind.device(wire)];
            Forwarder::start(&means.environment, devices, folder).map(BackEnd::Testpmd)
        }
        Subject::VhostUserNet => {
            let program = means.vhost_user_net.as_deref().context("no --vhost-user-net")?;
            VhostUserNet::start(program, socket, wire.near(), folder).map(BackEnd::VhostUserNet)
        }
        Subject::Ovs => bail!("{} is not measured with uplinks", subject.name()),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of seconds are far below 2^52")]
fn millions(frames: u64) -> f64 {
    frames as f64 / 1e6
}

/// Where the time went, a line for each case and back end.
pub(super) fn spent(runs: &[Run]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for run in runs {
        let row = (run.case.as_str(), run.subject.as_str());
        if seen.contains(&row) || !Regime::STEADY.contains(&run.regime) {
            continue;
        }
        seen.push(row);
        let of = runs.iter().filter(|run| (run.case.as_str(), run.subject.as_str()) == row);
        let of: Vec<_> = of.filter(|run| Regime::STEADY.contains(&run.regime)).collect();
        let middle = |pick: fn(&Run) -> Option<f64>| {
            median(&of.iter().filter_map(|run| pick(run)).collect::<Vec<_>>())
        };
        let kernel = middle(|run| run.spent.map(|spent| spent.kernel_ns));
        let own = middle(|run| run.spent.map(|spent| spent.own_ns));
        if let (Some(kernel), Some(own)) = (kernel, own) {
            let share = 100.0 * kernel / (kernel + own).max(f64::MIN_POSITIVE);
            lines.push(format!(
                "| {} | {} | {kernel:.0} ns | {own:.0} ns | {share:.0} % |",
                row.0, row.1
            ));
        }
    }
    lines
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
    for line in spent(&report.runs) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vhost_user_net_takes_part_if_it_is_there_and_can() {
        let take_part = |kind, program| {
            let case = Case { kind, way: Way::To, size: 64 };
            case.subjects(program).contains(&Subject::VhostUserNet)
        };
        let program = Some(Path::new("/opt/vhost_user_net"));
        assert!(take_part(UplinkKind::Tap, program));
        assert!(!take_part(UplinkKind::Tap, None));
        assert!(!take_part(UplinkKind::PacketMmap, program));
    }
}
