//! Where a device is in its ring, written so that a successor goes on after a death at any
//! instruction.
//!
//! Split rings need little: `used.idx` is the truth, since chains are completed in the order in
//! which they came. The record only says which values it can have, so that a ring which was set up
//! anew is told from one that ran. Packed rings have no such index, and used descriptors are
//! written over those of the driver:
//!
//! ```text
//!   lengths ─► place: [from, to), meant ─► used descriptors but the first ─► the first (publishes)
//!                                                                        ─► place: to, done
//! ```
//!
//! A successor that finds a burst *meant* looks at its first descriptor. If it is used, the burst
//! was published: go on behind it. If it is still available, the driver has seen none of it: the
//! successor writes what is missing and publishes the burst itself. Ids of descriptors that were
//! not written yet are still in the ring, lengths are in the record. Bursts with chains of several
//! slots are written from their end, so that everything before the first used descriptor is whole
//! and the ring itself says where each chain begins.
//!
//! **Trust.** The ring is the guest's: what a successor reads there is checked, and if it is not
//! what the record says the record does not count.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use crate::config::{Layout, QueueConfig, QueueError, RingPosition, WRAP_BIT};
use crate::mem::{GuestMap, PackedAreas, RecordPage, SplitAreas};
use crate::packed::recover;
use crate::shared::Shared;

/// The place is known, and published.
const DONE: u64 = 1 << 32;
/// A burst is being published.
const MEANT: u64 = 1 << 33;
/// The record has the bytes written into each chain; otherwise there are none.
const LENS: u64 = 1 << 34;
/// One used descriptor stands for the burst (`IN_ORDER`).
const ONE: u64 = 1 << 35;
/// Each chain is one slot.
const SINGLE: u64 = 1 << 36;
/// Bits 48 to 63 are the place of the last used descriptor that was written.
const LAST: u64 = 1 << 37;

/// How a burst is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) lens: bool,
    pub(crate) one: bool,
    pub(crate) single: bool,
}

/// A record as a successor finds it. Places are those of vhost-user: packed rings have the wrap
/// counter in bit 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The burst is being published.
    pub(crate) meant: bool,
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) last: Option<u16>,
    pub(crate) shape: Shape,
}

#[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
impl Entry {
    fn read(word: u64) -> Option<Self> {
        let flag = |bit: u64| word & bit != 0;
        (flag(DONE) || flag(MEANT)).then_some(Self {
            meant: flag(MEANT),
            from: word as u16,
            to: (word >> 16) as u16,
            last: flag(LAST).then_some((word >> 48) as u16),
            shape: Shape { lens: flag(LENS), one: flag(ONE), single: flag(SINGLE) },
        })
    }
}

/// A ring's record in the hands of its queue.
#[derive(Debug)]
pub(crate) struct Record {
    page: RecordPage,
    /// The place of the last used descriptor of the burst that is being published.
    last: u16,
}

impl Record {
    pub(crate) fn new(page: RecordPage) -> Self {
        Self { page, last: 0 }
    }

    /// The queue starts, or goes on, here. What an earlier queue of the same ring left is as good
    /// if it says the same.
    pub(crate) fn begin(&self, place: u16) {
        let now = Entry::read(self.page.place().load(Relaxed));
        if !now.is_some_and(|now| !now.meant && now.to == place) {
            let word = DONE | u64::from(place) | u64::from(place) << 16;
            // ORDERING: release orders what the owner wrote into the page before it, for a
            // successor that maps the page after our death.
            self.page.place().store(word, Release);
        }
    }

    /// Split: `used.idx` goes from one value to the other with the next store.
    #[inline(always)]
    pub(crate) fn step(&self, from: u16, to: u16) {
        self.page.place().store(MEANT | u64::from(from) | u64::from(to) << 16, Relaxed);
    }

    /// Packed: the burst from one place to the other is about to be written. The last used
    /// descriptor of it will be at `last`.
    #[inline(always)]
    pub(crate) fn mean(&mut self, (from, to, last): (u16, u16, u16), shape: (Shape, &[u32])) {
        let (shape, lens) = shape;
        self.last = last;
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let shape_bits = flag(shape.lens, LENS) | flag(shape.one, ONE) | flag(shape.single, SINGLE);
        if shape.lens {
            self.page.write_lens(lens);
        }
        let word = MEANT | shape_bits | u64::from(from) | u64::from(to) << 16;
        // ORDERING: release: the lengths come before. The fence: the used descriptors come after.
        // Both for a successor that looks at page and ring after our death.
        self.page.place().store(word, Release);
        fence(Release);
    }

    /// Packed: the burst is published.
    #[inline(always)]
    pub(crate) fn done(&self, place: u16) {
        // ORDERING: as in `mean`: the store that published the burst comes before.
        fence(Release);
        let places = u64::from(place) | u64::from(place) << 16 | u64::from(self.last) << 48;
        self.page.place().store(DONE | LAST | places, Relaxed);
    }
}

/// What a record says about a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// It knows nothing.
    Unknown,
    /// It does not fit what is in the ring: the driver has set it up anew. The reason, for people.
    Unlikely(&'static str),
    /// The queue goes on here.
    At(RingPosition),
}

impl RecordPage {
    /// Forgets the place: whoever had the ring told its front end where it stopped, or the driver
    /// resets it.
    pub fn forget(&self) {
        self.place().store(0, Relaxed);
    }

    /// Sets the place of a ring that nobody runs, and of which no chain is on its way.
    pub fn leave(&self, position: RingPosition) {
        let place = match position {
            RingPosition::Split { used, .. } => used,
            RingPosition::Packed { used, used_wrap, .. } => {
                if used_wrap {
                    used | WRAP_BIT
                } else {
                    used
                }
            }
        };
        self.forget();
        Record::new(self.clone()).begin(place);
    }

    /// Whether there is a place.
    pub fn is_known(&self) -> bool {
        Entry::read(self.place().load(Acquire)).is_some()
    }
}

impl QueueConfig {
    /// Where a predecessor that ended at any instruction left the ring, as `record` and the ring
    /// say. A burst that it had begun to publish is published: its frames had been dealt with. The
    /// position of `self` does not matter. Nobody else may use the ring.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the configuration is wrong.
    pub fn recover(&self, memory: &GuestMap, record: &RecordPage) -> Result<Recovery, QueueError> {
        self.check_size()?;
        // ORDERING: acquire pairs with the release of `mean` and `begin`.
        let Some(entry) = Entry::read(record.place().load(Acquire)) else {
            return Ok(Recovery::Unknown);
        };
        match self.layout {
            Layout::Split => SplitAreas::new(memory, self).map(|areas| split(&areas, entry, self)),
            Layout::Packed => {
                let areas = PackedAreas::new(memory, self)?;
                Ok(recover::packed(&areas, entry, record))
            }
        }
    }
}

fn split(areas: &SplitAreas, entry: Entry, config: &QueueConfig) -> Recovery {
    // ORDERING: relaxed; whoever wrote them has stopped, and the message that told us so orders
    // its stores before this.
    let used = areas.used_idx().load(Relaxed);
    let ahead = areas.avail_idx().load(Relaxed).wrapping_sub(used);
    if used != entry.from && used != entry.to {
        return Recovery::Unlikely("used.idx is another");
    }
    if ahead > config.size {
        return Recovery::Unlikely("avail.idx is not ahead of used.idx");
    }
    Recovery::At(RingPosition::Split { avail: used, used })
}

#[cfg(test)]
mod tests;
