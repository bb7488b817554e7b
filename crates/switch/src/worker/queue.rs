//! One ingress queue of a worker.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use port::capture::IngressTap;
use port::{BURST_MAX, FrameBuf, Ingress, QueueId};

use crate::guard::Guard;
use crate::lane::Spread;
use crate::panics::drop_quietly;
use crate::pipeline::Origin;
use crate::shared::Shared;

/// Copies that one burst makes of its frames before others get their turn, about.
const COPIES_MAX: u64 = 256;

/// How a queue is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Looked at in every turn.
    Hot,
    /// Armed: looked at when its fd is readable.
    Cold,
    /// Left alone until its port may send again.
    Resting,
    /// Not served while its port is in quarantine.
    Parked,
    /// Not served any more: a fault.
    Broken,
}

/// A burst that began at a port with limits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admitted {
    now_ns: u64,
    /// Bytes that had arrived before.
    bytes: u64,
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
    /// What its port may send; none if that is everything.
    pub(super) guard: Option<Arc<Guard>>,
    /// How many frames its next burst may have.
    pub(super) most: usize,
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
            guard: None,
            most: BURST_MAX,
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

    /// Lets a burst begin, if the port may send.
    ///
    /// # Errors
    ///
    /// It may not: until when, in nanoseconds.
    #[inline(always)]
    pub(super) fn admit(
        &self,
        shared: &Shared,
        frames: &mut FrameBuf,
    ) -> Result<Option<Admitted>, u64> {
        let Some(guard) = &self.guard else {
            frames.limit(self.most);
            return Ok(None);
        };
        // A rate is kept more exactly than the worker's clock is.
        let now_ns = shared.now_ns();
        frames.limit(guard.admit(now_ns)?.min(self.most));
        Ok(Some(Admitted { now_ns, bytes: self.origin.counters.ingress.arrived_bytes() }))
    }

    /// Notes what a burst of `taken` frames cost, which made so many copies.
    #[inline(always)]
    pub(super) fn charge(&mut self, admitted: Option<Admitted>, taken: u64, copies: u64) {
        if let (Some(admitted), Some(guard)) = (admitted, &self.guard) {
            let bytes = self.origin.counters.ingress.arrived_bytes();
            guard.spend(admitted.now_ns, taken, bytes.wrapping_sub(admitted.bytes));
        }
        if (copies > COPIES_MAX || self.most < BURST_MAX) && taken > 0 {
            self.adapt(taken, copies);
        }
    }

    /// A burst of `taken` frames was flooded to so many more ports: one that makes others wait for
    /// longer than [`COPIES_MAX`] copies makes the next one smaller.
    #[cold]
    fn adapt(&mut self, taken: u64, copies: u64) {
        let fair = taken.saturating_mul(COPIES_MAX).checked_div(copies).unwrap_or(u64::MAX);
        self.most = if copies > COPIES_MAX {
            usize::try_from(fair).unwrap_or(BURST_MAX).clamp(1, BURST_MAX)
        } else {
            self.most.saturating_mul(2).min(BURST_MAX)
        };
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
