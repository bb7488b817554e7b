//! Memory that this process shares with the kernel: rings of sockets, and buffers in a memfd.
//!
//! **Trust.** The kernel, or a process that holds the same fd, may write every byte at any time.
//! Bytes are reached as those of a guest are: copied out before they are believed, words by atomic
//! access, bodies by the one copy that tolerates writers.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{MapError, RawSeg, SegSpan, SegStore, Writable, WritePiece, Writer};

/// A mapping that stays as long as a clone of this lives.
#[derive(Clone)]
pub struct SharedMap {
    ptr: *mut u8,
    len: usize,
    /// Its end unmaps the memory.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is never dereferenced without the checks of this module, the mapping behind
// it lives as long as `_keep`, and every access is one that tolerates concurrent writers.
unsafe impl Send for SharedMap {}
// SAFETY: as above; the struct itself is immutable.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Takes over a mapping of `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// `[ptr, ptr + len)` is mapped for reading and writing until `keep` is dropped, no reference
    /// to its bytes exists or will, and `ptr` is aligned to a page.
    pub unsafe fn new(ptr: *mut u8, len: usize, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self { ptr, len, _keep: keep }
    }

    /// The address of the first byte, for system calls that take addresses.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl fmt::Debug for SharedMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMap({} B)", self.len)
    }
}

/// Slots of equal size in a [`SharedMap`]: blocks or frames of a ring. Slot `i` is segment `i`; a
/// second list of segments, made anew for each burst, is for frames that several slots hold.
#[derive(Debug)]
pub struct SharedSlots {
    segs: Box<[RawSeg]>,
    slot_bytes: u32,
    /// Frames that are spread over several slots, of one burst.
    list: Vec<RawSeg>,
    _map: SharedMap,
}

impl SharedSlots {
    /// `slots` slots of `slot_bytes` bytes, from byte `offset` of `map` on.
    ///
    /// # Errors
    ///
    /// [`MapError::Outside`] if the last one ends outside of the map, or slots are not aligned to
    /// words of 32 bits.
    pub fn new(
        map: &SharedMap,
        offset: usize,
        slots: u32,
        slot_bytes: u32,
    ) -> Result<Self, MapError> {
        let bytes = (slots as usize).saturating_mul(slot_bytes as usize);
        let end = offset.saturating_add(bytes);
        if end > map.len || !offset.is_multiple_of(4) || !slot_bytes.is_multiple_of(4) {
            return Err(MapError::Outside { end, len: map.len });
        }
        let slot = |i: u32| {
            let at = offset.saturating_add((i as usize).saturating_mul(slot_bytes as usize));
            RawSeg::new(map.ptr.wrapping_add(at), slot_bytes)
        };
        Ok(Self {
            segs: (0..slots).map(slot).collect(),
            slot_bytes,
            list: Vec::new(),
            _map: map.clone(),
        })
    }

