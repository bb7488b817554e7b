//! The ring words as the driver side sees them: offsets are checked, accesses are atomic.
//!
//! **Trust.** The device side may write any of these bytes at any time, so every value is a number
//! that the caller checks. **Limits.** An access outside of the area reads zero and writes nothing:
//! offsets are computed from private state, so it would be a bug of the driver, never of its peer.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::{GuestMap, GuestPhysAddr};

/// One ring area: contiguous, 16-aligned, mapped as long as the driver keeps its `GuestMap`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DriverWords {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: a plain address with its length. Its owner keeps the mapping, and every access through
// it is atomic, so it may happen on any thread.
unsafe impl Send for DriverWords {}

/// What every area's host address is a multiple of: the alignment of a descriptor.
const ALIGN: usize = 16;

impl DriverWords {
    /// Resolves `bytes` bytes at `addr`; `None` if they are not mapped in one piece or not at a
    /// multiple of [`ALIGN`].
    pub(crate) fn new(map: &GuestMap, addr: GuestPhysAddr, bytes: u64) -> Option<Self> {
        let ptr = map.contiguous(addr, bytes)?;
        ptr.addr()
            .is_multiple_of(ALIGN)
            .then_some(Self { ptr, bytes: usize::try_from(bytes).ok()? })
    }

    /// The address of the `bytes` bytes at `offset`, if they lie inside and `offset` is a multiple
    /// of `align`, which divides [`ALIGN`].
    #[inline(always)]
    fn word(self, offset: usize, bytes: usize, align: usize) -> Option<*mut u8> {
        let inside = offset.saturating_add(bytes) <= self.bytes && offset.is_multiple_of(align);
        debug_assert!(inside);
        inside.then(|| self.ptr.wrapping_add(offset))
    }

    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`word` checks the alignment")]
    fn w16(&self, offset: usize) -> Option<&AtomicU16> {
        let at = self.word(offset, 2, 2)?.cast::<u16>();
        // SAFETY: `word` says that two mapped, aligned bytes are there, for as long as the owner
        // keeps the map. Any value is a valid integer, whoever wrote it.
        Some(unsafe { AtomicU16::from_ptr(at) })
    }

    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`word` checks the alignment")]
    fn w32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.word(offset, 4, 4)?.cast::<u32>();
        // SAFETY: as in `w16`, for four bytes.
        Some(unsafe { AtomicU32::from_ptr(at) })
    }

    /// The two halves of descriptor `index`.
    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`word` checks the alignment")]
    fn desc(&self, index: usize) -> Option<&[AtomicU64; 2]> {
        let at = self.word(index.saturating_mul(16), 16, 8)?.cast::<[AtomicU64; 2]>();
        // SAFETY: as in `w16`, for two words of eight bytes.
        Some(unsafe { &*at })
    }

    /// Reads the second half of descriptor `index`.
    #[inline(always)]
    pub(crate) fn load_desc_meta(&self, index: u16, order: Ordering) -> u64 {
        // ORDERING: the caller's, who names its partner.
        self.desc(usize::from(index)).map_or(0, |[_, meta]| u64::from_le(meta.load(order)))
    }

    /// Writes the first half of descriptor `index`, and the second one unless it is held back.
    #[inline(always)]
    pub(crate) fn store_desc(&self, index: usize, addr: u64, meta: Option<u64>) {
        if let Some([first, second]) = self.desc(index) {
            // ORDERING: relaxed, a descriptor becomes visible by a later release store.
            first.store(addr.to_le(), Ordering::Relaxed);
            if let Some(meta) = meta {
                second.store(meta.to_le(), Ordering::Relaxed);
            }
        }
    }

    /// Writes the second half of descriptor `index`: what its first half, and all that was written
    /// before, becomes visible with.
    #[inline(always)]
    pub(crate) fn release_desc_meta(&self, index: u16, meta: u64) {
        if let Some([_, second]) = self.desc(usize::from(index)) {
            // ORDERING: release, pairs with the device's acquire load of the flags.
            second.store(meta.to_le(), Ordering::Release);
        }
    }

    /// Reads the little-endian word at `offset`.
    #[inline(always)]
    pub(crate) fn load16(&self, offset: usize, order: Ordering) -> u16 {
        // ORDERING: the caller's, who names its partner.
        self.w16(offset).map_or(0, |w| u16::from_le(w.load(order)))
    }

    /// Writes the little-endian word at `offset`.
    #[inline(always)]
    pub(crate) fn store16(&self, offset: usize, value: u16, order: Ordering) {
        if let Some(w) = self.w16(offset) {
            // ORDERING: the caller's, who names its partner.
            w.store(value.to_le(), order);
        }
    }

    /// Reads the little-endian word at `offset`, which is a multiple of four.
    #[inline(always)]
    pub(crate) fn load32(&self, offset: usize, order: Ordering) -> u32 {
        // ORDERING: the caller's, who names its partner.
        self.w32(offset).map_or(0, |w| u32::from_le(w.load(order)))
    }

    /// Reads the two little-endian words at `offset`, which is a multiple of four.
    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`word` checks the alignment")]
    pub(crate) fn load32_pair(&self, offset: usize) -> [u32; 2] {
        let Some(at) = self.word(offset, 8, 4) else { return [0; 2] };
        // SAFETY: as in `w16`, for two words of four bytes.
        let pair = unsafe { &*at.cast::<[AtomicU32; 2]>() };
        // ORDERING: relaxed, the caller's acquire load of an index came before.
        pair.each_ref().map(|word| u32::from_le(word.load(Ordering::Relaxed)))
    }

    /// Writes the little-endian word at `offset`, which is a multiple of four.
    #[inline(always)]
    pub(crate) fn store32(&self, offset: usize, value: u32, order: Ordering) {
        if let Some(w) = self.w32(offset) {
            // ORDERING: the caller's, who names its partner.
            w.store(value.to_le(), order);
        }
    }

    /// Zeroes the whole area.
    pub(crate) fn clear(&self) {
        for offset in (0..self.bytes).step_by(2) {
            // ORDERING: none needed, the device does not run while a driver sets a ring up.
            self.store16(offset, 0, Ordering::Relaxed);
        }
    }
}
