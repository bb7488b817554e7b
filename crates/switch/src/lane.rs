//! Internal load balancing: the flows that arrive on one queue are spread over the workers.
//!
//! ```text
//!  the queue's worker                        port::Lane: 32 parcels       another worker
//!  receive ─► Spread: inner flow's hash ─┬─► copy ─► full ─────► Lane (an ingress) ─► forward
//!             │ its own share            │          empty ◄──── release
//!             └► forward                 └─► … one lane to each other worker
//! ```
//!
//! A queue whose frames are many flows is served by one worker, because a ring has one reader.
//! That one takes them out, and hands those of most flows over to the others, in lanes.
//!
//! **Order.** A flow (of what is inside of a tunnel) always goes the same way: no frame of it
//! overtakes another.
//! **Accounting.** Frames in lanes are `held`. A lane has counters of its own, because another
//! worker writes them: what was dropped there is shown at the pair that the frames came from, and
//! added to its counters when the lane ends.
//! **Limits.** When no parcel is free, frames are dropped (`hand_over_full`).

use std::sync::Arc;

use port::lane::{Giver, Lane, Sent, lane};
use port::{Batch, DropReason, QueueCounters};

use crate::pipeline::Origin;

/// Parcels of a lane.
const PARCELS: usize = 32;

/// Spreads a queue's frames over the workers.
#[derive(Debug)]
pub(crate) struct Spread {
    /// By worker; none for the one that has the queue.
    lanes: Box<[Option<Giver>]>,
}

impl Spread {
    /// Hands frames over to other workers, and leaves in `batch` those that are for this one.
    #[inline(never)]
    pub(crate) fn hand_over(&mut self, origin: &mut Origin, batch: &mut Batch<'_>) {
        let (mut kept, mut away, mut lost) = (0usize, 0u64, 0usize);
        origin.places.clear();
        for index in 0..batch.len() {
            let Some(frame) = batch.frames().get(index) else { break };
            let hash = u64::from(packet::inner_flow_hash(frame.head()));
            let worker = hash.wrapping_mul(self.lanes.len() as u64) >> 32;
            let lane = self.lanes.get_mut(worker as usize).and_then(Option::as_mut);
            match lane.map(|lane| lane.put(batch, frame)) {
                Some(true) => away = away.wrapping_add(1),
                Some(false) => {
                    lost = lost.wrapping_add(1);
                    origin.note_drop(index, DropReason::HandOverFull);
                }
                None => {
                    if kept != index {
                        batch.frames_mut().swap(kept, index);
                    }
                    kept = kept.wrapping_add(1);
                    if origin.fates.is_some() {
                        origin.places.push(u16::try_from(index).unwrap_or(u16::MAX));
                    }
                }
            }
        }
        batch.truncate(kept);
        origin.drop_frames(DropReason::HandOverFull, lost);
        origin.handed = origin.handed.wrapping_add(away);
        self.lanes.iter_mut().flatten().for_each(Giver::flush);
    }
}

/// A lane as control knows it.
#[derive(Debug)]
pub(crate) struct Track {
    /// The worker that takes, as an index.
    pub(crate) worker: usize,
    /// What it took, and dropped.
    pub(crate) counters: Arc<QueueCounters>,
    sent: Sent,
}

impl Track {
    /// Adds what was dropped in the lane to the counters of the pair that it began at. Neither
    /// worker serves it any more: what is still in it is lost with a worker that failed.
    pub(crate) fn settle(&self, pair: &QueueCounters) {
        let drops = self.counters.read_ends().drops;
        for (reason, count) in DropReason::ALL.iter().zip(drops) {
            if count > 0 {
                pair.ingress.dropped(*reason, count);
            }
        }
        let lost = self.sent.frames().wrapping_sub(self.counters.ingress.arrived());
        if lost > 0 {
            pair.ingress.dropped(DropReason::PortDown, lost);
        }
    }
}

/// The end of a lane that takes, for control and for its worker.
pub(crate) type Taker = (Track, Box<Lane>);

/// Makes lanes from worker `from` to all others of `workers`.
pub(crate) fn lanes(from: usize, workers: usize) -> std::io::Result<(Spread, Vec<Taker>)> {
    let mut givers = Vec::new();
    let mut takers = Vec::new();
    for worker in 0..workers {
        if worker == from {
            givers.push(None);
            continue;
        }
        let counters: Arc<QueueCounters> = Arc::default();
        let (giver, taker) = lane(PARCELS, Arc::clone(&counters))?;
        givers.push(Some(giver));
        let sent = taker.sent();
        takers.push((Track { worker, counters, sent }, Box::new(taker)));
    }
    Ok((Spread { lanes: givers.into() }, takers))
}