    /// Number of slots.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        u32::try_from(self.segs.len()).unwrap_or(u32::MAX)
    }

    /// Bytes of a slot.
    #[inline(always)]
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// The slots as segments, to read: [`super::Pool::span`] names bytes of them.
    #[inline(always)]
    pub fn store(&self) -> SegStore<'_> {
        SegStore::new(&self.segs, &self.list)
    }

    /// Forgets the second list of segments: a new burst begins.
    #[inline(always)]
    pub fn clear_list(&mut self) {
        self.list.clear();
    }

    /// Keeps the first `count` segments of the second list.
    pub fn truncate_list(&mut self, count: u32) {
        self.list.truncate(count as usize);
    }

    /// Number of segments in the second list.
    #[inline(always)]
    pub fn list_len(&self) -> u32 {
        u32::try_from(self.list.len()).unwrap_or(u32::MAX)
    }

    /// Appends the bytes `[skip, skip + len)` of a slot to the second list; false, and nothing
    /// appended, if the slot has fewer. Allocates only while the list grows beyond what it was.
    pub fn push(&mut self, slot: u32, skip: u32, len: u32) -> bool {
        let Some(seg) = self.segs.get(slot as usize) else { return false };
        let fits = seg.len().checked_sub(skip).is_some_and(|left| left >= len);
        if fits {
            self.list.push(RawSeg::new(seg.ptr().wrapping_add(skip as usize), len));
        }
        fits
    }

    /// `len` bytes in the segments of the second list from `first` on.
    pub fn list_span(&self, first: u32, len: u32) -> SegSpan {
        let count = self.list_len().saturating_sub(first);
        SegSpan { first: SegStore::spread_index(first), count, skip: 0, len }
    }

    /// The bytes of a slot behind `skip`, to write at once; none if there are no such bytes.
    #[inline(always)]
    pub fn piece(&mut self, slot: u32, skip: u32) -> Option<WritePiece<'_>> {
        let seg = self.segs.get(slot as usize)?;
        let len = seg.len().checked_sub(skip)?;
        Some(WritePiece::new(RawSeg::new(seg.ptr().wrapping_add(skip as usize), len)))
    }

    /// The bytes of a slot behind `skip`, to write one after the other.
    pub fn writer(&mut self, slot: u32, skip: u32) -> Writer<'_> {
        let at = slot as usize;
        let segs = self.segs.get(at..at.saturating_add(1)).unwrap_or_default();
        let mut writer = Writable { segs, len: self.slot_bytes }.writer();
        let _ = writer.skip(skip);
        writer
    }

    /// The word of 32 bits at byte `at` of a slot, in the machine's order. 0 outside of it.
    #[inline(always)]
    pub fn load(&self, slot: u32, at: u32) -> u32 {
        // ORDERING: Acquire pairs with the other side's release of the word: what it wrote before
        // is seen behind this.
        self.word(slot, at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets the word of 32 bits at byte `at` of a slot; nothing outside of it.
    #[inline(always)]
    pub fn publish(&self, slot: u32, at: u32, value: u32) {
        if let Some(word) = self.word(slot, at) {
            // ORDERING: Release pairs with the other side's acquire of the word: reads and writes
            // of the slot are done before this is seen.
            word.store(value, Ordering::Release);
        }
    }

    #[inline(always)]
    fn word(&self, slot: u32, at: u32) -> Option<&AtomicU32> {
        let seg = self.segs.get(slot as usize)?;
        let fits = at.is_multiple_of(4) && at.checked_add(4).is_some_and(|end| end <= seg.len());
        if !fits {
            return None;
        }
        #[expect(clippy::cast_ptr_alignment, reason = "slots and words are aligned: checked")]
        let word = seg.ptr().wrapping_add(at as usize).cast::<u32>();
        // SAFETY: the word is within the slot, which is mapped while `_map` lives; the map is
        // aligned to a page, slots and `at` to words (`new` and above); this process reaches such
        // words only atomically, and what others do to it can make any value, all are valid.
        Some(unsafe { AtomicU32::from_ptr(word) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::MmapRegion;

    use super::{SharedMap, SharedSlots};
    use crate::mem::{MapError, Pool};

    fn map(len: usize) -> SharedMap {
        let region = Arc::new(MmapRegion::<()>::new(len).unwrap());
        // SAFETY: the region is mapped while the `Arc` lives, and nobody else uses it.
        unsafe { SharedMap::new(region.as_ptr(), len, region) }
    }

    #[test]
    fn slots_hold_what_is_written_and_nothing_beyond() {
        let map = map(8192);
        let mut slots = SharedSlots::new(&map, 4096, 2, 2048).unwrap();
        drop(map);
        for slot in 0..2u8 {
            let piece = slots.piece(u32::from(slot), 100).unwrap();
            assert_eq!(piece.len(), 1948);
            assert!(piece.write_frame(&[slot; 12], &[7; 60], None));
            let mut writer = slots.writer(u32::from(slot), 2040);
            assert_eq!(writer.write(&[9; 20]), 8);
        }
        assert!(slots.piece(2, 0).is_none() && slots.piece(0, 2049).is_none());
        assert_eq!(slots.writer(2, 0).remaining(), 0);
        for slot in 0..2u8 {
            let mut out = [0; 80];
            let span = Pool::span(u32::from(slot), 100, 80);
            assert_eq!(slots.store().reader(span).read(&mut out), 80);
            assert_eq!((out[11], out[12], out[71], out[72]), (slot, 7, 7, 0));
            let span = Pool::span(u32::from(slot), 2040, 80);
            assert_eq!(slots.store().reader(span).read(&mut out), 8);
        }
    }

    #[test]
    fn a_spread_frame_is_read_in_the_order_of_its_parts() {
        let map = map(4096);
        let mut slots = SharedSlots::new(&map, 0, 4, 100).unwrap();
        for slot in 0..4u8 {
            let piece = slots.piece(u32::from(slot), 0).unwrap();
            assert!(piece.write_frame(&[], &[slot; 100], None));
        }
        assert!(slots.push(3, 0, 100));
        let first = slots.list_len();
        assert!(slots.push(2, 90, 10) && slots.push(0, 0, 100) && slots.push(1, 50, 5));
        assert!(!slots.push(1, 50, 51) && !slots.push(4, 0, 1) && !slots.push(0, 101, 0));
        let span = slots.list_span(first, 115);
        let mut out = [0xff; 200];
        assert_eq!(slots.store().reader(span).read(&mut out), 115);
        assert_eq!(out[..115], [vec![2; 10], vec![0; 100], vec![1; 5]].concat());
        slots.truncate_list(first);
        assert_eq!(slots.list_len(), 1);
        slots.clear_list();
        assert_eq!(slots.store().reader(span).remaining(), 0);
    }

    #[test]
    fn words_are_within_their_slot() {
        let map = map(4096);
        let slots = SharedSlots::new(&map, 0, 4, 1024).unwrap();
        slots.publish(3, 1020, 0x0102_0304);
        assert_eq!(slots.load(3, 1020), 0x0102_0304);
        for (slot, at) in [(3, 1022), (3, 1024), (4, 0), (0, u32::MAX - 3)] {
            slots.publish(slot, at, 1);
            assert_eq!(slots.load(slot, at), 0);
        }
        assert_eq!(slots.load(2, 0), 0);
        let error = SharedSlots::new(&map, 4, 4, 1024).unwrap_err();
        assert_eq!(error, MapError::Outside { end: 4100, len: 4096 });
        assert!(SharedSlots::new(&map, 0, u32::MAX, u32::MAX).is_err());
    }
}
