//! What happened between two looks at the counters: `ctl top`.
//!
//! The interval is the switch's own time between the two, so that rates do not depend on how long
//! an answer was on its way. A counter that went back (the port or the switch is a new one)
//! counts from zero.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::protocol::{BATCH_SIZES, PortStats, QueueStats, StatsView, WorkerStats};

/// `ctl top`: frames and drops are those of the interval, rates are per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopView {
    /// Seconds between the two looks.
    pub interval_s: f64,
    /// Every worker.
    pub workers: Vec<WorkerTop>,
    /// Every port.
    pub ports: Vec<PortTop>,
}

/// One worker of `ctl top`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerTop {
    /// Its number.
    pub number: usize,
    /// The CPU that it is pinned to.
    pub cpu: Option<u16>,
    /// Share of the time that it had work, 0 to 1.
    pub busy_ratio: f64,
    /// Frames that it took from ports.
    pub frames: u64,
    /// The same per second.
    pub frames_per_s: f64,
    /// Nanoseconds per frame, of turns that had work; none without frames.
    pub ns_per_frame: Option<f64>,
    /// Bursts that the frames came in.
    pub bursts: u64,
    /// The bursts by size: 1, 2, 3 to 4, 5 to 8, 9 to 16, 17 to 32, 33 to 64 frames.
    pub batches: [u64; BATCH_SIZES.len()],
    /// Queues that were woken by a kick.
    pub kicks_per_s: f64,
    /// Calls that were sent.
    pub calls_per_s: f64,
    /// Calls that were left out.
    pub calls_suppressed_per_s: f64,
    /// How often it fell asleep.
    pub sleeps_per_s: f64,
}

/// One port of `ctl top`, all queues together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortTop {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// `up`, `waiting`, `down`, `broken` or `quarantined`.
    pub state: String,
    /// Frames into the switch.
    pub rx_frames: u64,
    /// The same per second.
    pub rx_frames_per_s: f64,
    /// Bits into the switch per second.
    pub rx_bits_per_s: f64,
    /// Frames out of the switch.
    pub tx_frames: u64,
    /// The same per second.
    pub tx_frames_per_s: f64,
    /// Bits out of the switch per second.
    pub tx_bits_per_s: f64,
    /// Frames that died, by reason; reasons that none died for are left out.
    pub drops: BTreeMap<String, u64>,
    /// All of them per second.
    pub drops_per_s: f64,
    /// Kicks that woke a queue.
    pub kicks_per_s: f64,
    /// Calls that were sent.
    pub calls_per_s: f64,
    /// Calls that were left out.
    pub calls_suppressed_per_s: f64,
}

impl TopView {
    /// What happened from `before` to `after`.
    pub fn between(before: &StatsView, after: &StatsView) -> Self {
        let span = Span::new(before, after);
        let worker = |now: &WorkerStats| {
            let same = |was: &&WorkerStats| was.number == now.number && was.cpu == now.cpu;
            let was = before.workers.iter().find(same).filter(|_| span.continues);
            span.worker(&was.copied().unwrap_or_default(), now)
        };
        let port = |now: &PortStats| {
            let same = |was: &&PortStats| was.name == now.name;
            let was = before.ports.iter().find(same).filter(|_| span.continues);
            span.port(&was.map(sum).unwrap_or_default(), now)
        };
        Self {
            interval_s: span.seconds,
            workers: after.workers.iter().map(worker).collect(),
            ports: after.ports.iter().map(port).collect(),
        }
    }

    /// Frames per second that all workers took.
    pub fn frames_per_s(&self) -> f64 {
        self.workers.iter().map(|worker| worker.frames_per_s).sum()
    }
}

/// The time between two looks.
#[derive(Debug, Clone, Copy)]
struct Span {
    ns: u64,
    seconds: f64,
    /// Whether it is the same switch.
    continues: bool,
}

impl Span {
    fn new(before: &StatsView, after: &StatsView) -> Self {
        let continues = after.up_ns >= before.up_ns;
        let began = if continues { before.up_ns } else { 0 };
        let ns = after.up_ns.saturating_sub(began);
        Self { ns, seconds: ratio(ns, 1_000_000_000), continues }
    }

