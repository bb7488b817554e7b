//! Completing chains of a packed ring, and calling the driver.

use std::sync::atomic::Ordering::Relaxed;

use super::{Packed, Place};
use crate::chain::{Chain, Token};
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
    pub(crate) fn complete_burst(&mut self, chains: &[Chain]) {
        if self.config.features.in_order {
            let Some(last) = chains.last() else { return };
            let slots = chains
                .iter()
                .fold(0u16, |sum, chain| sum.saturating_add(chain.start.token().slots));
            self.mark_used(last.start.token().id, 0, slots);
        } else {
            self.complete_each(chains.iter().map(|chain| (chain.start.token(), 0)));
        }
    }

    /// Writes a used descriptor for each chain. The first one of a batch waits for `publish`.
    #[inline(always)]
    pub(crate) fn complete_each(&mut self, mut chains: impl Iterator<Item = (Token, u32)>) {
        if self.first.is_none() {
            let Some((token, written)) = chains.next() else { return };
            self.mark_used(token.id, written, token.slots);
        }
        let size = self.config.size;
        let (mut used, mut fetched) = (self.used, self.fetched);
        let mut flags = used_meta(used, 0, 0);
        for (token, written) in chains {
            let slots = token.slots;
            // None at all, or more than were popped.
            if slots.wrapping_sub(1) >= fetched {
                break;
            }
            let meta = flags | used_meta(NO_FLAGS, token.id, written);
            self.areas.meta(used.index).store(meta, Relaxed);
            fetched = fetched.wrapping_sub(slots);
            used.index = used.index.wrapping_add(slots);
            if used.index >= size {
                (used, flags) = next_lap(used, size);
            }
        }
        let passed = self.fetched.wrapping_sub(fetched);
        self.unpublished = self.unpublished.saturating_add(u32::from(passed));
        (self.used, self.fetched) = (used, fetched);
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

/// The place behind the end of the ring, in the lap after, and the flags of its used descriptors.
/// Cold, so that the loop branches instead of computing this for each descriptor.
#[cold]
fn next_lap(place: Place, size: u16) -> (Place, u64) {
    let place = Place { index: place.index.wrapping_sub(size), wrap: !place.wrap };
    (place, used_meta(place, 0, 0))
}

/// A place whose used descriptors have neither of the two flags.
const NO_FLAGS: Place = Place { index: 0, wrap: false };

/// The second half of a used descriptor at `place`: length, buffer id, flags.
#[inline(always)]
fn used_meta(place: Place, id: u16, written: u32) -> u64 {
    let flags = place.used() | if written > 0 { WRITE } else { 0 };
    u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48
}
