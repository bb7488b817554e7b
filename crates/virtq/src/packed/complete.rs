//! Completing chains of a packed ring, and calling the driver.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::fence;

use super::{Packed, Place};
use crate::chain::{ChainBuf, Token, id};
use crate::mem::RawSeg;
use crate::notify::{self, PackedStep};
use crate::record::Shape;
use crate::shared::Shared;
use crate::walk::WRITE;

impl Packed {
    #[inline(always)]
    pub(crate) fn complete(&mut self, token: Token, written: u32) {
        if self.record.is_some() {
            self.mean_one(token, token.slots, Some(written));
        }
        self.mark_used(token.id, written, token.slots);
    }

    #[inline(always)]
    pub(crate) fn complete_all(&mut self, tokens: &[Token]) {
        if self.config.features.in_order {
            // One descriptor with the last id says that all before it are used too.
            let Some(last) = tokens.last() else { return };
            let slots = tokens.iter().fold(0u16, |sum, token| sum.saturating_add(token.slots));
            if self.record.is_some() {
                self.mean_one(*last, slots, None);
            }
            self.mark_used(last.id, 0, slots);
        } else {
            for token in tokens {
                self.complete(*token, 0);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn complete_burst(&mut self, buf: &ChainBuf) {
        if self.config.features.in_order {
            let tokens = buf.tokens();
            let (last, slots) = tokens
                .fold((0, 0u16), |(_, sum), token| (token.id, sum.saturating_add(token.slots)));
            if self.record.is_some() {
                self.mean_one(Token { id: last, slots }, slots, None);
            }
            self.mark_used(last, 0, slots);
        } else {
            if self.record.is_some()
                && let Some(count) = self.mean_each(buf, buf.records().len(), &[])
            {
                return self.mark_back(buf, (count, buf.records()), |_| 0);
            }
            self.complete_each(buf, buf.records(), |_| 0);
        }
    }

    #[inline(always)]
    pub(crate) fn complete_written(&mut self, buf: &ChainBuf, written: &[u32]) {
        if self.record.is_some()
            && let Some(count) = self.mean_each(buf, written.len(), written)
        {
            return self.mark_back(buf, (count, written), |written| *written);
        }
        self.complete_each(buf, written, |written| *written);
    }

    /// Writes a used descriptor for each chain. The first one of a batch waits for `publish`.
    #[inline(always)]
    fn complete_each<T>(&mut self, buf: &ChainBuf, lens: &[T], len: impl Fn(&T) -> u32) {
        let slowly = if buf.all_single() { usize::from(self.first.is_none()) } else { lens.len() };
        for (token, item) in buf.tokens().zip(lens).take(slowly) {
            self.mark_used(token.id, len(item), token.slots);
        }
        let mut records = buf.records().get(slowly..).unwrap_or_default();
        let mut lens = lens.get(slowly..).unwrap_or_default();
        while self.fetched > 0 {
            let done = self.mark_run(records, lens, &len);
            if done == 0 {
                break;
            }
            records = records.get(done..).unwrap_or_default();
            lens = lens.get(done..).unwrap_or_default();
        }
    }

    /// The hot loop: marks chains of one slot used, within one lap. Returns how many.
    #[inline(always)]
    fn mark_run<T>(&mut self, records: &[RawSeg], lens: &[T], len: impl Fn(&T) -> u32) -> usize {
        let flags = used_meta(self.used, 0, 0);
        let written_flags = flags | u64::from(WRITE) << 48;
        let places = self.areas.metas(self.used.index, usize::from(self.fetched));
        let done = places.store(records, lens, |record, item| {
            let written = len(item);
            let flags = if written > 0 { written_flags } else { flags };
            flags | u64::from(written) | u64::from(id(record)) << 32
        });
        let slots = u16::try_from(done).unwrap_or(u16::MAX);
        self.used = self.used.forward(slots, self.config.size);
        self.fetched = self.fetched.wrapping_sub(slots);
        self.unpublished = self.unpublished.saturating_add(u32::from(slots));
        done
    }

    /// Writes a used descriptor over the first of `slots`. The first one of a batch waits for
    /// `publish`: the driver reads them in order, so it finds none of them before.
    #[inline(always)]
    fn mark_used(&mut self, id: u16, written: u32, slots: u16) {
        let slots = slots.min(self.fetched);
        if slots == 0 {
            return;
        }
        let meta = used_meta(self.used, id, written);
        if self.first.is_none() {
            self.first = Some((self.used, meta));
        } else {
            self.areas.meta(self.used.index).store(meta, Relaxed);
        }
        self.used = self.used.forward(slots, self.config.size);
        self.fetched = self.fetched.wrapping_sub(slots);
        self.unpublished = self.unpublished.saturating_add(u32::from(slots));
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) {
        if let Some((place, meta)) = self.first.take() {
            self.areas.prefetch_wish();
            notify::publish(&self.areas.meta(place.index), meta);
            if self.log().is_some() {
                self.log_used(place);
            }
            self.unlooked = self.unlooked.saturating_add(self.unpublished);
            self.unpublished = 0;
            if let Some(record) = &self.record {
                record.done(self.used.raw());
            }
        }
    }

    /// Notes the descriptors that were just published, from `first` on.
    #[cold]
    fn log_used(&self, first: Place) {
        let Some(log) = self.log() else { return };
        let run = (u32::from(first.index), self.unpublished);
        log.descs(self.config.size, run);
    }

    #[inline(always)]
    pub(crate) fn needs_call(&mut self) -> bool {
        let passed = std::mem::take(&mut self.unlooked);
        if passed == 0 {
            return false;
        }
        let step = PackedStep {
            index: self.used.index,
            wrap: self.used.wrap,
            passed,
            size: self.config.size,
            event_idx: self.config.features.event_idx,
        };
        let first = !std::mem::replace(&mut self.called, true);
        notify::packed_wants_call(&self.areas.driver_event(), step, first)
    }
}

/// With a record: see the module `record`.
impl Packed {
    /// Says that one used descriptor will stand for `slots`, up to the chain of `token`.
    #[inline(never)]
    fn mean_one(&mut self, token: Token, slots: u16, written: Option<u32>) {
        // Each burst is published by itself.
        self.publish();
        let slots = slots.min(self.fetched);
        let to = self.used.forward(slots, self.config.size);
        let one = token.slots != slots || written.is_none();
        let shape = Shape { lens: written.is_some(), one, single: false };
        let places = (self.used.raw(), to.raw(), self.used.raw());
        if let Some(record) = self.record.as_mut().filter(|_| slots > 0) {
            record.mean(places, (shape, &[written.unwrap_or(0)]));
        }
    }

    /// Says that the first `count` chains of the burst will be marked used. Returns how many of
    /// them must be marked from their end, because some have several slots.
    #[inline(never)]
    fn mean_each(&mut self, buf: &ChainBuf, count: usize, lens: &[u32]) -> Option<usize> {
        self.publish();
        let count = count.min(buf.records().len());
        let single = buf.all_single();
        let (fits, slots, last) = if single {
            let slots = u16::try_from(count).unwrap_or(u16::MAX).min(self.fetched);
            (count, slots, u16::from(slots > 0))
        } else {
            fitting(buf.tokens().take(count), self.fetched)
        };
        let to = self.used.forward(slots, self.config.size);
        let places = (self.used.raw(), to.raw(), to.back(last, self.config.size).raw());
        let shape = Shape { lens: !lens.is_empty(), one: false, single };
        if let Some(record) = self.record.as_mut().filter(|_| slots > 0) {
            record.mean(places, (shape, lens.get(..count).unwrap_or(lens)));
        }
        (!single).then_some(fits)
    }

    /// Marks the first `count` chains used as [`Self::complete_each`], from the last one to the
    /// first.
    fn mark_back<T>(
        &mut self,
        buf: &ChainBuf,
        (count, lens): (usize, &[T]),
        len: impl Fn(&T) -> u32,
    ) {
        let slots = buf.tokens().take(count).fold(0u16, |sum, t| sum.wrapping_add(t.slots));
        let to = self.used.forward(slots, self.config.size);
        let mut at = to;
        for (token, item) in buf.tokens().take(count).zip(lens.iter().take(count)).rev() {
            at = at.back(token.slots, self.config.size);
            let meta = used_meta(at, token.id, len(item));
            if at == self.used {
                self.first = Some((at, meta));
            } else {
                self.areas.meta(at.index).store(meta, Relaxed);
                // ORDERING: a successor relies on it that what comes before a used descriptor of
                // the burst is as the driver wrote it.
                fence(Release);
            }
        }
        self.used = to;
        self.fetched = self.fetched.wrapping_sub(slots);
        self.unpublished = self.unpublished.saturating_add(u32::from(slots));
    }
}

/// How many of `tokens` fit into `room` slots, the slots that they take, and those of the last.
fn fitting(tokens: impl Iterator<Item = Token>, room: u16) -> (usize, u16, u16) {
    let (mut fits, mut slots, mut last) = (0usize, 0u16, 0u16);
    for token in tokens {
        if token.slots > room.wrapping_sub(slots) {
            break;
        }
        (fits, slots, last) = (fits.wrapping_add(1), slots.wrapping_add(token.slots), token.slots);
    }
    (fits, slots, last)
}

/// The second half of a used descriptor at `place`: length, buffer id, flags.
#[inline(always)]
pub(super) fn used_meta(place: Place, id: u16, written: u32) -> u64 {
    let flags = place.used() | if written > 0 { WRITE } else { 0 };
    u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48
}
