//! Receiveqs that will go on: a message changes something about them, or all that they lack are
//! translations of their own addresses.
//!
//! ```text
//!  running ── log, memory, call … change ─► parked ── changed ──► running, and what waits is sent
//!  running ── INVALIDATE of its place ────►   │ ───── UPDATE ───►
//!  set up  ── its place is unknown ───────►   └── stopped, disabled, gone ──► what waits is lost
//! ```
//!
//! Frames meet a receiveq or what stands in its place ([`Parked`]): one is put for the other under
//! the lock of the way out, so that none finds the port without.

use std::any::Any;
use std::sync::Arc;

use port::backlog::{Backlog, Parked};
use port::{DropReason, Egress};
use virtio_net::{Receiveq, ReceiveqParts};

use super::rings::FabricRings;
use crate::session::{RingIndex, SetUpError};

/// Bursts that wait for a receiveq that does not run, or for translations of its buffers.
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
        let at = self.at(ring);
        self.ask_workers(|fabric| fabric.attach_egress(at, egress));
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
        // Made before the lock is taken; a receiveq behind a vIOMMU has its own.
        let mut room = self.spare.take().or_else(|| new_backlog().ok());
        let change = &mut |old: Box<dyn Egress>| {
            let counters = Arc::clone(old.counters());
            taken = downcast::<Receiveq>(old);
            let backlog = taken.as_mut().and_then(Receiveq::take_backlog);
            let parked = match (backlog, room.take()) {
                (Some(backlog), _) => Parked::new(backlog, counters, DropReason::NotTranslated),
                (None, room) => {
                    Parked::new(room.unwrap_or_default(), counters, DropReason::PortDown)
                }
            };
            Box::new(parked) as Box<dyn Egress>
        };
        if self.fabric.exchange_egress(self.at(ring), change) {
            let _ = self.parked.insert(ring);
        }
        self.spare = room;
        taken
    }

    /// Lets frames wait for a receiveq that does not run.
    pub(super) fn attach_parked(&mut self, ring: RingIndex) {
        let waiting = self.waiting.remove(&ring).map_or_else(new_backlog, Ok);
        let backlog = waiting.unwrap_or_default();
        let parked = Parked::new(backlog, (self.counters)(ring.pair()), DropReason::NotTranslated);
        let _ = self.parked.insert(ring);
        let at = self.at(ring);
        self.ask_workers(|fabric| fabric.attach_egress(at, Box::new(parked)));
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
