//! A way out to a ring that has no place at the moment, but will have one again.
//!
//! ```text
//!  a receiveq ── its translation goes ──► Parked ── the translation comes ──► a receiveq
//!    backlog ──────────────────────────► backlog, frames behind ──────────────► backlog
//! ```
//!
//! It stands where the receiveq stood, so for who sends nothing changes: the port stays a member of
//! its VLANs, its pairs stay as many. Frames wait in their order, as they do for buffers.
//!
//! **Limits.** Those of the [`Backlog`]; frames beyond it are dropped as `not_translated`.

use std::any::Any;
use std::sync::Arc;

use super::Backlog;
use crate::{Batch, DropReason, Egress, Notified, QueueCounters, QueueFault};

/// See the module's text.
#[derive(Debug)]
pub struct Parked {
    backlog: Backlog,
    counters: Arc<QueueCounters>,
}

impl Parked {
    /// Goes on with what waits already; the counters are those of the ring.
    pub fn new(backlog: Backlog, counters: Arc<QueueCounters>) -> Self {
        Self { backlog, counters }
    }

    /// What waits, for the ring.
    pub fn into_backlog(self) -> Backlog {
        self.backlog
    }
}

impl Egress for Parked {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let lost = self.backlog.put_picked(batch, picked);
        if lost > 0 {
            self.counters.egress.dropped(DropReason::NotTranslated, lost);
        }
        Ok(())
    }

    fn held(&self) -> u64 {
        self.backlog.frames()
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}
