//! How loaded workers are, by which pairs, and which pair had better move to another worker.
//!
//! ```text
//!  counters now ─► Sample ─┐
//!  the last one ───────────┴─► Loads: how busy a worker is, and each pair's share of that
//!                               └─► Balancer: the one move that helps most, if it helps enough
//! ```
//!
//! **Units.** Loads are parts of one CPU, 0 to 1. A pair's share of its worker goes by its frames,
//! and a little by their bytes: [`BYTES_OF_A_FRAME`] more cost as much as a frame.
//! **Hysteresis.** A pair moves only from a worker that was the busiest by [`GAP`], and busier
//! than [`BUSY_MIN`], in [`PATIENCE`] intervals one after the other; only if that makes the busiest
//! worker less busy by [`GAIN`]; and then it rests for [`REST`] intervals. One moves at a time.

use std::collections::HashMap;

use port::QueueId;

/// Bytes whose copy costs about as much as everything else that is done for a frame.
const BYTES_OF_A_FRAME: f64 = 1024.0;
/// A worker that is less busy keeps its pairs.
const BUSY_MIN: f64 = 0.5;
/// By how much the busiest worker must be busier than the idlest.
const GAP: f64 = 0.2;
/// By how much a move must relieve the busiest worker.
const GAIN: f64 = 0.1;
/// Intervals in which that must be so.
const PATIENCE: u32 = 2;
/// Intervals in which a pair that was moved stays.
const REST: u32 = 10;

/// A pair, or a lane from it to the worker of an index.
pub(crate) type Source = (QueueId, Option<usize>);

/// Counters at one moment.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    pub(crate) at_ns: u64,
    /// Of each pair, and of each lane from one to a worker: the number of its worker, frames and
    /// bytes.
    pub(crate) pairs: HashMap<Source, (usize, u64, u64)>,
    /// Nanoseconds with work, by the worker's number.
    pub(crate) busy_ns: HashMap<usize, u64>,
}

/// A pair's part of the work.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct PairLoad {
    /// Of what its worker did.
    pub(crate) share: f64,
    /// Of a CPU.
    pub(crate) busy: f64,
}

/// Loads between two samples.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    pub(crate) pairs: HashMap<Source, PairLoad>,
    /// By the worker's number.
    pub(crate) workers: HashMap<usize, f64>,
}

/// Loads since the last look.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    last: Option<Sample>,
    pub(crate) loads: Loads,
}

impl Meter {
    /// Ends an interval.
    pub(crate) fn look(&mut self, now: Sample) {
        let last = self.last.take().unwrap_or_default();
        self.loads = Loads::between(&last, &now);
        self.last = Some(now);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn float(number: u64) -> f64 {
    number as f64
}

impl Loads {
    fn between(last: &Sample, now: &Sample) -> Self {
        let mut loads = Self::default();
        let spent = float(now.at_ns.saturating_sub(last.at_ns)).max(1.0);
        for (worker, busy) in &now.busy_ns {
            let before = last.busy_ns.get(worker).copied().unwrap_or(0);
            let busy = float(busy.saturating_sub(before)) / spent;
            let _ = loads.workers.insert(*worker, busy.min(1.0));
        }
        let mut sums: HashMap<usize, f64> = HashMap::new();
        let mut weights = Vec::new();
        for (queue, (worker, frames, bytes)) in &now.pairs {
            let (_, frames0, bytes0) = last.pairs.get(queue).copied().unwrap_or_default();
            let bytes = float(bytes.saturating_sub(bytes0));
            let weight = float(frames.saturating_sub(frames0)) + bytes / BYTES_OF_A_FRAME;
            *sums.entry(*worker).or_default() += weight;
            weights.push((*queue, *worker, weight));
        }
        for (queue, worker, weight) in weights {
            let sum = sums.get(&worker).copied().unwrap_or(0.0);
            let share = if sum > 0.0 { weight / sum } else { 0.0 };
            let busy = share * loads.workers.get(&worker).copied().unwrap_or(0.0);
            let _ = loads.pairs.insert(queue, PairLoad { share, busy });
        }
        loads
    }
}

/// A pair that may move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Movable {
    pub(crate) queue: QueueId,
    /// Its worker, as an index.
    pub(crate) worker: usize,
    pub(crate) busy: f64,
}

/// What was seen in the intervals before.
#[derive(Debug, Default)]
pub(crate) struct Balancer {
    /// Intervals in which a move would have helped.
    uneven: u32,
    /// Intervals for which pairs that were moved still rest.
    resting: HashMap<QueueId, u32>,
}

impl Balancer {
    /// Ends an interval: the pair that is to move, and to which worker.
    pub(crate) fn plan(&mut self, workers: &[f64], pairs: &[Movable]) -> Option<(QueueId, usize)> {
        self.resting.retain(|_, left| {
            *left = left.saturating_sub(1);
            *left > 0
        });
        let found = self.best(workers, pairs);
        self.uneven = if found.is_some() { self.uneven.saturating_add(1) } else { 0 };
        let (queue, to) = found.filter(|_| self.uneven >= PATIENCE)?;
        self.uneven = 0;
        let _ = self.resting.insert(queue, REST);
        Some((queue, to))
    }

