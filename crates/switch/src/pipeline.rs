//! One burst through the switch: classify all frames, decide, bucket by egress, send.
//!
//! ```text
//!  frames ─► classify: VLAN rule, source, reserved ─► learn (one lock) ─► decide: look up
//!         ─► bucket by egress, in order ─► per bucket: tag form, lock, send
//! ```
//!
//! A burst of one (source, destination) pair, which is what load looks like, takes the short way:
//! the decision of the last burst is still valid if neither the database, nor the ports, nor the
//! second has changed, and 16 bytes per frame are compared.
//!
//! **Accounting.** `Origin::handed` follows what left the ingress's books, so that after a panic
//! the frames in flight are known exactly.

mod classify;
mod deliver;

use std::sync::Arc;

use port::capture::Fates;
use port::{
    BURST_MAX, Batch, Counter, DropReason, Frame, Notified, PortId, QueueCounters, QueueFault,
    QueueId,
};

pub(crate) use classify::PairCache;
use classify::{Classifier, Verdict};
use deliver::Delivery;
pub(crate) use deliver::resume_egress;

use crate::fdb::Fdb;
use crate::steering::FlowHashes;
use crate::table::Table;

/// What a burst is decided by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Env<'a> {
    pub(crate) fdb: &'a Fdb,
    pub(crate) table: &'a Table,
    /// Seconds since the switch began.
    pub(crate) now: u32,
    /// The same in the ticks of [`crate::steering`].
    pub(crate) ticks: u32,
    pub(crate) forward_reserved: bool,
    /// Nanoseconds since the switch began, as far as the worker has looked.
    pub(crate) now_ns: u64,
    /// Copies beyond the first of flooded frames.
    pub(crate) flood_copies: &'a Counter,
}

/// Where frames come from.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) port: PortId,
    /// The pair on which a guest sent them; none for frames of our own.
    pub(crate) pair: Option<u16>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) cache: PairCache,
    /// What `counters.ingress.passed()` should be: frames handed to egresses, less flood copies.
    pub(crate) handed: u64,
    /// Where a capture wants to know which frames were dropped.
    pub(crate) fates: Option<Arc<Fates>>,
    /// What the frames' indexes were before some of the burst were handed over; empty: as they are.
    pub(crate) places: Vec<u16>,
}

impl Origin {
    pub(crate) fn new(port: PortId, pair: Option<u16>, counters: Arc<QueueCounters>) -> Self {
        let handed = counters.ingress.passed();
        Self {
            port,
            pair,
            counters,
            cache: PairCache::default(),
            handed,
            fates: None,
            places: Vec::new(),
        }
    }

    #[inline]
    pub(crate) fn drop_frames(&self, reason: DropReason, count: usize) {
        if count > 0 {
            self.counters.ingress.dropped(reason, count as u64);
        }
    }

    /// Tells captures which frames were dropped.
    #[cold]
    fn note_drops(&self, drops: impl Iterator<Item = (usize, DropReason)>) {
        if let Some(fates) = &self.fates {
            let place = |index| self.places.get(index).map_or(index, |place| usize::from(*place));
            drops.for_each(|(index, reason)| fates.dropped(place(index), reason));
        }
    }

    /// Tells captures that a frame was dropped before any was handed over.
    #[cold]
    pub(crate) fn note_drop(&self, index: usize, reason: DropReason) {
        if let Some(fates) = &self.fates {
            fates.dropped(index, reason);
        }
    }

    /// Drops frames whose way out is not there.
    #[cold]
    fn drop_picked(&self, picked: &[u16]) {
        let reason = DropReason::PortDown;
        self.drop_frames(reason, picked.len());
        self.note_drops(picked.iter().map(|index| (usize::from(*index), reason)));
    }

    /// Counts what a panic took with it.
    pub(crate) fn count_panicked(&mut self) -> u64 {
        let lost = self.counters.ingress.passed().wrapping_sub(self.handed);
        self.counters.ingress.dropped(DropReason::Panicked, lost);
        lost
    }
}

/// What went wrong at an egress.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) at: QueueId,
    pub(crate) what: Trouble,
}

/// What takes a queue out of service.
#[derive(Debug)]
pub(crate) enum Trouble {
    Fault(QueueFault),
    Panic(String),
}

/// Scratch space of one worker; nothing is allocated while frames move.
#[derive(Debug, Default)]
pub(crate) struct Pipeline {
    classifier: Classifier,
    delivery: Delivery,
}

impl Pipeline {
    /// Makes room for the egresses of `table`.
    pub(crate) fn fit(&mut self, table: &Table) {
        self.delivery.fit(table);
    }

    /// Forgets what a panic may have left behind.
    pub(crate) fn reset(&mut self, table: &Table) {
        self.classifier = Classifier::default();
        self.delivery.reset();
        self.delivery.fit(table);
    }

