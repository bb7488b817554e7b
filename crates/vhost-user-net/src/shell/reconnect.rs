//! The client's way to a connection: try, wait longer, try again, for ever.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::{Errno, read};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

const FIRST_MS: u32 = 100;
const LAST_MS: u32 = 2000;

/// When to try again.
#[derive(Debug)]
pub(super) struct Reconnect {
    timer: OwnedFd,
    next_ms: u32,
}

impl Reconnect {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { timer, next_ms: FIRST_MS })
    }

    /// Tries as soon as possible.
    pub(super) fn now(&mut self) {
        self.arm(0);
    }

    /// Tries again after a while, every time after a longer one.
    pub(super) fn failed(&mut self) {
        self.arm(self.next_ms);
        self.next_ms = self.next_ms.saturating_mul(2).min(LAST_MS);
    }

    /// The next failure is the first one again.
    pub(super) fn succeeded(&mut self) {
        self.next_ms = FIRST_MS;
    }

    /// Clears the timer's readiness.
    pub(super) fn expired(&self) {
        let mut count = [0u8; 8];
        let _ = read(&self.timer, &mut count);
    }

    fn arm(&self, after_ms: u32) {
        let nanoseconds = i64::from(after_ms % 1000).saturating_mul(1_000_000).max(1);
        let once = Timespec { tv_sec: i64::from(after_ms / 1000), tv_nsec: nanoseconds };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let when = Itimerspec { it_interval: never, it_value: once };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &when) {
            tracing::error!(%error, "cannot set a timer");
        }
    }
}

impl AsFd for Reconnect {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// Connects without waiting: a unix socket connects at once or not at all.
pub(super) fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
