//! The switch as control and ports see it.

mod balance;

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use packet::MacAddr;
use port::capture::{EgressTap, IngressTap, Tap};
use port::{
    Egress, Fabric, Ingress, PortId, PortSnapshot, PortTotals, QueueCounters, QueueId, Restored,
    StatusCell,
};

use crate::event::{Events, Way, events};
use crate::guard::{Guard, PortLimits};
use crate::own::Own;
use crate::pipeline::resume_egress;
use crate::placement::Admin;
use crate::shared::{Arrival, Message, Shared};
use crate::stats::{add_totals, read_ends, read_rx};
use crate::table::{EgressSlot, Port, Record, Records, ShortLock, record, record_mut};
use crate::worker::{ByHand, Turn, WorkerHandle};
use crate::{
    FdbEntry, PortConfig, ReceiveTable, STATIC_MAX, SwitchConfig, SwitchStats, WorkerStats,
};

pub use balance::{Moved, Placement};

/// Ids in turn while less than half of them are taken.
const FEW_IDS: u16 = 4096;

/// The most queue pairs of a port.
pub const PAIRS_MAX: u16 = 256;

/// A learning switch and its workers. Dropping it ends them.
#[derive(Debug)]
pub struct Switch {
    pub(crate) shared: Arc<Shared>,
    events: Events,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) own: Mutex<Own>,
    /// Workers without threads.
    by_hand: Box<[Arc<ByHand>]>,
}

/// A new port, for its owner.
#[derive(Debug, Clone)]
pub struct PortHandle {
    /// Its id.
    pub id: PortId,
    /// Its state, which the owner sets.
    pub status: StatusCell,
    counters: Arc<Port>,
}

impl PortHandle {
    /// The counters of a pair: its ingress and egress must use them.
    pub fn counters(&self, pair: u16) -> Option<Arc<QueueCounters>> {
        self.counters.counters.get(usize::from(pair)).cloned()
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.counters.name
    }

    /// The most pairs that may be attached.
    pub fn pairs(&self) -> u16 {
        u16::try_from(self.counters.counters.len()).unwrap_or(PAIRS_MAX)
    }
}

/// Why a port could not be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Two ports cannot have one name.
    #[error("there is a port named {0} already")]
    Name(String),
    /// A port has one to 256 pairs.
    #[error("{0} queue pairs, 1 to {PAIRS_MAX} are possible")]
    Pairs(u16),
    /// Ids are 16 bits.
    #[error("there are 65535 ports already")]
    TooMany,
    /// The forwarding database has no room for a static entry.
    #[error("no room for the static entry of {0}: {STATIC_MAX} static entries are possible")]
    Station(MacAddr),
    /// There is no such worker.
    #[error("there is no worker {worker}: {count} share the queues")]
    Worker {
        /// The worker's index.
        worker: usize,
        /// Number of workers that serve the queues of all ports.
        count: usize,
    },
    /// There is nobody to spread over.
    #[error("flows cannot be spread over workers: each pair has one of its own")]
    Spread,
}

impl Switch {
    /// Starts the workers.
    ///
    /// # Errors
    ///
    /// If a thread, an epoll or an eventfd cannot be made, or a CPU does not exist.
    pub fn start(config: &SwitchConfig) -> std::io::Result<Self> {
        let (sender, events) = events()?;
        let seed = RandomState::new().hash_one(0u8);
        let shared = Arc::new(Shared::new(config, seed, sender));
        let admin = Admin::start(&shared, &config.workers)?;
        let own = Own::new(&shared);
        let by_hand = admin.workers.iter().filter_map(|worker| worker.by_hand.clone()).collect();
        Ok(Self { shared, events, admin: Mutex::new(admin), own: Mutex::new(own), by_hand })
    }

    /// Lets a worker of [`crate::Workers::Manual`], by number, take one turn on this thread: every
    /// queue that may have frames is served once. None if there is no such worker.
    ///
    /// Two threads may run two workers at once. Everything else may be called between turns, on
    /// the same thread, or meanwhile on another: it waits until the turn is over.
    #[inline]
    pub fn turn(&self, worker: usize) -> Option<Turn> {
        Some(self.by_hand.get(worker)?.turn())
    }

