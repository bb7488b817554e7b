//! Addresses behind a vIOMMU: what the front end told of them, and what it is asked for.
//!
//! ```text
//!   ring (worker)                      Iotlb                         session (control thread)
//!   pop: generation changed? ◄── snapshot: two GuestMaps ◄── insert (UPDATE), remove (INVALIDATE)
//!        address unknown ─────── misses, wake ─────────────► take_misses ──► MISS to the front end
//! ```
//!
//! Snapshots are immutable: a ring takes the newest at the start of a burst and uses it to its end.
//! So who removes an entry must wait until every worker has ended its turn before it says so.
//! A chain with an unknown address is left in the ring, not a fault: it comes again when the front
//! end has answered. The addresses of the next chains are asked for along with it.
//!
//! **Limits.** [`ENTRIES_MAX`] entries, the oldest leave first; [`ASKED_MAX`] questions at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ChainError;
use crate::mem::{GuestMap, GuestPhysAddr};

/// The most entries.
pub const ENTRIES_MAX: usize = 4096;
/// The most addresses that are asked for and not answered.
pub const ASKED_MAX: usize = 1024;
/// Chains whose addresses are asked for before their turn comes.
pub(crate) const LOOK_AHEAD: u16 = 64;
/// Pages of one buffer that are asked for ahead.
const PAGES_MAX: u32 = 17;
/// What a question is about: front ends answer with the page around it.
const PAGE: u64 = 4096;

/// An address that the device uses behind a vIOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(pub u64);

/// What a device may do at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read only.
    Read,
    /// Write only.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// Whether this allows what `wanted` needs.
    pub fn allows(self, wanted: Self) -> bool {
        self == Self::ReadWrite || self == wanted
    }
}

/// A range that the front end has translated: it is in one region of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IotlbEntry {
    /// Where the device sees it.
    pub iova: Iova,
    /// Where it is in the guest's memory.
    pub addr: GuestPhysAddr,
    /// Bytes.
    pub len: u64,
    /// What is allowed there.
    pub access: Access,
}

/// An address that a ring does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct IotlbMiss {
    /// The address.
    pub iova: Iova,
    /// What the ring wants to do there.
    pub access: Access,
}

/// What rings use for a burst.
#[derive(Debug, Clone)]
struct Snapshot {
    readable: GuestMap,
    writable: GuestMap,
}

struct State {
    memory: GuestMap,
    /// By address, without overlap.
    entries: BTreeMap<u64, IotlbEntry>,
    /// In the order in which they came; addresses of entries that are gone are skipped.
    order: VecDeque<u64>,
    snapshot: Snapshot,
    asked: BTreeSet<IotlbMiss>,
    misses: Vec<IotlbMiss>,
}

/// The translations of one device.
pub struct Iotlb {
    /// Raised by each change.
    generation: AtomicU64,
    state: Mutex<State>,
    /// Called, on a worker, when there is something to ask for.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Iotlb {
    /// Knows nothing yet; `wake` is called when [`Self::take_misses`] has something, perhaps on a
    /// worker: it must not wait.
    pub fn new(memory: &GuestMap, wake: Box<dyn Fn() + Send + Sync>) -> Self {
        let nothing = memory.view(&[]);
        let snapshot = Snapshot { readable: nothing.clone(), writable: nothing };
        let state = State {
            memory: memory.clone(),
            entries: BTreeMap::new(),
            order: VecDeque::new(),
            snapshot,
            asked: BTreeSet::new(),
            misses: Vec::new(),
        };
        Self { generation: AtomicU64::new(1), state: Mutex::new(state), wake }
    }

    /// Adds translations; what they overlap is forgotten. Returns whether somebody waited for them.
    pub fn insert(&self, entries: &[IotlbEntry]) -> bool {
        let mut state = self.state();
        let mut waited = false;
        for entry in entries.iter().filter(|entry| entry.len > 0) {
            state.forget(entry.iova.0, entry.len);
            let _ = state.entries.insert(entry.iova.0, *entry);
            state.order.push_back(entry.iova.0);
            let before = state.asked.len();
            state.asked.retain(|miss| !covers(entry, miss));
            waited |= state.asked.len() != before;
        }
        while state.entries.len() > ENTRIES_MAX {
            let Some(oldest) = state.order.pop_front() else { break };
            let _ = state.entries.remove(&oldest);
        }
        self.publish(state);
        waited
    }

