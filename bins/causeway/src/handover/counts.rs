//! Counters by name, so that programs with other tables of reasons understand each other.

use std::collections::BTreeMap;

use port::{CallTotals, DropReason, QueueRecord, QueueTotals, WayRecord};
use serde::{Deserialize, Serialize};

/// What a queue pair had counted.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct QueueCount {
    ingress: WayCount,
    egress: WayCount,
    /// The kernel's drops.
    kernel: BTreeMap<String, u64>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct WayCount {
    frames: u64,
    bytes: u64,
    kicks: u64,
    segments_added: u64,
    merged: u64,
    lost: [u64; 2],
    calls: u64,
    calls_suppressed: u64,
    drops: BTreeMap<String, u64>,
}

impl QueueCount {
    pub(crate) fn of(record: &QueueRecord) -> Self {
        Self {
            ingress: WayCount::of(&record.ingress),
            egress: WayCount::of(&record.egress),
            kernel: named(&record.kernel),
        }
    }

    pub(crate) fn record(&self) -> QueueRecord {
        QueueRecord {
            ingress: self.ingress.record(),
            egress: self.egress.record(),
            kernel: numbered(&self.kernel),
        }
    }
}

impl WayCount {
    fn of(record: &WayRecord) -> Self {
        Self {
            frames: record.frames,
            bytes: record.bytes,
            kicks: record.kicks,
            segments_added: record.segments_added,
            merged: record.merged,
            lost: record.lost,
            calls: record.calls.sent,
            calls_suppressed: record.calls.suppressed,
            drops: named(&record.drops),
        }
    }

    fn record(&self) -> WayRecord {
        WayRecord {
            frames: self.frames,
            bytes: self.bytes,
            kicks: self.kicks,
            segments_added: self.segments_added,
            merged: self.merged,
            lost: self.lost,
            calls: CallTotals { sent: self.calls, suppressed: self.calls_suppressed },
            drops: numbered(&self.drops),
        }
    }
}

fn named(drops: &[u64; DropReason::COUNT]) -> BTreeMap<String, u64> {
    let named = DropReason::ALL.iter().zip(drops).filter(|(_, count)| **count > 0);
    named.map(|(reason, count)| (reason.name().to_owned(), *count)).collect()
}

/// The counts in the order of this program's reasons. What has no reason here is counted as a
/// frame without destination, so that the books stay balanced.
fn numbered(drops: &BTreeMap<String, u64>) -> [u64; DropReason::COUNT] {
    let mut numbered = [0u64; DropReason::COUNT];
    for (name, count) in drops {
        let known = DropReason::ALL.into_iter().find(|reason| reason.name() == name);
        let reason = known.unwrap_or(DropReason::NoDestination);
        if let Some(place) = numbered.get_mut(reason as usize) {
            *place = place.wrapping_add(*count);
        }
    }
    numbered
}

/// Totals of both ways as one record that yields them again.
pub(super) fn as_record(totals: &QueueTotals) -> QueueRecord {
    QueueRecord {
        ingress: WayRecord {
            frames: totals.rx_frames,
            bytes: totals.rx_bytes,
            kicks: totals.kicks,
            calls: totals.rx_calls,
            drops: totals.drops,
            ..WayRecord::default()
        },
        egress: WayRecord {
            frames: totals.tx_frames,
            bytes: totals.tx_bytes,
            segments_added: totals.segments_added,
            merged: totals.merged,
            calls: totals.tx_calls,
            ..WayRecord::default()
        },
        kernel: [0; DropReason::COUNT],
    }
}

#[cfg(test)]
mod tests {
    use port::{QueueCounters, QueueTotals};

    use super::{DropReason, QueueCount, as_record};

    #[test]
    fn counters_survive_as_text() {
        let counters = QueueCounters::default();
        counters.ingress.received(10, 1000);
        counters.ingress.dropped(DropReason::Runt, 1);
        counters.egress.sent(7, 700);
        counters.egress.lost(2, 130);
        counters.egress.segmented(2);
        counters.egress.merged(1);
        counters.egress.dropped(DropReason::NoBuffer, 3);
        counters.kernel.dropped(DropReason::KernelRingFull, 4);
        let record = counters.record();
        let text = serde_json::to_string(&QueueCount::of(&record)).unwrap();
        let read: QueueCount = serde_json::from_str(&text).unwrap();
        assert_eq!(read.record(), record);
    }

    #[test]
    fn reasons_of_another_program_balance_all_the_same() {
        let text = r#"{"ingress":{"frames":9,"drops":{"runt":2,"meteor":7}},"more":1}"#;
        let read: QueueCount = serde_json::from_str(text).unwrap();
        let record = read.record();
        assert_eq!(record.ingress.drops[DropReason::NoDestination as usize], 7);
        assert_eq!(record.ingress.drops.iter().sum::<u64>(), 9);
    }

    #[test]
    fn totals_yield_themselves() {
        let mut totals =
            QueueTotals { rx_frames: 5, tx_frames: 3, merged: 1, ..Default::default() };
        totals.drops[DropReason::NoBuffer as usize] = 1;
        let counters = QueueCounters::default();
        counters.carry(&as_record(&totals));
        let mut read = counters.read_ends();
        counters.read_rx(&mut read);
        assert_eq!(read, totals);
    }
}