    /// What becomes readable when a turn of that worker is due, after one that was
    /// [`Turn::Quiet`].
    pub fn turn_fd(&self, worker: usize) -> Option<BorrowedFd<'_>> {
        Some(self.by_hand.get(worker)?.wake_fd())
    }

    /// Faults and panics, for the control thread.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Adds a port.
    ///
    /// # Errors
    ///
    /// [`PortError`] if the name is taken or a bound is passed.
    pub fn add_port(&self, config: &PortConfig) -> Result<PortHandle, PortError> {
        if config.pairs == 0 || config.pairs > PAIRS_MAX {
            return Err(PortError::Pairs(config.pairs));
        }
        let mut admin = self.admin();
        let count = admin.workers.len();
        if let Some(worker) = config.workers.iter().copied().find(|worker| *worker >= count) {
            return Err(PortError::Worker { worker, count });
        }
        if config.spread && count == 0 {
            return Err(PortError::Spread);
        }
        let (id, taken) = self.shared.tables.read(|records| {
            let taken = records.iter().flatten().any(|r| r.port.name == config.name);
            (free_id(records, admin.next_id), taken)
        });
        if taken {
            return Err(PortError::Name(config.name.clone()));
        }
        let id = id.ok_or(PortError::TooMany)?;
        let port = Arc::new(new_port(PortId(id), config));
        for (vlan, mac) in &config.stations {
            if !self.shared.fdb.add_static(*vlan, *mac, port.id) {
                let _ = self.shared.fdb.forget(port.id);
                return Err(PortError::Station(*mac));
            }
        }
        let new = Record {
            port: Arc::clone(&port),
            attached: BTreeSet::new(),
            pairs_seen: 0,
            quarantined: false,
            guard: Guard::new(&config.limits).map(Arc::new),
            taps: Vec::new(),
            hashed: None,
            elsewhere: PortTotals::default(),
        };
        let _ = self.shared.tables.edit(|records| {
            let index = usize::from(id);
            if records.len() <= index {
                records.resize_with(index.saturating_add(1), || None);
            }
            if let Some(place) = records.get_mut(index) {
                *place = Some(new);
            }
        });
        admin.next_id = id.wrapping_add(1);
        self.shared.wake_all();
        drop(admin);
        Ok(PortHandle { id: PortId(id), status: port.status.clone(), counters: port })
    }

    /// Removes a port. When this returns, no worker knows it. Halves that its owner has left
    /// attached are dropped. Returns whether there was such a port.
    pub fn remove_port(&self, id: PortId) -> bool {
        let pairs =
            self.shared.tables.read(|records| record(records, id).map(|record| record.pairs_seen));
        let Some(pairs) = pairs else { return false };
        for pair in 0..pairs {
            let at = QueueId { port: id, pair };
            drop(self.detach_ingress(at));
            drop(self.detach_egress(at));
        }
        let mut admin = self.admin();
        // The record stays, without egresses, until all workers let go: its counters still count.
        let (_, generation) = self.shared.tables.edit(|records| {
            if let Some(record) = record_mut(records, id) {
                record.attached.clear();
            }
        });
        self.wait_for_table(&admin, generation);
        let (gone, generation) = self
            .shared
            .tables
            .edit(|records| records.get_mut(usize::from(id.0)).and_then(Option::take));
        self.wait_for_table(&admin, generation);
        // What it has in the place of others is theirs again, and nobody's in no moment.
        self.shared.tables.read(|records| {
            records.iter().flatten().for_each(|record| self.shared.take_back(&record.port, id));
        });
        let _ = self.shared.fdb.forget(id);
        if let Some(gone) = gone {
            // Other hosts may have them meanwhile.
            let stations = gone.port.stations.iter();
            stations.for_each(|(vlan, mac)| self.shared.fdb.remove_static(*vlan, *mac));
            for tap in &gone.taps {
                tap.end(&format!("port {} was removed", gone.port.name));
            }
            for counters in &gone.port.counters {
                let mut totals = counters.read_ends();
                counters.read_rx(&mut totals);
                add_totals(&mut admin.removed_ports, &totals);
            }
        }
        true
    }

    /// Ends a port's quarantine. Its halves that did not panic are served again; its owner
    /// attaches those that did anew.
    pub fn reset_port(&self, id: PortId) -> bool {
        let (status, _) = self.shared.tables.edit(|records| {
            let record = record_mut(records, id)?;
            record.quarantined = false;
            Some(record.port.status.clone())
        });
        self.shared.wake_all();
        status.inspect(|status| status.reset("after a reset")).is_some()
    }

    /// Says how a guest wants its frames spread over its pairs (`VIRTIO_NET_F_RSS`), or that it
    /// does not say any more. Frames for a pair that is not attached go by the flow's hash. Returns
    /// whether there is such a port.
    pub fn set_receive_table(&self, port: PortId, table: Option<ReceiveTable>) -> bool {
        let (known, _) = self.shared.tables.edit(|records| {
            let record = record_mut(records, port)?;
            record.hashed = table.map(Arc::new);
            Some(())
        });
        self.shared.wake_all();
        known.is_some()
    }

    /// Changes what a port may send, from now on. Returns whether there is such a port.
    pub fn set_limits(&self, id: PortId, limits: &PortLimits) -> bool {
        let guard = Guard::new(limits).map(Arc::new);
        let (found, _) = self
            .shared
            .tables
            .edit(|records| record_mut(records, id).map(|record| record.guard = guard).is_some());
        self.shared.wake_all();
        found
    }

    /// Begins a capture on all pairs of a port, those that come later too. When this returns,
    /// every frame is seen. Returns whether there is such a port.
    pub fn add_tap(&self, port: PortId, tap: &Tap) -> bool {
        self.change_taps(port, |taps| taps.push(tap.clone()))
    }

    /// Ends a capture. When this returns, nothing more comes. Returns whether there is such a port.
    pub fn remove_tap(&self, port: PortId, tap: &Tap) -> bool {
        self.change_taps(port, |taps| taps.retain(|one| !one.is(tap)))
    }

    /// Changes the captures of a port, and then the taps around its halves.
    fn change_taps(&self, port: PortId, change: impl FnOnce(&mut Vec<Tap>)) -> bool {
        let admin = self.admin();
        let (changed, _) = self.shared.tables.edit(|records| {
            let record = record_mut(records, port)?;
            change(&mut record.taps);
            for pair in 0..record.pairs_seen {
                let slot = record.port.lock(pair);
                if let Some(mut slot) = slot.filter(|slot| slot.egress.is_some()) {
                    slot.tap(EgressTap::new(&record.taps, pair));
                }
            }
            Some((record.taps.clone(), record.pairs_seen))
        });
        let Some((taps, pairs)) = changed else { return false };
        for pair in 0..pairs {
            let at = QueueId { port, pair };
            let Some(worker) = admin.worker_of(at) else { continue };
            let (reply, answer) = std::sync::mpsc::sync_channel(1);
            let tap = IngressTap::new(&taps, pair);
            if worker.mailbox.send(Message::Tap(at, tap, reply)).is_ok() {
                worker.see_to_mail();
                let _ = answer.recv();
            }
        }
        true
    }

    /// The port of a name.
    pub fn port(&self, name: &str) -> Option<PortHandle> {
        self.shared.tables.read(|records| {
            let record = records.iter().flatten().find(|record| record.port.name == name)?;
            let counters = Arc::clone(&record.port);
            Some(PortHandle { id: counters.id, status: counters.status.clone(), counters })
        })
    }

    /// Entries of the forwarding database, by VLAN and address.
    pub fn fdb(&self) -> Vec<FdbEntry> {
        let mut entries = self.shared.fdb.entries(self.shared.now_secs());
        entries.sort_by_key(|entry| (entry.vlan, entry.mac));
        entries
    }

    /// What becomes readable when the forwarding database changed, once after each
    /// [`Self::watch_fdb`].
    ///
    /// # Errors
    ///
    /// There is no fd left.
    pub fn fdb_changes(&self) -> std::io::Result<BorrowedFd<'_>> {
        self.shared.fdb.changes()
    }

    /// Waits for the next change of the forwarding database; look at [`Self::fdb`] after this.
    pub fn watch_fdb(&self) {
        self.shared.fdb.watch();
    }

    /// Forgets learned stations, of one port or all. Returns how many.
    pub fn fdb_flush(&self, port: Option<PortId>) -> usize {
        self.shared.fdb.flush(port)
    }

    /// Forgets stations that were silent for too long; to be called every few seconds.
    pub fn age(&self) -> usize {
        self.shared.tables.read(|records| {
            for record in records.iter().flatten() {
                let has_queues = !record.attached.is_empty() && !record.quarantined;
                self.shared.fix_stations(&record.port, has_queues);
            }
        });
        self.shared.fdb.age(self.shared.now_secs())
    }

    /// All counters.
    pub fn stats(&self) -> SwitchStats {
        let admin = self.admin();
        let mut ports = self.shared.tables.read(read_ends);
        balance::add_lanes(&admin, &mut ports);
        let own = self.own();
        let own_ends = own.counters.read_ends();
        let mut own_totals = own_ends;
        own.counters.read_rx(&mut own_totals);
        let own_copies = own.flood_copies.get();
        drop(own);
        let up_ns = self.shared.now_ns();
        let mut flood_copies = admin.ended_copies.wrapping_add(own_copies);
        let mut workers = Vec::new();
        for worker in admin.all_workers() {
            let copies = worker.mailbox.counters.flood_copies.get();
            flood_copies = flood_copies.wrapping_add(copies);
            workers.push(WorkerStats::read(&worker.mailbox, up_ns));
        }
        workers.sort_unstable_by_key(|worker| worker.number);
        let originated = own_totals.rx_frames.wrapping_sub(own_ends.dropped());
        self.shared.tables.read(|records| read_rx(records, &mut ports));
        let (fdb_entries, fdb_refused) = self.shared.fdb.usage();
        let mut sum = admin.removed_ports;
        for totals in ports.iter().flat_map(|port| &port.queues) {
            add_totals(&mut sum, totals);
        }
        let began = sum.rx_frames.wrapping_add(flood_copies).wrapping_add(originated);
        let began = began.wrapping_add(sum.segments_added);
        let ended = sum.tx_frames.wrapping_add(sum.dropped()).wrapping_add(sum.merged);
        SwitchStats {
            ports,
            removed_ports: admin.removed_ports,
            flood_copies,
            originated,
            segments_added: sum.segments_added,
            merged: sum.merged,
            held: began.saturating_sub(ended),
            fdb_entries,
            fdb_refused,
            up_ns,
            workers,
        }
    }

    fn admin(&self) -> MutexGuard<'_, Admin> {
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of a pair, if the port exists.
    fn port_of(&self, at: QueueId) -> Option<Arc<Port>> {
        self.shared.tables.read(|records| record(records, at.port).map(|r| Arc::clone(&r.port)))
    }
}

