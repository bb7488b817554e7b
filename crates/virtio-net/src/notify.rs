//! Kick and call: eventfds that a peer gave us, read and written without ever waiting.
//!
//! ```text
//!  call ──► io_submit(read of nothing, resfd = call) ──► the kernel signals the eventfd itself
//! ```
//!
//! **Trust.** The peer shares the file description. It may fill the counter, close its end, pass
//! something that is no eventfd, or make it blocking again at any time. Each read says for itself
//! that it does not wait (`RWF_NOWAIT`). Linux has no such write for eventfds, and a `write` waits
//! as long as the counter is full and `O_NONBLOCK` is off. So we do not write: an asynchronous
//! read of nothing completes at once, and its completion signals the eventfd named in it, which
//! adds one, or nothing if the counter is full, and never waits. It takes 0.4 us instead of 0.25.
//! A notification that does not arrive was there already or is the peer's own loss.
//! How long a call takes is for the peer to say: it is watched ([`CallWatch`]).
//! **Limits.** A context for each thread that calls, made with its first call. Where the kernel
//! gives none (see [`can_block`]) a `write` has to do, to an fd that we make non-blocking.

mod watch;

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use port::{CallCounters, Notified};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, ReadWriteFlags, ioctl_fionbio, preadv2, write};
use vmm_sys_util::aio::{IOCB_CMD_PREAD, IOCB_FLAG_RESFD, IoContext, IoControlBlock, IoEvent};

pub use watch::CallWatch;

/// The offset that stands for reading a file that has none.
const NO_OFFSET: u64 = u64::MAX;
/// Completions that a context holds; they are taken out when half of them are there.
const COMPLETIONS: u32 = 128;

thread_local! {
    /// None inside if the kernel gives no context.
    static CALLER: RefCell<Option<Option<Caller>>> = const { RefCell::new(None) };
}

/// A file of our own that requests name.
struct Files {
    /// Holds nothing, so a read of it is done at once.
    empty: OwnedFd,
}

impl Files {
    fn get() -> io::Result<&'static Self> {
        static FILES: OnceLock<Files> = OnceLock::new();
        if let Some(files) = FILES.get() {
            return Ok(files);
        }
        let empty = memfd_create("nothing", MemfdFlags::CLOEXEC)?;
        Ok(FILES.get_or_init(|| Self { empty }))
    }
}

/// A thread's way to have eventfds signalled.
struct Caller {
    context: IoContext,
    files: &'static Files,
    /// Requests since completions were taken out last.
    pending: u32,
}

impl Caller {
    fn new() -> io::Result<Self> {
        Ok(Self { context: IoContext::new(COMPLETIONS)?, files: Files::get()?, pending: 0 })
    }

    fn signal(&mut self, fd: BorrowedFd<'_>) {
        if self.pending >= COMPLETIONS / 2 {
            self.take_completions();
        }
        if self.submit((0, 0), fd).is_err() {
            // It may have been for want of room. Beyond that the kernel has no memory left.
            self.take_completions();
            let _ = self.submit((0, 0), fd);
        }
        self.pending = self.pending.saturating_add(1);
    }

    fn take_completions(&mut self) {
        let mut events = [IoEvent::default(); COMPLETIONS as usize];
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = self.context.get_events(0, &mut events, Some(&mut now));
        self.pending = 0;
    }

    /// Whether the kernel takes `fd` for an eventfd; nothing is signalled. It looks at it before it
    /// finds that the request cannot be done.
    fn is_eventfd(&self, fd: BorrowedFd<'_>) -> Option<bool> {
        let nowhere = (u64::MAX, 1);
        let refused = self.submit(nowhere, fd).err()?;
        match Errno::from_io_error(&refused)? {
            Errno::FAULT => Some(true),
            Errno::INVAL | Errno::BADF => Some(false),
            _ => None,
        }
    }

    /// A read to an address, of so many bytes, at whose end `fd` is signalled. There is nothing to
    /// be read: nothing is written to the address.
    fn submit(&self, (to, bytes): (u64, u64), fd: BorrowedFd<'_>) -> io::Result<usize> {
        let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX);
        let mut request = IoControlBlock {
            aio_lio_opcode: u16::try_from(IOCB_CMD_PREAD).unwrap_or_default(),
            aio_fildes: number(self.files.empty.as_fd()),
            aio_buf: to,
            aio_nbytes: bytes,
            aio_flags: IOCB_FLAG_RESFD,
            aio_resfd: number(fd),
            ..IoControlBlock::default()
        };
        self.context.submit(&[&mut request])
    }
}

/// Does something with this thread's caller, if it has one.
fn with_caller<T>(job: impl FnOnce(&mut Caller) -> T) -> Option<T> {
    let job = |cell: &RefCell<Option<Option<Caller>>>| {
        let mut cell = cell.try_borrow_mut().ok()?;
        cell.get_or_insert_with(|| Caller::new().ok()).as_mut().map(job)
    };
    // None while the thread ends, too.
    CALLER.try_with(job).ok().flatten()
}

