//! Rings whose memory is still arriving: each is served by a thread of its own, and no change
//! waits for one that sleeps.
//!
//! ```text
//!  message ─► Late::rest: all threads between two bursts? ─ yes ─► Session::handle ─► go_on
//!                                     no: the connection is not read ◄─ notice ─┘ (missed eventfd)
//! ```

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use event_manager::EventOps;
use port::deferral::{
    DeferredEgress, DeferredIngress, EgressRest, IngressRest, Notice, Pacer, Plan,
};
use port::{Egress, Ingress, QueueCounters, QueueFault};
use virtio_net::{Receiveq, Transmitq, TransmitqParts};
use virtq::mem::Userfault;

use super::VhostUserPort;
use crate::session::{RingIndex, SetUpError};

/// Whether this process may open a userfaultfd; why not is logged once.
pub(super) fn is_possible(port: &str) -> bool {
    static POSSIBLE: OnceLock<bool> = OnceLock::new();
    *POSSIBLE.get_or_init(|| match Userfault::open() {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(port, %error, "postcopy is not offered: no userfaultfd");
            false
        }
    })
}

/// What waits for a ring that does not run.
#[derive(Debug)]
pub(super) enum Rest {
    Ingress(IngressRest),
    Egress(EgressRest),
}

/// See the module's text.
pub(super) struct Late {
    threads: BTreeMap<RingIndex, Pacer>,
    rests: BTreeMap<RingIndex, Rest>,
    /// Threads that start now rest at first: messages are being handled.
    resting: bool,
    /// What rings were broken by while threads did not rest.
    faults: Vec<(RingIndex, QueueFault)>,
    notice: Notice,
}

impl Late {
    /// `notice` is written when a thread rests that was asked to.
    pub(super) fn new(notice: Arc<OwnedFd>) -> Self {
        let notice: Notice = Arc::new(move || {
            // It fails only when it is full, and then it is readable.
            let _ = rustix::io::write(&notice, &1u64.to_ne_bytes());
        });
        let (threads, rests) = (BTreeMap::new(), BTreeMap::new());
        Self { threads, rests, resting: false, faults: Vec::new(), notice }
    }

    /// Asks all threads to rest. Returns whether all do, now; if so, end that with
    /// [`Self::go_on`]. If not, the notice comes.
    pub(super) fn rest(&mut self) -> bool {
        let mut all = true;
        for thread in self.threads.values() {
            all &= thread.rest();
        }
        self.resting = all;
        all
    }

    /// Lets all threads go on.
    pub(super) fn go_on(&mut self) {
        self.resting = false;
        self.threads.values().for_each(Pacer::go_on);
    }

    /// Keeps a fault until all threads rest.
    pub(super) fn remember(&mut self, ring: RingIndex, fault: &QueueFault) {
        self.faults.push((ring, fault.clone()));
    }

    /// Whether a ring runs in a thread of its own.
    pub(super) fn serves(&self, ring: RingIndex) -> bool {
        self.threads.contains_key(&ring)
    }

    /// Whether something is left of a ring that does not run.
    pub(super) fn has_rest(&self, ring: RingIndex) -> bool {
        self.rests.contains_key(&ring)
    }

    /// What is left of rings that do not run.
    pub(super) fn take_rests(&mut self) -> BTreeMap<RingIndex, Rest> {
        std::mem::take(&mut self.rests)
    }

    fn plan(&self, ring: RingIndex, port: &str) -> Plan {
        let name = format!("late-{port}-{}", ring.0);
        Plan { name, rests: self.resting, notice: Arc::clone(&self.notice) }
    }

    /// A transmitq in a thread of its own, behind what is left of the one before.
    pub(super) fn ingress(
        &mut self,
        ring: RingIndex,
        port: &str,
        parts: TransmitqParts,
    ) -> Result<Box<dyn Ingress>, SetUpError> {
        let counted: Arc<QueueCounters> = Arc::default();
        let shown = Arc::clone(&parts.counters);
        let queue =
            Transmitq::untouched(TransmitqParts { counters: Arc::clone(&counted), ..parts });
        let rest = match self.rests.remove(&ring) {
            Some(Rest::Ingress(rest)) => rest,
            _ => IngressRest::empty(shown).map_err(|_| SetUpError::NoThread)?,
        };
        let half = DeferredIngress::start(self.plan(ring, port), queue, counted, rest);
        let half = half.map_err(|_| SetUpError::NoThread)?;
        self.threads.extend(half.pacer().map(|pacer| (ring, pacer)));
        Ok(Box::new(half))
    }

