//! The ring areas of both formats, with accessors that cannot leave them.
//!
//! Indexes are masked (split) or clamped (packed) to the checked size, so that no value that a
//! guest or a bug produces reaches a byte outside of the area.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::word::RingMem;
use super::{GuestMap, RawSeg, Reader, Word, prefetch_read, prefetch_write};
use crate::config::{QueueConfig, QueueError, RingArea};
use crate::shared::Shared;

/// A descriptor's two words, as they were at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawDesc {
    pub(crate) addr: u64,
    /// Split: length, flags, next. Packed: length, buffer id, flags. From the low bits up.
    pub(crate) meta: u64,
}

#[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
impl RawDesc {
    /// Copies the descriptor at `seg`, which has 16 bytes and may be anywhere in guest memory.
    #[inline(always)]
    pub(super) fn fetch(seg: RawSeg) -> Option<Self> {
        if seg.len() != 16 || !seg.ptr().addr().is_multiple_of(8) {
            return Self::fetch_bytes(&[seg]);
        }
        let mem = RingMem { ptr: seg.ptr() };
        // SAFETY: the segment is mapped, has 16 bytes and is aligned to 8.
        let addr: Word<'_, u64> = unsafe { mem.word(0) };
        // SAFETY: as above.
        let meta: Word<'_, u64> = unsafe { mem.word(8) };
        Some(Self { addr: addr.load(Relaxed), meta: meta.load(Relaxed) })
    }

    /// Copies a descriptor that is not aligned or lies in two segments.
    #[cold]
    #[inline(never)]
    pub(super) fn fetch_bytes(segs: &[RawSeg]) -> Option<Self> {
        let mut bytes = [0u8; 16];
        let done = Reader::over(segs).read(&mut bytes);
        let (first, second) = bytes.split_first_chunk::<8>()?;
        let meta = u64::from_le_bytes(second.try_into().ok()?);
        (done == bytes.len()).then_some(Self { addr: u64::from_le_bytes(*first), meta })
    }

    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        self.meta as u32
    }

    /// Bits 32 to 47: flags (split and indirect tables of split) or buffer id (packed).
    #[inline(always)]
    pub(crate) fn third(self) -> u16 {
        (self.meta >> 32) as u16
    }

    /// Bits 48 to 63: next (split) or flags (packed).
    #[inline(always)]
    pub(crate) fn fourth(self) -> u16 {
        (self.meta >> 48) as u16
    }
}

/// Descriptor table, available ring and used ring of a split queue.
///
/// Invariants, kept by [`Self::new`]: each area is mapped while `map` lives, contiguous, aligned,
/// and long enough for `mask + 1` entries (and the event word if `event_idx`).
pub(crate) struct SplitAreas {
    map: GuestMap,
    desc: RingMem,
    avail: RingMem,
    used: RingMem,
    mask: usize,
    event_idx: bool,
}

// SAFETY: the pointers are as good in every thread, and are only accessed atomically.
unsafe impl Send for SplitAreas {}
// SAFETY: as above.
unsafe impl Sync for SplitAreas {}

impl SplitAreas {
    /// Checks the three areas; `config.size` must be a power of two.
    pub(crate) fn new(map: &GuestMap, config: &QueueConfig) -> Result<Self, QueueError> {
        let Some(mask) = config.size.checked_sub(1).filter(|m| m & config.size == 0) else {
            return Err(QueueError::Size(config.size));
        };
        let size = u64::from(config.size);
        let event = if config.features.event_idx { 2 } else { 0 };
        let bytes = |entry: u64, head: u64| size.saturating_mul(entry).saturating_add(head);
        let avail = bytes(2, 4).saturating_add(event);
        let used = bytes(8, 4).saturating_add(event);
        Ok(Self {
            desc: RingMem::new(map, RingArea::Descriptors, config.desc, (bytes(16, 0), 16))?,
            avail: RingMem::new(map, RingArea::Driver, config.driver, (avail, 2))?,
            used: RingMem::new(map, RingArea::Device, config.device, (used, 4))?,
            map: map.clone(),
            mask: usize::from(mask),
            event_idx: config.features.event_idx,
        })
    }

