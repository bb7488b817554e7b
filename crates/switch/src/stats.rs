//! Statistics: plain numbers, read without stopping anybody.

use port::{CallTotals, PortId, PortStatus, PortTotals, QueueTotals};

use crate::shared::{BATCH_SIZES, Mailbox};
use crate::table::Records;

/// All counters of a switch at one moment.
#[derive(Debug, Clone)]
pub struct SwitchStats {
    /// Ports, by id.
    pub ports: Vec<PortStats>,
    /// What ports that are gone had counted.
    pub removed_ports: QueueTotals,
    /// Copies beyond the first of flooded frames.
    pub flood_copies: u64,
    /// Frames of our own that found a destination.
    pub originated: u64,
    /// Segments beyond the first that frames were cut into, at whichever port.
    pub segments_added: u64,
    /// Frames that left as parts of others.
    pub merged: u64,
    /// Frames on their way:
    /// `rx + flood_copies + segments_added + originated - tx - drops - merged`.
    pub held: u64,
    /// Entries of the forwarding database.
    pub fdb_entries: u32,
    /// Addresses that it refused for want of room.
    pub fdb_refused: u64,
    /// Nanoseconds since the switch began.
    pub up_ns: u64,
    /// Threads, by number.
    pub workers: Vec<WorkerStats>,
}

/// Counters of a port.
#[derive(Debug, Clone)]
pub struct PortStats {
    /// Its id.
    pub id: PortId,
    /// Its name.
    pub name: String,
    /// Its state.
    pub status: PortStatus,
    /// Queue pairs, from pair 0 to the highest one that was ever attached.
    pub queues: Vec<QueueTotals>,
    /// What was counted where the port's guest was before: see [`Switch::restore`].
    ///
    /// [`Switch::restore`]: port::Fabric::restore
    pub elsewhere: PortTotals,
}

/// Counters of a worker.
#[derive(Debug, Clone, Copy)]
pub struct WorkerStats {
    /// Its number: not given to another one while the switch lives.
    pub number: usize,
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Frames that it took from ingresses.
    pub frames: u64,
    /// Bursts that they came in.
    pub bursts: u64,
    /// The bursts by size: 1, 2, 3 to 4, 5 to 8 frames, and so on.
    pub batches: [u64; BATCH_SIZES],
    /// Times that it slept.
    pub sleeps: u64,
    /// Queues that were woken by a kick.
    pub kicks: u64,
    /// Its calls, to whichever port.
    pub calls: CallTotals,
    /// Nanoseconds spent in turns that had work.
    pub busy_ns: u64,
    /// Nanoseconds since the switch began.
    pub up_ns: u64,
}

impl WorkerStats {
    /// Part of the time that had work, 0 to 1, since the switch began.
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn busy_ratio(&self) -> f64 {
        (self.busy_ns as f64 / self.up_ns.max(1) as f64).min(1.0)
    }

    pub(crate) fn read(mailbox: &Mailbox, up_ns: u64) -> Self {
        let counters = &mailbox.counters;
        let batches = counters.batches.each_ref().map(port::Counter::get);
        Self {
            number: mailbox.number,
            cpu: mailbox.cpu,
            frames: counters.frames.get(),
            bursts: batches.iter().fold(0, |sum, bursts| sum.wrapping_add(*bursts)),
            batches,
            sleeps: counters.sleeps.get(),
            kicks: counters.kicks.get(),
            calls: counters.calls.read(),
            busy_ns: counters.busy_ns.get(),
            up_ns,
        }
    }
}

/// Adds `more` to `sum`.
pub(crate) fn add_totals(sum: &mut QueueTotals, more: &QueueTotals) {
    let pairs = [
        (&mut sum.rx_frames, more.rx_frames),
        (&mut sum.rx_bytes, more.rx_bytes),
        (&mut sum.tx_frames, more.tx_frames),
        (&mut sum.tx_bytes, more.tx_bytes),
        (&mut sum.segments_added, more.segments_added),
        (&mut sum.merged, more.merged),
        (&mut sum.kicks, more.kicks),
        (&mut sum.rests, more.rests),
        (&mut sum.rx_calls.sent, more.rx_calls.sent),
        (&mut sum.rx_calls.suppressed, more.rx_calls.suppressed),
        (&mut sum.tx_calls.sent, more.tx_calls.sent),
        (&mut sum.tx_calls.suppressed, more.tx_calls.suppressed),
    ];
    for (to, from) in pairs {
        *to = to.wrapping_add(from);
    }
    for (to, from) in sum.drops.iter_mut().zip(more.drops) {
        *to = to.wrapping_add(from);
    }
}

/// Reads how frames ended, of all ports: the first half.
pub(crate) fn read_ends(records: &Records) -> Vec<PortStats> {
    let port = |record: &crate::table::Record| PortStats {
        id: record.port.id,
        name: record.port.name.clone(),
        status: record.port.status.read(),
        elsewhere: record.elsewhere,
        queues: {
            let used = usize::from(record.pairs_seen);
            record.port.counters.iter().take(used).map(|counters| counters.read_ends()).collect()
        },
    };
    records.iter().flatten().map(port).collect()
}

/// Reads how frames began: the second half, after the ends of all.
pub(crate) fn read_rx(records: &Records, ports: &mut [PortStats]) {
    for (record, port) in records.iter().flatten().zip(ports) {
        for (counters, totals) in record.port.counters.iter().zip(&mut port.queues) {
            counters.read_rx(totals);
        }
    }
}
