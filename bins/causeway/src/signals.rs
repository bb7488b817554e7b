//! Signals as something that the control thread can wait for.
//!
//! The handler only sets a bit and writes to an eventfd, both of which are safe in a handler.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::register_signal_handler;

static STOP: AtomicBool = AtomicBool::new(false);
static RELOAD: AtomicBool = AtomicBool::new(false);
static WAKE: OnceLock<OwnedFd> = OnceLock::new();

/// What signals asked for since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    /// SIGTERM or SIGINT.
    pub(crate) stop: bool,
    /// SIGHUP.
    pub(crate) reload: bool,
}

/// Signals of the process; readable when one came.
#[derive(Debug)]
pub(crate) struct Signals(&'static OwnedFd);

impl Signals {
    /// Takes SIGTERM, SIGINT and SIGHUP over.
    pub(crate) fn take_over() -> io::Result<Self> {
        let signals = Self::none()?;
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            register_signal_handler(signal, on_signal)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(signals)
    }

    /// None that come: the process keeps its own.
    pub(crate) fn none() -> io::Result<Self> {
        if let Some(fd) = WAKE.get() {
            return Ok(Self(fd));
        }
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(WAKE.get_or_init(|| fd)))
    }

    /// What was asked for; forgets it.
    pub(crate) fn take(&self) -> Asked {
        let _ = rustix::io::read(self.0, &mut [0; 8]);
        // ORDERING: flags of their own; the eventfd was read before, so a signal that comes now
        // makes it readable again.
        Asked {
            stop: STOP.swap(false, Ordering::Relaxed),
            reload: RELOAD.swap(false, Ordering::Relaxed),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

extern "C" fn on_signal(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // ORDERING: see `take`; the write to the eventfd comes after.
    let flag = if signal == libc::SIGHUP { &RELOAD } else { &STOP };
    flag.store(true, Ordering::Relaxed);
    if let Some(fd) = WAKE.get() {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}
