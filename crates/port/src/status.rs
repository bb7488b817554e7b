//! A port's state in words, and why.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What a port is able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortState {
    /// It carries frames.
    Up,
    /// It waits for somebody: a front end, a driver, an interface.
    Waiting,
    /// Something that it needs is gone.
    Down,
    /// Its driver broke a ring.
    Broken,
    /// A bug or a hostile act took it out of service until it is reset.
    Quarantined,
}

impl PortState {
    /// The name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Waiting => "waiting",
            Self::Down => "down",
            Self::Broken => "broken",
            Self::Quarantined => "quarantined",
        }
    }

    /// The state of a name in statistics.
    pub fn named(name: &str) -> Option<Self> {
        let all = [Self::Up, Self::Waiting, Self::Down, Self::Broken, Self::Quarantined];
        all.into_iter().find(|state| state.name() == name)
    }
}

/// State, reason and since when.
#[derive(Debug, Clone)]
pub struct PortStatus {
    /// What the port is able to do.
    pub state: PortState,
    /// Why, in words for people; empty when up.
    pub reason: String,
    /// When the state or the reason changed last.
    pub since: Instant,
    /// The last error and when it happened, kept after recovery.
    pub last_error: Option<(String, Instant)>,
}

/// A port's status, shared by its owner, the workers and the control socket.
#[derive(Debug, Clone)]
pub struct StatusCell {
    inner: Arc<Mutex<PortStatus>>,
}

impl StatusCell {
    /// A port that waits for `reason`.
    pub fn waiting(reason: impl Into<String>) -> Self {
        let status = PortStatus {
            state: PortState::Waiting,
            reason: reason.into(),
            since: Instant::now(),
            last_error: None,
        };
        Self { inner: Arc::new(Mutex::new(status)) }
    }

    /// Sets state and reason. A quarantined port stays so until [`Self::reset`].
    pub fn set(&self, state: PortState, reason: impl Into<String>) {
        let reason = reason.into();
        let mut status = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if status.state == PortState::Quarantined {
            return;
        }
        if status.state != state || status.reason != reason {
            (status.state, status.reason, status.since) = (state, reason, Instant::now());
        }
    }

    /// Remembers an error without changing the state.
    pub fn error(&self, text: impl Into<String>) {
        let mut status = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        status.last_error = Some((text.into(), Instant::now()));
    }

    /// Ends a quarantine: the port waits for `reason`.
    pub fn reset(&self, reason: impl Into<String>) {
        let mut status = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (status.state, status.reason) = (PortState::Waiting, reason.into());
        status.since = Instant::now();
    }

    /// Takes over the status that the port had in another process, whatever it was.
    pub fn restore(&self, status: PortStatus) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    /// The present status.
    pub fn read(&self) -> PortStatus {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{PortState, StatusCell};

    #[test]
    fn a_status_is_taken_over_whole() {
        let old = StatusCell::waiting("for the front end");
        old.error("once");
        old.set(PortState::Quarantined, "bug");
        let new = StatusCell::waiting("for its queues");
        new.restore(old.read());
        new.set(PortState::Up, "");
        let status = new.read();
        assert_eq!((status.state, status.reason.as_str()), (PortState::Quarantined, "bug"));
        assert_eq!(status.since, old.read().since);
        assert_eq!(status.last_error.unwrap().0, "once");
        assert_eq!(PortState::named("quarantined"), Some(PortState::Quarantined));
        assert_eq!(PortState::named("asleep"), None);
    }

    #[test]
    fn a_quarantine_ends_only_by_reset() {
        let cell = StatusCell::waiting("for the front end");
        cell.set(PortState::Quarantined, "bug");
        cell.set(PortState::Up, "");
        assert_eq!(cell.read().state, PortState::Quarantined);
        cell.reset("for the front end");
        cell.set(PortState::Up, "");
        assert_eq!(cell.read().state, PortState::Up);
    }
}