    /// Forgets what overlaps `[iova, iova + len)`. Rings use it until they have ended their turn.
    /// Returns whether somebody waited for an answer about it: it has to be asked for again, since
    /// it may be somewhere else now.
    pub fn remove(&self, iova: Iova, len: u64) -> bool {
        let mut state = self.state();
        state.forget(iova.0, len);
        let gone = IotlbEntry { iova, addr: GuestPhysAddr(0), len, access: Access::ReadWrite };
        let before = state.asked.len();
        state.asked.retain(|miss| !covers(&gone, miss));
        let waited = state.asked.len() != before;
        state.misses.retain(|miss| !covers(&gone, miss));
        self.publish(state);
        waited
    }

    /// Uses another memory table: translations into what is not there any more mean nothing.
    pub fn set_memory(&self, memory: &GuestMap) {
        let mut state = self.state();
        state.memory = memory.clone();
        self.publish(state);
    }

    fn publish(&self, mut state: MutexGuard<'_, State>) {
        state.snapshot = state.take_snapshot();
        // ORDERING: Release pairs with the Acquire in `RingIotlb::refresh`; the lock does the rest.
        let _ = self.generation.fetch_add(1, Ordering::Release);
    }

    /// The first address of `[iova, iova + len)` that is not known with this access.
    pub fn first_missing(&self, iova: Iova, len: u64, access: Access) -> Option<Iova> {
        let state = self.state();
        state.snapshot.of(access).first_unmapped(GuestPhysAddr(iova.0), len).map(|at| Iova(at.0))
    }

    fn map(&self, access: Access) -> GuestMap {
        self.state().snapshot.of(access).clone()
    }

    /// Everything that is known, whatever is allowed there: what a ring is set up in.
    pub fn whole_map(&self) -> GuestMap {
        let state = self.state();
        let pieces: Vec<_> = state.entries.values().map(|e| (e.iova.0, e.addr.0, e.len)).collect();
        state.memory.view(&pieces)
    }

    /// Where in the guest's memory an address is.
    pub fn translate(&self, iova: Iova) -> Option<GuestPhysAddr> {
        let state = self.state();
        let (_, entry) = state.entries.range(..=iova.0).next_back()?;
        let offset = iova.0.checked_sub(entry.iova.0).filter(|offset| *offset < entry.len)?;
        Some(GuestPhysAddr(entry.addr.0.wrapping_add(offset)))
    }

    /// Asks for an address, unless that was done already.
    pub fn ask(&self, iova: Iova, access: Access) {
        let miss = IotlbMiss { iova: Iova(iova.0 & !(PAGE - 1)), access };
        let mut state = self.state();
        if state.asked.len() < ASKED_MAX && state.asked.insert(miss) {
            state.misses.push(miss);
            drop(state);
            (self.wake)();
        }
    }

    /// What is to be asked for since this was called last.
    pub fn take_misses(&self) -> Vec<IotlbMiss> {
        std::mem::take(&mut self.state().misses)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.state().entries.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshot {
    fn of(&self, access: Access) -> &GuestMap {
        if access == Access::Read { &self.readable } else { &self.writable }
    }
}

impl State {
    /// Removes entries that overlap `[iova, iova + len)`, whole: their rest is asked for again.
    fn forget(&mut self, iova: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let end = iova.saturating_add(last);
        let before = self.entries.range(..=iova).next_back();
        let first = before.filter(|(_, e)| end_of(e) >= iova).map_or(iova, |(start, _)| *start);
        let gone: Vec<u64> = self.entries.range(first..=end).map(|(start, _)| *start).collect();
        for start in &gone {
            let _ = self.entries.remove(start);
        }
        if !gone.is_empty() {
            self.order.retain(|start| !gone.contains(start));
        }
    }

    fn take_snapshot(&self) -> Snapshot {
        let view = |access: Access| {
            let with = self.entries.values().filter(|entry| entry.access.allows(access));
            let pieces: Vec<_> = with.map(|e| (e.iova.0, e.addr.0, e.len)).collect();
            self.memory.view(&pieces)
        };
        Snapshot { readable: view(Access::Read), writable: view(Access::Write) }
    }
}

fn end_of(entry: &IotlbEntry) -> u64 {
    entry.iova.0.saturating_add(entry.len.saturating_sub(1))
}

fn covers(entry: &IotlbEntry, miss: &IotlbMiss) -> bool {
    let at = miss.iova.0;
    // Whatever it allows, it is the answer.
    (entry.iova.0..=end_of(entry)).contains(&at) || (entry.iova.0 & !(PAGE - 1)) == at
}

impl fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iotlb({} entries)", self.len())
    }
}

