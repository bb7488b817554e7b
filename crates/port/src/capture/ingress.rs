//! The tap around a way in.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::ring::{Inlet, Item, Stored, now_ns};
use super::{Direction, Tap, code, reason};
use crate::{BURST_MAX, Batch, DropReason, FrameBuf, Ingress, Notified, QueueCounters};

/// What became of the frames of one burst, as far as the switch dropped them. The switch writes it
/// between `receive` and `release`, on the same thread.
#[derive(Debug)]
pub struct Fates {
    of: [AtomicU8; BURST_MAX],
    /// Where each frame that is left was in the burst, if some were taken out of it.
    place: [AtomicU8; BURST_MAX],
    moved: AtomicBool,
}

impl Default for Fates {
    fn default() -> Self {
        let zeros = || std::array::from_fn(|_| AtomicU8::new(0));
        Self { of: zeros(), place: zeros(), moved: AtomicBool::new(false) }
    }
}

impl Fates {
    /// The frame at `index` was dropped.
    pub fn dropped(&self, index: usize, why: DropReason) {
        if let Some(fate) = self.of.get(self.place_of(index)) {
            fate.store(code(Some(why)), Ordering::Relaxed);
        }
    }

    /// Some frames were taken out of the batch: `kept` is where those that are left were.
    pub fn moved(&self, kept: &[u8]) {
        for (place, was) in self.place.iter().zip(kept) {
            place.store(*was, Ordering::Relaxed);
        }
        self.moved.store(true, Ordering::Relaxed);
    }

    /// Where a frame of the batch was in the burst.
    fn place_of(&self, index: usize) -> usize {
        let moved = self.moved.load(Ordering::Relaxed);
        let place = self.place.get(index).filter(|_| moved);
        place.map_or(index, |place| usize::from(place.load(Ordering::Relaxed)))
    }

    fn clear(&self) {
        self.of.iter().for_each(|fate| fate.store(0, Ordering::Relaxed));
        self.moved.store(false, Ordering::Relaxed);
    }

    fn of(&self, index: usize) -> Option<DropReason> {
        reason(self.of.get(index)?.load(Ordering::Relaxed))
    }
}

/// What the captures of a port need at one way in.
#[derive(Debug)]
pub struct IngressTap {
    outs: Vec<Out>,
    fates: Arc<Fates>,
}

/// One capture.
#[derive(Debug)]
struct Out {
    inlet: Inlet,
    /// Of the frames of the burst.
    states: [Stored; BURST_MAX],
}

impl IngressTap {
    /// None if nobody captures.
    pub fn new(taps: &[Tap], pair: u16) -> Option<Self> {
        let new = |tap: &Tap| Out {
            inlet: Inlet::new(&tap.0, pair, Direction::In),
            states: [Stored::Unwanted; BURST_MAX],
        };
        let outs: Vec<Out> = taps.iter().map(new).collect();
        (!outs.is_empty()).then(|| Self { outs, fates: Arc::default() })
    }

    /// Where the switch writes what it drops.
    pub fn fates(&self) -> Arc<Fates> {
        Arc::clone(&self.fates)
    }

    /// Puts the tap around `inner`.
    pub fn wrap(self, inner: Box<dyn Ingress>) -> Box<dyn Ingress> {
        Box::new(TappedIngress { inner, tap: self, in_burst: 0 })
    }

    /// Takes off what [`Self::wrap`] put around. The caller knows that it did.
    ///
    /// # Panics
    ///
    /// There is no tap around `tapped`: a bug.
    #[expect(clippy::panic, reason = "a bug of the switch, which keeps the books of its taps")]
    pub fn unwrap(tapped: Box<dyn Ingress>) -> Box<dyn Ingress> {
        match tapped.into_any().downcast::<TappedIngress>() {
            Ok(mut tapped) => {
                tapped.settle();
                tapped.inner
            }
            Err(_) => panic!("no tap is around this ingress"),
        }
    }
}

/// An ingress whose frames are copied.
#[derive(Debug)]
struct TappedIngress {
    inner: Box<dyn Ingress>,
    tap: IngressTap,
    /// Frames of the burst whose fate is not settled.
    in_burst: usize,
}

impl TappedIngress {
    /// Tells the readers what became of the last burst.
    fn settle(&mut self) {
        let count = std::mem::take(&mut self.in_burst);
        if count == 0 {
            return;
        }
        for Out { inlet, states } in &mut self.tap.outs {
            let (mut seen, mut accepted, mut skipped) = (0u64, 0u64, 0u64);
            for (index, stored) in (0u16..).zip(states.iter().take(count)) {
                let fate = self.tap.fates.of(usize::from(index));
                let counts = u64::from(fate.is_none() || inlet.wants_drops());
                seen = seen.wrapping_add(counts);
                if *stored == Stored::Unwanted {
                    continue;
                }
                accepted = accepted.wrapping_add(counts);
                match (stored, fate) {
                    (Stored::NoRoom, _) => skipped = skipped.wrapping_add(counts),
                    (_, Some(fate)) => inlet.note(index, fate),
                    (_, None) => {}
                }
            }
            inlet.counts.seen.add(seen);
            inlet.counts.accepted.add(accepted);
            inlet.counts.skipped.add(skipped);
            if states.iter().take(count).any(|stored| *stored == Stored::Yes) {
                inlet.end_burst();
                inlet.wake();
            }
        }
    }
}

impl Ingress for TappedIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        self.settle();
        let Self { inner, tap, in_burst } = self;
        let batch = inner.receive(frames);
        *in_burst = batch.len();
        if batch.is_empty() {
            return batch;
        }
        tap.fates.clear();
        let time_ns = now_ns();
        for Out { inlet, states } in &mut tap.outs {
            for ((index, frame), state) in (0u16..).zip(batch.frames()).zip(states) {
                *state = inlet.offer(&Item { batch: &batch, frame, index, time_ns });
            }
        }
        batch
    }

    fn release(&mut self) {
        self.settle();
        self.inner.release();
    }

    fn notify(&mut self) -> Notified {
        self.inner.notify()
    }

    fn arm(&mut self) -> bool {
        self.inner.arm()
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.inner.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}