/// The first free id from `next` on, so that an id comes back late: events name ports by id, and
/// one may still be under way when its port is removed.
///
/// As long as few ports live ids stay small, because tables have a place for every id.
fn free_id(records: &Records, next: u16) -> Option<u16> {
    let live = records.iter().flatten().count();
    let bound = if live < usize::from(FEW_IDS / 2) { FEW_IDS } else { u16::MAX };
    let from = next.min(bound);
    (from..bound).chain(0..from).find(|id| record(records, PortId(*id)).is_none())
}

fn new_port(id: PortId, config: &PortConfig) -> Port {
    let slot = || CachePadded::new(ShortLock::new(EgressSlot::default()));
    Port {
        id,
        name: config.name.clone(),
        rule: config.vlan.clone(),
        status: StatusCell::waiting("for its queues"),
        counters: (0..config.pairs).map(|_| Arc::default()).collect(),
        egress: (0..config.pairs).map(|_| slot()).collect(),
        steering: OnceLock::new(),
        workers: config.workers.as_slice().into(),
        spread: config.spread,
        outward: config.outward,
        stations: config.stations.as_slice().into(),
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.admin.get_mut().unwrap_or_else(PoisonError::into_inner).stop(&self.shared);
        // Handles may outlive the switch, the guests' memory must not.
        self.shared.tables.read(|records| {
            for record in records.iter().flatten() {
                for tap in &record.taps {
                    tap.end("the switch stopped");
                }
                for pair in 0..record.pairs_seen {
                    drop(record.port.lock(pair).map(|mut slot| slot.egress.take()));
                }
            }
        });
    }
}

