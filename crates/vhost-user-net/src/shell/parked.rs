//! Receiveqs that have no place: all that they lack are translations of their own addresses.
//!
//! ```text
//!  running ── INVALIDATE of its place ──► parked ── UPDATE ──► running, and what waits is sent
//!  set up  ── its place is unknown ─────►   └── stopped, disabled, gone ──► what waits is lost
//! ```
//!
//! Frames meet a receiveq or what stands in its place ([`Parked`]): one is put for the other under
//! the lock of the way out, so that none finds the port without.

use std::any::Any;
use std::sync::Arc;

use port::Egress;
use port::backlog::{Backlog, Parked};
use virtio_net::{Receiveq, ReceiveqParts};

use super::rings::FabricRings;
use crate::session::{RingIndex, SetUpError};

/// Bursts that wait for translations of a receiveq, or of its buffers.
const WAITING_PARCELS: usize = 8;

impl FabricRings {
    /// Hands a receiveq to the switch, with what waits for it.
    pub(super) fn start_egress(
        &mut self,
        ring: RingIndex,
        parts: ReceiveqParts,
        (late, translated): (bool, bool),
    ) -> Result<(), SetUpError> {
        if late || self.late.has_rest(ring) {
            self.unpark(ring);
        }
        let mut queue = if late { Receiveq::untouched(parts) } else { Receiveq::new(parts) };
        if self.parked.remove(&ring) {
            self.put_for_parked(ring, queue);
            self.fabric.resume_egress(self.at(ring));
            return Ok(());
        }
        let waiting = match self.waiting.remove(&ring) {
            None if translated => Some(new_backlog()?),
            waiting => waiting,
        };
        if let Some(waiting) = waiting {
            queue.set_backlog(waiting);
        }
        let egress = match late {
            true => self.late.egress(ring, &self.name, queue)?,
            false => self.late.behind_egress(ring, queue),
        };
        let waits = egress.held() > 0;
        self.fabric.attach_egress(self.at(ring), egress);
        if waits {
            self.fabric.resume_egress(self.at(ring));
        }
        Ok(())
    }

    /// Puts a receiveq where frames wait for it.
    fn put_for_parked(&self, ring: RingIndex, queue: Receiveq) {
        let mut queue = Some(Box::new(queue));
        let change = &mut |old: Box<dyn Egress>| match queue.take() {
            Some(mut queue) => {
                if let Some(parked) = downcast::<Parked>(old) {
                    queue.set_backlog(parked.into_backlog());
                }
                queue as Box<dyn Egress>
            }
            None => old,
        };
        let _ = self.fabric.exchange_egress(self.at(ring), change);
        // A bug closed what stood there.
        if let Some(queue) = queue {
            self.fabric.attach_egress(self.at(ring), queue);
        }
    }

    /// Lets frames wait where a receiveq runs. Returns it; none if there was a bug.
    pub(super) fn put_parked(&mut self, ring: RingIndex) -> Option<Receiveq> {
        let mut taken = None;
        let change = &mut |old: Box<dyn Egress>| {
            let counters = Arc::clone(old.counters());
            taken = downcast::<Receiveq>(old);
            let backlog = taken.as_mut().and_then(Receiveq::take_backlog);
            Box::new(Parked::new(backlog.unwrap_or_default(), counters)) as Box<dyn Egress>
        };
        if self.fabric.exchange_egress(self.at(ring), change) {
            let _ = self.parked.insert(ring);
        }
        taken
    }

    /// Lets frames wait for a receiveq that does not run.
    pub(super) fn attach_parked(&mut self, ring: RingIndex) {
        let waiting = self.waiting.remove(&ring).map_or_else(new_backlog, Ok);
        let backlog = waiting.unwrap_or_default();
        let parked = Parked::new(backlog, (self.counters)(ring.pair()));
        let _ = self.parked.insert(ring);
        self.fabric.attach_egress(self.at(ring), Box::new(parked));
    }

    /// Takes what stands in a receiveq's place away; frames that waited there wait here.
    pub(super) fn unpark(&mut self, ring: RingIndex) {
        if !self.parked.remove(&ring) {
            return;
        }
        let parked = self.fabric.detach_egress(self.at(ring)).and_then(downcast::<Parked>);
        self.waiting.extend(parked.map(|parked| (ring, parked.into_backlog())));
    }
}

fn new_backlog() -> Result<Backlog, SetUpError> {
    Backlog::new(WAITING_PARCELS).map_err(|_| SetUpError::NoRoom)
}

fn downcast<T: Any>(egress: Box<dyn Egress>) -> Option<T> {
    egress.into_any().downcast().ok().map(|concrete| *concrete)
}
