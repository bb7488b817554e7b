//! A way out to a ring that does not run at the moment, but will again: something about it changes,
//! or its place is unknown.
//!
//! ```text
//!  a receiveq ── it stops ──► Parked ── it starts ──► a receiveq
//!    backlog ───────────────► backlog, frames behind ─► backlog
//! ```
//!
//! It stands where the receiveq stood, so for who sends nothing changes: the port stays a member of
//! its VLANs, its pairs stay as many. Frames wait in their order, as they do for buffers.
//!
//! **Limits.** Those of the [`Backlog`]; frames beyond it are dropped, for a reason that was given.

use std::any::Any;
use std::sync::Arc;

use super::Backlog;
use crate::{Batch, DropReason, Egress, Notified, QueueCounters, QueueFault};

/// See the module's text.
#[derive(Debug)]
pub struct Parked {
    backlog: Backlog,
    counters: Arc<QueueCounters>,
    /// Why frames are dropped that have no room.
    full: DropReason,
}

impl Parked {
    /// Goes on with what waits already; the counters are those of the ring. What has no room is
    /// dropped as `full`.
    pub fn new(backlog: Backlog, counters: Arc<QueueCounters>, full: DropReason) -> Self {
        Self { backlog, counters, full }
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
            self.counters.egress.dropped(self.full, lost);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Parked;
    use crate::backlog::Backlog;
    use crate::{DropReason, Egress, FrameBuf, QueueCounters};

    #[test]
    fn what_has_no_room_is_dropped_for_the_reason_that_is_given() {
        for full in [DropReason::PortDown, DropReason::NotTranslated] {
            let counters: Arc<QueueCounters> = Arc::default();
            let mut parked = Parked::new(Backlog::new(1).unwrap(), Arc::clone(&counters), full);
            let mut frames = FrameBuf::default();
            frames.slot().unwrap().fill_private(&[7; 60]);
            frames.keep();
            let batch = frames.batch(virtq::mem::SegStore::empty(), None);
            for _ in 0..70 {
                parked.send(&batch, &[0]).unwrap();
            }
            assert_eq!(parked.held(), 64);
            assert_eq!(counters.egress.dropped_by_reason()[full as usize], 6);
        }
    }
}
