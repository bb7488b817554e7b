//! The client's way to a connection: try, wait longer, try again, for ever.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::timer::Timer;

const FIRST_MS: u32 = 100;
const LAST_MS: u32 = 2000;

/// When to try again.
#[derive(Debug)]
pub(super) struct Reconnect {
    timer: Timer,
    next_ms: u32,
}

impl Reconnect {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { timer: Timer::new()?, next_ms: FIRST_MS })
    }

    /// Tries as soon as possible.
    pub(super) fn now(&self) {
        self.timer.arm(0);
    }

    /// Tries again after a while, every time after a longer one.
    pub(super) fn failed(&mut self) {
        self.timer.arm(self.next_ms);
        self.next_ms = self.next_ms.saturating_mul(2).min(LAST_MS);
    }

    /// The next failure is the first one again.
    pub(super) fn succeeded(&mut self) {
        self.next_ms = FIRST_MS;
    }

    /// Clears the timer's readiness.
    pub(super) fn expired(&self) {
        self.timer.clear();
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
