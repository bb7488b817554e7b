//! What a switch takes over from another process, whose ports it goes on with.

use std::sync::PoisonError;

use port::{PortId, PortStatus, QueueCounters, QueueRecord, QueueTotals};

use crate::fdb::Key;
use crate::guard::PortDebt;
use crate::stats::add_totals;
use crate::table::{record, record_mut};
use crate::{FdbEntry, Switch};

/// What a switch had counted that belongs to no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SwitchRecord {
    /// Copies beyond the first of flooded frames.
    pub flood_copies: u64,
    /// Frames of its own that found a destination.
    pub originated: u64,
    /// Addresses that the forwarding database refused for want of room.
    pub fdb_refused: u64,
    /// What ports that were gone had counted.
    pub removed_ports: QueueTotals,
}

impl Switch {
    /// What was counted that belongs to no port; exact when nobody serves a queue.
    pub fn record(&self) -> SwitchRecord {
        let stats = self.stats();
        SwitchRecord {
            flood_copies: stats.flood_copies,
            originated: stats.originated,
            fdb_refused: stats.fdb_refused,
            removed_ports: stats.removed_ports,
        }
    }

    /// Adds what another switch had counted that belongs to no port.
    pub fn carry(&self, record: &SwitchRecord) {
        let mut admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner);
        admin.ended_copies = admin.ended_copies.wrapping_add(record.flood_copies);
        add_totals(&mut admin.removed_ports, &record.removed_ports);
        drop(admin);
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.counters.ingress.received(record.originated, 0);
        drop(own);
        self.shared.fdb.add_refused(record.fdb_refused);
    }

    /// What the pairs of a port that ever were attached have counted; exact when nobody serves
    /// them.
    pub fn record_port(&self, id: PortId) -> Vec<QueueRecord> {
        self.shared.tables.read(|records| {
            let Some(record) = record(records, id) else { return Vec::new() };
            let seen = record.port.counters.iter().take(usize::from(record.pairs_seen));
            seen.map(|counters| counters.record()).collect()
        })
    }

    /// Adds what the pairs of a port had counted elsewhere, before any of them is attached.
    pub fn carry_port(&self, id: PortId, pairs: &[QueueRecord]) {
        let _ = self.shared.tables.edit(|records| {
            let Some(record) = record_mut(records, id) else { return };
            for (counters, pair) in record.port.counters.iter().zip(pairs) {
                counters.carry(pair);
            }
            let seen = pairs.len().min(record.port.counters.len());
            record.pairs_seen = record.pairs_seen.max(u16::try_from(seen).unwrap_or(0));
        });
        self.shared.wake_all();
    }

    /// How much of its limits a port has used up; exact when nobody serves its queues.
    pub fn port_debt(&self, id: PortId) -> PortDebt {
        let now_ns = self.shared.now_ns();
        self.shared.tables.read(|records| {
            let guard = record(records, id).and_then(|record| record.guard.as_ref());
            guard.map(|guard| guard.debt(now_ns)).unwrap_or_default()
        })
    }

    /// Goes on with what a port has used up of its limits elsewhere.
    pub fn carry_debt(&self, id: PortId, debt: &PortDebt) {
        let now_ns = self.shared.now_ns();
        self.shared.tables.read(|records| {
            let guard = record(records, id).and_then(|record| record.guard.as_ref());
            guard.into_iter().for_each(|guard| guard.owe(now_ns, debt));
        });
    }

    /// Adds what a queue had counted of a port that does not exist here.
    pub fn carry_removed(&self, record: &QueueRecord) {
        let counters = QueueCounters::default();
        counters.carry(record);
        let mut totals = counters.read_ends();
        counters.read_rx(&mut totals);
        let mut admin = self.admin.lock().unwrap_or_else(PoisonError::into_inner);
        add_totals(&mut admin.removed_ports, &totals);
    }

    /// Notes stations that another switch had learned. Of static ones that matters which other
    /// hosts have meanwhile ([`crate::PortConfig::outward`]). Returns how many found no room.
    pub fn restore_fdb(&self, entries: impl IntoIterator<Item = FdbEntry>) -> usize {
        let (now, fdb) = (self.shared.now_secs(), &self.shared.fdb);
        let lend = |entry: &FdbEntry| {
            let key = Key::new(entry.vlan.get(), entry.mac.to_u64());
            let outward = self.shared.tables.read(|records| {
                let port = record(records, entry.port).map(|record| &record.port);
                port.is_some_and(|port| port.outward && !port.has_station(key))
            });
            if let (true, Some(home)) = (outward, fdb.lookup(key)) {
                let _ = fdb.lend(key, home, entry.port);
            }
        };
        let (fixed, learned): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.fixed);
        fixed.iter().for_each(lend);
        learned.iter().filter(|entry| !fdb.restore(entry, now)).count()
    }

    /// Ends all captures.
    pub fn end_captures(&self, reason: &str) {
        self.shared.tables.read(|records| {
            records
                .iter()
                .flatten()
                .flat_map(|record| &record.taps)
                .for_each(|tap| tap.end(reason));
        });
    }

    /// Takes a port out of service as a bug would: until [`Self::reset_port`].
    pub fn quarantine(&self, id: PortId, status: PortStatus) {
        let _ = self.shared.tables.edit(|records| {
            if let Some(record) = record_mut(records, id) {
                record.port.status.restore(status);
                record.quarantined = true;
            }
        });
        self.shared.wake_all();
    }
}
