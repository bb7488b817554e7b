//! From a guest: a thread takes frames out of its ring, a worker gets copies of them.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use virtq::mem::SegStore;

use super::PARCELS;
use super::edges::Edges;
use super::pacer::{Ended, Helper, Pacer, Plan, Work, wait_for};
use crate::lane::{Giver, Lane, lane};
use crate::{
    Batch, DropReason, FrameBuf, Ingress, Notified, QueueCounters, QueueFault, QueueRecord,
    WayRecord,
};

/// Parcels that any burst finds room in.
const BURST_PARCELS: usize = 2;
/// How long the thread lets the worker catch up when the lane is full.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// An ingress whose memory may have to be waited for; the worker's end of it.
#[derive(Debug)]
pub struct DeferredIngress<I: Ingress + 'static> {
    lane: Lane,
    source: Source<I>,
    /// Where the thread counts; what it drops is added to the worker's counters.
    counted: Arc<QueueCounters>,
    seen: WayRecord,
}

#[derive(Debug)]
enum Source<I: Ingress + 'static> {
    Thread(Helper<Taking<I>>),
    /// No thread any more: this comes behind what is left in the lane.
    Here(I, Giver),
}

/// What waits in the lane of an ingress that was taken apart.
#[derive(Debug)]
pub struct IngressRest {
    giver: Giver,
    lane: Lane,
}

impl IngressRest {
    /// Nothing: the beginning. What comes through is counted in `counters`.
    ///
    /// # Errors
    ///
    /// There is no memory or no fd left.
    pub fn empty(counters: Arc<QueueCounters>) -> io::Result<Self> {
        let (giver, lane) = lane(PARCELS, counters)?;
        Ok(Self { giver, lane })
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        !self.lane.has_frames()
    }

    /// Counts what waits as received and dropped: the port has ended.
    pub fn discard(mut self) {
        self.lane.discard(DropReason::PortDown);
    }
}

impl<I: Ingress + 'static> DeferredIngress<I> {
    /// Starts the thread. `ingress` counts in the counters that `counted` is, which nobody else
    /// writes, and has touched nothing yet: the thread calls [`Ingress::disarm`] first.
    ///
    /// # Errors
    ///
    /// There is no thread or fd left; `rest` is lost then, and counted.
    pub fn start(
        plan: Plan,
        ingress: I,
        counted: Arc<QueueCounters>,
        rest: IngressRest,
    ) -> io::Result<Self> {
        let IngressRest { giver, lane } = rest;
        let kicks = ingress.wake_fd().map(Edges::of).transpose()?;
        let taking = Taking { ingress, kicks, giver, frames: FrameBuf::default(), fresh: true };
        let helper = Helper::start(plan, taking)?;
        let seen = WayRecord::default();
        Ok(Self { lane, source: Source::Thread(helper), counted, seen })
    }

    /// No thread: `ingress` itself, behind what waits in `rest`.
    pub fn behind(rest: IngressRest, ingress: I) -> Self {
        let counted = Arc::clone(ingress.counters());
        let source = Source::Here(ingress, rest.giver);
        Self { lane: rest.lane, source, counted, seen: WayRecord::default() }
    }

    /// What makes the thread rest, if there is one.
    pub fn pacer(&self) -> Option<Pacer> {
        match &self.source {
            Source::Thread(helper) => Some(helper.pacer()),
            Source::Here(..) => None,
        }
    }

    /// Takes it apart; no worker has it. See [`Pacer::rest`] for when this does not wait. None if
    /// there was a bug: what waited is counted as dropped.
    pub fn into_parts(mut self) -> Option<(I, IngressRest)> {
        self.carry();
        self.lane.release();
        let Self { mut lane, source, .. } = self;
        let parts = match source {
            Source::Here(ingress, giver) => Some((ingress, giver)),
            Source::Thread(helper) => {
                let ended = helper.end().filter(|ended| ended.is_sound);
                ended.map(|Ended { work, .. }| (work.ingress, work.giver))
            }
        };
        let Some((ingress, giver)) = parts else {
            lane.discard(DropReason::Panicked);
            return None;
        };
        Some((ingress, IngressRest { giver, lane }))
    }

    /// Adds what the thread counted and the lane does not show: drops and calls.
    fn carry(&mut self) {
        if !matches!(self.source, Source::Thread(_)) {
            return;
        }
        let now = self.counted.record().ingress;
        let mut more = WayRecord::default();
        for ((more, now), seen) in more.drops.iter_mut().zip(now.drops).zip(self.seen.drops) {
            *more = now.wrapping_sub(seen);
        }
        // What was dropped there was received there, too.
        more.frames = more.drops.iter().fold(0, |sum, count| sum.wrapping_add(*count));
        more.calls.sent = now.calls.sent.wrapping_sub(self.seen.calls.sent);
        more.calls.suppressed = now.calls.suppressed.wrapping_sub(self.seen.calls.suppressed);
        if more != WayRecord::default() {
            let record = QueueRecord { ingress: more, ..QueueRecord::default() };
            self.lane.counters().carry(&record);
            self.seen = now;
        }
    }
}