impl Fabric for Switch {
    fn attach_ingress(&self, at: QueueId, ingress: Box<dyn Ingress>) {
        drop(self.detach_ingress(at));
        let mut admin = self.admin();
        let (tap, _) = self.note_pair(at, |record| IngressTap::new(&record.taps, at.pair));
        let (home, spread) = self.wishes(at);
        let arrival = Arrival { ingress, tap, spread: None };
        if let Err(error) = admin.place(&self.shared, at, arrival, (home, spread)) {
            tracing::error!(port = at.port.0, pair = at.pair, %error, "cannot serve a queue");
            if let Some(port) = self.port_of(at) {
                port.status.error(format!("cannot serve pair {}: {error}", at.pair));
            }
        }
    }

    fn detach_ingress(&self, at: QueueId) -> Option<Box<dyn Ingress>> {
        self.take_ingress(&mut self.admin(), at)
    }

    fn quiesce(&self) {
        let admin = self.admin();
        let generation = self.shared.tables.renew();
        admin.workers.iter().for_each(WorkerHandle::see_to_mail);
        self.shared.wait_for_turns(generation);
    }

    fn busy(&self) -> Duration {
        self.shared.busy()
    }

    fn attach_egress(&self, at: QueueId, egress: Box<dyn Egress>) {
        let (old, generation) = self.note_pair(at, |record| {
            let mut slot = record.port.lock(at.pair)?;
            let old = slot.take();
            slot.put(egress, EgressTap::new(&record.taps, at.pair));
            drop(slot);
            let _ = record.attached.insert(at.pair);
            Some((old, Arc::clone(&record.port)))
        });
        if let Some((old, port)) = old {
            drop(old);
            if !port.stations.is_empty() {
                // A worker that does not know of its queues yet may lend them once more.
                self.wait_for_table(&self.admin(), generation);
                self.shared.fix_stations(&port, true);
            }
        }
    }

