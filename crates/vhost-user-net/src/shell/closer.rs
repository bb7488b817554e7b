//! Closes what could make us wait.
//!
//! `close` of a TCP connection that lingers waits until what was sent has arrived; of a file on
//! FUSE, for a program of the front end's. Reading or mapping such a file waits too. So what a
//! front end sends is looked at in ways that ask nobody, before anything else is done with it: only
//! what the kernel alone answers for goes on to the session. The rest is closed on a thread of its
//! own, and something harmless takes its place, which the session refuses. A socket that looks
//! empty goes on, with a second fd of it: whoever closes it last closes what waits in it, and that
//! is a thread here.
//!
//! Whoever closes the last fd of something frees it: seconds for the pages of a large guest, or for
//! an eventfd that very many epolls watch, and nobody can tell the last fd, nor how large a file is
//! by then. So of each fd that comes, whatever becomes of it, a second one is let go of by a thread
//! here, after the messages of a turn were handled; and so are large files that a front end takes
//! back, the eventfds of its rings, and all that one had that has left.
//!
//! **Limits.** [`STUCK`] threads a port for fds, and what waits for them: if none of it gets
//! anywhere for [`PATIENCE`], the port is put into quarantine. As many for what is freed, so that
//! it never waits for those: a port that has as much to be freed is not listened to until less is
//! left. Where no thread can be had, fds that others answer for stay open for good and count as
//! waiting; everything else is let go of there and then.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};
use rustix::io::ioctl_fionread;
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{channel, share};
use crate::memory::{LARGE, file_bytes};
use crate::session::Gone;

/// Lists of fds of a port that wait for a `close`: it takes that for hostile if it stays so.
const STUCK: usize = 4;
/// How long: on a machine with much to do, a thread waits for its turn before it closes anything.
const PATIENCE: Duration = Duration::from_secs(2);

/// See the module's text. Clones belong to the same port.
#[derive(Debug, Clone, Default)]
pub(super) struct Closer {
    jobs: Arc<Mutex<Jobs>>,
    /// Written when something was let go of.
    notice: Option<Arc<OwnedFd>>,
}

#[derive(Debug, Default)]
struct Jobs {
    fds: Line,
    large: Line,
    /// CPU time that this took.
    spent: Duration,
}

/// What waits for threads of one kind.
#[derive(Debug, Default)]
struct Line {
    queue: VecDeque<Load>,
    /// Loads that are in the queue or being let go of.
    waiting: usize,
    /// Since when as many wait as are too many, and none was let go of.
    stuck: Option<Instant>,
    threads: usize,
}

/// What is let go of.
#[derive(Debug)]
enum Load {
    /// It may have to wait for others.
    Fds(Vec<OwnedFd>),
    Large(Vec<Box<dyn Any + Send>>),
}

/// The kind of a load.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Fds,
    Large,
}

impl Line {
    /// One more waits, or one was let go of.
    fn set_waiting(&mut self, count: usize) {
        let more = count > self.waiting;
        self.waiting = count;
        let since = self.stuck.filter(|_| more).unwrap_or_else(Instant::now);
        self.stuck = (count >= STUCK).then_some(since);
    }
}

impl Load {
    fn kind(&self) -> Kind {
        match self {
            Self::Fds(_) => Kind::Fds,
            Self::Large(_) => Kind::Large,
        }
    }
}

impl Jobs {
    fn line(&mut self, kind: Kind) -> &mut Line {
        match kind {
            Kind::Fds => &mut self.fds,
            Kind::Large => &mut self.large,
        }
    }
}

impl Closer {
    /// One that writes to an eventfd whenever it has let go of something.
    pub(super) fn new(notice: &Arc<OwnedFd>) -> Self {
        Self { notice: Some(Arc::clone(notice)), ..Self::default() }
    }

    /// The same fds, with something harmless for those that could make us wait; and second fds of
    /// sockets among them, to be let go of after those.
    pub(super) fn sort(&self, fds: Vec<OwnedFd>) -> (Vec<OwnedFd>, Vec<Gone>) {
        if fds.iter().all(is_quick) {
            return (fds, Vec::new());
        }
        let (mut sorted, mut slow) = (Vec::with_capacity(fds.len()), Vec::new());
        let mut channels = Vec::new();
        for fd in fds {
            if is_quick(&fd) {
                sorted.push(fd);
            } else if let Some(second) = second_of_channel(&fd) {
                channels.push(second);
                sorted.push(fd);
            } else {
                slow.push(fd);
                sorted.extend(stand_in());
            }
        }
        if !slow.is_empty() {
            self.close(Load::Fds(slow));
        }
        (sorted, channels)
    }

