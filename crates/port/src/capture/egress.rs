//! The tap around a way out.

use std::any::Any;
use std::sync::Arc;

use super::ring::{Inlet, Item, now_ns};
use super::{Direction, Tap};
use crate::{Batch, DropReason, Egress, EgressCounters, Notified, QueueCounters, QueueFault};

/// What the captures of a port need at one way out.
#[derive(Debug)]
pub struct EgressTap {
    inlets: Vec<Inlet>,
}

impl EgressTap {
    /// None if nobody captures.
    pub fn new(taps: &[Tap], pair: u16) -> Option<Self> {
        let inlets: Vec<_> =
            taps.iter().map(|tap| Inlet::new(&tap.0, pair, Direction::Out)).collect();
        (!inlets.is_empty()).then_some(Self { inlets })
    }

    /// Puts the tap around `inner`.
    pub fn wrap(self, inner: Box<dyn Egress>) -> Box<dyn Egress> {
        Box::new(TappedEgress { inner, inlets: self.inlets })
    }

    /// Takes off what [`Self::wrap`] put around. The caller knows that it did.
    ///
    /// # Panics
    ///
    /// There is no tap around `tapped`: a bug.
    #[expect(clippy::panic, reason = "a bug of the switch, which keeps the books of its taps")]
    pub fn unwrap(tapped: Box<dyn Egress>) -> Box<dyn Egress> {
        match tapped.into_any().downcast::<TappedEgress>() {
            Ok(tapped) => tapped.inner,
            Err(_) => panic!("no tap is around this egress"),
        }
    }
}

/// An egress whose frames are copied.
#[derive(Debug)]
struct TappedEgress {
    inner: Box<dyn Egress>,
    inlets: Vec<Inlet>,
}

impl Egress for TappedEgress {
    /// One frame at a time: what is counted meanwhile is that frame's fate.
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let Self { inner, inlets } = self;
        let counters = Arc::clone(inner.counters());
        let time_ns = now_ns();
        let mut result = Ok(());
        for (at, one) in picked.iter().enumerate() {
            let before = counters.egress.dropped_by_reason();
            // After a fault the egress is not asked again; it has dropped what it was given.
            result = inner.send(batch, std::slice::from_ref(one));
            let fate = fate(&before, &counters.egress);
            let Some(frame) = batch.frames().get(usize::from(*one)) else { continue };
            let item = Item { batch, frame, index: *one, fate, time_ns };
            inlets.iter_mut().for_each(|inlet| offer(inlet, &item));
            if result.is_err() {
                let left = picked.get(at.wrapping_add(1)..).unwrap_or_default();
                lose(batch, left, (&counters.egress, inlets));
                break;
            }
        }
        inlets.iter().for_each(Inlet::wake);
        result
    }

    fn held(&self) -> u64 {
        self.inner.held()
    }

    fn resume(&mut self) -> Result<(), QueueFault> {
        self.inner.resume()
    }

    fn notify(&mut self) -> Notified {
        self.inner.notify()
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.inner.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// Why a frame was dropped since `before`, if it was.
fn fate(before: &[u64; DropReason::COUNT], counters: &EgressCounters) -> Option<DropReason> {
    let after = counters.dropped_by_reason();
    let mut reasons = DropReason::ALL.iter().zip(before.iter().zip(&after));
    reasons.find(|(_, (before, after))| before != after).map(|(reason, _)| *reason)
}

/// Counts a frame, and stores it if it is wanted.
fn offer(inlet: &mut Inlet, item: &Item<'_>) {
    if item.fate.is_some() && !inlet.wants_drops() {
        return;
    }
    inlet.counts.seen.add(1);
    if inlet.accepts(item.frame) {
        inlet.counts.accepted.add(1);
        if !inlet.store(item) {
            inlet.counts.skipped.add(1);
        }
    }
}

/// The egress broke: it drops what it was not given yet.
#[cold]
fn lose(batch: &Batch<'_>, left: &[u16], (counters, inlets): (&EgressCounters, &mut [Inlet])) {
    counters.dropped(DropReason::PortDown, left.len() as u64);
    let time_ns = now_ns();
    for index in left {
        let Some(frame) = batch.frames().get(usize::from(*index)) else { continue };
        let fate = Some(DropReason::PortDown);
        let item = Item { batch, frame, index: *index, fate, time_ns };
        inlets.iter_mut().for_each(|inlet| offer(inlet, &item));
    }
}
