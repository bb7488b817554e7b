//! Completing chains of a packed ring, and calling the driver.

use std::sync::atomic::Ordering::Relaxed;

use super::{Packed, Place};
use crate::chain::{ChainBuf, Token};
use crate::notify::{self, PackedStep};
use crate::shared::Shared;
use crate::walk::WRITE;

impl Packed {
    #[inline(always)]
    pub(crate) fn complete(&mut self, token: Token, written: u32) {
        self.mark_used(token.id, written, token.slots);
    }

    #[inline(always)]
    pub(crate) fn complete_all(&mut self, tokens: &[Token]) {
        if self.config.features.in_order {
            // One descriptor with the last id says that all before it are used too.
            let Some(last) = tokens.last() else { return };
            let slots = tokens.iter().fold(0u16, |sum, token| sum.saturating_add(token.slots));
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
            self.mark_used(last, 0, slots);
        } else {
            self.complete_each(buf, std::iter::repeat_n(0, buf.chains.len()));
        }
    }

    #[inline(always)]
    pub(crate) fn complete_written(&mut self, buf: &ChainBuf, written: &[u32]) {
        self.complete_each(buf, written.iter().copied());
    }

    /// Writes a used descriptor for each chain. The first one of a batch waits for `publish`.
    #[inline(always)]
    fn complete_each(&mut self, buf: &ChainBuf, written: impl ExactSizeIterator<Item = u32>) {
        let mut chains = buf.tokens().zip(written);
        if self.first.is_none() {
            let Some((token, written)) = chains.next() else { return };
            self.mark_used(token.id, written, token.slots);
        }
        loop {
            let odd = self.complete_run(&mut chains);
            let Some((token, written)) = odd else { return };
            self.mark_used(token.id, written, token.slots);
        }
    }

    /// The hot loop: marks slots used as long as each is a chain, within one lap. Returns the
    /// first chain that ends this.
    #[inline(always)]
    fn complete_run(
        &mut self,
        chains: &mut impl Iterator<Item = (Token, u32)>,
    ) -> Option<(Token, u32)> {
        let flags = used_meta(self.used, 0, 0);
        let written_flags = flags | u64::from(WRITE) << 48;
        let mut places = self.areas.metas(self.used.index).take(usize::from(self.fetched));
        let mut done = 0u16;
        let odd = loop {
            let Some((token, written)) = chains.next() else { break None };
            if token.slots != 1 {
                break Some((token, written));
            }
            let Some(place) = places.next() else { break Some((token, written)) };
            let flags = if written > 0 { written_flags } else { flags };
            place.store(flags | u64::from(written) | u64::from(token.id) << 32, Relaxed);
            done = done.wrapping_add(1);
        };
        self.used = self.used.forward(done, self.config.size);
        self.fetched = self.fetched.wrapping_sub(done);
        self.unpublished = self.unpublished.saturating_add(u32::from(done));
        odd
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
            notify::publish(&self.areas.meta(place.index), meta);
            self.unlooked = self.unlooked.saturating_add(self.unpublished);
            self.unpublished = 0;
        }
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

/// The second half of a used descriptor at `place`: length, buffer id, flags.
#[inline(always)]
fn used_meta(place: Place, id: u16, written: u32) -> u64 {
    let flags = place.used() | if written > 0 { WRITE } else { 0 };
    u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48
}
