//! The device's state on its way through a pipe, by a thread of its own.
//!
//! ```text
//!  SET_DEVICE_STATE_FD ─► begin ─► thread: write, or read until the end ─► Ended ─► wakes the port
//!  CHECK_DEVICE_STATE ─► the answer, at once or when the thread has ended ─► restore
//! ```
//!
//! What was read takes effect when the front end asks whether it arrived, all of it or nothing.
//!
//! **Trust.** The pipe's other end is hostile: slow, half closed, endless. Neither the control
//! thread nor a worker ever touches it; a thread that nobody can wake any more is left to itself.
//! **Limits.** [`IDLE`] without a byte, [`WHOLE`] for a transfer, [`CHECK`] for an answer, and
//! [`crate::state::STREAM_MAX`] bytes; [`THREADS`] of a port, those included that were given up.
//! **Not supported.** A transfer does not go along when another process takes the port over: it
//! has failed then, and the front end may begin anew.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::EventOps;
use port::{PortSnapshot, StatusCell};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};

use super::connection::Disconnect;
use super::share::say;
use super::{FabricRings, Link, VhostUserPort};
use crate::codec::FrontendReq;
use crate::session::StateAsk;
use crate::state::{self, FormatError, STREAM_MAX};

/// How long a transfer may stand still.
const IDLE: Duration = Duration::from_secs(10);
/// How long it may take as a whole.
const WHOLE: Duration = Duration::from_secs(60);
/// How long the answer to `CHECK_DEVICE_STATE` may take: the front end has seen the end of the
/// pipe by then, or made it.
const CHECK: Duration = Duration::from_secs(2);
/// Transfers of a port whose threads have not ended.
const THREADS: usize = 4;
/// Bytes that are read at once.
const PIECE: usize = 1 << 14;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    #[error("CHECK_DEVICE_STATE without a transfer of the device's state")]
    None,
    #[error("the device's state: {THREADS} transfers of this port still wait for their pipes")]
    Busy,
    #[error("the device's state: the pipe stood still for {} s", IDLE.as_secs())]
    Idle,
    #[error("the device's state: it was not through after {} s", WHOLE.as_secs())]
    Slow,
    #[error(
        "the device's state: the pipe was not closed {} s after CHECK_DEVICE_STATE",
        CHECK.as_secs()
    )]
    Open,
    #[error("the device's state: more than {STREAM_MAX} bytes")]
    Long,
    #[error("the device's state: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("given up")]
    Cancelled,
}

impl From<Errno> for TransferError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// What came of a transfer: what was read, or nothing if it was written.
type Ended = Result<Option<PortSnapshot>, TransferError>;

/// The transfers of a port: one at a time.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    wake: Option<Arc<OwnedFd>>,
    current: Option<Transfer>,
    /// The front end waits for an answer, until then at most.
    asked: Option<Instant>,
    threads: Arc<AtomicUsize>,
}

/// One that was begun. Its thread ends when this is dropped.
#[derive(Debug)]
struct Transfer {
    ended: Arc<Mutex<Option<Ended>>>,
    cancel: Arc<OwnedFd>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let _ = write(&*self.cancel, &1u64.to_ne_bytes());
    }
}

impl Transfers {
    /// `wake` is written when a transfer has ended.
    pub(super) fn new(wake: &Arc<OwnedFd>) -> Self {
        Self { wake: Some(Arc::clone(wake)), ..Self::default() }
    }

    /// Whether the front end waits for an answer.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Until when, if so.
    pub(super) fn asked_until(&self) -> Option<Instant> {
        self.asked
    }

    /// The front end is gone.
    pub(super) fn end(&mut self) {
        self.asked = None;
        self.current = None;
    }

    /// Begins one; what may be under way still is given up.
    fn begin(&mut self, what: Way) -> Result<(), TransferError> {
        self.end();
        // ORDERING: Relaxed: a count. Only the control thread makes it larger.
        if self.threads.load(Ordering::Relaxed) >= THREADS {
            return Err(TransferError::Busy);
        }
        let cancel = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let transfer = Transfer { ended: Arc::default(), cancel: Arc::clone(&cancel) };
        let ended = Arc::clone(&transfer.ended);
        let wake = self.wake.clone();
        let counted = Counted::new(&self.threads);
        let job = move || {
            let result = what.run(&cancel);
            *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            drop(counted);
            if let Some(wake) = wake {
                let _ = write(&*wake, &1u64.to_ne_bytes());
            }
        };
        drop(std::thread::Builder::new().name("device-state".to_owned()).spawn(job)?);
        self.current = Some(transfer);
        Ok(())
    }

    /// What came of the transfer; none as long as it is under way.
    fn outcome(&mut self, now: Instant) -> Option<Ended> {
        let Some(transfer) = &self.current else { return Some(Err(TransferError::None)) };
        let ended = transfer.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        let until = *self.asked.get_or_insert_with(|| now.checked_add(CHECK).unwrap_or(now));
        let outcome = ended.or_else(|| (until <= now).then_some(Err(TransferError::Open)))?;
        self.end();
        Some(outcome)
    }
}

