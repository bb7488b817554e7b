//! The ring between one half of a port and the reader: records of any length, one after another.
//!
//! ```text
//!  frame: kind fate index captured original time_ns │ bytes …     note: kind fate index    end: …
//! ```
//!
//! A frame is stored before its fate is known: on the way in its body is gone by then, on the way
//! out an answer may have come. So there is a burst (of one frame on the way out), then a note for
//! each frame of it that was dropped, then an end; room for those is kept free.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use rtrb::{Consumer, Producer, RingBuffer};

use super::{Counts, Direction, Shared, code};
use crate::{BURST_MAX, Batch, DropReason, Frame};

/// A record that carries a frame.
pub(super) const FRAME: u8 = 1;
/// A record that tells the fate of a frame of the same burst.
pub(super) const NOTE: u8 = 2;
/// A record that ends a burst.
pub(super) const END: u8 = 3;
/// Bytes that every record begins with: kind, fate, index in its burst.
pub(super) const SHORT: usize = 4;
/// Bytes of a frame's record before the frame.
pub(super) const LONG: usize = 20;
/// What the notes and the end of a burst need.
const KEPT_FREE: usize = (BURST_MAX + 1) * SHORT;
/// The least size of a ring: one frame of any length.
const LEAST: usize = super::SNAPLEN_MAX as usize + LONG + KEPT_FREE;

/// The producer's end: it belongs to one half.
#[derive(Debug)]
pub(super) struct Inlet {
    ring: Producer<u8>,
    pub(super) shared: Arc<Shared>,
    pub(super) counts: Arc<Counts>,
}

/// The reader's end.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) ring: Consumer<u8>,
    pub(super) counts: Arc<Counts>,
    pub(super) pair: u16,
    pub(super) direction: Direction,
}

/// A frame to be stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item<'a> {
    pub(super) batch: &'a Batch<'a>,
    pub(super) frame: &'a Frame,
    pub(super) index: u16,
    pub(super) time_ns: u64,
}

/// What became of a frame that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// The filter does not let it through.
    Unwanted,
    Yes,
    NoRoom,
}

impl Inlet {
    /// A new ring, whose other end the reader finds.
    pub(super) fn new(shared: &Arc<Shared>, pair: u16, direction: Direction) -> Self {
        let (ring, outlet) = RingBuffer::new(shared.settings.ring_bytes.max(LEAST));
        let counts = Arc::<Counts>::default();
        let outlet = Outlet { ring: outlet, counts: Arc::clone(&counts), pair, direction };
        shared.new_rings().push(outlet);
        shared.wake_if_asleep();
        Self { ring, shared: Arc::clone(shared), counts }
    }

    /// Whether the filter lets a frame through.
    fn accepts(&self, frame: &Frame) -> bool {
        self.shared.settings.filter.matches(frame.head(), frame.len())
    }

    pub(super) fn wants_drops(&self) -> bool {
        self.shared.settings.drops
    }

    /// Stores a frame. Returns whether there was room.
    fn store(&mut self, item: &Item<'_>) -> bool {
        let original = item.frame.len();
        let captured = original.min(self.shared.settings.snaplen);
        let len = LONG.saturating_add(captured as usize);
        if self.ring.slots() < len.saturating_add(KEPT_FREE) {
            return false;
        }
        let Ok(mut chunk) = self.ring.write_chunk(len) else { return false };
        let (first, second) = chunk.as_mut_slices();
        let mut space = Spread { first, second };
        space.put(&short(FRAME, None, item.index));
        space.put(&captured.to_ne_bytes());
        space.put(&original.to_ne_bytes());
        space.put(&item.time_ns.to_ne_bytes());
        let head = item.frame.head();
        let from_head = head.len().min(captured as usize);
        space.put(head.get(..from_head).unwrap_or_default());
        let mut body = item.batch.body(item.frame);
        // The body is read once; what its owner does meanwhile only changes which bytes arrive.
        for part in [space.first, space.second] {
            let _ = body.read(part);
        }
        chunk.commit_all();
        true
    }

    /// Stores a frame if it is wanted. Its fate is open.
    pub(super) fn offer(&mut self, item: &Item<'_>) -> Stored {
        if !self.accepts(item.frame) {
            Stored::Unwanted
        } else if self.store(item) {
            Stored::Yes
        } else {
            Stored::NoRoom
        }
    }

    /// Tells the fate of a frame that was stored.
    pub(super) fn note(&mut self, index: u16, fate: DropReason) {
        self.put_short(short(NOTE, Some(fate), index));
    }

    /// Ends a burst.
    pub(super) fn end_burst(&mut self) {
        self.put_short(short(END, None, 0));
    }

    fn put_short(&mut self, record: [u8; SHORT]) {
        // There is room: `store` keeps it free.
        if let Ok(mut chunk) = self.ring.write_chunk(SHORT) {
            let (first, second) = chunk.as_mut_slices();
            Spread { first, second }.put(&record);
            chunk.commit_all();
        }
    }

    /// Wakes the reader if it waits.
    pub(super) fn wake(&self) {
        self.shared.wake_if_asleep();
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        // ORDERING: no ordering is needed: the reader looks at the ring itself.
        if self.shared.asleep.load(Ordering::Relaxed) {
            self.shared.wake();
        }
    }
}

fn short(kind: u8, fate: Option<DropReason>, index: u16) -> [u8; SHORT] {
    let [a, b] = index.to_ne_bytes();
    [kind, code(fate), a, b]
}

/// Space in a ring: two pieces, because a ring ends somewhere.
struct Spread<'a> {
    first: &'a mut [u8],
    second: &'a mut [u8],
}

impl Spread<'_> {
    fn put(&mut self, mut data: &[u8]) {
        for part in [&mut self.first, &mut self.second] {
            let count = part.len().min(data.len());
            let (now, later) = data.split_at(count);
            let (space, rest) = std::mem::take(part).split_at_mut(count);
            space.copy_from_slice(now);
            *part = rest;
            data = later;
        }
    }
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
