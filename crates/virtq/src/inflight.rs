//! The in-flight region of a ring, in the layout of the vhost-user specification ("Inflight I/O
//! tracking"): which chains the device has, kept by the front end while the back end is away.
//!
//! ```text
//!   split    head 16 B: features, version, desc_num, last_batch_head, used_idx
//!            state 16 B: inflight, next, counter                                (by head)
//!   packed   head 32 B: features, version, desc_num, free_head, old_free_head,
//!                       used_idx, old_used_idx, used_wrap, old_used_wrap
//!            state 32 B: inflight, next, last, num, counter, id, flags, len, addr  (a free list)
//! ```
//!
//! This device completes chains in the order in which it fetched them, so what is in flight are
//! the chains behind the last used one. A successor therefore goes on there; for packed rings it
//! first puts the descriptors back that were written over and not published.
//!
//! **Trust.** The region is the front end's: indexes are checked or masked by bounds, loops are
//! bounded by the queue's size.
//! **Not supported.** Going on from a region of a device that completed chains out of order.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use crate::config::{Layout, QueueConfig, QueueError, RingPosition};
use crate::mem::{GuestMap, InflightArea, PackedAreas, RawDesc, SplitAreas};
use crate::packed::restore;
use crate::record::Recovery;
use crate::shared::Shared;

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
/// Split.
const LAST_BATCH: usize = 12;
const USED_IDX: usize = 14;
const SPLIT_HEAD: usize = 16;
/// Packed.
const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
/// One word: used index, the old one, and a byte for each one's wrap counter. Stored at once, so
/// that index and counter always belong together.
const PACKED_USED: usize = 16;
const PACKED_HEAD: usize = 32;

/// What a queue's region is aligned to, as in other implementations.
const ALIGN: usize = 64;

/// Bytes of the region of a queue of `size`.
pub fn inflight_bytes(layout: Layout, size: u16) -> usize {
    let (head, state) = sizes(layout);
    usize::from(size).saturating_mul(state).saturating_add(head).next_multiple_of(ALIGN)
}

fn sizes(layout: Layout) -> (usize, usize) {
    match layout {
        Layout::Split => (SPLIT_HEAD, 16),
        Layout::Packed => (PACKED_HEAD, 32),
    }
}

/// A descriptor of a packed ring that was in flight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Saved {
    /// Length, id, flags, as in the ring.
    pub(crate) meta: u64,
}

/// A chain that the device has.
#[derive(Debug, Clone, Copy)]
struct Chain {
    /// Head (split) or first state (packed).
    state: u16,
    slots: u16,
}

/// A ring's region in the hands of its queue.
#[derive(Debug)]
pub struct Inflight {
    area: InflightArea,
    layout: Layout,
    size: u16,
    counter: u64,
    /// What was fetched and not completed, the oldest first.
    order: VecDeque<Chain>,
    /// What was completed and not published.
    batch: Vec<Chain>,
}

impl Inflight {
    /// The region of a queue with `config`; none if it is too short, or of another queue.
    pub fn new(area: InflightArea, config: &QueueConfig) -> Option<Self> {
        let (layout, size) = (config.layout, config.size);
        let fits = area.len() >= inflight_bytes(layout, size);
        let known = match area.get16(VERSION) {
            0 => true,
            1 => area.get16(DESC_NUM) == size,
            _ => false,
        };
        let order = VecDeque::with_capacity(usize::from(size));
        let batch = Vec::with_capacity(usize::from(size));
        (fits && known).then_some(Self { area, layout, size, counter: 0, order, batch })
    }

    fn state(&self, index: u16) -> usize {
        let (head, state) = sizes(self.layout);
        usize::from(index).saturating_mul(state).saturating_add(head)
    }

    /// Nothing is in flight, the device is at `position`.
    pub(crate) fn begin(&mut self, position: RingPosition) {
        self.area.put16(VERSION, 0);
        self.area.put64(0, 0);
        self.area.put16(DESC_NUM, self.size);
        for index in 0..self.size {
            let at = self.state(index);
            self.area.put16(at, 0);
            if self.layout == Layout::Packed {
                self.area.put16(at.saturating_add(2), index.wrapping_add(1));
            }
        }
        match position {
            RingPosition::Split { used, .. } => {
                self.area.put16(LAST_BATCH, 0);
                self.area.put16(USED_IDX, used);
            }
            RingPosition::Packed { used, used_wrap, .. } => {
                self.area.put16(FREE_HEAD, 0);
                self.area.put16(OLD_FREE_HEAD, 0);
                let here = (used, used_wrap);
                self.area.put64(PACKED_USED, used_word(here, here));
            }
        }
        self.area.put16(VERSION, 1);
    }

