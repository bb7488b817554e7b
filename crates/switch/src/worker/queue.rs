//! One ingress queue of a worker.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use port::capture::IngressTap;
use port::{BURST_MAX, FrameBuf, Ingress, QueueId};

use super::share::Carried;
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

/// Since when a queue has no work. Between two looks at the clock a busy worker knows only that it
/// is later than the last one, so time counts from the next one on.
#[derive(Debug, Clone, Copy)]
pub(super) enum Idle {
    /// Since this look at the clock, or later.
    After(u64),
    /// Since then, in nanoseconds.
    Since(u64),
}

impl Idle {
    /// For how long a queue that has no work now has had none.
    #[inline]
    pub(super) fn ns(idle: &mut Option<Self>, looks: u64, now_ns: u64) -> u64 {
        match *idle {
            Some(Self::Since(since_ns)) => return now_ns.wrapping_sub(since_ns),
            Some(Self::After(look)) if look != looks => *idle = Some(Self::Since(now_ns)),
            Some(Self::After(_)) => {}
            None => *idle = Some(Self::After(looks)),
        }
        0
    }
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
    pub(super) idle: Option<Idle>,
    /// Whether its fd is in the worker's epoll: else it can only be polled.
    pub(super) wakes: bool,
    /// What its port may send; none if that is everything.
    pub(super) guard: Option<Arc<Guard>>,
    /// How many frames its next burst may have: its floods make others wait.
    pub(super) most: usize,
    /// The same: its frames make others wait.
    pub(super) share: usize,
    /// What it carried until the last look at all queues; what that since the one before cost, and
    /// what each of those frames did.
    pub(super) carried: Carried,
    pub(super) cost: u64,
    pub(super) each: u64,
    /// Whether it is looked at after each other queue.
    pub(super) light: bool,
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
            idle: None,
            wakes: false,
            guard: None,
            most: BURST_MAX,
            share: BURST_MAX,
            carried: Carried::default(),
            cost: 0,
            each: 0,
            light: false,
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
        (shared, clock_ns): (&Shared, u64),
        frames: &mut FrameBuf,
    ) -> Result<Option<Admitted>, u64> {
        let Some(guard) = &self.guard else {
            frames.limit(self.most.min(self.share));
            return Ok(None);
        };
        let (now_ns, most) = match guard.admits_all(clock_ns) {
            true => (clock_ns, BURST_MAX),
            // A rate is kept more exactly than the worker's clock is.
            false => {
                let now_ns = shared.now_ns();
                (now_ns, guard.admit(now_ns)?)
            }
        };
        frames.limit(most.min(self.most).min(self.share));
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

#[cfg(test)]
mod tests {
    use super::Idle;

    #[test]
    fn time_that_a_busy_worker_did_not_see_pass_is_no_idleness() {
        let mut idle = None;
        // It looked at the clock at 100, and now it is much later, which it does not know.
        assert_eq!(Idle::ns(&mut idle, 1, 100), 0);
        assert_eq!(Idle::ns(&mut idle, 1, 100), 0);
        // The next look: the queue may have had work just before.
        assert_eq!(Idle::ns(&mut idle, 2, 200_000), 0);
        assert_eq!(Idle::ns(&mut idle, 2, 200_000), 0);
        assert_eq!(Idle::ns(&mut idle, 3, 200_040), 40);
    }
}