    /// Closes a front end's connection. Messages in it that nobody read may hold anything.
    pub(super) fn close_stream(&self, stream: OwnedFd) {
        // From now on nothing more gets in.
        let _ = shutdown(&stream, Shutdown::Both);
        self.close_unread(stream);
    }

    /// The same of one that others go on with.
    pub(super) fn close_unread(&self, stream: OwnedFd) {
        if ioctl_fionread(&stream).is_ok_and(|unread| unread > 0) {
            self.close(Load::Fds(vec![stream]));
        }
    }

    /// Lets go of what is large, and of channels.
    pub(super) fn release(&self, gone: Vec<Gone>) {
        let (mut large, mut fds) = (Vec::new(), Vec::new());
        for gone in gone {
            match gone {
                Gone::Large(what) => large.push(what),
                Gone::Channel(fd) => fds.push(fd),
                Gone::Event(event) => large.push(Box::new(event)),
            }
        }
        if !large.is_empty() {
            self.close(Load::Large(large));
        }
        if !fds.is_empty() {
            self.close(Load::Fds(fds));
        }
    }

    /// When so much has waited for others to be closed, for so long, that the front end must mean
    /// it, unless some of it is closed before.
    pub(super) fn stuck_at(&self) -> Option<Instant> {
        self.jobs().fds.stuck?.checked_add(PATIENCE)
    }

    /// Whether nothing more should come before something was let go of.
    pub(super) fn is_full(&self) -> bool {
        let jobs = self.jobs();
        jobs.fds.waiting.max(jobs.large.waiting) >= STUCK
    }

    /// CPU time that it took since this was asked last.
    pub(super) fn take_spent(&self) -> Duration {
        std::mem::take(&mut self.jobs().spent)
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, load: Load) {
        let kind = load.kind();
        let mut jobs = self.jobs();
        let line = jobs.line(kind);
        line.set_waiting(line.waiting.saturating_add(1));
        line.queue.push_back(load);
        if line.threads >= STUCK {
            return;
        }
        line.threads = line.threads.saturating_add(1);
        drop(jobs);
        let own = self.clone();
        let job = move || own.close_all(kind);
        if let Err(error) = std::thread::Builder::new().name("closer".to_owned()).spawn(job) {
            tracing::warn!(%error, "cannot start a thread that closes a front end's fds");
            let mut jobs = self.jobs();
            let line = jobs.line(kind);
            line.threads = line.threads.saturating_sub(1);
            if line.threads == 0 {
                let queue = std::mem::take(&mut line.queue);
                drop(jobs);
                queue.into_iter().for_each(|load| self.leave_open(load));
            }
        }
    }

    /// What cannot be let go of by a thread: to close fds here could take for ever.
    fn leave_open(&self, load: Load) {
        match load {
            Load::Fds(fds) => fds.into_iter().for_each(std::mem::forget),
            Load::Large(large) => {
                drop(large);
                let mut jobs = self.jobs();
                let waiting = jobs.large.waiting.saturating_sub(1);
                jobs.large.set_waiting(waiting);
            }
        }
    }

    /// Lets go of what is in a queue.
    fn close_all(&self, kind: Kind) {
        let mut jobs = self.jobs();
        // To start the thread is a part of it.
        let mut before = Duration::ZERO;
        while let Some(load) = jobs.line(kind).queue.pop_front() {
            drop(jobs);
            drop(load);
            let now = share::cpu_time();
            let spent = now.saturating_sub(std::mem::replace(&mut before, now));
            jobs = self.jobs();
            jobs.spent = jobs.spent.saturating_add(spent);
            let line = jobs.line(kind);
            line.set_waiting(line.waiting.saturating_sub(1));
            if let Some(notice) = &self.notice {
                // It fails only when it is full, and then it is readable.
                let _ = rustix::io::write(notice, &1u64.to_ne_bytes());
            }
        }
        let line = jobs.line(kind);
        line.threads = line.threads.saturating_sub(1);
    }
}

