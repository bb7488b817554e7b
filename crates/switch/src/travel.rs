//! What is known of a port's guest travels with the guest, into the switch that it moves to.
//!
//! ```text
//!   switch of before: snapshot ──► PortSnapshot ──(the guest's migration)──► restore: this one
//! ```
//!
//! **Trust.** A snapshot that comes was in the hands of the guest's front end, which is hostile.
//! It may say no more than frames of the port could: stations are those that the port may have
//! (its VLANs, its `antispoof`), within its share of the forwarding database, and static entries
//! stay; flows are the port's own. What was counted elsewhere is shown beside what is counted here
//! and never added to it, so that every frame of this switch stays accounted for.

use std::sync::Arc;

use port::{FlowPlace, PortId, PortSnapshot, PortTotals, Restored, Station};

use crate::Switch;
use crate::fdb::{FdbEntry, Key};
use crate::steering::{TICK_SHIFT, ticks};
use crate::table::{Record, record, record_mut};

/// Nanoseconds in a millisecond.
const MS_NS: u64 = 1_000_000;

impl Switch {
    /// What is known of a port's guest. Its counters are exact if nobody serves its queues.
    pub(crate) fn port_snapshot(&self, id: PortId) -> PortSnapshot {
        let entries = self.shared.fdb.entries(self.shared.now_secs());
        let learned = entries.into_iter().filter(|entry| entry.port == id && !entry.fixed);
        let station = |entry: FdbEntry| {
            let FdbEntry { vlan, mac, age_secs, .. } = entry;
            Station { vlan, mac, age_secs }
        };
        let mut stations: Vec<Station> = learned.map(station).collect();
        // Who has less room takes the first ones.
        stations.sort_by_key(|station| (station.age_secs, station.vlan, station.mac));
        let now = ticks(self.shared.now_ns());
        self.shared.tables.read(|records| {
            let Some(record) = record(records, id) else { return PortSnapshot::default() };
            let flows = record.port.steering.get().map(|steering| steering.places(now));
            let flows = flows.into_iter().flatten().map(|(hash, pair, age)| FlowPlace {
                hash,
                pair,
                age_ms: ticks_to_ms(age),
            });
            PortSnapshot { stations, flows: flows.collect(), totals: totals(record) }
        })
    }

    /// Goes on with what another switch knew. See the module's text.
    pub(crate) fn restore_port(&self, id: PortId, snapshot: &PortSnapshot) -> Restored {
        let mut restored = Restored::default();
        let (found, _) = self.shared.tables.edit(|records| {
            let record = record_mut(records, id)?;
            record.elsewhere = snapshot.totals;
            Some((Arc::clone(&record.port), record.guard.clone()))
        });
        self.shared.wake_all();
        let Some((port, guard)) = found else { return restored };
        let now_secs = self.shared.now_secs();
        for station in &snapshot.stations {
            let own = guard.as_ref().is_none_or(|guard| guard.is_source(station.mac));
            let may = own && port.rule.is_member(station.vlan.get()) && !station.mac.is_group();
            let taken = may && self.learn_elsewhere(id, station, now_secs);
            let count = if taken { &mut restored.stations } else { &mut restored.refused };
            *count = count.saturating_add(1);
        }
        let pairs = port.counters.len();
        let now = ticks(self.shared.now_ns());
        for flow in snapshot.flows.iter().filter(|flow| usize::from(flow.pair) < pairs) {
            if pairs > 1 {
                let steering = port.steering.get_or_init(Arc::default);
                steering.restore(flow.hash, flow.pair, (now, ms_to_ticks(flow.age_ms)));
                restored.flows = restored.flows.saturating_add(1);
            }
        }
        restored
    }

    /// What was counted where the port's guest was before.
    pub fn elsewhere(&self, id: PortId) -> PortTotals {
        let find = |record: &Record| record.elsewhere;
        self.shared.tables.read(|records| record(records, id).map(find)).unwrap_or_default()
    }

    /// Takes over what another process knew to be counted where the port's guest was before.
    pub fn carry_elsewhere(&self, id: PortId, totals: PortTotals) {
        let _ = self.shared.tables.edit(|records| {
            if let Some(record) = record_mut(records, id) {
                record.elsewhere = totals;
            }
        });
        self.shared.wake_all();
    }

    /// Whether the station is behind the port now.
    fn learn_elsewhere(&self, port: PortId, station: &Station, now_secs: u32) -> bool {
        let Station { vlan, mac, age_secs } = *station;
        let entry = FdbEntry { vlan, mac, port, age_secs, fixed: false };
        let fdb = &self.shared.fdb;
        age_secs < fdb.age_secs()
            && fdb.restore(&entry, now_secs)
            && fdb.lookup(Key::new(vlan.get(), mac.to_u64())) == Some(port)
    }
}

fn totals(record: &Record) -> PortTotals {
    let mut sum = record.elsewhere;
    for counters in record.port.counters.iter().take(usize::from(record.pairs_seen)) {
        let mut pair = counters.read_ends();
        counters.read_rx(&mut pair);
        sum = sum.plus(PortTotals {
            rx_frames: pair.rx_frames,
            rx_bytes: pair.rx_bytes,
            tx_frames: pair.tx_frames,
            tx_bytes: pair.tx_bytes,
            drops: pair.dropped(),
        });
    }
    sum
}

fn ticks_to_ms(ticks: u32) -> u32 {
    let ns = u64::from(ticks) << TICK_SHIFT;
    u32::try_from(ns.div_euclid(MS_NS)).unwrap_or(u32::MAX)
}

fn ms_to_ticks(ms: u32) -> u32 {
    let ticks = u64::from(ms).saturating_mul(MS_NS) >> TICK_SHIFT;
    u32::try_from(ticks).unwrap_or(u32::MAX)
}
