//! What the driver knows about each id: private state, against which used entries are checked.

use super::{DriverError, Used};

/// One id. For split rings the id of a chain is its head, and its other descriptors' slots are
/// only links of the free list.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    cookie: u64,
    /// Bytes that the device may write.
    writable: u32,
    /// Last id of the chain: what goes back to the free list is `id..=last`.
    last: u16,
    /// Ring entries of the chain; 0 while the device does not have it.
    entries: u16,
}

/// A buffer to be given to the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) id: u16,
    pub(super) last: u16,
    pub(super) entries: u16,
    pub(super) writable: u32,
    pub(super) cookie: u64,
}

/// All ids of a queue. Free ids form a FIFO, so that with `IN_ORDER` they are used in ring order.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Box<[Slot]>,
    next: Box<[u16]>,
    head: u16,
    tail: u16,
    /// Whether a chain takes an id for each of its entries (split) or one as a whole (packed).
    id_per_entry: bool,
    free_ids: u16,
    free_entries: u16,
    outstanding: u16,
    /// The id that the device has had for longest; kept with `IN_ORDER` only.
    oldest: u16,
}

impl Slots {
    pub(super) fn new(size: u16, id_per_entry: bool) -> Self {
        let last = size.wrapping_sub(1);
        Self {
            slots: vec![Slot::default(); usize::from(size)].into(),
            next: (0..size).map(|id| if id == last { 0 } else { id.wrapping_add(1) }).collect(),
            head: 0,
            tail: last,
            id_per_entry,
            free_ids: size,
            free_entries: size,
            outstanding: 0,
            oldest: 0,
        }
    }

    #[inline(always)]
    pub(super) fn free_entries(&self) -> u16 {
        self.free_entries
    }

    #[inline(always)]
    pub(super) fn outstanding(&self) -> u16 {
        self.outstanding
    }

    pub(super) fn size(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// The free id that comes next.
    #[inline(always)]
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// The free id after `id`.
    #[inline(always)]
    pub(super) fn after(&self, id: u16) -> u16 {
        self.next.get(usize::from(id)).copied().unwrap_or(0)
    }

    /// Whether a chain of `entries` entries fits now.
    #[inline(always)]
    pub(super) fn check_room(&self, entries: usize) -> Result<(), DriverError> {
        if entries == 0 {
            return Err(DriverError::Empty);
        }
        if entries > usize::from(self.free_entries) {
            return Err(DriverError::Full { needed: entries, free: self.free_entries });
        }
        Ok(())
    }

    /// Takes the ids `claim.id..=claim.last` from the head of the free list.
    #[inline(always)]
    pub(super) fn claim(&mut self, claim: Claim) {
        self.head = self.after(claim.last);
        let ids = if self.id_per_entry { claim.entries } else { 1 };
        self.free_ids = self.free_ids.wrapping_sub(ids);
        self.free_entries = self.free_entries.wrapping_sub(claim.entries);
        self.outstanding = self.outstanding.wrapping_add(1);
        if let Some(slot) = self.slots.get_mut(usize::from(claim.id)) {
            *slot = Slot {
                cookie: claim.cookie,
                writable: claim.writable,
                last: claim.last,
                entries: claim.entries,
            };
        }
    }

    /// `id` if the device has it.
    #[inline(always)]
    pub(super) fn outstanding_id(&self, id: u32) -> Option<u16> {
        let slot = self.slots.get(id as usize)?;
        if slot.entries == 0 { None } else { u16::try_from(id).ok() }
    }

    /// Takes the buffer `id` back from the device, which wrote `len` bytes. Returns it with the
    /// number of ring entries that it took; nothing if the used entry cannot be: [`Self::why`].
    /// Buffers without a writable byte have no length that means anything, and devices in use
    /// (DPDK, packed) give that of what they read: it is ignored.
    #[inline(always)]
    pub(super) fn release(&mut self, id: u32, len: u32) -> Option<(Used, u16)> {
        let slot = self.slots.get_mut(id as usize)?;
        let Slot { cookie, writable, last, entries } = *slot;
        if entries == 0 || (len > writable && writable != 0) {
            return None;
        }
        slot.entries = 0;
        // Below the number of slots, so it is 16 bits long.
        let id = u16::try_from(id).ok()?;
        if self.free_ids == 0 {
            self.head = id;
        } else if let Some(next) = self.next.get_mut(usize::from(self.tail)) {
            *next = id;
        }
        self.tail = last;
        let ids = if self.id_per_entry { entries } else { 1 };
        self.free_ids = self.free_ids.wrapping_add(ids);
        self.free_entries = self.free_entries.wrapping_add(entries);
        self.outstanding = self.outstanding.wrapping_sub(1);
        Some((Used { cookie, len: len.min(writable) }, entries))
    }

    /// Which rule a used entry breaks that [`Self::release`] refused.
    #[cold]
    pub(super) fn why(&self, id: u32, len: u32) -> DriverError {
        match (u16::try_from(id), self.slots.get(id as usize)) {
            (Ok(_), Some(slot)) if slot.entries != 0 => {
                DriverError::UsedLength { len, writable: slot.writable }
            }
            (Ok(id), Some(_)) => DriverError::NotOutstanding(id),
            _ => DriverError::UsedId { id, size: self.size() },
        }
    }

    /// With `IN_ORDER`: takes the oldest buffer back. `len` is what the device wrote if the buffer
    /// is `id`; one before it counts as completely written (specification, "In-order use").
    #[inline(always)]
    pub(super) fn release_oldest(&mut self, id: u16, len: u32) -> Option<(Used, u16)> {
        let oldest = self.oldest;
        let slot = self.slots.get(usize::from(oldest))?;
        let last = slot.last;
        let len = if oldest == id { len } else { slot.writable };
        let released = self.release(u32::from(oldest), len)?;
        let next = last.wrapping_add(1);
        self.oldest = if usize::from(next) >= self.slots.len() { 0 } else { next };
        Some(released)
    }

    /// The id that `release_oldest` would take.
    #[inline(always)]
    pub(super) fn oldest(&self) -> u16 {
        self.oldest
    }

    /// Cookies of all buffers that the device has, in no order.
    pub(super) fn cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.slots.iter().filter(|s| s.entries != 0).map(|s| s.cookie)
    }
}
