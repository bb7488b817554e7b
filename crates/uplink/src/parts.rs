//! An open uplink as file descriptors and a text: all that another process needs to go on with it.
//!
//! ```text
//!  this process: workers let go ─► parts() ─► text, fds ─(SCM_RIGHTS)─► from_parts(): new mappings
//!                                     │                                      │
//!      it works on with what it has ◄─┴─ no                             yes ─┴─► leave(), drop
//! ```
//!
//! Taking parts changes nothing: fds are duplicates, and whoever took them may go on as if nothing
//! had happened if the other process does not. Only one of both may use the queues. Who drops a
//! whole uplink undoes what was changed on the interface; who leaves it to the other says `leave`.
//! **Trust.** The text comes from a process that we trust as ourselves: wrong numbers in it are
//! refused, so that no memory is touched that is not ours.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What an open uplink is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the fds are, and where the rings are: JSON.
    pub state: String,
    /// In the order that the state means.
    pub fds: Vec<OwnedFd>,
}

/// Why an uplink could not be taken apart or put together again.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// The state is not what this version knows.
    #[error("the state of the uplink cannot be read: {0}")]
    State(String),
    /// The state says more than what came with it.
    #[error("the state of the uplink speaks of more than the {0} fds that came with it")]
    Fds(usize),
    /// The rings were made by a version that divides memory in another way.
    #[error("the uplink's {what} is {found}, this version knows {known} only")]
    Layout {
        /// Of what.
        what: &'static str,
        /// What the state says.
        found: u64,
        /// What would be right.
        known: u64,
    },
    /// The rings cannot be mapped a second time.
    #[error(
        "cannot map the rings of interface {name}: {error} (AF_XDP rings of a bound socket can be \
        mapped since Linux 6.4)"
    )]
    Map {
        /// The interface.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// Anything else.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
}

impl PartsError {
    pub(crate) fn state(what: impl std::fmt::Display) -> Self {
        Self::State(what.to_string())
    }
}

/// Collects duplicates of fds.
#[derive(Debug, Default)]
pub(crate) struct Collected(Vec<OwnedFd>);

impl Collected {
    pub(crate) fn add(&mut self, fd: impl AsFd) -> Result<(), PartsError> {
        let what = "duplicate a file descriptor";
        let fd = fd.as_fd().try_clone_to_owned();
        self.0.push(fd.map_err(|error| PartsError::System { what, error })?);
        Ok(())
    }

    pub(crate) fn finish(self, state: &impl Serialize) -> Result<Parts, PartsError> {
        let state = serde_json::to_string(state).map_err(PartsError::state)?;
        Ok(Parts { state, fds: self.0 })
    }
}

/// Hands out fds in the order in which they were collected.
#[derive(Debug)]
pub(crate) struct Remaining {
    fds: std::vec::IntoIter<OwnedFd>,
    count: usize,
}

impl Remaining {
    /// The state of an uplink of `kind`, and its fds.
    pub(crate) fn open<T: DeserializeOwned>(
        parts: Parts,
        kind: &str,
    ) -> Result<(T, Self), PartsError> {
        let state: serde_json::Value =
            serde_json::from_str(&parts.state).map_err(PartsError::state)?;
        let found = state.get("kind").and_then(serde_json::Value::as_str).unwrap_or_default();
        if found != kind {
            return Err(PartsError::state(format!("it is of kind {found:?}, not {kind:?}")));
        }
        let state = serde_json::from_value(state).map_err(PartsError::state)?;
        let count = parts.fds.len();
        Ok((state, Self { fds: parts.fds.into_iter(), count }))
    }

    pub(crate) fn next(&mut self) -> Result<OwnedFd, PartsError> {
        self.fds.next().ok_or(PartsError::Fds(self.count))
    }

    /// The next one if there is one of that kind.
    pub(crate) fn next_if(&mut self, there: bool) -> Result<Option<OwnedFd>, PartsError> {
        there.then(|| self.next()).transpose()
    }
}

/// Refuses a layout that is not ours.
pub(crate) fn check_layout(what: &'static str, found: u32, known: u32) -> Result<(), PartsError> {
    if found == known {
        return Ok(());
    }
    Err(PartsError::Layout { what, found: found.into(), known: known.into() })
}

/// Each of `counters` needs a queue and the other way round.
pub(crate) fn check_queues(queues: usize, counters: usize) -> Result<(), PartsError> {
    if queues == counters {
        return Ok(());
    }
    Err(PartsError::state(format!("it has {queues} queues, counters came for {counters}")))
}
