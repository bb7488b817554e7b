//! The device side of a packed virtqueue: one descriptor ring that both sides write.
//!
//! ```text
//!    used                             avail
//!      │ popped, to be completed        │ available, to be popped
//!   ───┴────────────────────────────────┴───────────────────────►  descriptor ring, then again
//!      from its start with the wrap counter inverted
//! ```
//!
//! **Trust.** Everything read from the ring is hostile: descriptors are copied once and checked on
//! the copy. The slots that a chain takes are remembered in its token, never read again.

mod complete;
mod pop;
pub(crate) mod recover;
pub(crate) mod restore;

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use virtio_bindings::virtio_ring::{VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED};

use crate::chain::{ChainBuf, Token};
use crate::config::{QueueConfig, QueueError, RingPosition, WRAP_BIT};
use crate::dirty::RingLog;
use crate::inflight::Inflight;
use crate::iotlb::{self, Lookup, Ring, RingIotlb};
use crate::mem::{GuestMap, PackedAreas, RawDesc};
use crate::notify::{self, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, packed_event};
use crate::record::Record;
use crate::shared::Shared;
use crate::{ChainError, queue::Kicks};

/// Descriptor flags: made available, and used, in the lap whose wrap counter they equal.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const _: () =
    assert!(AVAIL == 1 << VRING_PACKED_DESC_F_AVAIL && USED == 1 << VRING_PACKED_DESC_F_USED);

/// A place in the ring, and the wrap counter of its lap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    /// The place `slots` (at most `size`) further on.
    #[inline(always)]
    fn forward(self, slots: u16, size: u16) -> Self {
        let index = self.index.wrapping_add(slots);
        if index >= size {
            Self { index: index.wrapping_sub(size), wrap: !self.wrap }
        } else {
            Self { index, wrap: self.wrap }
        }
    }

    /// The place `slots` (at most `size`) before this one.
    fn back(self, slots: u16, size: u16) -> Self {
        match self.index.checked_sub(slots) {
            Some(index) => Self { index, wrap: self.wrap },
            None => {
                let index = self.index.wrapping_add(size).wrapping_sub(slots);
                Self { index, wrap: !self.wrap }
            }
        }
    }

    /// As vhost-user and the event suppression areas have it.
    #[inline(always)]
    pub(crate) fn raw(self) -> u16 {
        if self.wrap { self.index | WRAP_BIT } else { self.index }
    }

    fn from_raw(raw: u16) -> Self {
        Self { index: raw & !WRAP_BIT, wrap: raw & WRAP_BIT != 0 }
    }

    /// The two flags of a descriptor here that the driver has made available.
    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The two flags of a descriptor here that the device has used.
    #[inline(always)]
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// A running packed virtqueue.
#[derive(Debug)]
pub struct Packed {
    areas: PackedAreas,
    /// Where buffers are.
    lookup: Lookup,
    /// All bits of the ids below the greatest power of two that is not above the size.
    small_ids: u16,
    /// What `stop` gives back, but for the position.
    config: QueueConfig,
    /// The flags that mean something in indirect tables.
    table_flags: u16,
    /// The next descriptor to read.
    avail: Place,
    /// The next descriptor to mark used.
    used: Place,
    /// Slots from `used` to `avail`; at most the size.
    fetched: u16,
    /// Chains of the last burst that had any: as many are asked for when there is one.
    expected: u16,
    /// The first descriptor of the unpublished batch: its flags are what publishes all of it.
    first: Option<(Place, u64)>,
    /// Slots completed and not published.
    unpublished: u32,
    /// Slots published since the last look at what the driver wants.
    unlooked: u32,
    /// Whether the driver was called before: the first call does not trust the event area.
    called: bool,
    /// What the driver was told about kicks.
    kicks: Kicks,
    /// Where writes are noted while the guest migrates.
    log: Option<Box<RingLog>>,
    /// Where a successor finds out how far we came; looked at once per burst.
    record: Option<Record>,
    /// The front end's in-flight region; looked at once per burst.
    inflight: Option<Box<Inflight>>,
}

impl Packed {
    pub(crate) fn new(memory: &GuestMap, config: QueueConfig) -> Result<Self, QueueError> {
        let RingPosition::Packed { avail, avail_wrap, used, used_wrap } = config.position else {
            return Err(QueueError::PositionLayout(config.layout));
        };
        Ok(Self {
            fetched: config.outstanding()?,
            areas: PackedAreas::new(memory, &config)?,
            lookup: Lookup::new(),
            small_ids: config.size.checked_ilog2().map_or(0, |bits| (1u16 << bits).wrapping_sub(1)),
            config,
            table_flags: !0,
            avail: Place { index: avail, wrap: avail_wrap },
            used: Place { index: used, wrap: used_wrap },
            expected: 0,
            first: None,
            unpublished: 0,
            unlooked: 0,
            called: false,
            kicks: Kicks::Unknown,
            log: None,
            record: None,
            inflight: None,
        })
    }

    pub(crate) fn inflight(&mut self) -> &mut Option<Box<Inflight>> {
        &mut self.inflight
    }

    #[inline(always)]
    pub(crate) fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    /// Slots that were fetched and not completed.
    pub(crate) fn outstanding(&self) -> u16 {
        self.fetched
    }

