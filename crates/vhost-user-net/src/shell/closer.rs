//! Closes what could make us wait.
//!
//! `close` of a TCP connection that lingers waits until what was sent has arrived; of a file on
//! FUSE, for a program of the front end's. Reading or mapping such a file waits too. So what a
//! front end sends is looked at in ways that ask nobody, before anything else is done with it: only
//! what the kernel alone answers for goes on to the session. The rest is closed on a thread of its
//! own, and something harmless takes its place, which the session refuses.
//!
//! **Limits.** [`STUCK`] such threads a port: then the port is put into quarantine.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::event::epoll;
use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};
use rustix::io::ioctl_fionread;
use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, Shutdown, shutdown};

/// Threads of a port that wait for a `close`: it takes that for hostile.
const STUCK: usize = 4;

/// See the module's text. Clones belong to the same port.
#[derive(Debug, Clone, Default)]
pub(super) struct Closer {
    waiting: Arc<AtomicUsize>,
}

impl Closer {
    /// The same fds, with something harmless for those that could make us wait.
    pub(super) fn sort(&self, fds: Vec<OwnedFd>) -> Vec<OwnedFd> {
        if fds.iter().all(is_quick) {
            return fds;
        }
        let (mut sorted, mut slow) = (Vec::with_capacity(fds.len()), Vec::new());
        for fd in fds {
            if is_quick(&fd) {
                sorted.push(fd);
            } else {
                slow.push(fd);
                sorted.extend(stand_in());
            }
        }
        self.close(slow);
        sorted
    }

    /// Closes a front end's connection. Messages in it that nobody read may hold anything.
    pub(super) fn close_stream(&self, stream: OwnedFd) {
        // From now on nothing more gets in.
        let _ = shutdown(&stream, Shutdown::Both);
        if ioctl_fionread(&stream).is_ok_and(|unread| unread > 0) {
            self.close(vec![stream]);
        }
    }

    /// Whether so much waits to be closed that the front end must mean it.
    pub(super) fn is_stuck(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= STUCK
    }

    fn close(&self, fds: Vec<OwnedFd>) {
        let waiting = Arc::clone(&self.waiting);
        let _ = waiting.fetch_add(1, Ordering::Relaxed);
        let job = move || {
            drop(fds);
            let _ = waiting.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = std::thread::Builder::new().name("closer".to_owned()).spawn(job) {
            // They were closed here then.
            tracing::warn!(%error, "cannot start a thread that closes a front end's fds");
            let _ = self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether the kernel alone answers for this fd: nothing that is done with it asks another machine
/// or program.
fn is_quick(fd: &OwnedFd) -> bool {
    // Files of tmpfs and hugetlbfs have seals, and nothing else has.
    if fcntl_get_seals(fd).is_ok() {
        return true;
    }
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(stat) = statx(fd, "", flags, StatxFlags::TYPE) else { return false };
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        // Eventfds and their kind.
        FileType::Unknown | FileType::Fifo | FileType::Directory | FileType::Symlink => true,
        FileType::Socket => socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX),
        // On a disk; what has no device is FUSE, the network, or made of other file systems.
        FileType::RegularFile => stat.stx_dev_major != 0,
        FileType::CharacterDevice | FileType::BlockDevice => false,
    }
}

/// What no message wants.
fn stand_in() -> Option<OwnedFd> {
    static NOTHING: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let new = || epoll::create(epoll::CreateFlags::CLOEXEC).ok();
    NOTHING.get_or_init(new).as_ref()?.as_fd().try_clone_to_owned().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::net::sockopt::set_socket_linger;
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// A connection that lingers, full of what nobody reads, and its other end.
    fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        set_socket_linger(&stream, Some(Duration::from_secs(60))).unwrap();
        stream.set_nonblocking(true).unwrap();
        while rustix::io::write(&stream, &[0; 1 << 16]).is_ok() {}
        (stream.into(), peer)
    }

    #[test]
    fn nobody_waits_for_what_lingers_and_four_are_too_many() {
        let closer = Closer::default();
        let mut peers = Vec::new();
        for count in 1..=STUCK {
            let (stream, peer) = lingering();
            peers.push(peer);
            assert_eq!(closer.sort(vec![stream]).len(), 1);
            assert_eq!(closer.is_stuck(), count == STUCK);
        }
        drop(peers);
        let end = Instant::now() + Duration::from_secs(20);
        while closer.is_stuck() {
            assert!(Instant::now() < end, "they are closed");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_others_answer_for_is_told_apart() {
        let memory = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let socket = OwnedFd::from(UnixStream::pair().unwrap().0);
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for fd in [memory, reader, writer, socket, event, File::open("/").unwrap().into()] {
            assert!(is_quick(&fd), "{fd:?}");
        }
        let tcp = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let proc = OwnedFd::from(File::open("/proc/self/status").unwrap());
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let closer = Closer::default();
        for fd in [tcp, proc, null] {
            assert!(!is_quick(&fd), "{fd:?}");
            let sorted = closer.sort(vec![eventfd(0, EventfdFlags::CLOEXEC).unwrap(), fd]);
            assert!(sorted.len() == 2 && sorted.iter().all(is_quick));
        }
        let end = Instant::now() + Duration::from_secs(10);
        while closer.waiting.load(Ordering::Relaxed) > 0 {
            assert!(Instant::now() < end, "they are closed");
            std::thread::yield_now();
        }
    }
}
