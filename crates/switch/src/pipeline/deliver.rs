//! Buckets by egress, and the short exclusive section in which a bucket is sent.
//!
//! A worker holds one egress lock at a time. A panic inside of an egress is caught here, before
//! the lock is released: that egress is closed, its frames are counted, everything else goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{Ordering, fence};

use port::{BURST_MAX, Batch, DropReason, Frame, Notified, PortId, QueueId};

use super::{Env, Failure, Origin, Trouble};
use crate::panics::{drop_quietly, panic_text};
use crate::room;
use crate::steering::FlowHashes;
use crate::table::{EgressSlot, Entry, Port, Table};
use crate::vlan::Tagging;

/// All indexes of a burst, in order.
static ALL: [u16; BURST_MAX] = all();

#[expect(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "at compile time")]
#[expect(clippy::cast_possible_truncation, reason = "at compile time")]
const fn all() -> [u16; BURST_MAX] {
    let mut indexes = [0; BURST_MAX];
    let mut at = 0;
    while at < BURST_MAX {
        indexes[at] = at as u16;
        at += 1;
    }
    indexes
}

/// Frames for one egress.
#[derive(Debug)]
pub(super) struct Bucket {
    at: QueueId,
    egress: usize,
    picked: Vec<u16>,
}

/// An egress that got frames.
#[derive(Debug, Clone, Copy)]
struct Touched {
    at: QueueId,
    egress: usize,
}

/// No bucket.
const NONE: u32 = u32::MAX;

/// Buckets of one burst, and the egresses touched in this turn.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    /// The first `used` hold frames.
    buckets: Vec<Bucket>,
    used: usize,
    /// By egress: its bucket.
    bucket_of: Vec<u32>,
    /// By egress: whether it is in `touched`.
    marked: Vec<bool>,
    touched: Vec<Touched>,
    taggings: Vec<Tagging>,
    /// Of the burst that is put into buckets.
    pub(super) hashes: FlowHashes,
    pub(super) failures: Vec<Failure>,
}

impl Delivery {
    /// Makes room for the egresses of `table`, so that nothing is allocated later.
    pub(super) fn fit(&mut self, table: &Table) {
        self.bucket_of.clear();
        room::reserve(&mut self.bucket_of, table.egress_count);
        self.bucket_of.resize(table.egress_count, NONE);
        self.marked.clear();
        room::reserve(&mut self.marked, table.egress_count);
        self.marked.resize(table.egress_count, false);
        for touched in &mut self.touched {
            // It stays to be notified, under its new number.
            let at = touched.at;
            let entry = table.entry(at.port);
            let egress = entry.map(|entry| entry.egress(at.pair));
            touched.egress = egress.unwrap_or(usize::MAX);
            if let Some(mark) = self.marked.get_mut(touched.egress) {
                *mark = true;
            }
        }
        room::reserve(&mut self.touched, table.attached_count);
        self.buckets.truncate(table.attached_count.max(1));
        room::reserve(&mut self.buckets, table.attached_count.max(1));
        self.buckets.resize_with(table.attached_count.max(1), || Bucket {
            at: QueueId { port: PortId(0), pair: 0 },
            egress: 0,
            picked: room::vec(BURST_MAX),
        });
        room::reserve(&mut self.taggings, BURST_MAX);
        self.taggings.resize(BURST_MAX, Tagging::default());
        self.hashes.fit();
    }

    /// Forgets everything.
    pub(super) fn reset(&mut self) {
        let failures = std::mem::take(&mut self.failures);
        let touched = std::mem::take(&mut self.touched);
        *self = Self { failures, touched, ..Self::default() };
    }

    /// Notifies the other sides of all egresses that got frames, and forgets them.
    #[inline]
    pub(super) fn notify(&mut self, table: &Table, mut told: impl FnMut(Notified)) {
        for touched in self.touched.drain(..) {
            if let Some(mark) = self.marked.get_mut(touched.egress) {
                *mark = false;
            }
            match notify_egress(table, touched.at) {
                Ok(notified) => told(notified),
                Err(failure) => self.failures.push(failure),
            }
        }
    }

