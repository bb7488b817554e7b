//! Kick and call: eventfds, written and read without ever blocking.
//!
//! **Trust.** The peer shares the file description. It may fill the counter, close its end or
//! pass something that is no eventfd: a notification that cannot be written was already there or
//! is the peer's own loss, so errors are ignored.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use port::{CallCounters, Notified};
use rustix::io::{ioctl_fionbio, read, write};

/// Makes `fd` non-blocking, so that a full counter cannot stop a worker.
pub(crate) fn prepare(fd: Option<&Arc<OwnedFd>>) {
    if let Some(fd) = fd {
        let _ = ioctl_fionbio(fd, true);
    }
}

/// Adds one to the counter.
#[inline]
pub(crate) fn signal(fd: Option<&Arc<OwnedFd>>) {
    if let Some(fd) = fd {
        let _ = write(fd, &1u64.to_ne_bytes());
    }
}

/// Calls a driver that wants it, and counts that.
#[inline]
pub(crate) fn call(fd: Option<&Arc<OwnedFd>>, wanted: bool, counters: &CallCounters) -> Notified {
    let notified = if wanted && fd.is_some() { Notified::Called } else { Notified::Suppressed };
    counters.count(notified);
    if notified == Notified::Called {
        signal(fd);
    }
    notified
}

/// Takes what is in the counter.
pub(crate) fn drain(fd: Option<&Arc<OwnedFd>>) {
    if let Some(fd) = fd {
        let mut counter = [0u8; 8];
        let _ = read(fd, &mut counter);
    }
}
