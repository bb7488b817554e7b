//! Private buffers of equal size whose contents can be sent as frame bodies.

use vm_memory::MmapRegion;

use super::{MapError, RawSeg, SegSpan, SegStore, Writable, Writer};

/// Private buffers for an uplink: the kernel fills a slot, egresses read it as segment `slot`.
///
/// **Trust.** The memory belongs to this process alone; its contents came from the network.
/// **Limits.** Untouched pages of a slot cost address space only.
#[derive(Debug)]
pub struct Pool {
    segs: Box<[RawSeg]>,
    slot_bytes: u32,
    /// Keeps the buffers mapped.
    _map: MmapRegion<()>,
}

impl Pool {
    /// Maps `slots` buffers of `slot_bytes` bytes.
    ///
    /// # Errors
    ///
    /// [`MapError::Private`] if the kernel refuses the mapping or the size overflows.
    pub fn new(slots: u32, slot_bytes: u32) -> Result<Self, MapError> {
        let total = usize::try_from(u64::from(slots).saturating_mul(u64::from(slot_bytes)))
            .map_err(|_| MapError::Private(usize::MAX))?;
        let map = MmapRegion::new(total).map_err(|_| MapError::Private(total))?;
        let slot = |i: u32| {
            let offset = (i as usize).saturating_mul(slot_bytes as usize);
            RawSeg::new(map.as_ptr().wrapping_add(offset), slot_bytes)
        };
        Ok(Self { segs: (0..slots).map(slot).collect(), slot_bytes, _map: map })
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.segs.len()
    }

    /// A slot, to fill.
    #[inline]
    pub fn slot_mut(&mut self, slot: u32) -> Option<&mut [u8]> {
        let seg = self.segs.get(slot as usize)?;
        // SAFETY: the slot is mapped while `_map` lives, no other slot overlaps it, nobody but
        // this pool knows the memory (it is never shared with a guest), and `&mut self` excludes
        // the readers that `store` gave out.
        Some(unsafe { std::slice::from_raw_parts_mut(seg.ptr(), self.slot_bytes as usize) })
    }

    /// The slots as segments: slot `i` is segment `i`.
    #[inline]
    pub fn store(&self) -> SegStore<'_> {
        SegStore::new(&self.segs, &[])
    }

    /// The bytes of a slot, to write one after the other.
    pub fn writer(&mut self, slot: u32) -> Writer<'_> {
        let at = slot as usize;
        let segs = self.segs.get(at..at.saturating_add(1)).unwrap_or_default();
        Writable { segs, len: self.slot_bytes }.writer()
    }

    /// The bytes of the first `slots` slots, to write one after the other.
    pub fn writer_over(&mut self, slots: u32) -> Writer<'_> {
        let segs = self.segs.get(..slots as usize).unwrap_or_default();
        Writable { segs, len: self.slot_bytes.saturating_mul(slots) }.writer()
    }

    /// `len` bytes of a slot after `skip`.
    #[inline]
    pub fn span(slot: u32, skip: u32, len: u32) -> SegSpan {
        SegSpan { first: slot, count: 1, skip, len }
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn what_a_slot_holds_is_what_its_span_reads() {
        let mut pool = Pool::new(3, 4096).unwrap();
        for slot in 0..3u8 {
            pool.slot_mut(u32::from(slot)).unwrap().fill(slot + 1);
        }
        assert!(pool.slot_mut(3).is_none());
        for slot in 0..3u8 {
            let mut out = [0; 5000];
            let mut reader = pool.store().reader(Pool::span(u32::from(slot), 96, 8000));
            assert_eq!(reader.read(&mut out), 4000);
            assert!(out[..4000].iter().all(|b| *b == slot + 1));
        }
        assert_eq!(pool.store().reader(Pool::span(9, 0, 10)).read(&mut [0; 4]), 0);
    }
}