    /// The same for a receiveq, which was not touched yet.
    pub(super) fn egress(
        &mut self,
        ring: RingIndex,
        port: &str,
        queue: Receiveq,
    ) -> Result<Box<dyn Egress>, SetUpError> {
        let rest = match self.rests.remove(&ring) {
            Some(Rest::Egress(rest)) => rest,
            _ => EgressRest::empty().map_err(|_| SetUpError::NoThread)?,
        };
        let begin = Receiveq::begin;
        let half = DeferredEgress::start(self.plan(ring, port), queue, begin, rest);
        let half = half.map_err(|_| SetUpError::NoThread)?;
        let _ = self.threads.insert(ring, half.pacer());
        Ok(Box::new(half))
    }

    /// A transmitq whose memory is there: behind what is left of the time when it was not.
    pub(super) fn behind_ingress(&mut self, ring: RingIndex, queue: Transmitq) -> Box<dyn Ingress> {
        match self.rests.remove(&ring) {
            Some(Rest::Ingress(rest)) if !rest.is_empty() => {
                Box::new(DeferredIngress::behind(rest, queue))
            }
            _ => Box::new(queue),
        }
    }

    /// A receiveq whose memory is there: gets what is left of the time when it was not.
    pub(super) fn behind_egress(
        &mut self,
        ring: RingIndex,
        mut queue: Receiveq,
    ) -> Box<dyn Egress> {
        if let Some(Rest::Egress(rest)) = self.rests.remove(&ring) {
            // A fault is met again by the next frame.
            let _ = rest.send_to(&mut queue);
        }
        Box::new(queue)
    }

    /// The transmitq in what the switch gave back. None if there was a bug.
    pub(super) fn take_ingress(
        &mut self,
        ring: RingIndex,
        ingress: Box<dyn Ingress>,
    ) -> Option<Transmitq> {
        let any = match ingress.into_any().downcast::<Transmitq>() {
            Ok(queue) => return Some(*queue),
            Err(any) => any,
        };
        let _ = self.threads.remove(&ring);
        let (queue, rest) = downcast::<DeferredIngress<Transmitq>>(any)?.into_parts()?;
        let _ = self.rests.insert(ring, Rest::Ingress(rest));
        Some(queue)
    }

    /// The same for a receiveq.
    pub(super) fn take_egress(
        &mut self,
        ring: RingIndex,
        egress: Box<dyn Egress>,
    ) -> Option<Receiveq> {
        let any = match egress.into_any().downcast::<Receiveq>() {
            Ok(queue) => return Some(*queue),
            Err(any) => any,
        };
        let _ = self.threads.remove(&ring);
        let (queue, rest) = downcast::<DeferredEgress<Receiveq>>(any)?.into_parts()?;
        let _ = self.rests.insert(ring, Rest::Egress(rest));
        Some(queue)
    }
}

fn downcast<T: 'static>(any: Box<dyn Any + Send>) -> Option<T> {
    any.downcast().ok().map(|concrete| *concrete)
}

impl VhostUserPort {
    /// Whether the guest's memory is still arriving: the port cannot be handed to another process.
    pub fn is_late(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.session.is_late())
    }

    /// A thread rests: goes on with what waited for that, if all do.
    pub(super) fn look_again(&mut self, ops: &mut EventOps<'_>) {
        if !self.rings.late.faults.is_empty() && self.rings.late.rest() {
            for (ring, fault) in std::mem::take(&mut self.rings.late.faults) {
                self.take_fault(ring, &fault);
            }
            self.rings.late.go_on();
        }
        // One that rests is served when that ends.
        if !self.rests() && self.link.as_ref().is_some_and(|link| link.waits) {
            self.serve(ops);
        }
    }
}

impl fmt::Debug for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Late").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}
