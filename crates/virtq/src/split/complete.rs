//! Completing chains of a split ring, and calling the driver.

use super::Split;
use crate::chain::{Chain, Token};
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
    pub(crate) fn complete_burst(&mut self, chains: &[Chain]) {
        if self.config.features.in_order {
            let Some(last) = chains.last() else { return };
            self.use_entries(
                last.start.token().id,
                0,
                u16::try_from(chains.len()).unwrap_or(u16::MAX),
            );
        } else {
            self.complete_each(chains.iter().map(|chain| (chain.start.token(), 0)));
        }
    }

    /// Writes a used entry for each chain; never more than there are chains popped.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, chains: impl Iterator<Item = (Token, u32)>) {
        let mut next = self.next_used;
        for (token, written) in chains {
            if next == self.next_avail {
                break;
            }
            self.areas.write_used(next, token.id, written);
            next = next.wrapping_add(1);
        }
        self.next_used = next;
    }

    /// Writes one used entry and passes `count`; never more than there are chains popped.
    #[inline(always)]
    fn use_entries(&mut self, id: u16, written: u32, count: u16) {
        let fetched = self.next_avail.wrapping_sub(self.next_used);
        if fetched > 0 {
            self.areas.write_used(self.next_used, id, written);
            self.next_used = self.next_used.wrapping_add(count.min(fetched));
        }
    }

    #[inline(always)]
    pub(crate) fn publish(&mut self) {
        let count = self.next_used.wrapping_sub(self.published);
        if count > 0 {
            notify::publish(&self.areas.used_idx(), self.next_used);
            self.published = self.next_used;
            self.unlooked = self.unlooked.saturating_add(u32::from(count));
        }
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