    #[inline(always)]
    pub(crate) fn map(&self) -> &GuestMap {
        &self.map
    }

    #[inline(always)]
    fn slot(&self, index: u16) -> usize {
        usize::from(index) & self.mask
    }

    /// The offset behind the entries of a ring with a head of 4 bytes.
    #[inline(always)]
    fn behind(&self, entry: usize) -> usize {
        self.mask.wrapping_add(1).wrapping_mul(entry).wrapping_add(4)
    }

    #[inline(always)]
    pub(crate) fn avail_flags(&self) -> Word<'_, u16> {
        // SAFETY: offset 0 of an area of at least 4 bytes, aligned to 2.
        unsafe { self.avail.word(0) }
    }

    #[inline(always)]
    pub(crate) fn avail_idx(&self) -> Word<'_, u16> {
        // SAFETY: offset 2 of an area of at least 4 bytes, aligned to 2.
        unsafe { self.avail.word(2) }
    }

    /// Where the driver says from which completion on it wants a call, with `EVENT_IDX`.
    #[inline(always)]
    pub(crate) fn used_event(&self) -> Option<Word<'_, u16>> {
        // SAFETY: with `event_idx` the area was checked to have this word behind its entries.
        self.event_idx.then(|| unsafe { self.avail.word(self.behind(2)) })
    }

    #[inline(always)]
    pub(crate) fn used_flags(&self) -> Word<'_, u16> {
        // SAFETY: offset 0 of an area of at least 4 bytes, aligned to 4.
        unsafe { self.used.word(0) }
    }

    #[inline(always)]
    pub(crate) fn used_idx(&self) -> Word<'_, u16> {
        // SAFETY: offset 2 of an area of at least 4 bytes, aligned to 4.
        unsafe { self.used.word(2) }
    }

    /// The used entries from `index` on, one after the other.
    #[inline(always)]
    pub(crate) fn entries(&self, index: u16) -> Entries<'_> {
        Entries { used: self.used, mask: self.mask, next: usize::from(index), _areas: PhantomData }
    }

    /// Where we say from which chain on we want a kick, with `EVENT_IDX`.
    #[inline(always)]
    pub(crate) fn avail_event(&self) -> Option<Word<'_, u16>> {
        // SAFETY: with `event_idx` the area was checked to have this word behind its entries.
        self.event_idx.then(|| unsafe { self.used.word(self.behind(8)) })
    }

    /// Copies one descriptor.
    #[inline(always)]
    pub(crate) fn desc(&self, index: u16) -> RawDesc {
        let offset = self.slot(index).wrapping_mul(16);
        // SAFETY: the slot is masked to the entries that `new` checked.
        let addr: Word<'_, u64> = unsafe { self.desc.word(offset) };
        // SAFETY: as above, the second half of the same descriptor.
        let meta: Word<'_, u64> = unsafe { self.desc.word(offset.wrapping_add(8)) };
        RawDesc { addr: addr.load(Relaxed), meta: meta.load(Relaxed) }
    }

    /// Asks the CPU for the available entries of a burst of `count` from `index` on.
    #[inline(always)]
    pub(crate) fn prefetch_avail(&self, index: u16, count: usize) {
        let size = self.mask.wrapping_add(1).wrapping_mul(2);
        let at = (usize::from(index) & self.mask).wrapping_mul(2);
        let entries = RingMem { ptr: self.avail.ptr.wrapping_add(4) };
        entries.ask(prefetch_read, at, (count.wrapping_mul(2), size));
    }

    /// Asks the CPU for the `count` descriptors from `head` on. Lines beyond are left alone: the
    /// driver may be writing there.
    #[inline(always)]
    pub(crate) fn prefetch_descs(&self, head: u16, count: usize) {
        let size = self.mask.wrapping_add(1).wrapping_mul(16);
        let at = (usize::from(head) & self.mask).wrapping_mul(16);
        self.desc.ask(prefetch_read, at, (count.wrapping_mul(16), size));
    }

    /// Asks for the word that says whether the driver wants a call: read after the fence that
    /// follows publication, it is there by then.
    #[inline(always)]
    pub(crate) fn prefetch_wish(&self) {
        let behind = if self.event_idx { self.behind(2) } else { 0 };
        prefetch_read(self.avail.ptr.wrapping_add(behind));
    }

    /// The head in available entry `index`, as the driver wrote it.
    #[inline(always)]
    pub(crate) fn head(&self, index: u16) -> u16 {
        let entry = self.slot(index).wrapping_mul(2).wrapping_add(4);
        // SAFETY: the entry is masked to those that `new` checked.
        let head: Word<'_, u16> = unsafe { self.avail.word(entry) };
        head.load(Relaxed)
    }

    /// The entries from `index` on, one after the other, whether available or not: it is the
    /// caller who knows how many are.
    #[inline(always)]
    pub(crate) fn heads(&self, index: u16) -> Heads<'_> {
        Heads {
            desc: self.desc,
            avail: self.avail,
            mask: self.mask,
            next: usize::from(index),
            _areas: PhantomData,
        }
    }
}

