//! The table of ports: an immutable snapshot that workers read, swapped whole when it changes.
//!
//! ```text
//!  control ── edit(ports) ──► new Arc<Table> ──► generation + 1 ──► wake every worker
//!  control ── renew ─────────────────────────► generation + 1
//!  worker  ── one load a turn: generation changed? ──► take the Arc, acknowledge the generation
//! ```
//!
//! A generation without a new table says only that a turn has ended in which a worker saw it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_utils::CachePadded;
use packet::{MacAddr, VlanId};
use port::capture::{EgressTap, Tap};
use port::{Egress, Frame, PortId, PortTotals, QueueCounters, StatusCell};

use crate::VlanRule;
use crate::fdb::Key;
use crate::guard::Guard;
use crate::receive_table::ReceiveTable;
use crate::steering::Steering;

/// One way out of the switch.
#[derive(Debug, Default)]
pub(crate) struct EgressSlot {
    /// None: nothing is attached.
    pub(crate) egress: Option<Box<dyn Egress>>,
    /// A fault ended it; it waits for its owner to take it back.
    pub(crate) broken: bool,
    /// The counters that the egress moves.
    pub(crate) counters: Option<Arc<QueueCounters>>,
    /// What `counters.egress.ended()` should be after all that was handed over.
    pub(crate) expected: u64,
    /// Whether a tap is around the egress.
    pub(crate) has_tap: bool,
}

impl EgressSlot {
    /// Puts this tap around the egress, and takes another off if there is one.
    pub(crate) fn tap(&mut self, tap: Option<EgressTap>) {
        let tapped = self.egress.take();
        let bare = if self.has_tap { tapped.map(EgressTap::unwrap) } else { tapped };
        self.has_tap = tap.is_some() && bare.is_some();
        self.egress = match (bare, tap) {
            (Some(bare), Some(tap)) => Some(tap.wrap(bare)),
            (bare, _) => bare,
        };
    }

    /// Begins with an egress, in which frames may wait already.
    pub(crate) fn put(&mut self, egress: Box<dyn Egress>, tap: Option<EgressTap>) {
        let counters = Arc::clone(egress.counters());
        let expected = counters.egress.ended().wrapping_add(egress.held());
        *self =
            Self { egress: Some(egress), counters: Some(counters), expected, ..Self::default() };
        self.tap(tap);
    }

    /// Takes the egress out, for who attached it.
    pub(crate) fn take(&mut self) -> Option<Box<dyn Egress>> {
        self.tap(None);
        std::mem::take(self).egress
    }
}

/// A port, as long as it exists.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) id: PortId,
    pub(crate) name: String,
    pub(crate) rule: VlanRule,
    pub(crate) status: StatusCell,
    pub(crate) counters: Box<[Arc<QueueCounters>]>,
    pub(crate) egress: Box<[CachePadded<ShortLock<EgressSlot>>]>,
    /// Where its flows are; made when it gets a second pair.
    pub(crate) steering: OnceLock<Arc<Steering>>,
    /// The workers that serve its pairs in turn; any if there are none.
    pub(crate) workers: Box<[usize]>,
    /// Whether the flows of each pair are spread over the workers.
    pub(crate) spread: bool,
    /// Whether other hosts are behind it.
    pub(crate) outward: bool,
    /// Stations that are fixed to it while it has queues.
    pub(crate) stations: Box<[(VlanId, MacAddr)]>,
}

/// A lock that is held for one burst. It is let go with a plain store, which waits for nothing: a
/// futex would wait until every store into the guest's memory is done. Who finds it taken lets
/// other threads run.
pub(crate) type ShortLock<T> = spin::mutex::SpinMutex<T, spin::Yield>;
type ShortGuard<'a, T> = spin::mutex::SpinMutexGuard<'a, T>;

impl Port {
    /// Whether these are the counters of one of its pairs.
    pub(crate) fn counts(&self, counters: &Arc<QueueCounters>) -> bool {
        self.counters.iter().any(|own| Arc::ptr_eq(own, counters))
    }

    /// Whether this station is fixed to it by its configuration.
    pub(crate) fn has_station(&self, key: Key) -> bool {
        self.stations.iter().any(|(vlan, mac)| Key::new(vlan.get(), mac.to_u64()) == key)
    }

    /// The worker that a pair is to be served by, if that is not left to us.
    pub(crate) fn home(&self, pair: u16) -> Option<usize> {
        let turn = usize::from(pair).checked_rem(self.workers.len())?;
        self.workers.get(turn).copied()
    }

    /// The way out at `pair`, locked.
    ///
    /// A panic while it was locked was caught and dealt with by who caused it.
    #[inline(always)]
    pub(crate) fn lock(&self, pair: u16) -> Option<ShortGuard<'_, EgressSlot>> {
        self.egress.get(usize::from(pair)).map(|slot| slot.lock())
    }
}

/// A port as workers see it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) port: Arc<Port>,
    /// Pairs that have an egress.
    pub(crate) pairs: Box<[u16]>,
    /// Where its flows are; none if there is no choice.
    pub(crate) steering: Option<Arc<Steering>>,
    /// The guest's own table, instead.
    hashed: Option<Arc<ReceiveTable>>,
    /// What the port may send; none if that is everything.
    pub(crate) guard: Option<Arc<Guard>>,
    /// A bug took the port out of service.
    pub(crate) quarantined: bool,
    /// Index of pair 0 among all egresses of the table.
    first_egress: usize,
}

impl Entry {
    /// Index of a pair's egress among all egresses of the table.
    #[inline(always)]
    pub(crate) fn egress(&self, pair: u16) -> usize {
        self.first_egress.wrapping_add(usize::from(pair))
    }

