//! Publication and notification: the few steps whose order matters, generic over the shared words
//! so that loom checks the very code that runs (`crate::loom`).
//!
//! ```text
//!           this side                          the driver
//!  publish  entries ─► index (release)         index (acquire) ─► entries
//!  call     index ─► fence ─► event word       event word ─► fence ─► index
//!  kick     event word ─► fence ─► ring        ring ─► fence ─► event word
//! ```
//!
//! Both notifications are Dekker's pattern: each side writes its own word, then reads the other's.
//! With a full fence between the two on both sides, at least one of them sees the other's store:
//! either the call is sent or the driver's second look finds the buffer.

use std::sync::atomic::Ordering::{Relaxed, Release};

use virtio_bindings::virtio_ring as bindings;

use crate::config::WRAP_BIT;
use crate::shared::Shared;

/// The used or available flag that asks for no notifications.
pub(crate) const NO_NOTIFICATION: u16 = 1;
/// Packed event flags: always, never, at a position.
pub(crate) const EVENT_ENABLE: u16 = 0;
pub(crate) const EVENT_DISABLE: u16 = 1;
pub(crate) const EVENT_DESC: u16 = 2;

const _: () = assert!(
    NO_NOTIFICATION as u32 == bindings::VRING_USED_F_NO_NOTIFY
        && NO_NOTIFICATION as u32 == bindings::VRING_AVAIL_F_NO_INTERRUPT
        && EVENT_ENABLE as u32 == bindings::VRING_PACKED_EVENT_FLAG_ENABLE
        && EVENT_DISABLE as u32 == bindings::VRING_PACKED_EVENT_FLAG_DISABLE
        && EVENT_DESC as u32 == bindings::VRING_PACKED_EVENT_FLAG_DESC
        && WRAP_BIT == 1 << bindings::VRING_PACKED_EVENT_F_WRAP_CTR
);

/// Makes what was written before visible to whoever sees `value` in `word`: `used.idx` of a split
/// ring, the flags of a batch's first descriptor in a packed one.
#[inline(always)]
pub(crate) fn publish<T>(word: &impl Shared<T>, value: T) {
    // ORDERING: release pairs with the driver's acquire of this word.
    word.store(value, Release);
}

/// Asks for notifications by writing `value` to `event`, and looks whether one was missed.
#[inline(always)]
pub(crate) fn arm<T, E: Shared<T>>(event: &E, value: T, look: impl FnOnce() -> bool) -> bool {
    event.store(value, Relaxed);
    // ORDERING: pairs with the driver's full fence between making a chain available and reading
    // `event`. Either it sees `value` and kicks, or `look` sees its chain.
    E::full_fence();
    look()
}

/// Whether a step from `old` to `new` passes `event` (`vring_need_event` of the specification).
#[inline(always)]
pub(crate) fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Whether the driver of a split ring with `EVENT_IDX` wants a call for the step from `old` to
/// `new`. The caller's full fence stands before this.
#[inline(always)]
pub(crate) fn split_wants_call(used_event: &impl Shared<u16>, new: u16, old: u16) -> bool {
    passes(used_event.load(Relaxed), new, old)
}

/// Whether the driver of a split ring without `EVENT_IDX` wants calls.
#[inline(always)]
pub(crate) fn split_allows_call(avail_flags: &impl Shared<u16>) -> bool {
    avail_flags.load(Relaxed) & NO_NOTIFICATION == 0
}

/// The last steps of a packed ring's device, up to where it stands now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedStep {
    /// The next descriptor to be marked used, and its wrap counter.
    pub(crate) index: u16,
    pub(crate) wrap: bool,
    /// Descriptors passed on the way.
    pub(crate) passed: u32,
    pub(crate) size: u16,
    pub(crate) event_idx: bool,
}

/// Whether the driver of a packed ring wants a call for `step`. The caller's full fence stands
/// before this. The first call after a start does not look at the position: what was before it is
/// not known.
#[inline(always)]
pub(crate) fn packed_wants_call(
    driver_event: &impl Shared<u32>,
    step: PackedStep,
    first: bool,
) -> bool {
    let (position, flags) = split_event(driver_event.load(Relaxed));
    match flags & 3 {
        EVENT_DISABLE => false,
        EVENT_DESC if step.event_idx && !first => step.passes(position),
        _ => true,
    }
}

impl PackedStep {
    /// Whether the descriptor at `position` (index and wrap bit) was marked used in this step.
    #[inline(always)]
    fn passes(self, position: u16) -> bool {
        let event = u32::from(position & !WRAP_BIT);
        let mut here = u32::from(self.index);
        if (position & WRAP_BIT != 0) != self.wrap {
            here = here.wrapping_add(u32::from(self.size));
        }
        // With the other wrap counter the position is one lap back, or one ahead: then `behind`
        // is above the size.
        let behind = here.wrapping_sub(event);
        here > event && behind <= self.passed
    }
}

/// The word of an event suppression area: index and wrap counter below, flags above.
#[inline(always)]
pub(crate) fn packed_event(index: u16, wrap: bool, flags: u16) -> u32 {
    let position = if wrap { index | WRAP_BIT } else { index };
    u32::from(position) | u32::from(flags) << 16
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
pub(crate) fn split_event(word: u32) -> (u16, u16) {
    (word as u16, (word >> 16) as u16)
}

#[cfg(test)]
mod tests;