/// A ring's side of an [`Iotlb`].
#[derive(Debug, Clone)]
pub struct RingIotlb {
    shared: Arc<Iotlb>,
    /// The generation of the snapshot in use.
    seen: u64,
    /// What the ring does with its buffers: a transmitq reads, a receiveq writes.
    access: Access,
    /// Where indirect tables are read from.
    tables: GuestMap,
    /// Whether the next chain has an address that was unknown in this generation.
    missed: bool,
}

impl RingIotlb {
    /// For a ring that reads its buffers, or one that writes them.
    pub fn new(shared: Arc<Iotlb>, access: Access) -> Self {
        let tables = shared.map(Access::Read);
        Self { shared, seen: 0, access, tables, missed: false }
    }

    /// The newest map, if it is another one than at the last call.
    #[inline]
    pub(crate) fn refresh(&mut self) -> Option<GuestMap> {
        // ORDERING: Acquire pairs with the Release in `Iotlb::publish`.
        if self.shared.generation.load(Ordering::Acquire) == self.seen {
            return None;
        }
        let state = self.shared.state();
        // ORDERING: relaxed, it changes under the lock only.
        self.seen = self.shared.generation.load(Ordering::Relaxed);
        self.tables = state.snapshot.readable.clone();
        self.missed = false;
        Some(state.snapshot.of(self.access).clone())
    }

    /// Whether the next chain waits for the front end.
    #[inline]
    pub(crate) fn is_waiting(&self) -> bool {
        // ORDERING: Acquire, as in `refresh`.
        self.missed && self.shared.generation.load(Ordering::Acquire) == self.seen
    }

    /// Where indirect tables are.
    #[inline]
    pub(crate) fn tables(&self) -> &GuestMap {
        &self.tables
    }

    /// What of a fault is one behind a vIOMMU: an address that is unknown is asked for, and its
    /// chain waits; one that is known, but not for this access, is a fault.
    pub(crate) fn judge(&mut self, fault: ChainError) -> Option<ChainError> {
        let (addr, len, access) = if let ChainError::Unmapped { addr, len } = fault {
            (addr, len, self.access)
        } else if let ChainError::TableUnmapped { addr } = fault {
            (addr, 16, Access::Read)
        } else {
            return Some(fault);
        };
        self.missed = true;
        // It may begin in what is known. If another generation came meanwhile, nothing may be
        // missing any more: the next burst uses that.
        let at = self.shared.first_missing(Iova(addr.0), u64::from(len), access)?;
        if self.shared.translate(at).is_some() {
            return Some(ChainError::Denied { addr: GuestPhysAddr(at.0) });
        }
        self.shared.ask(at, access);
        None
    }

    /// Asks for the buffer of a chain whose turn comes later, if it is unknown.
    pub(crate) fn look_at(&self, map: &GuestMap, addr: GuestPhysAddr, len: u32, is_table: bool) {
        let (map, access) =
            if is_table { (&self.tables, Access::Read) } else { (map, self.access) };
        let end = addr.0.saturating_add(u64::from(len));
        let mut at = addr;
        // Each page that is missing: an answer to the first does not tell of the next.
        for _ in 0..PAGES_MAX {
            let left = end.saturating_sub(at.0);
            let Some(missing) = map.first_unmapped(at, left) else { return };
            if self.shared.translate(Iova(missing.0)).is_none() {
                self.shared.ask(Iova(missing.0), access);
            }
            let Some(next) = (missing.0 & !(PAGE - 1)).checked_add(PAGE) else { return };
            at = GuestPhysAddr(next.min(end));
        }
    }
}

#[cfg(test)]
mod tests;
