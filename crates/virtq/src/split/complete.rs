//! Completing chains of a split ring, and calling the driver.

use super::Split;
use crate::chain::{ChainBuf, Token, id};
use crate::mem::RawSeg;
use crate::notify;

impl Split {
    #[inline(always)]
    pub(crate) fn complete(&mut self, token: Token, written: u32) {
        self.use_entries(token.id, written, 1);
    }

    #[inline(always)]
    pub(crate) fn complete_all(&mut self, tokens: &[Token]) {
        if self.config.features.in_order {
            // One entry with the last id says that all before it are used too.
            let Some(last) = tokens.last() else { return };
            self.use_entries(last.id, 0, u16::try_from(tokens.len()).unwrap_or(u16::MAX));
        } else {
            for token in tokens {
                self.use_entries(token.id, 0, 1);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn complete_burst(&mut self, buf: &ChainBuf) {
        let records = buf.records();
        if self.config.features.in_order {
            let Some(last) = records.last() else { return };
            self.use_entries(id(last), 0, u16::try_from(records.len()).unwrap_or(u16::MAX));
        } else {
            self.complete_each(records, records, |_| 0);
        }
    }

    #[inline(always)]
    pub(crate) fn complete_written(&mut self, buf: &ChainBuf, written: &[u32]) {
        self.complete_each(buf.records(), written, |written| *written);
    }

    /// Writes a used entry for each chain; never more than there are chains popped.
    #[inline(always)]
    fn complete_each<T>(&mut self, records: &[RawSeg], lens: &[T], len: impl Fn(&T) -> u32) {
        let fetched = self.next_avail.wrapping_sub(self.next_used);
        let count = u16::try_from(records.len().min(lens.len())).unwrap_or(u16::MAX).min(fetched);
        let records = records.get(..usize::from(count)).unwrap_or_default();
        let mut entries = self.areas.entries(self.next_used);
        for (record, item) in records.iter().zip(lens) {
            entries.write(id(record), len(item));
        }
        self.next_used = self.next_used.wrapping_add(count);
    }

    /// Writes one used entry and passes `count`; never more than there are chains popped.
    #[inline(always)]
    fn use_entries(&mut self, id: u16, written: u32, count: u16) {
        let fetched = self.next_avail.wrapping_sub(self.next_used);
        if fetched > 0 {
            self.areas.entries(self.next_used).write(id, written);
            self.next_used = self.next_used.wrapping_add(count.min(fetched));
        }
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) {
        let count = self.next_used.wrapping_sub(self.published);
        if count > 0 {
            self.areas.prefetch_wish();
            if let Some(record) = &self.record {
                record.step(self.published, self.next_used);
            }
            notify::publish(&self.areas.used_idx(), self.next_used);
            if self.log().is_some() {
                self.log_used(count);
            }
            self.published = self.next_used;
            self.unlooked = self.unlooked.saturating_add(u32::from(count));
        }
    }

    /// Notes the `count` entries that were just published, and the index.
    #[cold]
    fn log_used(&self, count: u16) {
        let Some(log) = self.log() else { return };
        let run = (u32::from(self.published), u32::from(count));
        log.used(self.config.size, run);
        log.device(2, 2);
    }

    #[inline(always)]
    pub(crate) fn needs_call(&mut self) -> bool {
        let unlooked = std::mem::take(&mut self.unlooked);
        if unlooked == 0 {
            return false;
        }
        let wanted = match (self.areas.used_event(), u16::try_from(unlooked)) {
            (Some(event), Ok(step)) if self.called => {
                let old = self.published.wrapping_sub(step);
                notify::split_wants_call(&event, self.published, old)
            }
            // The first look after a start, and one after 2^16 entries, cannot compare.
            (Some(_), _) => true,
            (None, _) => notify::split_allows_call(&self.areas.avail_flags()),
        };
        self.called = true;
        wanted
    }
}
