//! Frames on their way from one thread to another.
//!
//! ```text
//!  Giver::put ─► copy ─► full parcels ─────► Lane (an ingress)
//!                        empty ones ◄─────── release
//! ```
//!
//! Frames borrow the memory of their ingress, so they are copied: into parcels of private memory
//! that go round. The end that takes is an ingress like any other: armed, woken and counted.
//!
//! **Order.** A lane is a queue: no frame overtakes another.
//! **Limits.** A parcel holds a burst, or 132 KiB of frames with bodies; when none is free, a frame
//! is not taken. A parcel's memory is taken when it is first needed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crossbeam_utils::CachePadded;
use rtrb::{Consumer, Producer, RingBuffer};
use rustix::event::{EventfdFlags, eventfd};
use virtq::mem::{Pool, SegStore};

use crate::{BURST_MAX, Batch, DropReason, Frame, FrameBuf, Ingress, Notified, QueueCounters};

/// Bytes of the frames with bodies that a parcel holds: two of the largest.
const PARCEL_BYTES: u32 = (128 << 10) + 4096;

/// A burst on its way to another worker.
#[derive(Debug)]
pub(crate) struct Parcel {
    frames: Vec<Frame>,
    count: usize,
    /// One slot: the bodies, one after the other. Before each stands what its head holds, as it
    /// does where frames come from: who puts segments together reads their payload from there.
    bodies: Pool,
    used: u32,
    bytes: u64,
}

impl Parcel {
    pub(crate) fn new() -> io::Result<Box<Self>> {
        let bodies = Pool::new(1, PARCEL_BYTES).map_err(io::Error::other)?;
        Ok(Box::new(Self { frames: Vec::new(), count: 0, bodies, used: 0, bytes: 0 }))
    }

    pub(crate) fn clear(&mut self) {
        (self.count, self.used, self.bytes) = (0, 0, 0);
    }

    /// Number of frames.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Its frames from `first` on.
    pub(crate) fn batch<'a>(&'a self, first: usize, frames: &'a mut FrameBuf) -> Batch<'a> {
        frames.clear();
        let taken = self.frames.get(first..self.count).unwrap_or_default();
        frames.room().iter_mut().zip(taken).for_each(|(place, frame)| place.clone_from(frame));
        frames.keep_many(taken.len());
        frames.batch(self.bodies.store(), None)
    }

    /// Copies a frame. Returns false if there is no room.
    pub(crate) fn put(&mut self, batch: &Batch<'_>, frame: &Frame) -> bool {
        if self.count >= BURST_MAX {
            return false;
        }
        if self.frames.len() <= self.count {
            self.frames.resize(BURST_MAX, Frame::default());
        }
        let Some(place) = self.frames.get_mut(self.count) else { return false };
        let len = frame.body.len;
        if len > 0 {
            let (head, end) = (frame.head(), self.used.saturating_add(frame.len()));
            let range = self.used as usize..end as usize;
            let room = self.bodies.slot_mut(0).and_then(|slot| slot.get_mut(range));
            let Some((before, room)) = room.and_then(|room| room.split_at_mut_checked(head.len()))
            else {
                return false;
            };
            before.copy_from_slice(head);
            let _ = batch.body(frame).read(room);
            place.clone_from(frame);
            place.body = Pool::span(0, end.saturating_sub(len), len);
            self.used = end;
        } else {
            place.clone_from(frame);
        }
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

impl Shared {
    fn wake(&self) {
        // It fails only when the count is full, and then the fd is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// The end of a lane that gives.
#[derive(Debug)]
pub struct Giver {
    shared: Arc<Shared>,
    full: Producer<Box<Parcel>>,
    empty: Consumer<Box<Parcel>>,
    filling: Option<Box<Parcel>>,
}

impl Giver {
    /// Copies a frame, one of `batch`, which is sent with [`Self::flush`] or when a parcel is full.
    /// Returns false if there is no room.
    pub fn put(&mut self, batch: &Batch<'_>, frame: &Frame) -> bool {
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
    pub fn flush(&mut self) {
        let Some(parcel) = self.filling.take_if(|parcel| parcel.count > 0) else { return };
        let count = parcel.count as u64;
        // There are as many places as parcels.
        if self.full.push(parcel).is_ok() {
            // ORDERING: one writer; Release pairs with the Acquire in `Sent::frames`.
            let sent = self.shared.sent.load(Ordering::Relaxed).wrapping_add(count);
            self.shared.sent.store(sent, Ordering::Release);
        }
        // ORDERING: SeqCst: the parcel before the look whether the reader sleeps; pairs with the
        // fence in `Lane::arm`, between its note and its look for parcels.
        fence(Ordering::SeqCst);
        if self.shared.armed.load(Ordering::Relaxed) {
            self.shared.wake();
        }
    }

    /// Parcels that are free to be filled.
    pub fn room(&self) -> usize {
        self.empty.slots()
    }

    /// Wakes the reader, whether or not there is something for it.
    pub fn wake(&self) {
        self.shared.wake();
    }
}

/// The end of a lane that takes: an ingress.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<Shared>,
    full: Consumer<Box<Parcel>>,
    empty: Producer<Box<Parcel>>,
    /// The parcel whose frames are under way.
    open: Option<Box<Parcel>>,
    counters: Arc<QueueCounters>,
}

impl Lane {
    /// Whether frames wait.
    pub fn has_frames(&self) -> bool {
        !self.full.is_empty()
    }

    /// Counts what was handed over.
    pub fn sent(&self) -> Sent {
        Sent(Arc::clone(&self.shared))
    }

    /// Takes everything that waits, and counts it as dropped on its way in. The giver is gone.
    pub fn discard(&mut self, reason: DropReason) {
        let mut frames = FrameBuf::default();
        while self.has_frames() {
            let count = self.receive(&mut frames).len();
            self.counters.ingress.dropped(reason, count as u64);
        }
        self.release();
    }
}

impl Ingress for Lane {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        frames.clear();
        self.release();
        self.open = self.full.pop().ok();
        let Some(parcel) = &self.open else { return frames.batch(SegStore::empty(), None) };
        self.counters.ingress.received(parcel.count as u64, parcel.bytes);
        parcel.batch(0, frames)
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

/// How many frames were handed over in a lane.
#[derive(Debug, Clone)]
pub struct Sent(Arc<Shared>);

impl Sent {
    /// Frames so far.
    pub fn frames(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release in `Giver::flush`.
        self.0.sent.load(Ordering::Acquire)
    }
}

/// Makes a lane of so many parcels; what comes out is counted as received in `counters`.
///
/// # Errors
///
/// There is no memory or no fd left.
pub fn lane(parcels: usize, counters: Arc<QueueCounters>) -> io::Result<(Giver, Lane)> {
    let (full, take_full) = RingBuffer::new(parcels);
    let (mut give_empty, empty) = RingBuffer::new(parcels);
    for _ in 0..parcels {
        let _ = give_empty.push(Parcel::new()?);
    }
    let shared = Arc::new(Shared {
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        armed: CachePadded::default(),
        sent: CachePadded::default(),
    });
    let giver = Giver { shared: Arc::clone(&shared), full, empty, filling: None };
    Ok((giver, Lane { shared, full: take_full, empty: give_empty, open: None, counters }))
}
