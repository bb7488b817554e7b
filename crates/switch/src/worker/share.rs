//! How long queues that carry much let those that carry little wait.
//!
//! ```text
//!  once a millisecond:  what did each queue cost? ─► some little beside others' much?
//!     no:   bursts of up to 64 frames, one after the other
//!     yes:  the others' bursts take 2.2 us, and after each of them the queues that carry little
//!           are looked at
//! ```
//!
//! So a guest that sends a frame now and then waits for a part of one burst, whatever the frames
//! of its neighbours are and however many neighbours there are. Among queues that all carry much,
//! nothing changes: larger bursts are cheaper, and each waits for itself anyway.
//!
//! How long a burst takes is not guessed: what the window's frames cost took the time that the
//! worker was busy in it.
//!
//! **Units.** A queue's cost is bytes, with [`FRAME_COST`] for each frame.
//! **Limits.** [`LIGHT_MAX`] queues are looked at more often than the others.

use port::BURST_MAX;

use super::Worker;
use super::queue::{Queue, State};

/// How often costs are compared.
const WINDOW_NS: u64 = 1_000_000;
/// For how long bursts stay small after little was carried.
const HOLD_NS: u64 = 100_000_000;
/// As many bytes take about as long to copy as everything else that is done for a frame.
const FRAME_COST: u64 = 800;
/// How long the burst of a queue that carries much may take then. `bench fairness` here, split:
/// 1500 gives the light guest a p99 of 1.3 to 1.5 times of alone and the other 5.7 Mpps of 64 B,
/// 2200 up to 1.6 and 8.7, 2600 2.0 and 9, no bound 2.2 to 2.8 and 10.8.
const BURST_NS: u64 = 2200;
/// It may cost so much however long that takes, 8 frames of 64 bytes: a worker that others keep
/// from its CPU seems slow.
const BURST_LEAST: u64 = 8 * (FRAME_COST + 64);
/// A queue carries little if all cost so many times as much, or more.
const LITTLE: u64 = 8;
/// The most queues that are looked at after each other burst.
const LIGHT_MAX: usize = 8;

/// What a worker knows of its queues' shares.
#[derive(Debug, Default)]
pub(super) struct Shares {
    /// Numbers of the queues that carry little, if others carry much.
    light: Vec<usize>,
    /// When the present window began.
    since_ns: u64,
    /// Bursts are small until then.
    until_ns: u64,
    /// How long the worker had been busy when the window began.
    busy_ns: u64,
}

/// What a queue carried.
#[derive(Debug, Default)]
pub(super) struct Carried {
    frames: u64,
    bytes: u64,
}

impl Carried {
    /// Frames and bytes since the last look.
    fn since(&mut self, frames: u64, bytes: u64) -> (u64, u64) {
        let new = (frames.wrapping_sub(self.frames), bytes.wrapping_sub(self.bytes));
        *self = Self { frames, bytes };
        new
    }
}

/// What so much costs.
fn cost(frames: u64, bytes: u64) -> u64 {
    frames.saturating_mul(FRAME_COST).saturating_add(bytes)
}

/// What a burst of [`BURST_NS`] costs, if all that was carried took so long.
fn fair_cost(all: u64, busy_ns: u64) -> u64 {
    let cost = BURST_NS.saturating_mul(all).checked_div(busy_ns).unwrap_or(u64::MAX);
    cost.max(BURST_LEAST)
}

impl Worker {
    /// Compares what the queues have carried since the last time, if that is long enough ago.
    #[inline]
    pub(super) fn look_at_shares(&mut self) {
        if self.clock.now_ns.wrapping_sub(self.shares.since_ns) >= WINDOW_NS {
            self.compare();
        }
    }

    fn compare(&mut self) {
        let now_ns = self.clock.now_ns;
        self.shares.since_ns = now_ns;
        let mut all = 0u64;
        for queue in self.queues.iter_mut().flatten() {
            let ingress = &queue.origin.counters.ingress;
            let (frames, bytes) = queue.carried.since(ingress.arrived(), ingress.arrived_bytes());
            queue.cost = cost(frames, bytes);
            queue.each = queue.cost.checked_div(frames).unwrap_or(0).max(FRAME_COST);
            all = all.saturating_add(queue.cost);
        }
        let busy_ns = self.mailbox.counters.busy_ns.get();
        let fair = fair_cost(all, busy_ns.wrapping_sub(self.shares.busy_ns));
        self.shares.busy_ns = busy_ns;
        let little = |queue: &Queue| queue.cost > 0 && queue.cost.saturating_mul(LITTLE) <= all;
        if self.queues.iter().flatten().any(little) {
            self.shares.until_ns = now_ns.saturating_add(HOLD_NS);
        }
        let bounded = now_ns < self.shares.until_ns;
        self.shares.light.clear();
        for (number, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let much = queue.cost.saturating_mul(LITTLE) > all;
            let small = fair.checked_div(queue.each).and_then(|count| usize::try_from(count).ok());
            let small = small.map_or(BURST_MAX, |count| count.clamp(1, BURST_MAX));
            // A burst that is spread leaves most of its work to others, and takes a parcel of each
            // of their lanes however small it is: small ones would run the lanes full.
            let bound = bounded && much && queue.spread.is_none();
            queue.share = if bound { small } else { BURST_MAX };
            let light = bounded && !much && self.shares.light.len() < LIGHT_MAX;
            queue.light = light && queue.state == State::Hot;
            if queue.light {
                self.shares.light.push(number);
            }
        }
    }

    /// Looks at the queues that carry little, after one that may carry much.
    #[inline]
    pub(super) fn serve_light(&mut self, after: usize) {
        let mut at = 0;
        while let Some(number) = self.shares.light.get(at).copied() {
            at = at.wrapping_add(1);
            let hot = |queue: &Queue| queue.light && queue.state == State::Hot;
            let there = self.queues.get(number).and_then(Option::as_ref);
            if number != after && there.is_some_and(hot) {
                let _ = self.serve(number);
            }
        }
    }

    /// Whether nobody needs to be looked at more often than others.
    #[inline(always)]
    pub(super) fn all_alike(&self) -> bool {
        self.shares.light.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::{BURST_LEAST, BURST_NS, FRAME_COST, cost, fair_cost};

    #[test]
    fn a_burst_costs_what_its_time_is_worth() {
        // 10,000 frames of 64 bytes took a millisecond: 22 take 2.2 us.
        let all = cost(10_000, 640_000);
        assert_eq!(fair_cost(all, 1_000_000), 22 * (FRAME_COST + 64));
        // In half of that time, twice as many.
        assert_eq!(fair_cost(all, 500_000), 44 * (FRAME_COST + 64));
        assert_eq!(fair_cost(all, 0), u64::MAX);
        for long in [BURST_NS * all, u64::MAX] {
            assert_eq!(fair_cost(all, long), BURST_LEAST);
        }
        assert_eq!(fair_cost(0, 1), BURST_LEAST);
        assert_eq!(cost(u64::MAX, 1), u64::MAX);
    }
}
