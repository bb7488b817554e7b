//! A clock that a test moves: events happen in the order of their times, at no real time at all.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// Time in nanoseconds, and what is to happen when.
#[derive(Debug)]
pub struct VirtualClock<E> {
    now_ns: u64,
    next_id: u64,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, E>,
}

impl<E> Default for VirtualClock<E> {
    fn default() -> Self {
        Self { now_ns: 0, next_id: 0, due: BinaryHeap::new(), events: BTreeMap::new() }
    }
}

impl<E> VirtualClock<E> {
    /// The present time.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Lets `event` happen `after_ns` from now.
    pub fn schedule(&mut self, after_ns: u64, event: E) {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.due.push(Reverse((self.now_ns.saturating_add(after_ns), id)));
        let _ = self.events.insert(id, event);
    }

    /// Moves on to the next event. Events of one time come in the order in which they were
    /// scheduled.
    pub fn step(&mut self) -> Option<E> {
        let Reverse((at, id)) = self.due.pop()?;
        self.now_ns = at;
        self.events.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::VirtualClock;

    #[test]
    fn events_come_in_the_order_of_their_times() {
        let mut clock = VirtualClock::default();
        for (after, name) in [(30, "c"), (10, "a"), (30, "d"), (20, "b")] {
            clock.schedule(after, name);
        }
        let mut seen = Vec::new();
        while let Some(name) = clock.step() {
            seen.push((clock.now_ns(), name));
            if name == "a" {
                clock.schedule(15, "between");
            }
        }
        assert_eq!(seen, [(10, "a"), (20, "b"), (25, "between"), (30, "c"), (30, "d")]);
    }
}