/// Whether a peer that fills its eventfd and makes it blocking could stop this thread: the kernel
/// has no asynchronous I/O, or no context was left (`fs.aio-max-nr`).
pub fn can_block() -> bool {
    with_caller(|_| ()).is_none()
}

/// Whether `fd` is an eventfd; none if this cannot be found out.
pub fn is_eventfd(fd: impl AsFd) -> Option<bool> {
    with_caller(|caller| caller.is_eventfd(fd.as_fd())).flatten()
}

/// Adds one to an eventfd's counter, without ever waiting.
#[inline]
pub fn signal(fd: &OwnedFd) {
    if with_caller(|caller| caller.signal(fd.as_fd())).is_none() {
        let _ = ioctl_fionbio(fd, true);
        let _ = write(fd, &1u64.to_ne_bytes());
    }
}

/// Calls a driver that wants it, and counts that; who keeps the log of written pages always.
#[inline]
pub(crate) fn call(
    (log, fd): (Option<&Arc<OwnedFd>>, Option<&Arc<OwnedFd>>),
    wanted: bool,
    (counters, watch): (&CallCounters, &CallWatch),
) -> Notified {
    if let Some(log) = log {
        watch.signal(log);
    }
    let notified = if wanted && fd.is_some() { Notified::Called } else { Notified::Suppressed };
    counters.count(notified);
    if let (Notified::Called, Some(fd)) = (notified, fd) {
        watch.signal(fd);
    }
    notified
}

/// Takes what is in the counter of an eventfd whose owner we trust: all that wait until it can be
/// written are woken by that, however many they are.
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

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("pending", &self.pending).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
    use rustix::pipe::{PipeFlags, pipe_with};
    use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

    use rustix::fs::{Mode, OFlags, open};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn is_readable(fd: &OwnedFd) -> bool {
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        let _ = rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn a_kick_that_the_peer_made_blocking_stops_nobody() {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let (done, drained) = channel();
        let theirs = Arc::clone(&fd);
        let _reader = std::thread::spawn(move || {
            drain(Some(&theirs));
            done.send(()).unwrap();
        });
        drained.recv_timeout(PATIENCE).expect("the empty counter is not waited for");
        signal(&fd);
        assert!(is_readable(&fd));
        drain(Some(&fd));
        assert!(!is_readable(&fd), "what was there is taken");
    }

    #[test]
    fn a_call_whose_counter_is_full_and_blocking_stops_nobody() {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let _ = write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (done, called) = channel();
        let theirs = Arc::clone(&fd);
        let _caller = std::thread::spawn(move || {
            for _ in 0..3 * COMPLETIONS {
                signal(&theirs);
            }
            done.send(()).unwrap();
        });
        called.recv_timeout(PATIENCE).expect("the full counter is not waited for");
        let _ = count(&fd);
        signal(&fd);
        assert_eq!(count(&fd), 1, "one that was emptied is called again");
    }

    /// As KVM signals a kick: who waits for edges needs no room in the counter.
    #[test]
    fn the_kernels_signal_is_an_edge_though_the_counter_is_full() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&set, &fd, epoll::EventData::new_u64(0), flags).unwrap();
        let edges = || {
            let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            let mut events = Vec::with_capacity(2);
            let space = rustix::buffer::spare_capacity(&mut events);
            epoll::wait(&set, space, Some(&now)).unwrap()
        };
        let _ = write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert_eq!((edges(), edges()), (1, 0));
        for _ in 0..3 {
            signal(&fd);
            assert_eq!((edges(), edges()), (1, 0));
        }
    }

    #[test]
    fn every_call_counts_and_wakes() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for _ in 0..5 * u64::from(COMPLETIONS) {
            signal(&fd);
        }
        assert_eq!(count(&fd), 5 * u64::from(COMPLETIONS));
        let fd = Arc::new(fd);
        let theirs = Arc::clone(&fd);
        let waiter = std::thread::spawn(move || count(&theirs));
        signal(&fd);
        assert_eq!(waiter.join().unwrap(), 1);
        assert!(!can_block());
    }

    #[test]
    fn only_eventfds_are_eventfds() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let file = memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
        let path = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        for fd in [reader, writer, timer, set, file, path] {
            assert_eq!(is_eventfd(&fd), Some(false), "{fd:?}");
        }
        for flags in [EventfdFlags::empty(), EventfdFlags::SEMAPHORE | EventfdFlags::NONBLOCK] {
            let fd = eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap();
            assert_eq!(is_eventfd(&fd), Some(true));
            assert!(!is_readable(&fd), "asking is no call");
        }
    }
}