/// Second fds: while there is one, closing the first frees nothing. Those of channels are not among
/// them, see [`channels`]. Adds the bytes of files.
pub(super) fn hold(fds: &[OwnedFd], bytes: &mut u64) -> Vec<OwnedFd> {
    *bytes = fds.iter().map(file_bytes).fold(*bytes, u64::saturating_add);
    fds.iter().filter(|fd| is_quick(fd)).filter_map(|fd| fd.try_clone().ok()).collect()
}

/// Whether so many bytes of files should not wait for the end of a turn.
pub(super) fn is_large(bytes: u64) -> bool {
    bytes >= LARGE
}

/// A second fd of a socket that may be a channel. None of what is something else, or would wait
/// itself: what it would wait for, nobody here asks for.
fn second_of_channel(fd: &OwnedFd) -> Option<Gone> {
    channel::is_empty(fd.as_fd()).then(|| fd.try_clone().ok().map(Gone::Channel))?
}

/// Second fds of all that are channels.
pub(super) fn channels(fds: &[OwnedFd]) -> Vec<Gone> {
    fds.iter().filter(|fd| !is_quick(fd)).filter_map(second_of_channel).collect()
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
        FileType::Unknown => true,
        // Not one with a name: that may be on FUSE.
        FileType::Fifo => Some((stat.stx_dev_major, stat.stx_dev_minor)) == pipes(),
        // Not even one that looks empty: see `second_of_channel`.
        FileType::Socket => false,
        // On a disk; what has no device is FUSE, the network, or made of other file systems.
        FileType::RegularFile => stat.stx_dev_major != 0,
        FileType::Directory
        | FileType::Symlink
        | FileType::CharacterDevice
        | FileType::BlockDevice => false,
    }
}

