//! The driver of a packed ring.
//!
//! A burst becomes visible with one store: every descriptor of it is written complete, but the
//! first one's flags stay those of a descriptor that is not available until [`publish`].
//!
//! [`publish`]: PackedDriver::publish

use std::sync::atomic::{Ordering, fence};

use super::areas::{Areas, DESC_BYTES, DriverConfig};
use super::slots::{Claim, Slots};
use super::{Buffer, DriverError, Parts, Used};
use crate::config::RingPosition;
use crate::mem::{DriverWords, GuestMap, GuestPhysAddr};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Event suppression flags, in the upper half of the suppression word.
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
const WRAP_BIT: u16 = 1 << 15;

/// A place in the ring, with its wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    #[inline(always)]
    fn advance(&mut self, entries: u16, size: u16) {
        // Both are at most 32768: the sum fits.
        self.index = self.index.wrapping_add(entries);
        if self.index >= size {
            self.index = self.index.wrapping_sub(size);
            self.wrap = !self.wrap;
        }
    }

    /// As in the suppression areas.
    fn to_event(self) -> u16 {
        self.index | if self.wrap { WRAP_BIT } else { 0 }
    }
}

#[derive(Debug)]
pub(super) struct PackedDriver {
    desc: DriverWords,
    driver: DriverWords,
    device: DriverWords,
    tables: Option<DriverWords>,
    tables_at: GuestPhysAddr,
    table_len: u16,
    slots: Slots,
    size: u16,
    event_idx: bool,
    in_order: bool,
    /// Next descriptor to make available.
    avail: Place,
    /// Place and second half of the burst's first descriptor, held back until `publish`.
    held: (u16, u64),
    /// Entries written since `publish`.
    unpublished: u32,
    /// `avail` at the last `publish`.
    published: Place,
    /// Entries published since `needs_kick` was last asked.
    unchecked: u32,
    /// Next descriptor that the device will use.
    used: Place,
    /// With `IN_ORDER`: the used descriptor that stands for the buffers up to its id.
    batch: Option<(u16, u32)>,
}

impl PackedDriver {
    pub(super) fn new(
        map: &GuestMap,
        config: &DriverConfig,
        areas: &Areas,
    ) -> Result<Self, DriverError> {
        let RingPosition::Packed { avail, avail_wrap, used, used_wrap } = config.position else {
            return Err(DriverError::Position);
        };
        if (avail, avail_wrap) != (used, used_wrap) || avail >= config.size {
            return Err(DriverError::Position);
        }
        let words = |at, bytes| DriverWords::new(map, at, bytes).ok_or(DriverError::Area(at));
        let place = Place { index: avail, wrap: avail_wrap };
        let ring = Self {
            desc: words(areas.desc, u64::from(config.size).wrapping_mul(DESC_BYTES))?,
            driver: words(areas.driver, areas.driver_bytes)?,
            device: words(areas.device, areas.device_bytes)?,
            tables: super::map_tables(map, config, areas)?,
            tables_at: areas.tables,
            table_len: config.table_len,
            slots: Slots::new(config.size, false),
            size: config.size,
            event_idx: config.features.event_idx,
            in_order: config.features.in_order,
            avail: place,
            held: (0, 0),
            unpublished: 0,
            published: place,
            unchecked: 0,
            used: place,
            batch: None,
        };
        for area in [&ring.desc, &ring.driver, &ring.device] {
            area.clear();
        }
        ring.mark_all_used(place);
        Ok(ring)
    }

    /// Makes every descriptor look used, as after a full turn: neither side takes one by mistake
    /// wherever the ring starts.
    fn mark_all_used(&self, start: Place) {
        for index in 0..self.size {
            // Behind the start the current turn has been; from it on, only the one before.
            let wrap = if index < start.index { start.wrap } else { !start.wrap };
            let flags = if wrap { AVAIL | USED } else { 0 };
            let at = usize::from(index).wrapping_mul(16).wrapping_add(14);
            self.desc.store16(at, flags, Ordering::Relaxed);
        }
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    #[inline(always)]
    pub(super) fn add(&mut self, parts: Parts<'_>, cookie: u64) -> Result<(), DriverError> {
        let count = parts.count();
        self.slots.check_room(count)?;
        let id = self.slots.head();
        for (index, (buffer, writable)) in parts.iter().enumerate() {
            let more = index.wrapping_add(1) < count;
            let flags = if more { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.write_entry(buffer, flags, id);
        }
        let entries = u16::try_from(count).unwrap_or(u16::MAX);
        let writable = parts.writable_len();
        self.slots.claim(Claim { id, last: id, entries, writable, cookie });
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
            let meta = meta(buffer, 0, if writable { WRITE } else { 0 });
            tables.store_desc(first.wrapping_add(index), buffer.addr.0, Some(meta));
        }
        self.write_entry(super::table(self.tables_at, first, count), INDIRECT, id);
        let writable = parts.writable_len();
        self.slots.claim(Claim { id, last: id, entries: 1, writable, cookie });
        Ok(())
    }

    /// Writes the next descriptor of the ring.
    #[inline(always)]
    fn write_entry(&mut self, buffer: Buffer, flags: u16, id: u16) {
        let index = self.avail.index;
        let meta = meta(buffer, id, flags | if self.avail.wrap { AVAIL } else { USED });
        if self.unpublished == 0 {
            self.held = (index, meta);
            self.desc.store_desc(usize::from(index), buffer.addr.0, None);
        } else {
            self.desc.store_desc(usize::from(index), buffer.addr.0, Some(meta));
        }
        self.unpublished = self.unpublished.wrapping_add(1);
        self.avail.advance(1, self.size);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        if self.unpublished > 0 {
            let (index, meta) = self.held;
            self.desc.release_desc_meta(index, meta);
            self.unchecked = self.unchecked.saturating_add(self.unpublished);
            self.unpublished = 0;
            self.published = self.avail;
        }
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let added = std::mem::take(&mut self.unchecked);
        if added == 0 {
            return false;
        }
        // ORDERING: our flags store stands before this fence and the load of the device's wish
        // after it; the device stores its wish, fences, and looks at the flags. One of the two
        // sees the other's store, so that no kick is lost.
        fence(Ordering::SeqCst);
        let word = self.device.load32(0, Ordering::Relaxed);
        let [e0, e1, f0, f1] = word.to_le_bytes();
        let (event, flags) = (u16::from_le_bytes([e0, e1]), u16::from_le_bytes([f0, f1]) & 3);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => self.crossed(event, added),
            _ => true,
        }
    }

