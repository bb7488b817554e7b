//! The ring words as the driver side sees them: offsets are checked, accesses are atomic.
//!
//! **Trust.** The device side may write any of these bytes at any time, so every value is a number
//! that the caller checks. **Limits.** An access outside of the area reads zero and writes nothing:
//! offsets are computed from private state, so it would be a bug of the driver, never of its peer.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::{GuestMap, GuestPhysAddr};

/// One ring area: contiguous, mapped as long as the driver keeps its `GuestMap`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DriverWords {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: a plain address with its length. Its owner keeps the mapping, and every access through
// it is atomic, so it may happen on any thread.
unsafe impl Send for DriverWords {}

impl DriverWords {
    /// Resolves `bytes` bytes at `addr`; `None` if they are not mapped in one piece or if the
    /// host address is not a multiple of `align`.
    pub(crate) fn new(
        map: &GuestMap,
        addr: GuestPhysAddr,
        bytes: u64,
        align: usize,
    ) -> Option<Self> {
        let ptr = map.contiguous(addr, bytes)?;
        ptr.addr()
            .is_multiple_of(align)
            .then_some(Self { ptr, bytes: usize::try_from(bytes).ok()? })
    }

    /// The address of the `index`-th word of `size` bytes, if it lies inside.
    #[inline(always)]
    fn word(self, offset: usize, size: usize) -> Option<*mut u8> {
        let inside = offset <= self.bytes.wrapping_sub(size) && self.bytes >= size;
        debug_assert!(inside && self.ptr.addr().wrapping_add(offset).is_multiple_of(size));
        inside.then(|| self.ptr.wrapping_add(offset))
    }

    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`new` and the callers' offsets keep alignment")]
    fn w16(&self, offset: usize) -> Option<&AtomicU16> {
        let at = self.word(offset, 2)?.cast::<u16>();
        // SAFETY: `word` says that two mapped bytes are there; areas are 2-aligned at least and
        // offsets of this width even. Any value is a valid integer, whoever wrote it.
        Some(unsafe { AtomicU16::from_ptr(at) })
    }

    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`new` and the callers' offsets keep alignment")]
    fn w32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.word(offset, 4)?.cast::<u32>();
        // SAFETY: as in `w16`; only 4-aligned areas are accessed by this width.
        Some(unsafe { AtomicU32::from_ptr(at) })
    }

    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "`new` and the callers' offsets keep alignment")]
    fn w64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.word(offset, 8)?.cast::<u64>();
        // SAFETY: as in `w16`; only 16-aligned areas are accessed by this width.
        Some(unsafe { AtomicU64::from_ptr(at) })
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

    /// Writes the little-endian word at `offset`, which is a multiple of four.
    #[inline(always)]
    pub(crate) fn store32(&self, offset: usize, value: u32, order: Ordering) {
        if let Some(w) = self.w32(offset) {
            // ORDERING: the caller's, who names its partner.
            w.store(value.to_le(), order);
        }
    }

    /// Writes the little-endian word at `offset`, which is a multiple of eight.
    #[inline(always)]
    pub(crate) fn store64(&self, offset: usize, value: u64, order: Ordering) {
        if let Some(w) = self.w64(offset) {
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