/// Available entries of a split ring with the descriptors that they name, in a form that a loop
/// keeps in registers. Invariants: those of [`SplitAreas`], which the lifetime keeps.
pub(crate) struct Heads<'a> {
    desc: RingMem,
    avail: RingMem,
    mask: usize,
    next: usize,
    _areas: PhantomData<&'a SplitAreas>,
}

impl Heads<'_> {
    /// The next head as the driver wrote it, and the descriptor that it names if there is one.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> (u16, Option<RawDesc>) {
        let (head, desc) = self.wide_next();
        (u16::try_from(head).unwrap_or(u16::MAX), desc)
    }

    /// The same, wide, so that the head is widened once.
    #[inline(always)]
    fn wide_next(&mut self) -> (u32, Option<RawDesc>) {
        let entry = (self.next & self.mask).wrapping_mul(2).wrapping_add(4);
        self.next = self.next.wrapping_add(1);
        // SAFETY: the entry is masked to those that `SplitAreas::new` checked.
        let head: Word<'_, u16> = unsafe { self.avail.word(entry) };
        let head = u32::from(head.load(Relaxed));
        if head as usize > self.mask {
            return (head, None);
        }
        let offset = (head as usize).wrapping_mul(16);
        // SAFETY: the descriptor is one of the `mask + 1` that `SplitAreas::new` checked.
        let addr: Word<'_, u64> = unsafe { self.desc.word(offset) };
        // SAFETY: as above, the second half of the same descriptor.
        let meta: Word<'_, u64> = unsafe { self.desc.word(offset.wrapping_add(8)) };
        let desc = RawDesc { addr: addr.load(Relaxed), meta: meta.load(Relaxed) };
        (head, Some(desc))
    }

    /// The hot loop: fills `chains` with the buffers of the next heads, as long as each is found.
    /// Returns how many.
    #[inline(always)]
    pub(crate) fn resolve(
        mut self,
        find: impl Fn(RawDesc) -> Option<RawSeg>,
        chains: &mut [RawSeg],
    ) -> usize {
        let first = self.next;
        for chain in chains {
            let next = self.next;
            let (head, desc) = self.wide_next();
            let Some(found) = desc.and_then(&find) else {
                return next.wrapping_sub(first);
            };
            *chain = found.tagged(head);
        }
        self.next.wrapping_sub(first)
    }
}

/// Used entries of a split ring, one after the other; invariants as of [`Heads`].
pub(crate) struct Entries<'a> {
    used: RingMem,
    mask: usize,
    next: usize,
    _areas: PhantomData<&'a SplitAreas>,
}

impl Entries<'_> {
    /// Writes the next entry; it is the index's store that publishes it.
    #[inline(always)]
    pub(crate) fn write(&mut self, id: u16, len: u32) {
        let offset = (self.next & self.mask).wrapping_mul(8).wrapping_add(4);
        self.next = self.next.wrapping_add(1);
        // SAFETY: the slot is masked to the entries that `SplitAreas::new` checked.
        let first: Word<'_, u32> = unsafe { self.used.word(offset) };
        // SAFETY: as above, the second half of the same entry.
        let second: Word<'_, u32> = unsafe { self.used.word(offset.wrapping_add(4)) };
        first.store(u32::from(id), Relaxed);
        second.store(len, Relaxed);
    }
}

