//! One-shot timers as fds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::read;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Becomes readable once, some time after it was armed.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Sets the time; an earlier one is forgotten.
    pub(super) fn arm(&self, after_ms: u32) {
        // A time of zero would disarm the timer.
        let nanoseconds = i64::from(after_ms % 1000).saturating_mul(1_000_000).max(1);
        let once = Timespec { tv_sec: i64::from(after_ms / 1000), tv_nsec: nanoseconds };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let when = Itimerspec { it_interval: never, it_value: once };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &when) {
            tracing::error!(%error, "cannot set a timer");
        }
    }

    /// Ends the readiness.
    pub(super) fn clear(&self) {
        let mut count = [0u8; 8];
        let _ = read(&self.0, &mut count);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