/// The device of all pipes without a name.
fn pipes() -> Option<(u32, u32)> {
    static PIPES: OnceLock<(u32, u32)> = OnceLock::new();
    let look = || {
        let (reader, _) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        let stat = statx(&reader, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE).ok()?;
        Some((stat.stx_dev_major, stat.stx_dev_minor))
    };
    // Where there is no fd left, the next one looks again.
    PIPES.get().copied().or_else(|| look().map(|found| *PIPES.get_or_init(|| found)))
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
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::net::sockopt::set_socket_linger;
    use rustix::net::{
        RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg,
    };

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

    /// Beside what keeps all threads for fds busy.
    #[test]
    fn what_is_gone_is_let_go_of_by_a_thread_that_tells() {
        let notice = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let closer = Closer::new(&notice);
        let busy = [(); STUCK].map(|()| {
            let (stream, peer) = lingering();
            let _ = closer.sort(vec![stream]);
            peer
        });
        wait_for("all are busy", || closer.jobs().fds.queue.is_empty());
        closer.release(Vec::new());
        assert_eq!(closer.jobs().large.waiting, 0);
        assert!(rustix::io::read(&notice, &mut [0; 8]).is_err());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        closer.release(vec![Gone::Large(Box::new(sender))]);
        wait_for("it is gone", || closer.jobs().large.waiting == 0);
        assert!(receiver.recv().is_err() && closer.is_full() && closer.stuck_at().is_some());
        wait_for("it was said", || rustix::io::read(&notice, &mut [0; 8]).is_ok());
        drop(busy);
        wait_for("they are closed", || closer.jobs().fds.waiting == 0);
        assert!(!closer.is_full() && closer.stuck_at().is_none());
    }

    /// They are the front end's own, and nobody else is waited for.
    #[test]
    fn much_to_be_freed_is_no_reason_for_quarantine() {
        let closer = Closer::default();
        let gate = Arc::new(Mutex::new(()));
        struct Held(Arc<Mutex<()>>);
        impl Drop for Held {
            fn drop(&mut self) {
                drop(self.0.lock().unwrap());
            }
        }
        let shut = gate.lock().unwrap();
        for count in 1..=2 * STUCK {
            closer.release(vec![Gone::Large(Box::new(Held(Arc::clone(&gate))))]);
            assert_eq!((closer.is_full(), closer.stuck_at()), (count >= STUCK, None));
        }
        drop(shut);
        wait_for("all is freed", || closer.jobs().large.waiting == 0);
    }

    #[test]
    fn all_is_held_and_bytes_are_counted() {
        let file = File::from(memfd_create("m", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LARGE).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (socket, _end) = UnixStream::pair().unwrap();
        let fds = [file.try_clone().unwrap().into(), event, socket.into()];
        let mut bytes = 0;
        assert_eq!((hold(&fds, &mut bytes).len(), bytes), (2, 0), "it has no pages");
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, LARGE / 2).unwrap();
        assert!(hold(&fds, &mut bytes).len() == 2 && !is_large(bytes));
        assert!(hold(&fds, &mut bytes).len() == 2 && is_large(bytes), "twice as much");
    }

    fn wait_for(what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn nobody_waits_for_what_lingers_and_four_are_too_many() {
        let closer = Closer::default();
        let mut peers = Vec::new();
        for count in 1..=STUCK + 2 {
            let (stream, peer) = lingering();
            peers.push(peer);
            assert_eq!(closer.sort(vec![stream]).0.len(), 1);
            assert_eq!(closer.stuck_at().is_some(), count >= STUCK);
            assert!(closer.jobs().fds.threads <= STUCK, "so many threads");
        }
        // Since the first four waited; anew whenever one of them is closed.
        let since = closer.stuck_at().unwrap();
        assert!(since <= Instant::now() + PATIENCE);
        drop(peers.pop());
        drop(peers.remove(0));
        wait_for("one is closed", || closer.jobs().fds.waiting < STUCK + 2);
        assert!(closer.stuck_at().is_some_and(|at| at > since));
        drop(peers);
        wait_for("they are closed", || closer.jobs().fds.waiting == 0);
        assert!(closer.stuck_at().is_none());
        wait_for("the threads end", || closer.jobs().fds.threads == 0);
    }

    /// In a socket's queue, of which a connection that nobody reads is the same.
    #[test]
    fn what_waits_in_a_socket_is_closed_by_a_thread() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stream, peer) = lingering();
        send_fd(&ours, &stream, SendFlags::empty());
        drop(stream);
        let closer = Closer::default();
        let start = Instant::now();
        let (sorted, channels) = closer.sort(vec![theirs.into()]);
        assert!(sorted.iter().all(is_quick) && channels.is_empty());
        drop(sorted);
        assert!(start.elapsed() < Duration::from_secs(30), "it lingers for twice as long");
        assert_eq!(closer.jobs().fds.waiting, 1);
        drop(peer);
        wait_for("it is closed", || closer.jobs().fds.waiting == 0);
    }

    /// Sends a byte and an fd.
    fn send_fd(socket: &UnixStream, fd: &OwnedFd, flags: SendFlags) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let _ = sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags).unwrap();
    }

    /// A byte that was sent out of band and taken leaves its fds in the queue of a socket that
    /// looks empty.
    #[test]
    fn what_cannot_be_seen_in_a_channel_is_closed_by_a_thread() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stream, peer) = lingering();
        send_fd(&ours, &stream, SendFlags::OOB);
        drop(stream);
        let _ = recv(&theirs, &mut [0; 1][..], RecvFlags::OOB).unwrap();
        let closer = Closer::default();
        let start = Instant::now();
        let (sorted, channels) = closer.sort(vec![theirs.into()]);
        assert!(channel::is_empty(sorted[0].as_fd()) && channels.len() == 1);
        drop(sorted);
        assert_eq!(closer.jobs().fds.waiting, 0);
        closer.release(channels);
        assert!(start.elapsed() < Duration::from_secs(30), "it lingers for twice as long");
        assert_eq!(closer.jobs().fds.waiting, 1);
        drop(peer);
        wait_for("it is closed", || closer.jobs().fds.waiting == 0);
    }

    #[test]
    fn what_others_answer_for_is_told_apart() {
        let memory = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (socket, _end) = UnixStream::pair().unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for fd in [memory, reader, writer, event] {
            assert!(is_quick(&fd), "{fd:?}");
        }
        let socket = OwnedFd::from(socket);
        assert!(!is_quick(&socket) && channels(&[socket]).len() == 1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("named");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let both = File::options().read(true).write(true).open(&path).unwrap();
        let tcp = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let proc = OwnedFd::from(File::open("/proc/self/status").unwrap());
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let folder = OwnedFd::from(File::open("/").unwrap());
        let closer = Closer::default();
        for fd in [tcp, proc, null, folder, both.into()] {
            assert!(!is_quick(&fd), "{fd:?}");
            let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let (sorted, _) = closer.sort(vec![event, fd]);
            assert!(sorted.len() == 2 && sorted.iter().all(is_quick));
        }
        wait_for("they are closed", || closer.jobs().fds.waiting == 0);
    }
}
