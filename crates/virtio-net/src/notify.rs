//! Kick and call: eventfds, read without ever blocking and written without blocking as long as the
//! peer leaves them non-blocking.
//!
//! **Trust.** The peer shares the file description. It may fill the counter, close its end, pass
//! something that is no eventfd, or make it blocking again at any time. So each read says for
//! itself that it does not wait. Linux has no such write for eventfds: a peer that fills its call
//! counter and clears `O_NONBLOCK` stops the worker that calls it.
//! A notification that cannot be written was already there or is the peer's own loss, so errors
//! are ignored.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use port::{CallCounters, Notified};
use rustix::io::{ReadWriteFlags, ioctl_fionbio, preadv2, write};

/// The offset that stands for reading a file that has none.
const NO_OFFSET: u64 = u64::MAX;

/// Makes `fd` non-blocking, so that a full counter does not stop a worker.
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
        let _ = preadv2(
            fd,
            &mut [IoSliceMut::new(&mut counter)],
            NO_OFFSET,
            // Whatever the peer did to `O_NONBLOCK`.
            ReadWriteFlags::NOWAIT,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

    use super::*;

    fn kicked(fd: &OwnedFd) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    #[test]
    fn a_kick_that_the_peer_made_blocking_again_stops_nobody() {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        prepare(Some(&fd));
        ioctl_fionbio(&fd, false).unwrap();
        let (done, drained) = channel();
        let theirs = Arc::clone(&fd);
        let _reader = std::thread::spawn(move || {
            drain(Some(&theirs));
            done.send(()).unwrap();
        });
        drained.recv_timeout(Duration::from_secs(10)).expect("the empty counter is not waited for");
        signal(Some(&fd));
        assert!(kicked(&fd));
        drain(Some(&fd));
        assert!(!kicked(&fd), "what was there is taken");
    }
}
