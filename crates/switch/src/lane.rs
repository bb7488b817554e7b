//! Internal load balancing: the flows that arrive on one queue are spread over the workers.
//!
//! ```text
//!  the queue's worker                        lane: 32 parcels             another worker
//!  receive ─► Spread: inner flow's hash ─┬─► copy ─► full ─────► Lane (an ingress) ─► forward
//!             │ its own share            │          empty ◄──── release
//!             └► forward                 └─► … one lane to each other worker
//! ```
//!
//! A queue whose frames are many flows is served by one worker, because a ring has one reader.
//! That one takes them out, and hands those of most flows over to the others. Frames borrow the
//! memory of their ingress, so they are copied: into parcels of private memory that go round.
//!
//! **Order.** A flow (of what is inside of a tunnel) always goes the same way, and a lane is a
//! queue: no frame of it overtakes another.
//! **Accounting.** Frames in lanes are `held`. A lane has counters of its own, because another
//! worker writes them: what was dropped there is shown at the pair that the frames came from, and
//! added to its counters when the lane ends.
//! **Limits.** A parcel holds a burst, or [`PARCEL_BYTES`] of bodies; when none is free, frames are
//! dropped (`hand_over_full`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crossbeam_utils::CachePadded;
use port::{BURST_MAX, Batch, DropReason, Frame, FrameBuf, Ingress, Notified, QueueCounters};
use rtrb::{Consumer, Producer, RingBuffer};
use virtq::mem::{Pool, SegStore};

use crate::event::{signal, wake_fd};
use crate::pipeline::Origin;

/// Parcels of a lane.
const PARCELS: usize = 32;
/// Bytes of the bodies that a parcel holds: two of the largest frames.
const PARCEL_BYTES: u32 = 128 << 10;

/// A burst on its way to another worker.
#[derive(Debug)]
struct Parcel {
    frames: Box<[Frame]>,
    count: usize,
    /// One slot: the bodies, one after the other.
    bodies: Pool,
    used: u32,
    bytes: u64,
}

impl Parcel {
    fn new() -> std::io::Result<Box<Self>> {
        let bodies = Pool::new(1, PARCEL_BYTES).map_err(std::io::Error::other)?;
        let frames = vec![Frame::default(); BURST_MAX].into();
        Ok(Box::new(Self { frames, count: 0, bodies, used: 0, bytes: 0 }))
    }

    fn clear(&mut self) {
        (self.count, self.used, self.bytes) = (0, 0, 0);
    }

    /// Copies a frame. Returns false if there is no room.
    fn put(&mut self, batch: &Batch<'_>, frame: &Frame) -> bool {
        let Some(place) = self.frames.get_mut(self.count) else { return false };
        let len = frame.body.len;
        let end = self.used.saturating_add(len);
        if end > PARCEL_BYTES {
            return false;
        }
        place.clone_from(frame);
        if len > 0 {
            let range = self.used as usize..end as usize;
            let Some(room) = self.bodies.slot_mut(0).and_then(|slot| slot.get_mut(range)) else {
                return false;
            };
            let _ = batch.body(frame).read(room);
            place.body = Pool::span(0, self.used, len);
        }
        self.used = end;
        self.count = self.count.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(u64::from(frame.len()));
        true
    }
}

/// What both ends of a lane share.
#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    /// The reader sleeps: it is to be woken.
    armed: CachePadded<AtomicBool>,
    /// Frames that were handed over.
    sent: CachePadded<AtomicU64>,
}

/// The end of a lane that gives.
#[derive(Debug)]
struct Giver {
    shared: Arc<Shared>,
    full: Producer<Box<Parcel>>,
    empty: Consumer<Box<Parcel>>,
    filling: Option<Box<Parcel>>,
}

impl Giver {
    fn put(&mut self, batch: &Batch<'_>, frame: &Frame) -> bool {
        // A parcel that is full goes, and the next one is tried.
        for _ in 0..2 {
            if self.filling.is_none() {
                self.filling = self.empty.pop().ok();
            }
            let Some(parcel) = &mut self.filling else { return false };
            if parcel.put(batch, frame) {
                return true;
            }
            self.flush();
        }
        false
    }