impl<I: Ingress + 'static> Ingress for DeferredIngress<I> {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        self.carry();
        // Asked before the lane is looked at: all that came before the fault is in it.
        let fault = match &self.source {
            Source::Thread(helper) => helper.fault(),
            Source::Here(..) => None,
        };
        if self.lane.has_frames() {
            return self.lane.receive(frames);
        }
        self.lane.release();
        match &mut self.source {
            Source::Here(ingress, _) => ingress.receive(frames),
            Source::Thread(_) => {
                let _ = frames.begin();
                frames.batch(SegStore::empty(), fault)
            }
        }
    }

    fn release(&mut self) {
        self.lane.release();
        if let Source::Here(ingress, _) = &mut self.source {
            ingress.release();
        }
    }

    fn notify(&mut self) -> Notified {
        match &mut self.source {
            Source::Here(ingress, _) => ingress.notify(),
            Source::Thread(_) => Notified::Nobody,
        }
    }

    fn arm(&mut self) -> bool {
        match &mut self.source {
            Source::Here(ingress, _) => ingress.arm() | self.lane.has_frames(),
            Source::Thread(helper) => self.lane.arm() | helper.fault().is_some(),
        }
    }

    fn disarm(&mut self) {
        match &mut self.source {
            Source::Here(ingress, _) => ingress.disarm(),
            Source::Thread(_) => self.lane.disarm(),
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Here(ingress, _) => ingress.wake_fd(),
            Source::Thread(_) => self.lane.wake_fd(),
        }
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.lane.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// What the thread has.
#[derive(Debug)]
struct Taking<I> {
    ingress: I,
    /// None if it can only be polled.
    kicks: Option<Edges>,
    giver: Giver,
    frames: FrameBuf,
    /// It has not touched the ring yet.
    fresh: bool,
}

impl<I: Ingress + 'static> Work for Taking<I> {
    fn turn(&mut self) -> Result<bool, QueueFault> {
        if std::mem::take(&mut self.fresh) {
            self.ingress.disarm();
        }
        if self.giver.room() < BURST_PARCELS {
            std::thread::sleep(FULL_PAUSE);
            return Ok(true);
        }
        let arrived = self.ingress.counters().ingress.arrived();
        let batch = self.ingress.receive(&mut self.frames);
        for frame in batch.frames() {
            // There is room for all of a burst.
            let _ = self.giver.put(&batch, frame);
        }
        let fault = batch.fault().cloned();
        drop(batch);
        self.giver.flush();
        let worked = self.ingress.counters().ingress.arrived() != arrived;
        if worked {
            self.ingress.release();
            // ORDERING: SeqCst: what was published stands before the look at whether the driver
            // wants to know; pairs with the driver's fence.
            fence(Ordering::SeqCst);
            let _ = self.ingress.notify();
        }
        fault.map_or(Ok(worked), Err)
    }

    fn wait(&mut self, wake: BorrowedFd<'_>) {
        if !self.ingress.arm() {
            match &self.kicks {
                Some(kicks) => {
                    wait_for(&[kicks.as_fd(), wake]);
                    kicks.take();
                }
                None => std::thread::sleep(FULL_PAUSE),
            }
        }
        self.ingress.disarm();
    }

    fn faulted(&self) {
        self.giver.wake();
    }
}