    /// The pair that a frame goes to: the one that the guest's own table says, or on which the
    /// guest last sent frames of its flow, if that has an egress; else the one of the flow's
    /// `hash`.
    #[inline]
    pub(crate) fn pair_of(&self, frame: &Frame, hash: u32) -> u16 {
        let asked = match (&self.steering, &self.hashed) {
            (Some(steering), _) => steering.pair_of(hash),
            (None, Some(table)) => Some(table.pair_of(frame.head())),
            (None, None) => None,
        };
        if let Some(pair) = asked
            && self.pairs.binary_search(&pair).is_ok()
        {
            return pair;
        }
        let index = u64::from(hash).wrapping_mul(self.pairs.len() as u64) >> 32;
        usize::try_from(index).ok().and_then(|index| self.pairs.get(index)).copied().unwrap_or(0)
    }
}

/// All ports at one moment.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) generation: u64,
    /// By port id.
    entries: Vec<Option<Entry>>,
    /// Ports that have an egress.
    up: Vec<PortId>,
    /// Whether no port has a VLAN rule: tags need not be looked at on the way out.
    pub(crate) plain: bool,
    /// Number of egresses, attached or not.
    pub(crate) egress_count: usize,
    /// Number of egresses that are attached.
    pub(crate) attached_count: usize,
}

impl Table {
    #[inline(always)]
    pub(crate) fn entry(&self, port: PortId) -> Option<&Entry> {
        self.entries.get(usize::from(port.0))?.as_ref()
    }

    /// Ports that have an egress.
    #[inline(always)]
    pub(crate) fn up(&self) -> impl Iterator<Item = &Entry> {
        self.up.iter().filter_map(|port| self.entry(*port))
    }
}

/// A port as control sees it.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) port: Arc<Port>,
    pub(crate) attached: BTreeSet<u16>,
    /// The pairs that ever were attached are below this.
    pub(crate) pairs_seen: u16,
    pub(crate) quarantined: bool,
    /// What it may send; none if that is everything.
    pub(crate) guard: Option<Arc<Guard>>,
    /// Captures that run.
    pub(crate) taps: Vec<Tap>,
    /// How the guest wants its frames spread over its pairs, if it said so.
    pub(crate) hashed: Option<Arc<ReceiveTable>>,
    /// What was counted where its guest was before.
    pub(crate) elsewhere: PortTotals,
}

/// Ports by id.
pub(crate) type Records = Vec<Option<Record>>;

/// The present table and what it is made from.
#[derive(Debug)]
pub(crate) struct Tables {
    generation: CachePadded<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    records: Records,
    table: Arc<Table>,
    /// That of the table, or a later one.
    generation: u64,
}

impl Default for Tables {
    fn default() -> Self {
        let generation = 1;
        let table = Arc::new(Table { generation, plain: true, ..Table::default() });
        Self {
            generation: CachePadded::new(AtomicU64::new(generation)),
            state: State { records: Vec::new(), table, generation }.into(),
        }
    }
}

impl Tables {
    /// The present generation.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release in `publish`.
        self.generation.load(Ordering::Acquire)
    }

    /// The present table and generation.
    pub(crate) fn current(&self) -> (Arc<Table>, u64) {
        let state = self.lock();
        (Arc::clone(&state.table), state.generation)
    }

    /// Looks at the records.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Records) -> T) -> T {
        look(&self.lock().records)
    }

    /// Changes the records and publishes the table that follows. Returns its generation; the
    /// caller wakes the workers.
    pub(crate) fn edit<T>(&self, change: impl FnOnce(&mut Records) -> T) -> (T, u64) {
        let mut state = self.lock();
        let result = change(&mut state.records);
        let generation = state.generation.wrapping_add(1);
        state.table = Arc::new(build(&state.records, generation));
        self.publish(&mut state, generation);
        (result, generation)
    }

    /// Begins a generation with the same table, and returns it.
    pub(crate) fn renew(&self) -> u64 {
        let mut state = self.lock();
        let generation = state.generation.wrapping_add(1);
        self.publish(&mut state, generation);
        generation
    }

    /// Last of all: whoever sees it takes the lock.
    fn publish(&self, state: &mut State, generation: u64) {
        state.generation = generation;
        // ORDERING: Release pairs with the Acquire in `generation`.
        self.generation.store(generation, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record of a port.
pub(crate) fn record(records: &Records, port: PortId) -> Option<&Record> {
    records.get(usize::from(port.0))?.as_ref()
}

/// The record of a port, to change.
pub(crate) fn record_mut(records: &mut Records, port: PortId) -> Option<&mut Record> {
    records.get_mut(usize::from(port.0))?.as_mut()
}

fn build(records: &Records, generation: u64) -> Table {
    let mut table = Table { generation, plain: true, ..Table::default() };
    for record in records {
        let entry = record.as_ref().map(|record| {
            let attached = record.attached.iter().copied();
            let pairs: Box<[u16]> =
                if record.quarantined { Box::default() } else { attached.collect() };
            let port = Arc::clone(&record.port);
            let first_egress = table.egress_count;
            table.egress_count = first_egress.saturating_add(port.egress.len());
            table.attached_count = table.attached_count.saturating_add(pairs.len());
            table.plain &= port.rule == VlanRule::Any;
            if !pairs.is_empty() {
                table.up.push(port.id);
            }
            let several = pairs.len() > 1;
            let hashed = record.hashed.clone().filter(|_| several);
            let steering = (several && hashed.is_none())
                .then(|| Arc::clone(port.steering.get_or_init(Arc::default)));
            let guard = record.guard.clone();
            Entry {
                port,
                pairs,
                steering,
                hashed,
                guard,
                quarantined: record.quarantined,
                first_egress,
            }
        });
        table.entries.push(entry);
    }
    table
}