    fn exchange_egress(
        &self,
        at: QueueId,
        change: &mut dyn FnMut(Box<dyn Egress>) -> Box<dyn Egress>,
    ) -> bool {
        self.shared.tables.read(|records| {
            let Some(record) = record(records, at.port) else { return false };
            let Some(mut slot) = record.port.lock(at.pair) else { return false };
            let Some(old) = slot.take() else { return false };
            slot.put(change(old), EgressTap::new(&record.taps, at.pair));
            true
        })
    }

    fn detach_egress(&self, at: QueueId) -> Option<Box<dyn Egress>> {
        let (egress, _) = self.shared.tables.edit(|records| {
            let record = record_mut(records, at.port)?;
            let _ = record.attached.remove(&at.pair);
            let mut slot = record.port.lock(at.pair)?;
            slot.take()
        });
        self.shared.wake_all();
        egress
    }

    fn resume_egress(&self, at: QueueId) {
        if let Some(Err(failure)) = self.port_of(at).map(|port| resume_egress(&port, at)) {
            self.shared.report(failure.at, Way::Egress, failure.what);
        }
    }

    fn originate(&self, from: PortId, frame: &[u8]) {
        let mut own = self.own();
        own.originate(&self.shared, from, frame);
    }

    fn snapshot(&self, port: PortId) -> PortSnapshot {
        self.port_snapshot(port)
    }

    fn restore(&self, port: PortId, snapshot: &PortSnapshot) -> Restored {
        self.restore_port(port, snapshot)
    }
}

impl Switch {
    /// Waits until every worker uses the table of `generation` or a later one.
    fn wait_for_table(&self, admin: &Admin, generation: u64) {
        admin.workers.iter().for_each(WorkerHandle::see_to_mail);
        self.shared.wait_for_table(generation);
    }

    /// Changes the record of a pair's port, notes that the pair was attached, and publishes: what
    /// `change` returned, and the table's generation.
    fn note_pair<T>(
        &self,
        at: QueueId,
        change: impl FnOnce(&mut Record) -> Option<T>,
    ) -> (Option<T>, u64) {
        let noted = self.shared.tables.edit(|records| {
            let record = record_mut(records, at.port)?;
            record.pairs_seen = record.pairs_seen.max(at.pair.saturating_add(1));
            change(record)
        });
        self.shared.wake_all();
        noted
    }
}

#[cfg(test)]
mod tests;
