//! What arrived, per flow: what is missing, late or doubled.
//!
//! **Limits.** A frame that is more than [`WINDOW`] behind the newest of its flow is counted as
//! out of order without a look whether it was there before.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Sequence numbers that a flow remembers.
const WINDOW: u32 = 4096;
const WORDS: usize = 64;

/// Totals over all flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Losses {
    /// Sequence numbers that were skipped and did not come late.
    pub(crate) lost: u64,
    /// Frames that came after a later one.
    pub(crate) out_of_order: u64,
    /// Frames that came again.
    pub(crate) duplicated: u64,
}

/// Everything that arrived.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    index: HashMap<(u64, u16), usize>,
    flows: Vec<Flow>,
    /// The flow of the last frame: bursts are often of one flow.
    last: Option<((u64, u16), usize)>,
    losses: Losses,
}

/// One flow of one sender: its frames are numbered from 0 on.
#[derive(Debug)]
struct Flow {
    next: u32,
    seen: Box<[u64; WORDS]>,
}

impl Tracker {
    /// Notes that frame `seq` of a flow arrived.
    #[inline]
    pub(crate) fn arrived(&mut self, origin: u64, flow: u16, seq: u32) {
        let at = self.flow((origin, flow));
        let Some(flow) = self.flows.get_mut(at) else { return };
        if seq == flow.next {
            flow.mark_new(seq);
            flow.next = seq.wrapping_add(1);
            return;
        }
        let ahead = seq.wrapping_sub(flow.next);
        if ahead < 1 << 31 {
            flow.skip(ahead);
            flow.mark_new(seq);
            flow.next = seq.wrapping_add(1);
            self.losses.lost = self.losses.lost.wrapping_add(u64::from(ahead));
        } else if flow.next.wrapping_sub(seq) <= WINDOW && flow.was_seen(seq) {
            self.losses.duplicated = self.losses.duplicated.wrapping_add(1);
        } else {
            flow.mark_new(seq);
            self.losses.out_of_order = self.losses.out_of_order.wrapping_add(1);
            self.losses.lost = self.losses.lost.saturating_sub(1);
        }
    }

    /// Losses so far. Frames missing at the end of a flow cannot be known here.
    pub(crate) fn losses(&self) -> Losses {
        self.losses
    }

    #[inline]
    fn flow(&mut self, key: (u64, u16)) -> usize {
        if let Some((last, at)) = self.last
            && last == key
        {
            return at;
        }
        let at = match self.index.entry(key) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                self.flows.push(Flow { next: 0, seen: Box::new([0; WORDS]) });
                *new.insert(self.flows.len().saturating_sub(1))
            }
        };
        self.last = Some((key, at));
        at
    }
}

impl Flow {
    #[inline]
    fn place(seq: u32) -> (usize, u64) {
        let bit = seq % WINDOW;
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    #[inline]
    fn mark_new(&mut self, seq: u32) {
        let (word, bit) = Self::place(seq);
        if let Some(word) = self.seen.get_mut(word) {
            *word |= bit;
        }
    }

    fn was_seen(&self, seq: u32) -> bool {
        let (word, bit) = Self::place(seq);
        self.seen.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Forgets what stood where the skipped numbers go.
    fn skip(&mut self, count: u32) {
        for step in 0..count.min(WINDOW) {
            let (word, bit) = Self::place(self.next.wrapping_add(step));
            if let Some(word) = self.seen.get_mut(word) {
                *word &= !bit;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Losses, Tracker};

    fn losses(seqs: impl IntoIterator<Item = u32>) -> Losses {
        let mut tracker = Tracker::default();
        for seq in seqs {
            tracker.arrived(1, 0, seq);
        }
        tracker.losses()
    }

    #[test]
    fn in_order_nothing_is_wrong() {
        assert_eq!(losses(0..20_000), Losses::default());
    }

    #[test]
    fn a_gap_is_lost_until_it_comes_late() {
        assert_eq!(losses([0, 1, 5]).lost, 3);
        let late = losses([0, 1, 5, 3, 6]);
        assert_eq!((late.lost, late.out_of_order, late.duplicated), (2, 1, 0));
        assert_eq!(losses([4]).lost, 4);
    }

    #[test]
    fn a_second_copy_is_doubled_not_late() {
        let twice = losses([0, 1, 1, 2, 0]);
        assert_eq!((twice.lost, twice.out_of_order, twice.duplicated), (0, 0, 2));
        let far = (0..10_000).chain([9_000, 9_999]);
        assert_eq!(losses(far).duplicated, 2);
    }

    #[test]
    fn a_gap_larger_than_the_window_forgets_it() {
        let seqs = (0..100).chain([10_000, 9_990]);
        let after = losses(seqs);
        assert_eq!((after.lost, after.out_of_order, after.duplicated), (9_899, 1, 0));
    }

    #[test]
    fn flows_are_counted_apart() {
        let mut tracker = Tracker::default();
        for seq in 0..10 {
            tracker.arrived(1, 0, seq);
            tracker.arrived(1, 1, seq);
            tracker.arrived(2, 0, seq);
        }
        assert_eq!(tracker.losses(), Losses::default());
    }
}
