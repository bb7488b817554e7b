//! Completing chains of a split ring, and calling the driver.

use super::Split;
use crate::chain::Token;
use crate::notify;

impl Split {
    #[inline(always)]
    pub(crate) fn complete(&mut self, token: Token, written: u32) {
        self.areas.write_used(self.next_used, token.id, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline(always)]
    pub(crate) fn complete_all(&mut self, tokens: &[Token]) {
        if self.config.features.in_order {
            // One entry with the last id says that all before it are used too.
            let Some(last) = tokens.last() else { return };
            let count = u16::try_from(tokens.len()).unwrap_or(u16::MAX);
            self.areas.write_used(self.next_used, last.id, 0);
            self.next_used = self.next_used.wrapping_add(count);
        } else {
            for token in tokens {
                self.complete(*token, 0);
            }
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
