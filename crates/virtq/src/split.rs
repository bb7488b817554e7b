//! The device side of a split virtqueue: descriptor table, available ring, used ring.
//!
//! ```text
//!   published            next_used            next_avail           avail.idx
//!       │ completed, to be    │ popped, to be      │ available, to be   │
//!       │ published           │ completed          │ popped             │
//!   ────┴─────────────────────┴────────────────────┴────────────────────┴──►  (modulo 2^16)
//! ```
//!
//! **Trust.** Everything read from the ring is hostile: indexes are compared with what this side
//! knows, descriptors are copied once and checked on the copy.

mod complete;
mod pop;

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::chain::{ChainBuf, Token};
use crate::config::{QueueConfig, QueueError, RingPosition};
use crate::dirty::RingLog;
use crate::inflight::Inflight;
use crate::iotlb::{self, Lookup, Ring, RingIotlb};
use crate::mem::{GuestMap, RawDesc, SplitAreas};
use crate::notify::{self, NO_NOTIFICATION};
use crate::record::Record;
use crate::shared::Shared;
use crate::{ChainError, queue::Kicks};

/// A running split virtqueue.
#[derive(Debug)]
pub struct Split {
    areas: SplitAreas,
    /// Where buffers are.
    lookup: Lookup,
    /// What `stop` gives back, but for the position.
    config: QueueConfig,
    /// The next available entry to read.
    next_avail: u16,
    /// `avail.idx` as it was when it was looked at last.
    seen_avail: u16,
    /// The next head, if they came in order: what may be asked for before it is known.
    next_head: Option<u16>,
    /// Descriptors of the next burst were asked for.
    asked: bool,
    /// The next used entry to write.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// Entries published since the last look at what the driver wants.
    unlooked: u32,
    /// Whether the driver was called before: the first call does not trust the event word.
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

impl Split {
    pub(crate) fn new(memory: &GuestMap, config: QueueConfig) -> Result<Self, QueueError> {
        let RingPosition::Split { avail, used } = config.position else {
            return Err(QueueError::PositionLayout(config.layout));
        };
        let _ = config.outstanding()?;
        Ok(Self {
            areas: SplitAreas::new(memory, &config)?,
            lookup: Lookup::new(),
            config,
            next_avail: avail,
            seen_avail: avail,
            next_head: None,
            asked: false,
            next_used: used,
            published: used,
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

    /// Chains that were fetched and not completed.
    pub(crate) fn outstanding(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    /// Notes the chains of the burst in `buf`, which the device has just fetched.
    pub(crate) fn track(&mut self, buf: &ChainBuf) {
        if let Some(inflight) = &mut self.inflight {
            buf.tokens().for_each(|token| inflight.fetched(token.id));
        }
    }

    pub(crate) fn set_record(&mut self, record: Record) {
        record.begin(self.published);
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
        pop::prefetch(self, count);
    }

    pub(crate) fn unpop(&mut self, tokens: &[Token]) {
        let back = u16::try_from(tokens.len()).unwrap_or(u16::MAX);
        let fetched = self.next_avail.wrapping_sub(self.next_used);
        self.next_avail = self.next_avail.wrapping_sub(back.min(fetched));
    }

    pub(crate) fn enable_kicks(&mut self) -> bool {
        self.kicks = Kicks::Enabled;
        let look = || self.has_available();
        let available = match self.areas.avail_event() {
            Some(event) => notify::arm(&event, self.next_avail, look),
            None => notify::arm(&self.areas.used_flags(), 0, look),
        };
        self.log_wish();
        available
    }

    #[inline(always)]
    pub(crate) fn disable_kicks(&mut self) {
        if self.kicks != Kicks::Disabled {
            self.kicks = Kicks::Disabled;
            // With EVENT_IDX the event word stays where it is: the driver passes it once.
            if self.areas.avail_event().is_none() {
                self.areas.used_flags().store(NO_NOTIFICATION, Relaxed);
                self.log_wish();
            }
        }
    }

    #[inline(always)]
    pub(crate) fn has_available(&self) -> bool {
        // ORDERING: acquire pairs with the driver's release of `avail.idx`.
        let available = self.areas.avail_idx().load(Acquire) != self.next_avail;
        available && self.lookup.is_open()
    }

    pub(crate) fn set_log(&mut self, log: Option<Box<RingLog>>) {
        self.log = log;
        if let Some(log) = self.log() {
            log.device(0, u64::from(self.config.size).saturating_mul(8).saturating_add(6));
        }
    }

    pub(crate) fn log(&self) -> Option<&RingLog> {
        self.log.as_deref()
    }

    /// Notes the words that tell the driver about kicks.
    fn log_wish(&self) {
        if let Some(log) = self.log() {
            log.device(0, 2);
            if self.config.features.event_idx {
                log.device(u64::from(self.config.size).saturating_mul(8).saturating_add(4), 2);
            }
        }
    }

    pub(crate) fn fault(&self) -> Option<ChainError> {
        self.lookup.fault
    }

    pub(crate) fn size(&self) -> u16 {
        self.config.size
    }

    pub(crate) fn position(&self) -> RingPosition {
        RingPosition::Split { avail: self.next_avail, used: self.next_used }
    }

    pub(crate) fn stop(mut self) -> QueueConfig {
        self.publish();
        QueueConfig { position: self.position().refetch(), ..self.config }
    }
}

impl Ring for Split {
    #[inline(always)]
    fn lookup(&mut self) -> &mut Lookup {
        &mut self.lookup
    }

    #[inline(always)]
    fn outstanding(&self) -> u16 {
        Self::outstanding(self)
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