/// A thread that is counted.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(threads: &Arc<AtomicUsize>) -> Self {
        // ORDERING: Relaxed, here and in `drop`: a count.
        let _ = threads.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(threads))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let _ = self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the thread does.
enum Way {
    Save(OwnedFd, Vec<u8>),
    Load(OwnedFd),
}

impl Way {
    fn run(self, cancel: &OwnedFd) -> Ended {
        match self {
            Self::Save(pipe, stream) => save(&Pipe::new(&pipe, cancel), &stream).map(|()| None),
            Self::Load(pipe) => Ok(Some(state::decode(&load(&Pipe::new(&pipe, cancel))?)?)),
        }
    }
}

fn save(pipe: &Pipe<'_>, stream: &[u8]) -> Result<(), TransferError> {
    let mut left = stream;
    while !left.is_empty() {
        pipe.wait(PollFlags::OUT)?;
        match write(pipe.fd, left) {
            Ok(count) => left = left.get(count..).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn load(pipe: &Pipe<'_>) -> Result<Vec<u8>, TransferError> {
    let (mut stream, mut piece) = (Vec::new(), vec![0; PIECE]);
    loop {
        pipe.wait(PollFlags::IN)?;
        match read(pipe.fd, &mut *piece) {
            Ok(0) => return Ok(stream),
            Ok(count) => stream.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if stream.len() > STREAM_MAX {
            return Err(TransferError::Long);
        }
    }
}

/// An end of a pipe that does not block, as far as its other owners let it.
struct Pipe<'a> {
    fd: &'a OwnedFd,
    cancel: &'a OwnedFd,
    until: Option<Instant>,
}

impl<'a> Pipe<'a> {
    fn new(fd: &'a OwnedFd, cancel: &'a OwnedFd) -> Self {
        Self { fd, cancel, until: Instant::now().checked_add(WHOLE) }
    }

    /// Waits until there is something to be done.
    fn wait(&self, what: PollFlags) -> Result<(), TransferError> {
        let left =
            self.until.map_or(WHOLE, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Err(TransferError::Slow);
        }
        let mut fds = [PollFd::new(self.fd, what), PollFd::new(self.cancel, PollFlags::IN)];
        let time = Timespec::try_from(left.min(IDLE)).map_err(io::Error::other)?;
        let ready = match poll(&mut fds, Some(&time)) {
            // Who waits here asks again anyway.
            Err(Errno::INTR) => return Ok(()),
            ready => ready?,
        };
        let [_, cancelled] = fds;
        if !cancelled.revents().is_empty() {
            return Err(TransferError::Cancelled);
        }
        match ready {
            0 if left <= IDLE => Err(TransferError::Slow),
            0 => Err(TransferError::Idle),
            _ => Ok(()),
        }
    }
}

impl Link {
    /// Does what the session asks for, and answers, or lets the front end wait for the answer.
    pub(super) fn ask_state(
        &mut self,
        ask: StateAsk,
        rings: &mut FabricRings,
        status: &StatusCell,
    ) -> Result<(), Disconnect> {
        let begun = match ask {
            StateAsk::Save(pipe) => {
                let snapshot = rings.snapshot();
                let (stations, flows) = (snapshot.stations.len(), snapshot.flows.len());
                let stream = state::encode(&snapshot);
                say!(rings, info, stations, flows, bytes = stream.len(), "state is saved");
                rings.transfers.begin(Way::Save(pipe, stream))
            }
            StateAsk::Load(pipe) => rings.transfers.begin(Way::Load(pipe)),
            StateAsk::Check => return self.check_state(rings, status),
        };
        if let Err(error) = &begun {
            self.complain("refused", error, (rings, status));
        }
        let request = FrontendReq::SET_DEVICE_STATE_FD.into();
        self.connection.send(&StateAsk::reply(request, begun.is_ok()), None)
    }

    fn check_state(
        &mut self,
        rings: &mut FabricRings,
        status: &StatusCell,
    ) -> Result<(), Disconnect> {
        let Some(outcome) = rings.transfers.outcome(Instant::now()) else { return Ok(()) };
        let success = match outcome {
            Ok(None) => true,
            Ok(Some(snapshot)) => {
                let restored = rings.restore(&snapshot);
                let (stations, flows) = (restored.stations, restored.flows);
                let refused = restored.refused;
                say!(rings, info, stations, refused, flows, "goes on with its state");
                true
            }
            Err(error) => {
                self.complain("refused", &error, (rings, status));
                false
            }
        };
        let request = FrontendReq::CHECK_DEVICE_STATE.into();
        self.connection.send(&StateAsk::reply(request, success), None)
    }
}

impl VhostUserPort {
    /// Answers a front end that waits to hear of its transfer, if that has ended, and listens to
    /// it again.
    pub(super) fn answer_state(&mut self, ops: &mut EventOps<'_>) {
        let Some(link) = self.link.as_mut().filter(|_| self.rings.transfers.is_asked()) else {
            return;
        };
        if let Err(reason) = link.check_state(&mut self.rings, &self.status) {
            return self.unlink(&reason, ops);
        }
        if !self.rings.transfers.is_asked() {
            self.serve(ops);
        }
    }
}
