//! Whether something wakes who waits for an fd.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// Whether `done`, or what follows it within a time, wakes who waits for the fd, for whatever it
/// may wait.
pub(crate) fn wakes(fd: BorrowedFd<'_>, within: Duration, done: impl FnOnce()) -> bool {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).unwrap();
    let look = |within: Duration| {
        let (mut events, within) = (Vec::with_capacity(1), Timespec::try_from(within).unwrap());
        epoll::wait(&set, spare_capacity(&mut events), Some(&within)).unwrap() > 0
    };
    // What is so already comes as the first event.
    let _ = look(Duration::ZERO);
    done();
    look(within)
}
