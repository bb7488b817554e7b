//! When there is nothing to do: spin for a while, then sleep until a back end calls.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::port::GuestPort;

/// How long we spin after the last work.
const SPIN: Duration = Duration::from_micros(50);
/// The longest sleep: signals and back ends that went away are noticed by then.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// A deadline that is nearer than this is waited for awake.
const SLEEP_MIN: Duration = Duration::from_micros(100);
/// Turns with work between two looks at the sessions.
const CHECK_TURNS: u32 = 4096;

/// The waiting side of an event loop.
pub(crate) struct Idle {
    busy: bool,
    /// Calls of all rings, sessions, the timer.
    epoll: Epoll,
    timer: OwnedFd,
    last_work: Instant,
    turns: u32,
    calls: u64,
    /// How long we spin after the last work.
    pub(crate) spin: Duration,
    /// Wake up for every frame that was read, not only when there is room again.
    pub(crate) draining: bool,
}

impl Idle {
    /// Watches `ports`, and `others`: who reads those until they are empty is woken by what comes
    /// next, and who cannot, for want of room, is not woken by what waits. With `busy`, it never
    /// sleeps.
    pub(crate) fn new<'a>(
        busy: bool,
        ports: &[GuestPort],
        others: impl IntoIterator<Item = BorrowedFd<'a>>,
    ) -> anyhow::Result<Self> {
        let epoll = Epoll::new().context("cannot create an epoll set")?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)
            .context("cannot create a timer")?;
        let watch = |fd: RawFd, events| {
            let event = EpollEvent::new(events, 0);
            epoll.ctl(ControlOperation::Add, fd, event).context("cannot watch a descriptor")
        };
        watch(timer.as_raw_fd(), EventSet::IN)?;
        for fd in others {
            watch(fd.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        for port in ports {
            watch(port.session_fd().as_raw_fd(), EventSet::READ_HANG_UP)?;
            for pair in &port.pairs {
                watch(pair.rx.call().as_raw_fd(), EventSet::IN)?;
                watch(pair.tx.call().as_raw_fd(), EventSet::IN)?;
            }
        }
        Ok(Self {
            busy,
            epoll,
            timer,
            last_work: Instant::now(),
            turns: 0,
            calls: 0,
            spin: SPIN,
            draining: false,
        })
    }

    /// Call this once per turn: `worked` says whether the turn found anything to do. It returns
    /// when there may be something again, at `until` at the latest.
    pub(crate) fn turn(
        &mut self,
        worked: bool,
        ports: &mut [GuestPort],
        until: Option<Instant>,
    ) -> anyhow::Result<()> {
        self.turns = self.turns.wrapping_add(1);
        if self.turns >= CHECK_TURNS {
            self.turns = 0;
            check_all(ports)?;
        }
        let now = Instant::now();
        if worked {
            self.last_work = now;
            return Ok(());
        }
        let left = until.map_or(SLEEP_MAX, |u| u.saturating_duration_since(now)).min(SLEEP_MAX);
        if self.busy || left < SLEEP_MIN || now.duration_since(self.last_work) < self.spin {
            std::hint::spin_loop();
            return Ok(());
        }
        let result = if arm_all(ports, self.draining) { Ok(()) } else { self.sleep(left) };
        self.calls = self.calls.wrapping_add(disarm_all(ports));
        check_all(ports)?;
        result
    }

    fn sleep(&self, left: Duration) -> anyhow::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        let once = Itimerspec { it_interval: zero, it_value: value };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)
            .context("cannot set a timer")?;
        let mut events = [EpollEvent::default(); 8];
        match self.epoll.wait(-1, &mut events) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error).context("cannot wait"),
        }
    }

    /// Calls that were taken.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }
}

/// Looks after the sessions. The last ports first: those that only receive are there again before
/// the first one sends.
fn check_all(ports: &mut [GuestPort]) -> anyhow::Result<()> {
    ports.iter_mut().rev().try_for_each(GuestPort::check)
}

fn arm_all(ports: &mut [GuestPort], draining: bool) -> bool {
    let mut something = false;
    for pair in ports.iter_mut().flat_map(|p| &mut p.pairs) {
        something |= pair.rx.arm();
        if pair.tx.is_full() || (draining && pair.tx.outstanding() > 0) {
            something |= pair.tx.arm();
        }
    }
    something
}

fn disarm_all(ports: &mut [GuestPort]) -> u64 {
    let pairs = ports.iter_mut().flat_map(|p| &mut p.pairs);
    pairs.map(|p| u64::from(p.rx.disarm()).wrapping_add(u64::from(p.tx.disarm()))).sum()
}
