//! Counters: written by one worker, read by anybody without stopping it.
//!
//! The law for the switch as a whole: `rx + flood_copies + segments_added + originated =
//! tx + drops + merged + held`, where `held` is what is on its way. A frame is counted as received
//! before it can be counted as sent, and readers read sent and dropped before received, so that
//! `held` is never negative.
//!
//! What the kernel drops before an uplink could take it came to the switch all the same: it counts
//! as received and dropped at once, and so leaves the law exact. Its bytes are not known.

mod carry;

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::{DropReason, Notified};

pub use carry::{QueueRecord, WayRecord};

/// A counter with one writer at a time.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the owner of the queue calls this.
    #[inline(always)]
    pub fn add(&self, count: u64) {
        let now = self.0.load(Ordering::Relaxed);
        // ORDERING: Release pairs with the Acquire in `get`: who sees this count also sees the
        // counts that the same frame moved before.
        self.0.store(now.wrapping_add(count), Ordering::Release);
    }

    /// The present value.
    #[inline]
    pub fn get(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release in `add`.
        self.0.load(Ordering::Acquire)
    }
}

/// Drops by reason.
#[derive(Debug)]
struct Drops([Counter; DropReason::COUNT]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Drops {
    #[inline]
    fn add(&self, reason: DropReason, count: u64) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.add(count);
        }
    }

    fn sum(&self) -> u64 {
        self.0.iter().fold(0, |sum, counter| sum.wrapping_add(counter.get()))
    }

    fn add_to(&self, totals: &mut [u64; DropReason::COUNT]) {
        for (total, counter) in totals.iter_mut().zip(&self.0) {
            *total = total.wrapping_add(counter.get());
        }
    }
}

/// How the notifications of one side were decided; written by who notifies.
#[derive(Debug, Default)]
pub struct CallCounters {
    sent: Counter,
    suppressed: Counter,
}

impl CallCounters {
    /// Counts a decision.
    #[inline(always)]
    pub fn count(&self, notified: Notified) {
        match notified {
            Notified::Called => self.sent.add(1),
            Notified::Suppressed => self.suppressed.add(1),
            Notified::Nobody => {}
        }
    }

    /// The present values.
    pub fn read(&self) -> CallTotals {
        CallTotals { sent: self.sent.get(), suppressed: self.suppressed.get() }
    }
}

/// Counters of a queue's way into the switch; written by the worker that owns the ingress. What
/// every burst writes comes first, in one cache line.
#[derive(Debug, Default)]
#[repr(C)]
pub struct IngressCounters {
    frames: Counter,
    bytes: Counter,
    /// Calls to the other side: buffers were given back.
    pub calls: CallCounters,
    kicks: Counter,
    rests: Counter,
    drops: Drops,
}

impl IngressCounters {
    /// Counts frames that arrived, before anything else happens to them.
    #[inline(always)]
    pub fn received(&self, frames: u64, bytes: u64) {
        self.bytes.add(bytes);
        self.frames.add(frames);
    }

    /// Counts frames that the switch decided to drop.
    #[inline]
    pub fn dropped(&self, reason: DropReason, frames: u64) {
        self.drops.add(reason, frames);
    }

    /// Counts a kick that woke the queue.
    #[inline]
    pub fn kicked(&self) {
        self.kicks.add(1);
    }

    /// Counts that the queue was left alone because its port's rate was used up.
    #[inline]
    pub fn rested(&self) {
        self.rests.add(1);
    }

    /// Bytes that arrived so far.
    #[inline(always)]
    pub fn arrived_bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Frames that arrived so far.
    #[inline(always)]
    pub fn arrived(&self) -> u64 {
        self.frames.get()
    }

    /// Frames that were not dropped on this way; exact for the owner of the queue only.
    pub fn passed(&self) -> u64 {
        self.frames.get().wrapping_sub(self.drops.sum())
    }
}

/// Counters of a queue's way out of the switch; written under the egress's lock. What every burst
/// writes comes first, in one cache line.
#[derive(Debug, Default)]
#[repr(C)]
pub struct EgressCounters {
    frames: Counter,
    bytes: Counter,
    /// Calls to the other side: buffers were filled.
    pub calls: CallCounters,
    segments_added: Counter,
    merged: Counter,
    /// Counted as sent, and lost: frames, and their bytes.
    lost: [Counter; 2],
    drops: Drops,
}