    /// Notifies the other sides of all egresses that got frames since the last call, each once.
    #[inline]
    pub(crate) fn notify(&mut self, table: &Table, told: impl FnMut(Notified)) {
        self.delivery.notify(table, told);
    }

    /// What went wrong at egresses.
    pub(crate) fn failures(&mut self) -> &mut Vec<Failure> {
        &mut self.delivery.failures
    }

    /// Takes a burst through the switch. Every frame is counted: handed to an egress, or dropped.
    #[inline]
    pub(crate) fn forward(&mut self, env: &Env<'_>, origin: &mut Origin, batch: &mut Batch<'_>) {
        let generation = env.fdb.generation();
        if origin.cache.is_valid(env, generation)
            && let Some((at, tagging)) = origin.cache.single()
            && origin.cache.holds_for_all(batch.frames())
        {
            if origin.cache.is_steered() {
                note_flows(env, origin, batch.frames(), &mut self.delivery.hashes);
            }
            self.delivery.send_all(env, origin, batch, (at, tagging));
        } else {
            self.forward_each(env, origin, batch, generation);
        }
    }

    /// As [`Self::forward`], frame by frame.
    #[inline(never)]
    fn forward_each(
        &mut self,
        env: &Env<'_>,
        origin: &mut Origin,
        batch: &mut Batch<'_>,
        generation: u64,
    ) {
        let Some(from) = env.table.entry(origin.port) else {
            origin.drop_frames(DropReason::PortDown, batch.len());
            origin.note_drops((0..batch.len()).map(|index| (index, DropReason::PortDown)));
            return;
        };
        if !origin.cache.is_valid(env, generation) {
            origin.cache.clear();
        }
        // Those of another burst.
        self.delivery.hashes.clear();
        if from.steering.is_some() {
            note_flows(env, origin, batch.frames(), &mut self.delivery.hashes);
        }
        self.classifier.classify(env, from, origin, batch.frames());
        let last = self.classifier.decide(env, origin, batch.len());
        if origin.fates.is_some() {
            origin.note_drops(self.classifier.drops(batch.len()));
        }
        self.bucket(env, origin, batch);
        self.delivery.send_buckets(env, origin, batch);
        match last {
            Some(pair) => origin.cache.set(pair, env, from, generation),
            None => origin.cache.clear(),
        }
    }

    /// Puts each frame into the bucket of its egress, in order.
    fn bucket(&mut self, env: &Env<'_>, origin: &mut Origin, batch: &Batch<'_>) {
        let verdicts = self.classifier.verdicts(batch.len());
        let guard = env.table.entry(origin.port).and_then(|entry| entry.guard.as_deref());
        let (mut no_destination, mut storm) = (0usize, 0usize);
        for (index, (verdict, frame)) in (0u16..).zip(verdicts.iter().zip(batch.frames())) {
            match *verdict {
                Verdict::To(port) => self.delivery.put(env.table, port, index, frame),
                Verdict::Flood if !guard.is_none_or(|guard| guard.may_flood(env.now_ns)) => {
                    storm = storm.saturating_add(1);
                    let drop = (usize::from(index), DropReason::Storm);
                    origin.note_drops(std::iter::once(drop));
                }
                Verdict::Flood => {
                    let vlan = self.classifier.tagging(index).vlan();
                    let copies = self.delivery.flood(env.table, origin.port, vlan, (index, frame));
                    match copies.checked_sub(1) {
                        None => {
                            no_destination = no_destination.saturating_add(1);
                            let drop = (usize::from(index), DropReason::NoDestination);
                            origin.note_drops(std::iter::once(drop));
                        }
                        Some(0) => {}
                        Some(extra) => {
                            env.flood_copies.add(extra);
                            origin.handed = origin.handed.wrapping_sub(extra);
                        }
                    }
                }
                Verdict::Drop(_) | Verdict::Same | Verdict::LookUp(_) => {}
            }
        }
        origin.drop_frames(DropReason::NoDestination, no_destination);
        origin.drop_frames(DropReason::Storm, storm);
        if !env.table.plain {
            self.delivery.copy_tagging(self.classifier.taggings());
        }
    }
}

/// Notes on which pair a guest sent its frames, so that the answers come there.
#[inline(never)]
fn note_flows(env: &Env<'_>, origin: &Origin, frames: &[Frame], hashes: &mut FlowHashes) {
    let steering = env.table.entry(origin.port).and_then(|entry| entry.steering.as_ref());
    if let (Some(steering), Some(pair)) = (steering, origin.pair) {
        steering.note_all(frames, (pair, env.ticks), hashes);
    }
}

const _: () = assert!(BURST_MAX <= u16::MAX as usize);

#[cfg(test)]
mod tests;