    fn best(&self, workers: &[f64], pairs: &[Movable]) -> Option<(QueueId, usize)> {
        let by_load = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
        let (busiest, most) = workers.iter().enumerate().max_by(by_load)?;
        let (idlest, least) = workers.iter().enumerate().min_by(by_load)?;
        if *most < BUSY_MIN || most - least < GAP {
            return None;
        }
        // After a move the busier one of both is to be as idle as possible.
        let after = |pair: &Movable| (most - pair.busy).max(least + pair.busy);
        let here =
            |pair: &&Movable| pair.worker == busiest && !self.resting.contains_key(&pair.queue);
        let best = pairs.iter().filter(here).min_by(|a, b| after(a).total_cmp(&after(b)))?;
        (after(best) <= most - GAIN).then_some((best.queue, idlest))
    }
}

#[cfg(test)]
mod tests {
    use port::{PortId, QueueId};

    use super::{Balancer, Meter, Movable, REST, Sample};

    fn queue(pair: u16) -> QueueId {
        QueueId { port: PortId(1), pair }
    }

    #[test]
    fn a_pair_has_its_share_of_what_its_worker_did() {
        let mut meter = Meter::default();
        let mut sample = Sample { at_ns: 1000, ..Sample::default() };
        let _ = sample.busy_ns.insert(7, 100);
        for pair in 0..3 {
            let _ = sample.pairs.insert((queue(pair), None), (7, 50, 0));
        }
        meter.look(sample);
        let mut sample = Sample { at_ns: 2000, ..Sample::default() };
        let _ = sample.busy_ns.insert(7, 900);
        let _ = sample.pairs.insert((queue(0), None), (7, 50 + 300, 0));
        let _ = sample.pairs.insert((queue(1), None), (7, 50, 100 * 1024));
        let _ = sample.pairs.insert((queue(2), None), (7, 50, 0));
        meter.look(sample);
        assert!((meter.loads.workers[&7] - 0.8).abs() < 1e-9);
        for (pair, share) in [(0, 0.75), (1, 0.25), (2, 0.0)] {
            let load = meter.loads.pairs[&(queue(pair), None)];
            assert!((load.share - share).abs() < 1e-9 && (load.busy - share * 0.8).abs() < 1e-9);
        }
    }

    /// Pairs with loads on two workers: what moves in each interval, and where the loads settle.
    fn run(mut pairs: Vec<Movable>, intervals: usize) -> (Vec<(u16, usize)>, Vec<f64>) {
        let mut balancer = Balancer::default();
        let mut moves = Vec::new();
        let sums = |pairs: &[Movable]| {
            let sum = |w| pairs.iter().filter(|p| p.worker == w).map(|p| p.busy).sum::<f64>();
            vec![sum(0), sum(1)]
        };
        for _ in 0..intervals {
            let workers = sums(&pairs);
            if let Some((queue, to)) = balancer.plan(&workers, &pairs) {
                moves.push((queue.pair, to));
                pairs.iter_mut().find(|p| p.queue == queue).unwrap().worker = to;
            }
        }
        (moves, sums(&pairs))
    }

    fn on_worker_0(loads: &[f64]) -> Vec<Movable> {
        let pairs = (0u16..).zip(loads);
        pairs.map(|(pair, busy)| Movable { queue: queue(pair), worker: 0, busy: *busy }).collect()
    }

    #[test]
    fn loads_are_evened_out_and_then_rest() {
        let (moves, loads) = run(on_worker_0(&[0.3, 0.3, 0.2, 0.1]), 100);
        assert_eq!(moves, [(0, 1), (2, 1)]);
        assert!(loads.iter().all(|load| *load < 0.65), "{loads:?}");
        let (moves, loads) = run(on_worker_0(&[0.1; 9]), 100);
        assert_eq!(moves.len(), 4, "{moves:?}");
        assert!(loads.iter().all(|load| *load < 0.55), "{loads:?}");
    }

    #[test]
    fn what_does_not_help_is_not_done() {
        for loads in [&[0.9][..], &[0.9, 0.05], &[0.2, 0.2], &[0.45]] {
            assert_eq!(run(on_worker_0(loads), 50).0, [], "{loads:?}");
        }
        assert_eq!(Balancer::default().plan(&[], &[]), None);
        assert_eq!(Balancer::default().plan(&[1.0], &on_worker_0(&[0.5, 0.5])), None);
    }

    #[test]
    fn a_load_that_jumps_between_pairs_makes_nothing_flap() {
        let mut balancer = Balancer::default();
        let mut pairs = on_worker_0(&[0.5, 0.4, 0.0, 0.0]);
        let mut moves: u32 = 0;
        for interval in 0..100u32 {
            // Who is loud changes in every interval.
            for (at, pair) in (0u32..).zip(&mut pairs) {
                pair.busy = if at % 2 == interval % 2 { 0.45 } else { 0.0 };
            }
            let load = |w| pairs.iter().filter(|p| p.worker == w).map(|p| p.busy).sum::<f64>();
            if let Some((queue, to)) = balancer.plan(&[load(0), load(1)], &pairs) {
                pairs.iter_mut().find(|p| p.queue == queue).unwrap().worker = to;
                moves = moves.wrapping_add(1);
            }
        }
        assert!(moves <= 4 * 100 / REST, "{moves} moves");
    }

    #[test]
    fn one_interval_is_no_reason() {
        let mut balancer = Balancer::default();
        let pairs = on_worker_0(&[0.4, 0.4]);
        assert_eq!(balancer.plan(&[0.8, 0.0], &pairs), None);
        assert_eq!(balancer.plan(&[0.4, 0.4], &pairs), None);
        assert_eq!(balancer.plan(&[0.8, 0.0], &pairs), None);
        assert_eq!(balancer.plan(&[0.8, 0.0], &pairs), Some((queue(0), 1)));
    }
}
