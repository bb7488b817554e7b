//! One run: the switch, the good guest, and who is beside it.

use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};
use serde::Deserialize;

use super::acts::{Act, Hostile, Phase};
use super::{Options, Regime, Run};
use crate::bench::machine::guest_program;

/// How long the guest may take to end.
const SLACK: Duration = Duration::from_secs(30);
/// The good guest's rings, and its frames under way: its receiveq never overflows, and the worker
/// has something to do while the guest has no CPU for a moment.
const RING: u16 = 1024;
const WINDOW: &str = "896";
/// Bytes of a receive buffer beyond the frame: buffers lie close to each other, so that all of
/// them fit into a cache that is nobody else's. With 8 MiB of them the same run made 2 or 8 Mpps,
/// as other machines on this host left the shared one.
const BEYOND: u16 = 64;
/// From the good guest's start to the first part of a run, and what all parts may take longer.
const SETTLE: Duration = Duration::from_millis(300);
const SPARE: Duration = Duration::from_secs(2);
/// For how long the hostile guest did the same before the good one comes: what it may do at once
/// is over then.
const LEAD: Duration = Duration::from_secs(3);

/// What `causeway-guest --json` says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    lost: u64,
}

pub(super) fn start(scratch: &Scratch) -> Result<Switch> {
    let spec = |name: &str, vlan: u8| {
        let socket = scratch.path(&format!("{name}.sock"));
        format!("vhost-user:name={name},vlan={vlan},socket={}", socket.display())
    };
    // What it floods is not to reach the good one: that is what VLANs are for.
    let ports = [spec("good0", 1), spec("good1", 1), spec("evil", 2)];
    let mut arguments = vec!["--workers", "0", "--log", "error"];
    arguments.extend(ports.iter().flat_map(|port| ["--port", port]));
    Switch::start_with(scratch.folder(), &arguments)
}

/// The good guest runs all the time: what differs from one process to the next, such as where its
/// memory is, differs in none of the three.
pub(super) fn run(
    switch: &Switch,
    scratch: &Scratch,
    (act, packed): (Act, bool),
    options: &Options,
) -> Result<Run> {
    let hostile = Hostile::new(scratch.path("evil.sock"), packed);
    let mut good = good(scratch, options)?;
    switch.wait_ports_up(&["good0", "good1"])?;
    std::thread::sleep(SETTLE);
    let part = || rate(switch, options);
    let (alone_pps, _) = part()?;
    let repeat = |phase: &AtomicU8| hostile.repeat(act, phase).context(act.name());
    let ((beside_pps, spent), done) = with((LEAD, repeat), part)?;
    let ((twin_pps, _), ()) = with((Duration::ZERO, |phase| done.mimic(phase)), part)?;
    if switch.ctl(&["ports"])?.contains("quarantined") {
        let _ = switch.ctl(&["port", "reset", "evil"])?;
    }
    let lost = lost(&mut good)?;
    Ok(Run {
        act,
        packed,
        size: options.size,
        regime: Regime::Changed,
        before_ns: 0.0,
        after_ns: 0.0,
        alone_pps,
        beside_pps,
        twin_pps,
        taken: done.cpu_share(),
        control: spent.control,
        waited: spent.waited,
        acts_per_s: done.per_second(),
        lost,
    })
}

/// Frames per second of the good guest for some time from now on, and what the switch spends.
fn rate(switch: &Switch, options: &Options) -> Result<(f64, Spent)> {
    let frames = || Ok::<_, anyhow::Error>(switch.stats()?.port("good0")?.rx_frames());
    let (before, spent, start) = (frames()?, Spent::of(switch.id())?, Instant::now());
    std::thread::sleep(Duration::from_secs(options.seconds.into()));
    let spent = Spent::of(switch.id())?.since(spent, start.elapsed());
    let came = u32::try_from(frames()?.saturating_sub(before)).unwrap_or(u32::MAX);
    Ok((f64::from(came) / start.elapsed().as_secs_f64(), spent))
}

/// What comes of `measured`, and of what `other` did in a thread from some time before it.
fn with<A, B: Send>(
    (lead, other): (Duration, impl FnOnce(&AtomicU8) -> Result<B> + Send),
    measured: impl FnOnce() -> Result<A>,
) -> Result<(A, B)> {
    let phase = AtomicU8::new(Phase::LEADS);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| other(&phase));
        std::thread::sleep(lead);
        phase.store(Phase::COUNTS, Ordering::Relaxed);
        let found = measured();
        phase.store(Phase::ENDS, Ordering::Relaxed);
        let done = thread.join().map_err(|_| anyhow::anyhow!("the other guest panicked"))?;
        Ok((found?, done?))
    })
}

/// What the switch has spent, as shares of the time.
#[derive(Clone, Copy)]
struct Spent {
    /// CPU time of all that is no worker.
    control: f64,
    /// Time for which workers waited for a CPU.
    waited: f64,
}

impl Spent {
    /// So far, in seconds.
    fn of(process: u32) -> Result<Self> {
        let mut sum = Self { control: 0.0, waited: 0.0 };
        for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let task = task?.path();
            // A thread may end meanwhile.
            let Ok(name) = std::fs::read_to_string(task.join("comm")) else { continue };
            let times = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            let mut seconds = times
                .split_whitespace()
                .map(|word| Duration::from_nanos(word.parse().unwrap_or(0)).as_secs_f64());
            let (ran, waited) = (seconds.next(), seconds.next());
            if name.starts_with("worker-") {
                sum.waited += waited.unwrap_or(0.0);
            } else {
                sum.control += ran.unwrap_or(0.0);
            }
        }
        Ok(sum)
    }

    fn since(self, before: Self, time: Duration) -> Self {
        let time = time.as_secs_f64();
        Self {
            control: (self.control - before.control).max(0.0) / time,
            waited: (self.waited - before.waited).max(0.0) / time,
        }
    }
}

/// The good guest, for as long as a run takes.
fn good(scratch: &Scratch, options: &Options) -> Result<Process> {
    let seconds = u64::from(options.seconds).saturating_mul(3).saturating_add(LEAD.as_secs());
    let seconds = seconds.saturating_add(SPARE.as_secs()).to_string();
    let mut command: Command = tied_command("taskset");
    let _ = command
        .args(["--cpu-list", "1"])
        .arg(guest_program()?)
        .args(["--generate", "--busy", "--json", "--mrg-rxbuf", "off", "--window", WINDOW])
        .args(["--queue-size", &RING.to_string(), "--size", &options.size.to_string()])
        .args(["--buffer-size", &options.size.saturating_add(BEYOND).to_string()])
        .args(["--seconds", &seconds]);
    for name in ["good0.sock", "good1.sock"] {
        let _ = command.arg("--socket").arg(scratch.path(name));
    }
    Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))
}

/// Waits for the good guest's end. Returns how many frames it missed.
fn lost(guest: &mut Process) -> Result<u64> {
    let status = guest.finish(SLACK)?;
    ensure!(status.success(), "causeway-guest ended with {status}\n{}", guest.tail());
    let log = guest.output_from(0)?;
    let line = log.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("causeway-guest says: {log}"))?;
    let said: Said =
        serde_json::from_str(line).with_context(|| format!("causeway-guest says: {line}"))?;
    Ok(said.lost)
}
