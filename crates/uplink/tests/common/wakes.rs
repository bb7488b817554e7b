//! Whether something wakes who waits for an fd.

use std::os::fd::BorrowedFd;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// Whether `done` wakes who waits for the fd, for whatever it may wait.
pub(crate) fn wakes(fd: BorrowedFd<'_>, done: impl FnOnce()) -> bool {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).unwrap();
    let look = || {
        let mut events = Vec::with_capacity(1);
        epoll::wait(&set, spare_capacity(&mut events), Some(&Timespec::default())).unwrap() > 0
    };
    // What is so already comes as the first event.
    let _ = look();
    done();
    look()
}
