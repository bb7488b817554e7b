//! The edges of an fd that nobody reads: a guest's kick.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

/// Readable when another fd has become so, until that is taken. See [`crate::Ingress::wake_fd`].
#[derive(Debug)]
pub(super) struct Edges(OwnedFd);

impl Edges {
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&set, fd, epoll::EventData::new_u64(0), flags)?;
        Ok(Self(set))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes what has happened, before its cause is looked at: the next edge is another one.
    pub(super) fn take(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 1];
        let _ = epoll::wait(&self.0, &mut space, Some(&now));
    }
}