    /// Notes the chains of the burst in `buf`, which the device has just fetched.
    pub(crate) fn track(&mut self, buf: &ChainBuf) {
        let Some(inflight) = &mut self.inflight else { return };
        let total = buf.tokens().fold(0u16, |sum, token| sum.wrapping_add(token.slots));
        let mut at = self.avail.back(total.min(self.config.size), self.config.size);
        for token in buf.tokens() {
            let areas = &self.areas;
            let size = self.config.size;
            let desc = |n| areas.desc(at.forward(n, size).index);
            inflight.fetched_all((0..token.slots).map(desc));
            at = at.forward(token.slots, size);
        }
    }

    pub(crate) fn set_record(&mut self, record: Record) {
        record.begin(self.used.raw());
        self.record = Some(record);
    }

    pub(crate) fn pop(&mut self, buf: &mut ChainBuf, max: usize) -> Option<ChainError> {
        buf.clear();
        if self.lookup.iotlb.is_some() {
            return iotlb::pop(self, buf, max);
        }
        if self.lookup.fault.is_none() {
            self.lookup.fault = pop::burst::<false>(self, buf, max).err();
        }
        self.lookup.fault
    }

    pub(crate) fn set_iotlb(&mut self, iotlb: Option<Box<RingIotlb>>) {
        iotlb::set_iotlb(self, iotlb);
    }

    pub(crate) fn look_ahead(&mut self) {
        iotlb::look_ahead(self);
    }

    pub(crate) fn is_translated(&self) -> bool {
        self.lookup.iotlb.is_some()
    }

    /// Whether the next chain waits for a translation.
    #[inline(always)]
    pub(crate) fn is_waiting(&self) -> bool {
        self.lookup.is_waiting()
    }

    #[inline(always)]
    pub(crate) fn prefetch(&mut self, count: usize) {
        let room = self.config.size.wrapping_sub(self.fetched);
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        self.areas.prefetch(self.avail.index, count.min(room));
    }

    pub(crate) fn unpop(&mut self, tokens: &[Token]) {
        for token in tokens.iter().rev() {
            let slots = token.slots.min(self.fetched);
            self.avail = self.avail.back(slots, self.config.size);
            self.fetched = self.fetched.wrapping_sub(slots);
        }
    }

    pub(crate) fn enable_kicks(&mut self) -> bool {
        self.kicks = Kicks::Enabled;
        // Without a position to name, one that is not zero: see `recover`.
        let event = if self.config.features.event_idx {
            packed_event(self.avail.index, self.avail.wrap, EVENT_DESC)
        } else {
            packed_event(0, true, EVENT_ENABLE)
        };
        let available = notify::arm(&self.areas.device_event(), event, || self.has_available());
        self.log_wish();
        available
    }

    #[inline(always)]
    pub(crate) fn disable_kicks(&mut self) {
        if self.kicks != Kicks::Disabled {
            self.kicks = Kicks::Disabled;
            self.areas.device_event().store(packed_event(0, false, EVENT_DISABLE), Relaxed);
            self.log_wish();
        }
    }

    #[inline(always)]
    pub(crate) fn has_available(&self) -> bool {
        // ORDERING: acquire, as in `pop`, although nothing but the flags is read here.
        let flags = (self.areas.meta(self.avail.index).load(Acquire) >> 48) as u16;
        self.fetched < self.config.size
            && flags & (AVAIL | USED) == self.avail.available()
            && self.lookup.is_open()
    }

    pub(crate) fn read_only(&mut self) {
        self.table_flags = !crate::walk::WRITE;
    }

    pub(crate) fn set_log(&mut self, log: Option<Box<RingLog>>) {
        self.log = log;
        if let Some(log) = self.log() {
            log.device(0, 4);
            log.descs(self.config.size, (0, self.config.size.into()));
        }
    }

    pub(crate) fn log(&self) -> Option<&RingLog> {
        self.log.as_deref()
    }

    /// Notes the area that tells the driver about kicks.
    fn log_wish(&self) {
        if let Some(log) = self.log() {
            log.device(0, 4);
        }
    }

    pub(crate) fn fault(&self) -> Option<ChainError> {
        self.lookup.fault
    }

    pub(crate) fn size(&self) -> u16 {
        self.config.size
    }

    pub(crate) fn position(&self) -> RingPosition {
        RingPosition::Packed {
            avail: self.avail.index,
            avail_wrap: self.avail.wrap,
            used: self.used.index,
            used_wrap: self.used.wrap,
        }
    }

    pub(crate) fn stop(mut self) -> QueueConfig {
        self.publish();
        QueueConfig { position: self.position().refetch(), ..self.config }
    }
}

impl Ring for Packed {
    #[inline(always)]
    fn lookup(&mut self) -> &mut Lookup {
        &mut self.lookup
    }

    #[inline(always)]
    fn outstanding(&self) -> u16 {
        self.fetched
    }

    #[inline(always)]
    fn burst(&mut self, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
        pop::burst::<true>(self, buf, max)
    }

    #[inline(always)]
    fn upcoming(&self, skip: u16, most: u16, look: impl FnMut(RawDesc, bool)) -> u16 {
        pop::upcoming(self, skip, most, look)
    }
}

#[cfg(test)]
mod tests;