    /// Split: the device has fetched the chain at `head`.
    pub(crate) fn fetched(&mut self, head: u16) {
        let at = self.state(head);
        self.count(at);
        self.area.put16(at, 1);
        self.order.push_back(Chain { state: head, slots: 1 });
    }

    fn count(&mut self, at: usize) {
        self.area.put64(at.saturating_add(8), self.counter);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Packed: the device has fetched a chain of these descriptors.
    pub(crate) fn fetched_all(&mut self, descs: impl ExactSizeIterator<Item = RawDesc>) {
        let slots = u16::try_from(descs.len()).unwrap_or(u16::MAX);
        let first = self.area.get16(OLD_FREE_HEAD);
        let head = self.state(first);
        self.count(head);
        let mut entry = first;
        let mut last = first;
        for desc in descs {
            let at = self.state(entry);
            self.area.put64(at.saturating_add(16), desc.saved());
            self.area.put64(at.saturating_add(24), desc.addr);
            last = entry;
            entry = self.area.get16(at.saturating_add(2));
        }
        self.area.put16(head.saturating_add(4), last);
        self.area.put16(head.saturating_add(6), slots);
        self.area.put16(head, 1);
        self.area.put16(FREE_HEAD, entry);
        self.area.put16(OLD_FREE_HEAD, entry);
        self.order.push_back(Chain { state: first, slots });
    }

    /// The device gave the newest chains of `slots` slots back unused, while no batch waits.
    pub(crate) fn returned(&mut self, slots: u16) {
        let mut left = slots;
        while left > 0
            && let Some(chain) = self.order.pop_back()
        {
            self.area.put16(self.state(chain.state), 0);
            if self.layout == Layout::Packed {
                self.free(chain.state);
                self.area.put16(OLD_FREE_HEAD, chain.state);
            }
            left = left.saturating_sub(chain.slots);
        }
    }

    /// The oldest chains of `slots` slots are about to be published.
    pub(crate) fn completing(&mut self, slots: u16) {
        let mut left = slots;
        while left > 0
            && let Some(chain) = self.order.pop_front()
        {
            let at = self.state(chain.state);
            match self.layout {
                Layout::Split => {
                    self.area.put16(at.saturating_add(6), self.area.get16(LAST_BATCH));
                    self.area.put16(LAST_BATCH, chain.state);
                }
                Layout::Packed => self.free(chain.state),
            }
            self.batch.push(chain);
            left = left.saturating_sub(chain.slots);
        }
    }

    /// Packed: puts a chain's states before those that are free.
    fn free(&self, first: u16) {
        let last = self.area.get16(self.state(first).saturating_add(4));
        self.area.put16(self.state(last).saturating_add(2), self.area.get16(FREE_HEAD));
        self.area.put16(FREE_HEAD, first);
    }

    /// The next store publishes the batch, behind which the device is at `position` then.
    pub(crate) fn publishing(&self, position: RingPosition) {
        if let RingPosition::Packed { used, used_wrap, .. } = position {
            let (_, old) = self.packed_used();
            self.area.put64(PACKED_USED, used_word((used, used_wrap), old));
        }
    }

    /// The batch is published.
    pub(crate) fn published(&mut self, position: RingPosition) {
        while let Some(chain) = self.batch.pop() {
            self.area.put16(self.state(chain.state), 0);
        }
        match position {
            RingPosition::Split { used, .. } => self.area.put16(USED_IDX, used),
            RingPosition::Packed { used, used_wrap, .. } => {
                let here = (used, used_wrap);
                self.area.put16(OLD_FREE_HEAD, self.area.get16(FREE_HEAD));
                self.area.put64(PACKED_USED, used_word(here, here));
            }
        }
    }

    /// Whether a batch waits to be published.
    pub(crate) fn has_batch(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Where a predecessor that ended at any instruction left the ring. Nobody else may use it.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the configuration is wrong.
    pub fn recover(
        &mut self,
        config: &QueueConfig,
        memory: &GuestMap,
    ) -> Result<Recovery, QueueError> {
        config.check_size()?;
        if self.area.get16(VERSION) != 1 {
            return Ok(Recovery::Unknown);
        }
        match self.layout {
            Layout::Split => Ok(self.recover_split(&SplitAreas::new(memory, config)?)),
            Layout::Packed => Ok(self.recover_packed(&PackedAreas::new(memory, config)?)),
        }
    }

    /// The chains that were in flight, in the order in which they were fetched. Each counter is
    /// read once: `sort` panics if what it compares changes meanwhile.
    fn in_flight(&self) -> Vec<u16> {
        let is = |index: &u16| self.area.get16(self.state(*index)) & 0xff != 0;
        let mut all: Vec<u16> = (0..self.size).filter(is).collect();
        all.sort_by_cached_key(|index| self.area.get64(self.state(*index).saturating_add(8)));
        all
    }

    fn recover_split(&mut self, areas: &SplitAreas) -> Recovery {
        let used = areas.used_idx().load(Relaxed);
        let batch = used.wrapping_sub(self.area.get16(USED_IDX));
        if batch > self.size || areas.avail_idx().load(Relaxed).wrapping_sub(used) > self.size {
            return Recovery::Unlikely("used.idx is another");
        }
        let mut head = self.area.get16(LAST_BATCH);
        for _ in 0..batch {
            if head < self.size {
                let at = self.state(head);
                self.area.put16(at, 0);
                head = self.area.get16(at.saturating_add(6));
            }
        }
        self.area.put16(USED_IDX, used);
        let mut heads = areas.heads(used);
        if self.in_flight().iter().any(|head| heads.next().0 != *head) {
            return Recovery::Unlikely("chains were completed out of order");
        }
        Recovery::At(RingPosition::Split { avail: used, used })
    }

    fn recover_packed(&mut self, areas: &PackedAreas) -> Recovery {
        if areas.device_event().load(Relaxed) == 0 {
            return Recovery::Unlikely("the device area is as new");
        }
        let (new, old) = self.packed_used();
        if new.0 >= self.size || old.0 >= self.size {
            return Recovery::Unlikely("the place is beyond the ring");
        }
        let committed = new != old && restore::is_published(areas, old);
        if committed {
            self.area.put16(OLD_FREE_HEAD, self.area.get16(FREE_HEAD));
        }
        let used = if committed { new } else { old };
        self.clear_free(self.area.get16(OLD_FREE_HEAD));
        let mut saved: Vec<Saved> = Vec::with_capacity(usize::from(self.size));
        for head in self.in_flight() {
            let room = usize::from(self.size).saturating_sub(saved.len());
            let chain = self.saved(head);
            if chain.len() > room {
                return Recovery::Unlikely("more is in flight than the ring holds");
            }
            saved.extend(chain);
        }
        if restore::put_back(areas, used, &saved) {
            let (avail, avail_wrap) = used;
            let (used, used_wrap) = used;
            Recovery::At(RingPosition::Packed { avail, avail_wrap, used, used_wrap })
        } else {
            Recovery::Unlikely("chains were completed out of order")
        }
    }

    /// Where the device is, and was before the last batch: index and wrap counter.
    fn packed_used(&self) -> (Used, Used) {
        let word = self.area.get64(PACKED_USED);
        let (new, old) = (low16(word), low16(word >> 16));
        ((new, word >> 32 & 0xff != 0), (old, word >> 40 & 0xff != 0))
    }

    /// Entries in the free list are not in flight, whatever they say.
    fn clear_free(&self, head: u16) {
        let mut entry = head;
        for _ in 0..self.size {
            if entry >= self.size {
                break;
            }
            let at = self.state(entry);
            self.area.put16(at, 0);
            entry = self.area.get16(at.saturating_add(2));
        }
    }

    /// The descriptors of the chain whose first state is `head`.
    fn saved(&self, head: u16) -> Vec<Saved> {
        let count = self.area.get16(self.state(head).saturating_add(6)).min(self.size);
        let mut entry = head;
        let mut saved = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let at = self.state(entry);
            let meta = saved_meta(self.area.get64(at.saturating_add(16)));
            saved.push(Saved { meta });
            entry = self.area.get16(at.saturating_add(2));
        }
        saved
    }
}

/// A used index and its wrap counter.
type Used = (u16, bool);

fn used_word(new: Used, old: Used) -> u64 {
    let wraps = u64::from(new.1) | u64::from(old.1) << 8;
    u64::from(new.0) | u64::from(old.0) << 16 | wraps << 32
}

#[expect(clippy::cast_possible_truncation, reason = "picks a bit field")]
fn low16(word: u64) -> u16 {
    word as u16
}

/// id, flags, len of a state to length, id, flags of a descriptor.
fn saved_meta(word: u64) -> u64 {
    word.rotate_left(32)
}

impl RawDesc {
    /// id, flags, len, as a state has them.
    fn saved(self) -> u64 {
        self.meta.rotate_left(32)
    }
}

#[cfg(test)]
mod tests;