impl fmt::Debug for SplitAreas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitAreas").field("mask", &self.mask).finish_non_exhaustive()
    }
}

/// Descriptor ring and the two event suppression areas of a packed queue.
///
/// Invariants, kept by [`Self::new`]: each area is mapped while `map` lives, contiguous and
/// aligned; the ring has `size >= 1` descriptors, the other two have 4 bytes.
pub(crate) struct PackedAreas {
    map: GuestMap,
    desc: RingMem,
    driver: RingMem,
    device: RingMem,
    size: u16,
}

// SAFETY: the pointers are as good in every thread, and are only accessed atomically.
unsafe impl Send for PackedAreas {}
// SAFETY: as above.
unsafe impl Sync for PackedAreas {}

impl PackedAreas {
    /// Checks the three areas.
    pub(crate) fn new(map: &GuestMap, config: &QueueConfig) -> Result<Self, QueueError> {
        if config.size == 0 {
            return Err(QueueError::Size(config.size));
        }
        let ring = u64::from(config.size).saturating_mul(16);
        Ok(Self {
            desc: RingMem::new(map, RingArea::Descriptors, config.desc, (ring, 16))?,
            driver: RingMem::new(map, RingArea::Driver, config.driver, (4, 4))?,
            device: RingMem::new(map, RingArea::Device, config.device, (4, 4))?,
            map: map.clone(),
            size: config.size,
        })
    }

    #[inline(always)]
    pub(crate) fn map(&self) -> &GuestMap {
        &self.map
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn offset(&self, index: u16) -> usize {
        let slot = if index < self.size { index } else { 0 };
        usize::from(slot).wrapping_mul(16)
    }

    /// Length, buffer id and flags of a descriptor in one word.
    #[inline(always)]
    pub(crate) fn meta(&self, index: u16) -> Word<'_, u64> {
        // SAFETY: the offset is clamped to the descriptors that `new` checked.
        unsafe { self.desc.word(self.offset(index).wrapping_add(8)) }
    }

    /// Copies one descriptor; what its driver wrote before its flags is in the copy.
    #[inline(always)]
    pub(crate) fn desc(&self, index: u16) -> RawDesc {
        // ORDERING: acquire pairs with the driver's release of the flags, which are in this word:
        // the address that is read next is the one that belongs to them.
        let meta = self.meta(index).load(Acquire);
        // SAFETY: the offset is clamped to the descriptors that `new` checked.
        let addr: Word<'_, u64> = unsafe { self.desc.word(self.offset(index)) };
        RawDesc { addr: addr.load(Relaxed), meta }
    }

    /// The descriptors from `index` on, as they are when each is reached: at most `count`, and
    /// not beyond the end of the ring.
    #[inline(always)]
    pub(crate) fn descs(&self, index: u16, count: usize) -> Descs<'_> {
        let left = usize::from(self.size.saturating_sub(index));
        let ptr = self.desc.ptr.wrapping_add(self.offset(index));
        Descs { at: RingMem { ptr }, left: count.min(left), _areas: PhantomData }
    }

    /// The second words of the descriptors from `index` on: at most `count`, and not beyond the
    /// end of the ring.
    #[inline(always)]
    pub(crate) fn metas(&self, index: u16, count: usize) -> Metas<'_> {
        let Descs { at, left, _areas } = self.descs(index, count);
        Metas { at, left, _areas }
    }

    /// Asks for the word that says whether the driver wants a call.
    #[inline(always)]
    pub(crate) fn prefetch_wish(&self) {
        prefetch_read(self.driver.ptr);
    }

    /// Asks the CPU for the `count` descriptors from `index` on, which will be read and then
    /// marked used.
    #[inline(always)]
    pub(crate) fn prefetch(&self, index: u16, count: u16) {
        let size = usize::from(self.size).wrapping_mul(16);
        let bytes = usize::from(count.min(self.size)).wrapping_mul(16);
        self.desc.ask(prefetch_write, self.offset(index), (bytes, size));
    }

    /// What the driver wants to be told: offset and wrap in the low half, flags in the high one.
    #[inline(always)]
    pub(crate) fn driver_event(&self) -> Word<'_, u32> {
        // SAFETY: offset 0 of an area of 4 bytes, aligned to 4.
        unsafe { self.driver.word(0) }
    }

    /// What we want to be told, in the same form.
    #[inline(always)]
    pub(crate) fn device_event(&self) -> Word<'_, u32> {
        // SAFETY: offset 0 of an area of 4 bytes, aligned to 4.
        unsafe { self.device.word(0) }
    }
}

