//! What the hostile guest does.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use testkit::request::{GET_FEATURES, SET_MEM_TABLE, SET_OWNER, SET_VRING_CALL};
use testkit::{GuestSettings, Remote, SharedMemory};
use virtq::Layout;

use super::viommu::Behind;

/// The pause after each: the good guest has the same CPU.
const PAUSE: Duration = Duration::from_micros(500);
/// How long a port that it broke may take to be there again.
const PATIENCE: Duration = Duration::from_secs(5);

/// What it does, again and again.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(in crate::bench) enum Act {
    /// 32 kicks with nothing to do.
    Kicks,
    /// 64 messages.
    Messages,
    /// Its memory is shared anew: all its rings stop and start.
    Memory,
    /// A connection, all set up, and gone again.
    Departures,
    /// Garbage in its ring, which breaks; then it comes anew.
    Garbage,
    /// Frames whose calls go to an eventfd that is full and blocks.
    FullCall,
    /// Connections beside its own.
    Connections,
    /// Its memory is cut short under the switch: once, since the port is in quarantine then.
    CutShort,
    /// 32 translations that nobody asked for, and each taken back.
    Mappings,
    /// 16 frames whose place is asked for, told, and taken back.
    Questions,
    /// 64 frames, each of a station that nobody has heard of: the forwarding table fills.
    Stations,
    /// 64 broadcasts.
    Storm,
    /// Frames of as many pieces as the ring has room for.
    Chains,
}

impl Act {
    pub(super) const ALL: &[Self] = &[
        Self::Kicks,
        Self::Messages,
        Self::Memory,
        Self::Departures,
        Self::Garbage,
        Self::FullCall,
        Self::Connections,
        Self::CutShort,
        Self::Mappings,
        Self::Questions,
        Self::Stations,
        Self::Storm,
        Self::Chains,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kicks => "kicks for nothing",
            Self::Messages => "a flood of messages",
            Self::Memory => "memory shared anew",
            Self::Departures => "it comes and goes",
            Self::Garbage => "garbage in its ring",
            Self::FullCall => "a call that is full and blocks",
            Self::Connections => "connections beside its own",
            Self::CutShort => "memory cut short, and more frames",
            Self::Mappings => "translations that nobody asked for",
            Self::Questions => "translations that are always missing",
            Self::Stations => "a flood of stations",
            Self::Storm => "a storm of broadcasts",
            Self::Chains => "chains as long as the ring",
        }
    }
}

/// What is asked of who is beside the good guest.
pub(super) struct Phase;

impl Phase {
    /// To begin; what it does does not count.
    pub(super) const LEADS: u8 = 0;
    /// To go on: the good guest is there.
    pub(super) const COUNTS: u8 = 1;
    pub(super) const ENDS: u8 = 2;
}

/// What it did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    count: u64,
    /// How long that took, and how much of it the guest was running.
    time: Duration,
    running: Duration,
}

