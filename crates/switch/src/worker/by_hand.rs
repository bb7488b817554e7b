//! A worker without a thread of its own: it takes a turn when it is told to.
//!
//! It is the worker that threads run, behind a lock: between turns control takes that lock and
//! lets the worker read its mail, so that nothing ever waits for a next turn.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_utils::CachePadded;

use super::Worker;

/// What a turn found: see [`crate::Switch::turn`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Frames moved.
    Worked,
    /// No queue had a frame, and some are still looked at: take another turn soon.
    Idle,
    /// No queue had a frame, and all are armed: [`crate::Switch::turn_fd`] becomes readable when
    /// another turn is due.
    Quiet,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct ByHand {
    worker: CachePadded<Mutex<Worker>>,
    wake: OwnedFd,
}

impl ByHand {
    pub(super) fn new(mut worker: Worker) -> std::io::Result<Self> {
        worker.sleeps = false;
        worker.begin();
        let wake = worker.waiter.as_fd().try_clone_to_owned()?;
        Ok(Self { worker: CachePadded::new(Mutex::new(worker)), wake })
    }

    /// Takes a turn.
    pub(crate) fn turn(&self) -> Turn {
        let mut worker = self.lock();
        if !worker.attend() {
            return Turn::Quiet;
        }
        let worked = worker.turn();
        worker.rest(worked);
        match (worked, worker.is_quiet()) {
            (true, _) => Turn::Worked,
            (false, false) => Turn::Idle,
            (false, true) => Turn::Quiet,
        }
    }

    /// Takes over what control asks for, between turns.
    pub(super) fn attend(&self) {
        let _ = self.lock().attend();
    }

    /// Readable while a turn is due.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Panics of ports are caught inside of a turn; after any other the worker goes on.
    fn lock(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