    /// Puts a frame into a bucket of `port`.
    #[inline]
    pub(super) fn put(&mut self, table: &Table, port: PortId, index: u16, frame: &Frame) {
        if let Some(entry) = table.entry(port) {
            self.put_to(entry, index, frame);
        }
    }

    /// Puts a frame into a bucket of every member of its VLAN but `from`. Returns how many.
    pub(super) fn flood(
        &mut self,
        table: &Table,
        from: PortId,
        vlan: u16,
        (index, frame): (u16, &Frame),
    ) -> u64 {
        let mut copies = 0u64;
        for entry in table.up() {
            if entry.port.id != from && entry.port.rule.is_member(vlan) {
                self.put_to(entry, index, frame);
                copies = copies.wrapping_add(1);
            }
        }
        copies
    }

    #[inline]
    fn put_to(&mut self, entry: &Entry, index: u16, frame: &Frame) {
        let pair = match *entry.pairs {
            [only] => only,
            _ => entry.pair_of(frame, self.hashes.of(index, frame)),
        };
        let egress = entry.egress(pair);
        let Some(number) = self.bucket_of.get_mut(egress) else { return };
        if *number == NONE {
            let Some(bucket) = self.buckets.get_mut(self.used) else { return };
            bucket.at = QueueId { port: entry.port.id, pair };
            bucket.egress = egress;
            bucket.picked.clear();
            *number = u32::try_from(self.used).unwrap_or(NONE);
            self.used = self.used.wrapping_add(1);
        }
        if let Some(bucket) = self.buckets.get_mut(*number as usize) {
            bucket.picked.push(index);
        }
    }

    /// Keeps how the frames of this burst are tagged.
    pub(super) fn copy_tagging(&mut self, taggings: &[Tagging; BURST_MAX]) {
        self.taggings.clear();
        self.taggings.extend_from_slice(taggings);
    }

    /// Sends the whole burst to one egress.
    #[inline]
    pub(super) fn send_all(
        &mut self,
        env: &Env<'_>,
        origin: &mut Origin,
        batch: &mut Batch<'_>,
        (at, tagging): (QueueId, Tagging),
    ) {
        let Some(entry) = env.table.entry(at.port) else { return };
        if !env.table.plain {
            entry.port.rule.apply_all(tagging, batch.frames_mut());
        }
        self.mark(entry.egress(at.pair), at);
        let picked = ALL.get(..batch.len()).unwrap_or(&ALL);
        match send(entry, origin, batch, at, picked) {
            Sent::Handed => {}
            Sent::Failed(failure) => self.failures.push(failure),
            Sent::Gone => self.send_elsewhere(entry, origin, batch, (at, picked)),
        }
    }

    /// Sends frames whose pair went away while the burst was under way to another one of the port:
    /// a guest that disables a queue loses nothing.
    #[cold]
    fn send_elsewhere(
        &mut self,
        entry: &Entry,
        origin: &mut Origin,
        batch: &Batch<'_>,
        (gone, picked): (QueueId, &[u16]),
    ) {
        for pair in entry.pairs.iter().filter(|pair| **pair != gone.pair) {
            let at = QueueId { pair: *pair, ..gone };
            match send(entry, origin, batch, at, picked) {
                Sent::Gone => continue,
                Sent::Handed => {}
                Sent::Failed(failure) => self.failures.push(failure),
            }
            self.mark(entry.egress(*pair), at);
            return;
        }
        origin.drop_picked(picked);
    }

    /// Sends and empties all buckets.
    pub(super) fn send_buckets(
        &mut self,
        env: &Env<'_>,
        origin: &mut Origin,
        batch: &mut Batch<'_>,
    ) {
        for number in 0..std::mem::take(&mut self.used) {
            let Some(bucket) = self.buckets.get_mut(number) else { break };
            let (at, egress) = (bucket.at, bucket.egress);
            if !env.table.plain {
                tag_picked(env.table, bucket, &mut self.taggings, batch);
            }
            match env.table.entry(at.port) {
                Some(entry) => match send(entry, origin, batch, at, &bucket.picked) {
                    Sent::Handed => {}
                    Sent::Failed(failure) => self.failures.push(failure),
                    Sent::Gone => {
                        let picked = std::mem::take(&mut bucket.picked);
                        self.send_elsewhere(entry, origin, batch, (at, &picked));
                        if let Some(bucket) = self.buckets.get_mut(number) {
                            bucket.picked = picked;
                        }
                    }
                },
                None => origin.drop_picked(&bucket.picked),
            }
            if let Some(number) = self.bucket_of.get_mut(egress) {
                *number = NONE;
            }
            self.mark(egress, at);
        }
    }