impl Done {
    /// The share of its CPU that it took.
    pub(super) fn cpu_share(&self) -> f64 {
        self.running.as_secs_f64() / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    pub(super) fn per_second(&self) -> f64 {
        f64::from(u32::try_from(self.count).unwrap_or(u32::MAX)) / self.time.as_secs_f64()
    }

    /// Takes the same CPU as often and for as long as the acts did, and does nothing else.
    pub(super) fn mimic(&self, phase: &AtomicU8) -> Result<()> {
        tie()?;
        let each = |time: Duration| time.div_f64(f64::from(u32::try_from(self.count).unwrap_or(1)));
        let (run, cycle) = (each(self.running), each(self.time));
        while phase.load(Ordering::Relaxed) != Phase::ENDS {
            let begin = cpu_time();
            while cpu_time().saturating_sub(begin) < run {}
            std::thread::sleep(cycle.saturating_sub(run));
        }
        Ok(())
    }
}

/// The calling thread shares the good guest's CPU.
fn tie() -> Result<()> {
    let mut cpu = rustix::thread::CpuSet::new();
    cpu.set(1);
    Ok(rustix::thread::sched_setaffinity(None, &cpu)?)
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The hostile guest.
#[derive(Debug)]
pub(super) struct Hostile {
    socket: PathBuf,
    settings: GuestSettings,
}

impl Hostile {
    pub(super) fn new(socket: PathBuf, packed: bool) -> Self {
        let layout = if packed { Layout::Packed } else { Layout::Split };
        Self { socket, settings: GuestSettings::new(layout) }
    }

    fn join(&self) -> Result<Remote> {
        let mut remote = self.connect()?;
        remote.set_up()?;
        Ok(remote)
    }

    fn connect(&self) -> Result<Remote> {
        let start = Instant::now();
        loop {
            // The one before may still be on its way out.
            let mut remote = Remote::connect(&self.socket, self.settings)?;
            match remote.front_end.ask(GET_FEATURES, &[]) {
                Ok(_) => return Ok(remote),
                Err(error) => ensure!(start.elapsed() < PATIENCE, "it cannot come again: {error}"),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Begins, so that it can be done again and again.
    fn begin(&self, act: Act) -> Result<(Remote, Option<Behind>)> {
        if matches!(act, Act::Mappings | Act::Questions) {
            let mut remote = self.connect()?;
            let behind = Behind::set_up(&mut remote)?;
            return Ok((remote, Some(behind)));
        }
        let mut remote = self.join()?;
        if act == Act::FullCall {
            fill_calls(&mut remote)?;
        }
        Ok((remote, None))
    }

    /// Does it until it is to end; returns what it did since it counts.
    pub(super) fn repeat(&self, act: Act, phase: &AtomicU8) -> Result<Done> {
        tie()?;
        virtq::mem::guard::install()?;
        let (mut remote, behind) = self.begin(act)?;
        let (mut count, mut counts) = (0u64, false);
        let (mut start, mut before) = (Instant::now(), cpu_time());
        loop {
            match phase.load(Ordering::Relaxed) {
                Phase::ENDS => break,
                Phase::COUNTS if !counts => {
                    (counts, count, start, before) = (true, 0, Instant::now(), cpu_time());
                }
                _ => {}
            }
            match &behind {
                Some(behind) if act == Act::Questions => behind.ask_again(&mut remote, 16)?,
                Some(behind) => behind.map_and_unmap(&mut remote, 32)?,
                None => self.once(act, (counts, count), &mut remote)?,
            }
            count = count.saturating_add(1);
            std::thread::sleep(PAUSE);
        }
        let running = cpu_time().saturating_sub(before);
        Ok(Done { count: count.max(1), time: start.elapsed(), running })
    }

    /// Leaves and comes back.
    fn again(&self, remote: &mut Remote) -> Result<()> {
        remote.front_end.stream().shutdown(std::net::Shutdown::Both)?;
        *remote = self.join()?;
        Ok(())
    }

    fn once(&self, act: Act, at: (bool, u64), remote: &mut Remote) -> Result<()> {
        match act {
            Act::Kicks => (0..32).for_each(|_| remote.guest.kick()),
            Act::Messages => {
                for _ in 0..64 {
                    remote.front_end.send(SET_OWNER, &[], &[])?;
                }
            }
            Act::Memory => {
                let table = SharedMemory::table(0, remote.memory.bytes());
                remote.front_end.send(SET_MEM_TABLE, &table, &[remote.memory.as_fd()])?;
            }
            Act::Departures => self.again(remote)?,
            Act::Garbage => {
                remote.guest.scribble(0, &[0xa5; 4096])?;
                remote.guest.kick();
                self.again(remote)?;
            }
            Act::FullCall => send(remote, &[0xff; 60], 1)?,
            Act::Connections => drop(std::os::unix::net::UnixStream::connect(&self.socket)?),
            Act::CutShort => {
                if at == (true, 100) {
                    rustix::fs::ftruncate(remote.memory.as_fd(), 0)?;
                }
                let _ = remote.guest.send(&[0xff; 60], 1);
                let _ = remote.guest.flush();
                remote.guest.kick();
            }
            Act::Stations => {
                for number in (0..64).map(|frame| at.1.wrapping_mul(64).wrapping_add(frame)) {
                    send(remote, &of_station(number), 1)?;
                }
            }
            Act::Storm => {
                for _ in 0..64 {
                    send(remote, &BROADCAST, 1)?;
                }
            }
            Act::Chains => send(remote, &[0xff; 1514], remote.guest.settings().queue_size)?,
            // See `repeat`.
            Act::Mappings | Act::Questions => {}
        }
        Ok(())
    }
}

/// A frame to everybody, from one station.
const BROADCAST: [u8; 60] = {
    let mut frame = [0xff; 60];
    frame[6] = 0x02;
    frame
};

/// A frame to a station that nobody knows, from a station of its own number.
fn of_station(number: u64) -> [u8; 60] {
    let mut frame = BROADCAST;
    frame[0] = 0x02;
    frame[7..12].copy_from_slice(&number.to_be_bytes()[3..]);
    frame
}

/// Sends a frame; where the ring has no room, the switch is asked to make some.
fn send(remote: &mut Remote, frame: &[u8], pieces: u16) -> Result<()> {
    let _ = remote.guest.send(frame, pieces)?;
    let _ = remote.guest.flush();
    remote.guest.kick();
    Ok(())
}

/// Puts eventfds that are full, and block who writes to them, in the place of both calls.
fn fill_calls(remote: &mut Remote) -> Result<()> {
    for ring in [0u64, 1] {
        let fd: OwnedFd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let _ = rustix::io::write(&fd, &u64::MAX.wrapping_sub(1).to_ne_bytes())?;
        remote.front_end.send(SET_VRING_CALL, &ring.to_le_bytes(), &[fd.as_fd()])?;
    }
    Ok(())
}