impl EgressCounters {
    /// Counts frames that were delivered.
    #[inline(always)]
    pub fn sent(&self, frames: u64, bytes: u64) {
        self.bytes.add(bytes);
        self.frames.add(frames);
    }

    /// Counts frames that could not be delivered.
    #[inline]
    pub fn dropped(&self, reason: DropReason, frames: u64) {
        self.drops.add(reason, frames);
    }

    /// Counts frames that were delivered, by an egress that learns later of some that were lost.
    #[inline(always)]
    pub fn sent_but_lost(&self, reason: DropReason, frames: u64, bytes: u64) {
        let [lost_frames, lost_bytes] = self.lost.each_ref().map(Counter::get);
        if lost_frames | lost_bytes == 0 {
            self.sent(frames, bytes);
        } else {
            self.make_good(reason, frames, bytes);
        }
    }

    /// Counts frames that were counted as sent, and turn out to be lost. What is shown as sent
    /// never falls: each is shown as dropped once another one was sent that stands for it, in
    /// [`Self::sent_but_lost`].
    pub fn lost(&self, frames: u64, bytes: u64) {
        for (counter, more) in self.lost.iter().zip([frames, bytes]) {
            counter.add(more);
        }
    }

    #[cold]
    fn make_good(&self, reason: DropReason, frames: u64, bytes: u64) {
        let [lost_frames, lost_bytes] = &self.lost;
        let (dropped, of_them) = (frames.min(lost_frames.get()), bytes.min(lost_bytes.get()));
        lost_frames.add(dropped.wrapping_neg());
        lost_bytes.add(of_them.wrapping_neg());
        self.sent(frames.wrapping_sub(dropped), bytes.wrapping_sub(of_them));
        self.dropped(reason, dropped);
    }

    /// Counts a frame that is about to become one and `more` segments: before any is sent.
    #[inline]
    pub fn segmented(&self, more: u64) {
        self.segments_added.add(more);
    }

    /// Counts frames that went on as parts of another one.
    #[inline]
    pub fn merged(&self, frames: u64) {
        self.merged.add(frames);
    }

    /// Drops so far, in the order of [`DropReason::ALL`]; exact under the egress's lock only.
    pub fn dropped_by_reason(&self) -> [u64; DropReason::COUNT] {
        std::array::from_fn(|at| self.drops.0.get(at).map_or(0, Counter::get))
    }

    /// Frames that were handed over and ended here: sent, dropped, or merged, less the segments
    /// that were made of them; exact under the egress's lock only.
    pub fn ended(&self) -> u64 {
        let ended = self.frames.get().wrapping_add(self.drops.sum());
        ended.wrapping_add(self.merged.get()).wrapping_sub(self.segments_added.get())
    }
}

/// Frames for an uplink's queue that the kernel dropped; written by the control thread alone,
/// which asks the kernel now and then.
#[derive(Debug, Default)]
pub struct KernelCounters {
    drops: Drops,
}

impl KernelCounters {
    /// Counts frames that came for this queue and never reached it.
    pub fn dropped(&self, reason: DropReason, frames: u64) {
        self.drops.add(reason, frames);
    }
}

/// Both ways of one queue pair, each in cache lines of its own.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Into the switch, as far as the kernel.
    pub kernel: KernelCounters,
    /// Into the switch.
    pub ingress: CachePadded<IngressCounters>,
    /// Out of the switch.
    pub egress: CachePadded<EgressCounters>,
}

/// What [`CallCounters`] were at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallTotals {
    /// Calls that were sent.
    pub sent: u64,
    /// Calls that were not, because the other side did not ask for them.
    pub suppressed: u64,
}

/// What a queue's counters were at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueTotals {
    /// Frames into the switch.
    pub rx_frames: u64,
    /// Bytes into the switch.
    pub rx_bytes: u64,
    /// Frames out of the switch.
    pub tx_frames: u64,
    /// Bytes out of the switch.
    pub tx_bytes: u64,
    /// Segments beyond the first that frames were cut into on their way out.
    pub segments_added: u64,
    /// Frames that left as parts of others.
    pub merged: u64,
    /// Drops, in the order of [`DropReason::ALL`].
    pub drops: [u64; DropReason::COUNT],
    /// Kicks that woke the way in.
    pub kicks: u64,
    /// Times that the way in rested because the port's rate was used up.
    pub rests: u64,
    /// Calls after the way in gave buffers back.
    pub rx_calls: CallTotals,
    /// Calls after the way out filled buffers.
    pub tx_calls: CallTotals,
}