/// Descriptors of a packed ring, one after the other. Invariant: `left` of them lie in the ring
/// from `at` on, which the areas keep mapped.
pub(crate) struct Descs<'a> {
    at: RingMem,
    left: usize,
    _areas: PhantomData<&'a PackedAreas>,
}

impl Descs<'_> {
    /// The hot loop: copies descriptors and fills `chains` with their buffers, as long as each is
    /// found. Returns how many.
    #[inline(always)]
    pub(crate) fn resolve(
        self,
        find: impl Fn(RawDesc) -> Option<RawSeg>,
        chains: &mut [RawSeg],
    ) -> u16 {
        let count = self.left.min(chains.len());
        let (mut at, mut done) = (self.at, 0u16);
        for chain in chains.get_mut(..count).unwrap_or_default() {
            // SAFETY: one of the `left` descriptors.
            let desc = unsafe { copied(at) };
            let Some(found) = find(desc) else { break };
            *chain = found.tagged(u32::from(desc.third()));
            at.ptr = at.ptr.wrapping_add(16);
            done = done.wrapping_add(1);
        }
        done
    }

    /// Shows the descriptors as long as their flags, under `mask`, are `want`. Returns how many.
    #[inline(always)]
    pub(crate) fn show(self, mask: u16, want: u16, mut look: impl FnMut(RawDesc)) -> u16 {
        let (mut at, mut seen) = (self.at, 0u16);
        for _ in 0..self.left {
            // SAFETY: one of the `left` descriptors.
            let desc = unsafe { copied(at) };
            if desc.fourth() & mask != want {
                break;
            }
            look(desc);
            at.ptr = at.ptr.wrapping_add(16);
            seen = seen.wrapping_add(1);
        }
        seen
    }
}

/// Copies the descriptor at `at`, flags first.
///
/// # Safety
///
/// It must be mapped, and aligned to 16.
#[inline(always)]
unsafe fn copied(at: RingMem) -> RawDesc {
    // SAFETY: the caller's descriptor; its second word.
    let meta: Word<'_, u64> = unsafe { at.word(8) };
    // ORDERING: acquire pairs with the driver's release of the flags, which are in this word: the
    // address that is read next is the one that belongs to them.
    let meta = meta.load(Acquire);
    // SAFETY: as above, its first word.
    let addr: Word<'_, u64> = unsafe { at.word(0) };
    RawDesc { addr: addr.load(Relaxed), meta }
}

/// The second words of descriptors, one after the other; invariant as of [`Descs`].
pub(crate) struct Metas<'a> {
    at: RingMem,
    left: usize,
    _areas: PhantomData<&'a PackedAreas>,
}

impl Metas<'_> {
    /// Stores what `meta` makes of each pair of `a` and `b`, as far as there are both and places.
    /// Returns how many.
    #[inline(always)]
    pub(crate) fn store<A, B>(self, a: &[A], b: &[B], meta: impl Fn(&A, &B) -> u64) -> usize {
        let count = self.left.min(a.len()).min(b.len());
        let (a, b) = (a.get(..count).unwrap_or_default(), b.get(..count).unwrap_or_default());
        let mut at = self.at;
        for (a, b) in a.iter().zip(b) {
            // SAFETY: one of the `left` descriptors, which are aligned to 16.
            let place: Word<'_, u64> = unsafe { at.word(8) };
            place.store(meta(a, b), Relaxed);
            at.ptr = at.ptr.wrapping_add(16);
        }
        count
    }
}

impl fmt::Debug for PackedAreas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedAreas").field("size", &self.size).finish_non_exhaustive()
    }
}
