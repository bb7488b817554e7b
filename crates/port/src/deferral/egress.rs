//! To a guest: workers leave copies of frames, a thread puts them into its ring.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::PARCELS;
use super::pacer::{Ended, Helper, Pacer, Plan, Work, wait_for};
use crate::lane::{Giver, Lane, lane};
use crate::{
    BURST_MAX, Batch, DropReason, Egress, FrameBuf, Ingress, Notified, QueueCounters, QueueFault,
};

/// An egress whose memory may have to be waited for; the workers' end of it.
#[derive(Debug)]
pub struct DeferredEgress<E: Egress + 'static> {
    giver: Giver,
    helper: Helper<Giving<E>>,
    /// The thread counts here, and the workers only what has no room.
    counters: Arc<QueueCounters>,
}

/// What waits in the lane to an egress that was taken apart.
#[derive(Debug)]
pub struct EgressRest {
    giver: Giver,
    lane: Lane,
}

impl EgressRest {
    /// Nothing: the beginning.
    ///
    /// # Errors
    ///
    /// There is no memory or no fd left.
    pub fn empty() -> io::Result<Self> {
        let (giver, lane) = lane(PARCELS, Arc::default())?;
        Ok(Self { giver, lane })
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        !self.lane.has_frames()
    }

    /// Sends what waits: its memory is there now, and `egress` is nobody else's yet.
    ///
    /// # Errors
    ///
    /// A fault: the rest is counted as dropped.
    pub fn send_to(self, egress: &mut impl Egress) -> Result<(), QueueFault> {
        let mut lane = self.lane;
        let mut frames = FrameBuf::default();
        let counters = Arc::clone(egress.counters());
        let result = loop {
            match pass_on(&mut lane, &mut frames, egress) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(fault) => break Err(fault),
            }
        };
        drop_all(&mut lane, &counters, DropReason::PortDown);
        result
    }

    /// Counts what waits as dropped: the port has ended.
    pub fn discard(mut self, counters: &QueueCounters) {
        drop_all(&mut self.lane, counters, DropReason::PortDown);
    }
}

fn drop_all(lane: &mut Lane, counters: &QueueCounters, reason: DropReason) {
    let mut frames = FrameBuf::default();
    while lane.has_frames() {
        let count = lane.receive(&mut frames).len();
        counters.egress.dropped(reason, count as u64);
    }
    lane.release();
}

/// Sends one burst of what waits. Returns whether there was one.
fn pass_on(
    lane: &mut Lane,
    frames: &mut FrameBuf,
    egress: &mut impl Egress,
) -> Result<bool, QueueFault> {
    let batch = lane.receive(frames);
    if batch.is_empty() {
        return Ok(false);
    }
    let mut picked = [0u16; BURST_MAX];
    for (index, place) in (0..).zip(&mut picked) {
        *place = index;
    }
    let sent = egress.send(&batch, picked.get(..batch.len()).unwrap_or(&picked));
    drop(batch);
    lane.release();
    notify(egress);
    sent.map(|()| true)
}

fn notify(egress: &mut impl Egress) {
    // ORDERING: SeqCst: what was published stands before the look at whether the driver wants to
    // know; pairs with the driver's fence.
    fence(Ordering::SeqCst);
    let _ = egress.notify();
}

impl<E: Egress + 'static> DeferredEgress<E> {
    /// Starts the thread, which calls `begin` first: `egress` has touched nothing yet.
    ///
    /// # Errors
    ///
    /// There is no thread or fd left; `rest` is lost then.
    pub fn start(plan: Plan, egress: E, begin: fn(&mut E), rest: EgressRest) -> io::Result<Self> {
        let EgressRest { giver, lane } = rest;
        let counters = Arc::clone(egress.counters());
        let frames = FrameBuf::default();
        let giving = Giving { egress, lane, frames, begin: Some(begin) };
        Ok(Self { giver, helper: Helper::start(plan, giving)?, counters })
    }

    /// What makes the thread rest.
    pub fn pacer(&self) -> Pacer {
        self.helper.pacer()
    }

    /// Takes it apart; no worker has it. See [`Pacer::rest`] for when this does not wait. None if
    /// there was a bug.
    pub fn into_parts(self) -> Option<(E, EgressRest)> {
        let Self { giver, helper, counters } = self;
        let Ended { work: Giving { egress, mut lane, .. }, is_sound } = helper.end()?;
        if !is_sound {
            drop_all(&mut lane, &counters, DropReason::Panicked);
            return None;
        }
        Some((egress, EgressRest { giver, lane }))
    }
}

impl<E: Egress + 'static> Egress for DeferredEgress<E> {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if let Some(fault) = self.helper.fault() {
            self.counters.egress.dropped(DropReason::PortDown, picked.len() as u64);
            return Err(fault);
        }
        let mut lost = 0u64;
        for index in picked {
            let frame = batch.frames().get(usize::from(*index));
            if frame.is_none_or(|frame| !self.giver.put(batch, frame)) {
                lost = lost.wrapping_add(1);
            }
        }
        self.giver.flush();
        if lost > 0 {
            self.counters.egress.dropped(DropReason::DeferralFull, lost);
        }
        Ok(())
    }

    /// The thread does, in its next turn.
    fn resume(&mut self) -> Result<(), QueueFault> {
        self.giver.wake();
        Ok(())
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// What the thread has.
struct Giving<E> {
    egress: E,
    lane: Lane,
    frames: FrameBuf,
    begin: Option<fn(&mut E)>,
}

impl<E: Egress + 'static> Work for Giving<E> {
    fn turn(&mut self) -> Result<bool, QueueFault> {
        if let Some(begin) = self.begin.take() {
            begin(&mut self.egress);
        }
        if self.egress.held() > 0 {
            self.egress.resume()?;
            notify(&mut self.egress);
        }
        pass_on(&mut self.lane, &mut self.frames, &mut self.egress)
    }

    fn wait(&mut self, wake: BorrowedFd<'_>) {
        if !self.lane.arm()
            && let Some(lane) = self.lane.wake_fd()
        {
            wait_for(&[lane, wake]);
        }
        self.lane.disarm();
    }

    /// The next send says so.
    fn faulted(&self) {}
}

impl<E> fmt::Debug for Giving<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Giving").field("lane", &self.lane).finish_non_exhaustive()
    }
}