    /// Whether the last `added` published entries contain the one that the device asked for.
    fn crossed(&self, event: u16, added: u32) -> bool {
        let turns = u32::from(self.size).wrapping_mul(2);
        // Places of two turns have different numbers, and come again after that.
        let number = |index: u16, wrap: bool| {
            u32::from(index).wrapping_add(if wrap { 0 } else { u32::from(self.size) })
        };
        let new = number(self.published.index, self.published.wrap).wrapping_add(turns);
        let event = number(event & !WRAP_BIT, event & WRAP_BIT != 0);
        let behind = new.saturating_sub(event).checked_rem(turns).unwrap_or(0);
        (1..=added).contains(&behind) || added >= turns
    }

    #[inline(always)]
    pub(super) fn poll_used(&mut self) -> Result<Option<Used>, DriverError> {
        if self.in_order {
            return self.poll_in_order();
        }
        let Some((id, len)) = self.read_used() else { return Ok(None) };
        let Some((used, entries)) = self.slots.release(id, len) else {
            return Err(self.slots.why(id, len));
        };
        self.used.advance(entries, self.size);
        Ok(Some(used))
    }

    /// The used descriptor at our place, if there is one: its id and length.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
    fn read_used(&self) -> Option<(u32, u32)> {
        // ORDERING: acquire, pairs with the device's release store of the flags: id, length and
        // the bytes of the buffer are visible with it.
        let meta = self.desc.load_desc_meta(self.used.index, Ordering::Acquire);
        let want = if self.used.wrap { AVAIL | USED } else { 0 };
        let used = (meta >> 48) as u16 & (AVAIL | USED) == want;
        used.then_some((u32::from((meta >> 32) as u16), meta as u32))
    }

    fn poll_in_order(&mut self) -> Result<Option<Used>, DriverError> {
        let (id, len) = match self.batch {
            Some(batch) => batch,
            None => {
                let Some((id, len)) = self.read_used() else { return Ok(None) };
                let known = self.slots.outstanding_id(id);
                (known.ok_or_else(|| self.slots.why(id, len))?, len)
            }
        };
        let ends = self.slots.oldest() == id;
        let Some((used, entries)) = self.slots.release_oldest(id, len) else {
            return Err(self.slots.why(u32::from(id), len));
        };
        self.batch = (!ends).then_some((id, len));
        self.used.advance(entries, self.size);
        Ok(Some(used))
    }

    #[inline(always)]
    pub(super) fn has_used(&self) -> bool {
        self.batch.is_some() || self.read_used().is_some()
    }

    #[inline(always)]
    pub(super) fn enable_calls(&mut self) -> bool {
        let flags = if self.event_idx { EVENT_DESC } else { 0 };
        let word = u32::from(self.used.to_event()) | u32::from(flags) << 16;
        self.driver.store32(0, word, Ordering::Relaxed);
        // ORDERING: pairs with the device's fence between its used descriptors and its look at
        // this area: either it sees our wish, or we see its descriptors below.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    #[inline(always)]
    pub(super) fn disable_calls(&mut self) {
        self.driver.store32(0, u32::from(EVENT_DISABLE) << 16, Ordering::Relaxed);
    }

    /// Where a device that lost its own position goes on: after the last buffer that we took back.
    pub(super) fn device_position(&self) -> RingPosition {
        let Place { index, wrap } = self.used;
        RingPosition::Packed { avail: index, avail_wrap: wrap, used: index, used_wrap: wrap }
    }
}

/// The second half of a descriptor.
#[inline(always)]
fn meta(buffer: Buffer, id: u16, flags: u16) -> u64 {
    u64::from(buffer.len) | u64::from(id) << 32 | u64::from(flags) << 48
}