    #[inline(always)]
    fn mark(&mut self, egress: usize, at: QueueId) {
        if let Some(mark) = self.marked.get_mut(egress)
            && !*mark
        {
            *mark = true;
            self.touched.push(Touched { at, egress });
        }
    }
}

fn tag_picked(table: &Table, bucket: &Bucket, taggings: &mut [Tagging], batch: &mut Batch<'_>) {
    let Some(entry) = table.entry(bucket.at.port) else { return };
    for index in &bucket.picked {
        let index = usize::from(*index);
        if let (Some(frame), Some(tagging)) =
            (batch.frames_mut().get_mut(index), taggings.get_mut(index))
        {
            entry.port.rule.apply(tagging, frame);
        }
    }
}

/// What became of frames that were to be sent.
enum Sent {
    /// The egress has dealt with them.
    Handed,
    /// It has, and is out of service now.
    Failed(Failure),
    /// There is no egress.
    Gone,
}

/// Sends under the egress's lock.
#[inline]
fn send(
    entry: &Entry,
    origin: &mut Origin,
    batch: &Batch<'_>,
    at: QueueId,
    picked: &[u16],
) -> Sent {
    let Some(mut slot) = entry.port.lock(at.pair) else { return Sent::Gone };
    let (false, Some(egress)) = (slot.broken, slot.egress.as_mut()) else { return Sent::Gone };
    let outcome = catch_unwind(AssertUnwindSafe(|| egress.send(batch, picked)));
    origin.handed = origin.handed.wrapping_add(picked.len() as u64);
    slot.expected = slot.expected.wrapping_add(picked.len() as u64);
    match outcome {
        Ok(Ok(())) => Sent::Handed,
        Ok(Err(fault)) => {
            slot.broken = true;
            Sent::Failed(Failure { at, what: Trouble::Fault(fault) })
        }
        Err(panic) => Sent::Failed(Failure { at, what: Trouble::Panic(close(&mut slot, &*panic)) }),
    }
}

/// Lets an egress send what it holds, under its lock, and notifies its other side.
pub(crate) fn resume_egress(port: &Port, at: QueueId) -> Result<(), Failure> {
    let Some(mut slot) = port.lock(at.pair) else { return Ok(()) };
    let (false, Some(egress)) = (slot.broken, slot.egress.as_mut()) else { return Ok(()) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let resumed = egress.resume();
        // ORDERING: SeqCst: as in a worker's turn, used entries before the read of whether the
        // driver wants to be notified.
        fence(Ordering::SeqCst);
        let _ = egress.notify();
        resumed
    }));
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(fault)) => {
            slot.broken = true;
            Err(Failure { at, what: Trouble::Fault(fault) })
        }
        Err(panic) => Err(Failure { at, what: Trouble::Panic(close(&mut slot, &*panic)) }),
    }
}

/// Closes an egress that panicked and counts the frames that it had.
#[cold]
fn close(slot: &mut EgressSlot, panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(counters) = &slot.counters {
        let lost = slot.expected.wrapping_sub(counters.egress.ended());
        counters.egress.dropped(DropReason::Panicked, lost);
    }
    drop_quietly(slot.egress.take());
    slot.counters = None;
    panic_text(panic)
}

/// Notifies the other side of an egress.
#[inline]
fn notify_egress(table: &Table, at: QueueId) -> Result<Notified, Failure> {
    let slot = table.entry(at.port).and_then(|entry| entry.port.lock(at.pair));
    let Some(mut slot) = slot else { return Ok(Notified::Nobody) };
    let Some(egress) = slot.egress.as_mut() else { return Ok(Notified::Nobody) };
    match catch_unwind(AssertUnwindSafe(|| egress.notify())) {
        Ok(notified) => Ok(notified),
        Err(panic) => Err(Failure { at, what: Trouble::Panic(close(&mut slot, &*panic)) }),
    }
}