impl QueueTotals {
    /// Sum of all drops.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }
}

impl QueueCounters {
    /// Reads the ways that end a frame; call this for every queue before [`Self::read_rx`].
    pub fn read_ends(&self) -> QueueTotals {
        let mut drops = [0; DropReason::COUNT];
        self.ingress.drops.add_to(&mut drops);
        self.egress.drops.add_to(&mut drops);
        self.kernel.drops.add_to(&mut drops);
        QueueTotals {
            tx_frames: self.egress.frames.get(),
            tx_bytes: self.egress.bytes.get(),
            merged: self.egress.merged.get(),
            drops,
            kicks: self.ingress.kicks.get(),
            rests: self.ingress.rests.get(),
            rx_calls: self.ingress.calls.read(),
            tx_calls: self.egress.calls.read(),
            ..QueueTotals::default()
        }
    }

    /// Adds what began: read after the ends of every queue.
    pub fn read_rx(&self, totals: &mut QueueTotals) {
        let by_kernel = self.kernel.drops.sum();
        totals.rx_frames = self.ingress.frames.get().wrapping_add(by_kernel);
        totals.rx_bytes = self.ingress.bytes.get();
        totals.segments_added = self.egress.segments_added.get();
    }
}

#[cfg(test)]
mod tests {
    use super::{CallTotals, QueueCounters};
    use crate::{DropReason, Notified};

    #[test]
    fn totals_show_each_way() {
        let counters = QueueCounters::default();
        counters.ingress.received(3, 180);
        counters.ingress.dropped(DropReason::Runt, 1);
        counters.egress.sent(2, 120);
        counters.egress.dropped(DropReason::NoBuffer, 4);
        let mut totals = counters.read_ends();
        counters.read_rx(&mut totals);
        assert_eq!((totals.rx_frames, totals.rx_bytes), (3, 180));
        assert_eq!((totals.tx_frames, totals.tx_bytes), (2, 120));
        assert_eq!(totals.dropped(), 5);
        assert_eq!(totals.drops[DropReason::NoBuffer as usize], 4);
    }

    /// Prometheus takes a counter that falls for a restart.
    #[test]
    fn what_was_not_sent_after_all_is_dropped_and_no_counter_falls() {
        let counters = QueueCounters::default();
        let shown = || {
            let totals = counters.read_ends();
            (totals.tx_frames, totals.tx_bytes, totals.dropped())
        };
        let send = |frames, bytes| {
            counters.egress.sent_but_lost(DropReason::UplinkError, frames, bytes);
        };
        send(10, 1000);
        counters.egress.lost(3, 200);
        assert_eq!(shown(), (10, 1000, 0));
        send(2, 300);
        assert_eq!(shown(), (10, 1100, 2));
        assert_eq!(counters.egress.ended(), 12);
        send(2, 300);
        assert_eq!(shown(), (11, 1400, 3));
        send(1, 100);
        assert_eq!((shown(), counters.egress.ended()), ((12, 1500, 3), 15));
    }

    #[test]
    fn what_the_kernel_drops_is_received_and_dropped() {
        let counters = QueueCounters::default();
        counters.ingress.received(3, 180);
        counters.kernel.dropped(DropReason::KernelRingFull, 5);
        counters.kernel.dropped(DropReason::KernelNoBuffer, 1);
        let mut totals = counters.read_ends();
        // Reads are not at one moment: what is dropped between them only seems to be on its way.
        counters.kernel.dropped(DropReason::KernelRingFull, 2);
        counters.read_rx(&mut totals);
        assert_eq!((totals.rx_frames, totals.rx_bytes, totals.dropped()), (11, 180, 6));
        assert_eq!(totals.drops[DropReason::KernelRingFull as usize], 5);
        assert_eq!(counters.ingress.passed(), 3);
    }

    #[test]
    fn notifications_are_counted_by_how_they_were_decided() {
        let counters = QueueCounters::default();
        counters.ingress.kicked();
        for notified in [Notified::Called, Notified::Suppressed, Notified::Called] {
            counters.ingress.calls.count(notified);
        }
        for notified in [Notified::Nobody, Notified::Suppressed] {
            counters.egress.calls.count(notified);
        }
        let totals = counters.read_ends();
        assert_eq!(totals.kicks, 1);
        assert_eq!(totals.rx_calls, CallTotals { sent: 2, suppressed: 1 });
        assert_eq!(totals.tx_calls, CallTotals { sent: 0, suppressed: 1 });
    }
}
