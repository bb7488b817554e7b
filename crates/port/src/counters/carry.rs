//! What a queue had counted, for another process that goes on counting.

use super::{CallCounters, CallTotals, Counter, Drops, QueueCounters};
use crate::DropReason;

/// What one way of a queue had counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WayRecord {
    /// Frames.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
    /// Kicks; of a way in only.
    pub kicks: u64,
    /// Segments that large frames became, beyond the first; of a way out only.
    pub segments_added: u64,
    /// Segments that were merged into larger frames; of a way out only.
    pub merged: u64,
    /// Frames that were counted as sent and lost, and their bytes; of a way out only.
    pub lost: [u64; 2],
    /// Calls.
    pub calls: CallTotals,
    /// Drops, in the order of [`DropReason::ALL`].
    pub drops: [u64; DropReason::COUNT],
}

/// What a queue had counted, each way by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueRecord {
    /// Into the switch.
    pub ingress: WayRecord,
    /// Out of the switch.
    pub egress: WayRecord,
    /// Drops of the kernel, in the order of [`DropReason::ALL`].
    pub kernel: [u64; DropReason::COUNT],
}

impl QueueCounters {
    /// What was counted; exact when nobody serves the queue.
    pub fn record(&self) -> QueueRecord {
        let (ingress, egress) = (&self.ingress, &self.egress);
        QueueRecord {
            ingress: WayRecord {
                frames: ingress.frames.get(),
                bytes: ingress.bytes.get(),
                kicks: ingress.kicks.get(),
                calls: ingress.calls.read(),
                drops: ingress.drops.all(),
                ..WayRecord::default()
            },
            egress: WayRecord {
                frames: egress.frames.get(),
                bytes: egress.bytes.get(),
                kicks: 0,
                segments_added: egress.segments_added.get(),
                merged: egress.merged.get(),
                lost: egress.lost.each_ref().map(Counter::get),
                calls: egress.calls.read(),
                drops: egress.drops.all(),
            },
            kernel: self.kernel.drops.all(),
        }
    }

    /// Adds what was counted elsewhere. Nobody serves the queue yet.
    pub fn carry(&self, record: &QueueRecord) {
        let (ingress, egress) = (&self.ingress, &self.egress);
        // Received before sent and dropped, as always.
        ingress.received(record.ingress.frames, record.ingress.bytes);
        ingress.kicks.add(record.ingress.kicks);
        ingress.calls.carry(record.ingress.calls);
        ingress.drops.carry(&record.ingress.drops);
        egress.segments_added.add(record.egress.segments_added);
        egress.calls.carry(record.egress.calls);
        egress.drops.carry(&record.egress.drops);
        egress.merged.add(record.egress.merged);
        egress.sent(record.egress.frames, record.egress.bytes);
        let [frames, bytes] = record.egress.lost;
        egress.lost(frames, bytes);
        self.kernel.drops.carry(&record.kernel);
    }
}

impl CallCounters {
    fn carry(&self, totals: CallTotals) {
        self.sent.add(totals.sent);
        self.suppressed.add(totals.suppressed);
    }
}

impl Drops {
    fn all(&self) -> [u64; DropReason::COUNT] {
        let mut drops = [0; DropReason::COUNT];
        self.add_to(&mut drops);
        drops
    }

    fn carry(&self, drops: &[u64; DropReason::COUNT]) {
        for (counter, count) in self.0.iter().zip(drops) {
            counter.add(*count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::QueueCounters;
    use crate::{DropReason, Notified};

    #[test]
    fn another_process_goes_on_with_the_same_numbers() {
        let old = QueueCounters::default();
        old.ingress.received(7, 700);
        old.ingress.dropped(DropReason::Runt, 1);
        old.ingress.kicked();
        old.ingress.calls.count(Notified::Called);
        old.egress.segmented(4);
        old.egress.merged(2);
        old.egress.sent(5, 500);
        old.egress.lost(1, 60);
        old.egress.dropped(DropReason::NoBuffer, 2);
        old.egress.calls.count(Notified::Suppressed);
        old.kernel.dropped(DropReason::KernelRingFull, 3);
        let new = QueueCounters::default();
        new.carry(&old.record());
        let totals = |counters: &QueueCounters| {
            let mut totals = counters.read_ends();
            counters.read_rx(&mut totals);
            totals
        };
        assert_eq!(totals(&new), totals(&old));
        assert_eq!(new.record(), old.record());
        assert_eq!((new.ingress.passed(), new.egress.ended()), (6, old.egress.ended()));
    }
}