    fn per_second(self, count: u64) -> f64 {
        if self.ns == 0 { 0.0 } else { float(count) / self.seconds }
    }

    fn worker(self, was: &WorkerStats, now: &WorkerStats) -> WorkerTop {
        let frames = since(was.frames, now.frames);
        let busy_ns = since(was.busy_ns, now.busy_ns);
        let mut batches = now.batches;
        for (bursts, was) in batches.iter_mut().zip(was.batches) {
            *bursts = since(was, *bursts);
        }
        WorkerTop {
            number: now.number,
            cpu: now.cpu,
            busy_ratio: ratio(busy_ns, self.ns).min(1.0),
            frames,
            frames_per_s: self.per_second(frames),
            ns_per_frame: (frames > 0).then(|| ratio(busy_ns, frames)),
            bursts: since(was.bursts, now.bursts),
            batches,
            kicks_per_s: self.per_second(since(was.kicks, now.kicks)),
            calls_per_s: self.per_second(since(was.calls, now.calls)),
            calls_suppressed_per_s: self
                .per_second(since(was.calls_suppressed, now.calls_suppressed)),
            sleeps_per_s: self.per_second(since(was.sleeps, now.sleeps)),
        }
    }

    fn port(self, was: &QueueStats, port: &PortStats) -> PortTop {
        let now = sum(port);
        let rate = |term: fn(&QueueStats) -> u64| self.per_second(since(term(was), term(&now)));
        let died = now.drops.iter().map(|(reason, count)| {
            let before = was.drops.get(reason).copied().unwrap_or(0);
            (reason.clone(), since(before, *count))
        });
        let drops: BTreeMap<String, u64> = died.filter(|(_, count)| *count > 0).collect();
        let dropped = drops.values().fold(0, |sum: u64, n| sum.saturating_add(*n));
        PortTop {
            name: port.name.clone(),
            kind: port.kind.clone(),
            state: port.state.clone(),
            rx_frames: since(was.rx_frames, now.rx_frames),
            rx_frames_per_s: rate(|q| q.rx_frames),
            rx_bits_per_s: rate(|q| q.rx_bytes) * 8.0,
            tx_frames: since(was.tx_frames, now.tx_frames),
            tx_frames_per_s: rate(|q| q.tx_frames),
            tx_bits_per_s: rate(|q| q.tx_bytes) * 8.0,
            drops,
            drops_per_s: self.per_second(dropped),
            kicks_per_s: rate(|q| q.kicks),
            calls_per_s: rate(|q| q.rx_calls) + rate(|q| q.tx_calls),
            calls_suppressed_per_s: rate(|q| q.rx_calls_suppressed)
                + rate(|q| q.tx_calls_suppressed),
        }
    }
}

/// All queues of a port as one.
fn sum(port: &PortStats) -> QueueStats {
    let mut all = QueueStats::default();
    for queue in &port.queues {
        let pairs = [
            (&mut all.rx_frames, queue.rx_frames),
            (&mut all.rx_bytes, queue.rx_bytes),
            (&mut all.tx_frames, queue.tx_frames),
            (&mut all.tx_bytes, queue.tx_bytes),
            (&mut all.kicks, queue.kicks),
            (&mut all.rx_calls, queue.rx_calls),
            (&mut all.rx_calls_suppressed, queue.rx_calls_suppressed),
            (&mut all.tx_calls, queue.tx_calls),
            (&mut all.tx_calls_suppressed, queue.tx_calls_suppressed),
        ];
        for (to, from) in pairs {
            *to = to.saturating_add(from);
        }
        for (reason, count) in &queue.drops {
            let place = all.drops.entry(reason.clone()).or_default();
            *place = place.saturating_add(*count);
        }
    }
    all
}

/// How far a counter went; one that went back began anew.
fn since(was: u64, now: u64) -> u64 {
    now.checked_sub(was).unwrap_or(now)
}

fn ratio(part: u64, whole: u64) -> f64 {
    float(part) / float(whole.max(1))
}

#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests;
