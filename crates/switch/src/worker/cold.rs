//! The wait for cold queues and for messages: one edge-triggered epoll.
//!
//! Every fd stays registered for as long as its queue is attached. Guests' kicks are not read: each
//! write of an eventfd is an edge, whatever its count, and a read would wake all that wait until it
//! can be written, of whom its other owner may hang up very many. An edge that arrives while the
//! queue is hot costs one spurious look later; no edge is lost, because a queue is armed and
//! looked at once more before it becomes cold.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

/// Token of the mailbox.
const MAIL: u64 = u64::MAX;
/// Events taken at once.
const EVENTS: usize = 64;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Waiter {
    epoll: OwnedFd,
}

impl Waiter {
    pub(super) fn new(mail: &OwnedFd) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, mail, epoll::EventData::new_u64(MAIL), flags)?;
        Ok(Self { epoll })
    }

    /// Readable while something was woken.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Watches a queue's fd. Returns whether it is watched.
    pub(super) fn add(&self, fd: Option<BorrowedFd<'_>>, number: usize) -> bool {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(number as u64);
        fd.is_some_and(|fd| epoll::add(&self.epoll, fd, data, flags).is_ok())
    }

    pub(super) fn remove(&self, fd: Option<BorrowedFd<'_>>) {
        if let Some(fd) = fd {
            // It fails if the fd was never watched, and then there is nothing to do.
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    /// Waits for so many nanoseconds, or for ever, or only looks (0). Hands the numbers of the
    /// readable queues to `found`.
    pub(super) fn wait(&self, time_ns: Option<u64>, mut found: impl FnMut(usize)) {
        let timeout = time_ns.and_then(|ns| Timespec::try_from(Duration::from_nanos(ns)).ok());
        let timeout = timeout.as_ref();
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut space, timeout) else {
            // A signal: the caller's next turn waits again.
            return;
        };
        for event in events {
            let token = event.data.u64();
            if let (false, Ok(number)) = (token == MAIL, usize::try_from(token)) {
                found(number);
            }
        }
    }
}
