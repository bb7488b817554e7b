//! Addresses behind a vIOMMU: what the front end told of them, and what it is asked for.
//!
//! ```text
//!   ring (worker)                      Iotlb                         session (control thread)
//!   pop: something changed? ◄── changes, losses ◄─────── insert (UPDATE), remove (INVALIDATE)
//!        address not found ──── find, under the lock
//!        address unknown ─────► misses, wake ──────────► take_misses ──► MISS to the front end
//! ```
//!
//! A ring keeps what it has found (`iotlb::ring`) from burst to burst, and forgets it at the start
//! of the first burst after something was removed. So who removes an entry must wait until every
//! worker has ended its turn before it says so.
//! A chain with an unknown address is left in the ring, not a fault: it comes again when the front
//! end has answered. The addresses of the next chains are asked for along with it.
//!
//! **Limits.** [`ENTRIES_MAX`] entries, the oldest leave first; [`ASKED_MAX`] questions at a time.
//! A message costs as many steps as the logarithm of that; a buffer, too, if its ring has not found
//! it before.

mod pop;
mod ring;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Places;
use crate::mem::{GuestMap, GuestPhysAddr};
pub(crate) use pop::{Lookup, Ring, look_ahead, pop, set_iotlb};
pub use ring::RingIotlb;
use state::State;

/// The most entries.
pub const ENTRIES_MAX: usize = 4096;
/// The most addresses that are asked for and not answered.
pub const ASKED_MAX: usize = 1024;
/// What a question is about: front ends answer with the page around it.
const PAGE: u64 = 4096;

fn page_of(iova: u64) -> u64 {
    iova & !(PAGE - 1)
}

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

/// The translations of one device.
pub struct Iotlb {
    /// Raised by each change.
    changes: AtomicU64,
    state: Mutex<State>,
    /// Called, on a worker, when there is something to ask for.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Iotlb {
    /// Knows nothing yet; `wake` is called when [`Self::take_misses`] has something and had nothing
    /// before, perhaps on a worker: it must not wait.
    pub fn new(memory: &GuestMap, wake: Box<dyn Fn() + Send + Sync>) -> Self {
        let state = State::new(memory.clone());
        Self { changes: AtomicU64::new(1), state: Mutex::new(state), wake }
    }

    /// Adds translations; what they overlap is forgotten. Returns whether somebody waited for them.
    pub fn insert(&self, entries: &[IotlbEntry]) -> bool {
        let mut state = self.state();
        let mut waited = false;
        for entry in entries.iter().filter(|entry| entry.len > 0) {
            waited |= state.insert(*entry);
        }
        self.publish(state);
        waited
    }

    /// Forgets what overlaps `[iova, iova + len)`, and what was asked about it. Rings use it until
    /// they have ended their turn. What the next chain of a ring waits for is to be asked again,
    /// since it may be somewhere else now: `wake` is not called for that, it is in
    /// [`Self::take_misses`]. Returns whether a ring waits no more that had found no room for its
    /// question.
    pub fn remove(&self, iova: Iova, len: u64) -> bool {
        let mut state = self.state();
        let waited = state.remove(iova.0, len);
        self.publish(state);
        waited
    }

    /// Forgets what was asked: who asks about memory that is gone meanwhile gets no answer. Returns
    /// whether a ring waits no more: it asks anew.
    pub fn forget_questions(&self) -> bool {
        let mut state = self.state();
        let waited = state.forget_questions();
        self.publish(state);
        waited
    }

    /// Forgets everything. No ring runs.
    pub fn clear(&self) {
        let mut state = self.state();
        state.clear();
        self.publish(state);
    }

    /// Uses another memory table: translations into what is not there any more mean nothing.
    pub fn set_memory(&self, memory: &GuestMap) {
        let mut state = self.state();
        state.set_memory(memory);
        self.publish(state);
    }

    fn publish(&self, state: MutexGuard<'_, State>) {
        // ORDERING: Release pairs with the Acquire in `RingIotlb::refresh`; the lock does the rest.
        let _ = self.changes.fetch_add(1, Ordering::Release);
        drop(state);
    }

    /// The first address of `[iova, iova + len)` that is not known with this access.
    pub fn first_missing(&self, iova: Iova, len: u64, access: Access) -> Option<Iova> {
        self.state().first_missing(iova, len, access)
    }

    /// What is known around some ranges, each (address, bytes), whatever is allowed there: what a
    /// ring is set up in.
    pub fn map_of(&self, ranges: &[(Iova, u64)]) -> GuestMap {
        let state = self.state();
        let mut pieces = BTreeMap::new();
        for (iova, len) in ranges {
            pieces.extend(state.pieces(iova.0, *len).map(|piece| (piece.0, piece)));
        }
        state.memory().view(pieces.into_values())
    }

    /// Where in the guest's memory an address is.
    pub fn translate(&self, iova: Iova) -> Option<GuestPhysAddr> {
        self.state().translate(iova)
    }

    /// Where in the guest's memory the pieces of a range are, if all are known.
    pub fn places(&self, iova: Iova, len: u64) -> Option<Places> {
        self.state().places(iova, len)
    }

    /// Asks for an address, unless that was done already.
    pub fn ask(&self, iova: Iova, access: Access) {
        self.ask_locked(self.state(), iova, access);
    }

    fn ask_locked(&self, mut state: MutexGuard<'_, State>, iova: Iova, access: Access) {
        let is_due = state.ask(iova, access);
        drop(state);
        if is_due {
            (self.wake)();
        }
    }

    /// What is to be asked for since this was called last.
    pub fn take_misses(&self) -> Vec<IotlbMiss> {
        self.state().take_misses()
    }

    /// How often something was asked for that was not already. What is to be asked again does not
    /// count.
    pub fn asks(&self) -> u64 {
        self.state().asks()
    }

    /// Raised by each entry that goes, for whatever reason: while it is the same, no ring can use
    /// what is not known any more.
    pub fn losses(&self) -> u64 {
        self.state().losses()
    }

    /// The rings whose next chain does not wait any more, since this was called last: by the
    /// numbers of [`RingIotlb::of_ring`]. They have to be looked at again.
    pub fn take_ready(&self) -> BTreeSet<u16> {
        self.state().take_ready()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.state().len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iotlb({} entries)", self.len())
    }
}

#[cfg(test)]
mod tests;
