//! One ingress queue of a worker.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use port::capture::IngressTap;
use port::{Ingress, QueueId};

use crate::lane::Spread;
use crate::panics::drop_quietly;
use crate::pipeline::Origin;

/// How a queue is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Looked at in every turn.
    Hot,
    /// Armed: looked at when its fd is readable.
    Cold,
    /// Not served while its port is in quarantine.
    Parked,
    /// Not served any more: a fault.
    Broken,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) id: QueueId,
    pub(super) ingress: Box<dyn Ingress>,
    pub(super) origin: Origin,
    pub(super) state: State,
    /// Since when it had no work; none while it has.
    pub(super) idle_since_ns: Option<u64>,
    /// Whether its fd is in the worker's epoll: else it can only be polled.
    pub(super) wakes: bool,
    /// Whether the ingress was armed and not disarmed since.
    armed: bool,
    /// Whether a tap is around the ingress.
    has_tap: bool,
    /// Takes frames of other workers' flows away.
    pub(super) spread: Option<Spread>,
}

impl Queue {
    pub(super) fn new(id: QueueId, ingress: Box<dyn Ingress>) -> Self {
        let origin = Origin::new(id.port, Some(id.pair), Arc::clone(ingress.counters()));
        let state = State::Hot;
        Self {
            id,
            ingress,
            origin,
            state,
            idle_since_ns: None,
            wakes: false,
            armed: false,
            has_tap: false,
            spread: None,
        }
    }

    /// The same queue, whose frames are spread over the workers.
    pub(super) fn spread(mut self, spread: Option<Spread>) -> Self {
        self.spread = spread;
        self
    }

    /// The same queue with this tap around its ingress, and no other.
    pub(super) fn tapped(mut self, tap: Option<IngressTap>) -> Self {
        let bare = if self.has_tap { IngressTap::unwrap(self.ingress) } else { self.ingress };
        self.has_tap = tap.is_some();
        self.origin.fates = tap.as_ref().map(IngressTap::fates);
        self.ingress = match tap {
            Some(tap) => tap.wrap(bare),
            None => bare,
        };
        self
    }

    /// Arms the notification. Returns true if there are frames already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        self.ingress.arm()
    }

    /// Takes the arming back, if there is one.
    #[inline(always)]
    pub(super) fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.ingress.disarm();
        }
    }

    /// The ingress, disarmed, for who attached it. None if that panics.
    pub(super) fn into_ingress(self) -> Option<Box<dyn Ingress>> {
        let mut this = self.tapped(None);
        let disarmed = catch_unwind(AssertUnwindSafe(|| this.disarm()));
        match disarmed {
            Ok(()) => Some(this.ingress),
            Err(_) => {
                drop_quietly(this.ingress);
                None
            }
        }
    }

    /// Gets rid of a queue that panicked. Returns how many frames it took with it.
    pub(super) fn bury(mut self) -> u64 {
        let lost = self.origin.count_panicked();
        drop_quietly(self.ingress);
        lost
    }
}
