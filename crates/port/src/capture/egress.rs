//! The tap around a way out.

use std::any::Any;
use std::sync::Arc;

use super::ring::{Inlet, Item, Stored, now_ns};
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
        let outs = self.inlets.into_iter().map(|inlet| (inlet, Stored::Unwanted)).collect();
        Box::new(TappedEgress { inner, outs })
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
    /// Each with what became of the frame that is sent.
    outs: Vec<(Inlet, Stored)>,
}

impl Egress for TappedEgress {
    /// One frame at a time: what is counted meanwhile is that frame's fate. It is stored before it
    /// is sent: what answers it comes later.
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let Self { inner, outs } = self;
        let counters = Arc::clone(inner.counters());
        let time_ns = now_ns();
        let mut result = Ok(());
        for (at, one) in picked.iter().enumerate() {
            let before = counters.egress.dropped_by_reason();
            offer(outs, (batch, *one), time_ns);
            // After a fault the egress is not asked again; it has dropped what it was given.
            result = inner.send(batch, std::slice::from_ref(one));
            tell(outs, *one, fate(&before, &counters.egress));
            if result.is_err() {
                let left = picked.get(at.wrapping_add(1)..).unwrap_or_default();
                lose(batch, left, (&counters.egress, outs));
                break;
            }
        }
        outs.iter().for_each(|(inlet, _)| inlet.wake());
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

/// Stores a frame of a batch where it is wanted.
fn offer(outs: &mut [(Inlet, Stored)], (batch, index): (&Batch<'_>, u16), time_ns: u64) {
    let frame = batch.frames().get(usize::from(index));
    for (inlet, stored) in outs {
        *stored = frame
            .map_or(Stored::Unwanted, |frame| inlet.offer(&Item { batch, frame, index, time_ns }));
    }
}

/// Counts the frame that was offered, and tells what became of it.
fn tell(outs: &mut [(Inlet, Stored)], index: u16, fate: Option<DropReason>) {
    for (inlet, stored) in outs {
        if fate.is_none() || inlet.wants_drops() {
            inlet.counts.seen.add(1);
            inlet.counts.accepted.add(u64::from(*stored != Stored::Unwanted));
            inlet.counts.skipped.add(u64::from(*stored == Stored::NoRoom));
        }
        if *stored == Stored::Yes {
            if let Some(fate) = fate {
                inlet.note(index, fate);
            }
            inlet.end_burst();
        }
    }
}

/// The egress broke: it drops what it was not given yet.
#[cold]
fn lose(
    batch: &Batch<'_>,
    left: &[u16],
    (counters, outs): (&EgressCounters, &mut [(Inlet, Stored)]),
) {
    counters.dropped(DropReason::PortDown, left.len() as u64);
    let time_ns = now_ns();
    for index in left {
        offer(outs, (batch, *index), time_ns);
        tell(outs, *index, Some(DropReason::PortDown));
    }
}