    /// Sends what was filled.
    fn flush(&mut self) {
        let Some(parcel) = self.filling.take_if(|parcel| parcel.count > 0) else { return };
        let count = parcel.count as u64;
        // There are as many places as parcels.
        if self.full.push(parcel).is_ok() {
            // ORDERING: one writer; Release pairs with the Acquire in `Track::lost`.
            let sent = self.shared.sent.load(Ordering::Relaxed).wrapping_add(count);
            self.shared.sent.store(sent, Ordering::Release);
        }
        // ORDERING: SeqCst: the parcel before the look whether the reader sleeps; pairs with the
        // fence in `Lane::arm`, between its note and its look for parcels.
        fence(Ordering::SeqCst);
        if self.shared.armed.load(Ordering::Relaxed) {
            signal(&self.shared.wake);
        }
    }
}

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

/// The end of a lane that takes: an ingress of its worker.
#[derive(Debug)]
pub(crate) struct Lane {
    shared: Arc<Shared>,
    full: Consumer<Box<Parcel>>,
    empty: Producer<Box<Parcel>>,
    /// The parcel whose frames are under way.
    open: Option<Box<Parcel>>,
    counters: Arc<QueueCounters>,
}

impl Ingress for Lane {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        frames.clear();
        self.release();
        self.open = self.full.pop().ok();
        let Some(parcel) = &self.open else { return frames.batch(SegStore::empty(), None) };
        let taken = parcel.frames.iter().take(parcel.count);
        frames.room().iter_mut().zip(taken).for_each(|(place, frame)| place.clone_from(frame));
        frames.keep_many(parcel.count);
        self.counters.ingress.received(parcel.count as u64, parcel.bytes);
        frames.batch(parcel.bodies.store(), None)
    }

    fn release(&mut self) {
        if let Some(mut parcel) = self.open.take() {
            parcel.clear();
            // There is room for all of them.
            let _ = self.empty.push(parcel);
        }
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn arm(&mut self) -> bool {
        self.shared.armed.store(true, Ordering::Relaxed);
        // ORDERING: SeqCst: pairs with the fence in `Giver::flush`: it sees the note, or this sees
        // its parcel.
        fence(Ordering::SeqCst);
        !self.full.is_empty()
    }

    fn disarm(&mut self) {
        // ORDERING: a wake-up too many does no harm.
        self.shared.armed.store(false, Ordering::Relaxed);
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.wake.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send> {
        self
    }
}

/// A lane as control knows it.
#[derive(Debug)]
pub(crate) struct Track {
    /// The worker that takes, as an index.
    pub(crate) worker: usize,
    /// What it took, and dropped.
    pub(crate) counters: Arc<QueueCounters>,
    shared: Arc<Shared>,
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
        // ORDERING: Acquire pairs with the Release in `Giver::flush`.
        let sent = self.shared.sent.load(Ordering::Acquire);
        let lost = sent.wrapping_sub(self.counters.ingress.arrived());
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
        let (full, take_full) = RingBuffer::new(PARCELS);
        let (mut give_empty, empty) = RingBuffer::new(PARCELS);
        for _ in 0..PARCELS {
            let _ = give_empty.push(Parcel::new()?);
        }
        let shared = Arc::new(Shared {
            wake: wake_fd()?,
            armed: CachePadded::default(),
            sent: CachePadded::default(),
        });
        givers.push(Some(Giver { shared: Arc::clone(&shared), full, empty, filling: None }));
        let counters: Arc<QueueCounters> = Arc::default();
        let lane = Lane {
            shared: Arc::clone(&shared),
            full: take_full,
            empty: give_empty,
            open: None,
            counters: Arc::clone(&counters),
        };
        takers.push((Track { worker, counters, shared }, Box::new(lane)));
    }
    Ok((Spread { lanes: givers.into() }, takers))
}
