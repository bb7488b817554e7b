//! The driver of a split ring.

use std::sync::atomic::{Ordering, fence};

use super::areas::{Areas, DESC_BYTES, DriverConfig};
use super::slots::{Claim, Slots};
use super::{Buffer, DriverError, Parts, Used};
use crate::config::RingPosition;
use crate::mem::{DriverWords, GuestMap, GuestPhysAddr};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VRING_AVAIL_F_NO_INTERRUPT`, and `VRING_USED_F_NO_NOTIFY` of the other side.
const NO_NOTIFICATION: u16 = 1;
const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const ENTRIES_AT: usize = 4;

#[derive(Debug)]
pub(super) struct SplitDriver {
    desc: DriverWords,
    avail: DriverWords,
    used: DriverWords,
    tables: Option<DriverWords>,
    tables_at: GuestPhysAddr,
    table_len: u16,
    slots: Slots,
    mask: u16,
    event_idx: bool,
    in_order: bool,
    /// Entries written, published or not.
    avail_idx: u16,
    /// What the device can see.
    published: u16,
    /// `published` when [`Self::needs_kick`] was last asked.
    kick_checked: u16,
    /// Used entries taken.
    last_used: u16,
    /// The used index as last read: no new look before `last_used` reaches it.
    seen_used: u16,
    /// With `IN_ORDER`: the used entry that stands for the buffers up to its id.
    batch: Option<(u16, u32)>,
}

impl SplitDriver {
    pub(super) fn new(
        map: &GuestMap,
        config: &DriverConfig,
        areas: &Areas,
    ) -> Result<Self, DriverError> {
        let RingPosition::Split { avail, used } = config.position else {
            return Err(DriverError::Position);
        };
        if avail != used {
            return Err(DriverError::Position);
        }
        let words = |at, bytes| DriverWords::new(map, at, bytes).ok_or(DriverError::Area(at));
        let ring = Self {
            desc: words(areas.desc, u64::from(config.size).wrapping_mul(DESC_BYTES))?,
            avail: words(areas.driver, areas.driver_bytes)?,
            used: words(areas.device, areas.device_bytes)?,
            tables: super::map_tables(map, config, areas)?,
            tables_at: areas.tables,
            table_len: config.table_len,
            slots: Slots::new(config.size, true),
            mask: config.size.wrapping_sub(1),
            event_idx: config.features.event_idx,
            in_order: config.features.in_order,
            avail_idx: avail,
            published: avail,
            kick_checked: avail,
            last_used: used,
            seen_used: used,
            batch: None,
        };
        for area in [&ring.desc, &ring.avail, &ring.used] {
            area.clear();
        }
        ring.avail.store16(INDEX_AT, avail, Ordering::Relaxed);
        ring.used.store16(INDEX_AT, used, Ordering::Relaxed);
        ring.write_used_event(used);
        Ok(ring)
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    #[inline(always)]
    pub(super) fn add(&mut self, parts: Parts<'_>, cookie: u64) -> Result<(), DriverError> {
        let count = parts.count();
        self.slots.check_room(count)?;
        let id = self.slots.head();
        let mut last = id;
        for (index, (buffer, writable)) in parts.iter().enumerate() {
            if index > 0 {
                last = self.slots.after(last);
            }
            let more = index.wrapping_add(1) < count;
            let (link, next) = if more { (NEXT, self.slots.after(last)) } else { (0, 0) };
            let flags = link | if writable { WRITE } else { 0 };
            write_desc(&self.desc, usize::from(last), buffer, (flags, next));
        }
        let entries = u16::try_from(count).unwrap_or(u16::MAX);
        self.offer(Claim { id, last, entries, writable: parts.writable_len(), cookie });
        Ok(())
    }

    pub(super) fn add_indirect(
        &mut self,
        parts: Parts<'_>,
        cookie: u64,
    ) -> Result<(), DriverError> {
        let Some(tables) = self.tables else { return Err(DriverError::NoIndirect) };
        let count = parts.check_table(self.table_len)?;
        self.slots.check_room(count.min(1))?;
        let id = self.slots.head();
        let first = usize::from(id).wrapping_mul(usize::from(self.table_len));
        for (index, (buffer, writable)) in parts.iter().enumerate() {
            let after = index.wrapping_add(1);
            let (link, next) = if after < count { (NEXT, after) } else { (0, 0) };
            let flags = link | if writable { WRITE } else { 0 };
            let next = u16::try_from(next).unwrap_or(0);
            write_desc(&tables, first.wrapping_add(index), buffer, (flags, next));
        }
        let table = super::table(self.tables_at, first, count);
        write_desc(&self.desc, usize::from(id), table, (INDIRECT, 0));
        self.offer(Claim { id, last: id, entries: 1, writable: parts.writable_len(), cookie });
        Ok(())
    }

    /// Writes the available entry of a chain whose descriptors stand.
    #[inline(always)]
    fn offer(&mut self, claim: Claim) {
        let entry = usize::from(self.avail_idx & self.mask).wrapping_mul(2);
        // ORDERING: relaxed, the index store of `publish` makes it visible.
        self.avail.store16(ENTRIES_AT.wrapping_add(entry), claim.id, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.slots.claim(claim);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        if self.published != self.avail_idx {
            self.published = self.avail_idx;
            // ORDERING: release, pairs with the device's acquire load of the available index:
            // who sees the index sees the entries and descriptors below it.
            self.avail.store16(INDEX_AT, self.published, Ordering::Release);
        }
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let (old, new) = (self.kick_checked, self.published);
        if old == new {
            return false;
        }
        self.kick_checked = new;
        // ORDERING: the index store stands before this fence and the event load after it; the
        // device stores its event, fences, and then looks at the index. One of the two sees the
        // other's store, so that no kick is lost.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used_entry(self.mask.wrapping_add(1));
            let event = self.used.load16(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.load16(FLAGS_AT, Ordering::Relaxed) & NO_NOTIFICATION == 0
        }
    }

    /// Offset of the used entry in slot `slot`; the event word follows the last.
    #[inline(always)]
    fn used_entry(&self, slot: u16) -> usize {
        usize::from(slot).wrapping_mul(8).wrapping_add(ENTRIES_AT)
    }

    #[inline(always)]
    pub(super) fn poll_used(&mut self) -> Result<Option<Used>, DriverError> {
        if self.last_used == self.seen_used && !self.look()? {
            return Ok(None);
        }
        if self.in_order {
            return self.poll_in_order().map(Some);
        }
        let [id, len] = self.read_used();
        let Some((used, _)) = self.slots.release(id, len) else {
            return Err(self.slots.why(id, len));
        };
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(used))
    }

    #[inline(always)]
    fn read_used(&self) -> [u32; 2] {
        self.used.load32_pair(self.used_entry(self.last_used & self.mask))
    }

    fn poll_in_order(&mut self) -> Result<Used, DriverError> {
        let (id, len) = match self.batch {
            Some(batch) => batch,
            None => {
                let [id, len] = self.read_used();
                let known = self.slots.outstanding_id(id);
                (known.ok_or_else(|| self.slots.why(id, len))?, len)
            }
        };
        let ends = self.slots.oldest() == id;
        if !ends && self.last_used.wrapping_add(1) == self.seen_used {
            return Err(DriverError::BatchTooLong { id });
        }
        let Some((used, _)) = self.slots.release_oldest(id, len) else {
            return Err(self.slots.why(u32::from(id), len));
        };
        self.batch = (!ends).then_some((id, len));
        self.last_used = self.last_used.wrapping_add(1);
        Ok(used)
    }

    /// Reads the used index; whether there is something new.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, DriverError> {
        // ORDERING: acquire, pairs with the device's release store of the used index: its used
        // entries and the bytes of the buffers are visible after it.
        let index = self.used.load16(INDEX_AT, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.last_used);
        let outstanding = self.slots.outstanding();
        if ahead > outstanding {
            return Err(DriverError::UsedIndex { ahead, outstanding });
        }
        self.seen_used = index;
        Ok(ahead != 0)
    }

    #[inline(always)]
    pub(super) fn has_used(&self) -> bool {
        self.last_used != self.seen_used
            || self.used.load16(INDEX_AT, Ordering::Relaxed) != self.last_used
    }

    #[inline(always)]
    pub(super) fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.write_used_event(self.last_used);
        } else {
            self.avail.store16(FLAGS_AT, 0, Ordering::Relaxed);
        }
        // ORDERING: pairs with the device's fence between its used index and its look at our
        // event or flags: either it sees our wish, or we see its entries below.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    #[inline(always)]
    pub(super) fn disable_calls(&mut self) {
        if self.event_idx {
            // The flag must stay 0 with EVENT_IDX: an event half the index space away instead.
            self.write_used_event(self.last_used.wrapping_sub(0x8000));
        } else {
            self.avail.store16(FLAGS_AT, NO_NOTIFICATION, Ordering::Relaxed);
        }
    }

    fn write_used_event(&self, event: u16) {
        let at = usize::from(self.mask.wrapping_add(1)).wrapping_mul(2).wrapping_add(ENTRIES_AT);
        self.avail.store16(at, event, Ordering::Relaxed);
    }

    /// Where a device that lost its own position goes on: at what it has published.
    pub(super) fn device_position(&self) -> RingPosition {
        let used = self.used_index();
        RingPosition::Split { avail: used, used }
    }

    pub(super) fn used_index(&self) -> u16 {
        self.used.load16(INDEX_AT, Ordering::Relaxed)
    }
}

#[inline(always)]
fn write_desc(words: &DriverWords, index: usize, buffer: Buffer, (flags, next): (u16, u16)) {
    let meta = u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next) << 48;
    words.store_desc(index, buffer.addr.0, Some(meta));
}
