//! A ring's side of an [`Iotlb`]: what it has found itself, for its next buffers.
//!
//! ```text
//!   buffer ─► the last hit (one comparison) ─► the place of its page ─► Iotlb, under its lock
//! ```
//!
//! **What was found is used until the next burst at most after it was removed.**
//! [`RingIotlb::refresh`] stands before each burst and forgets everything if something was lost
//! since the last one. So when a worker has ended the turn in which an entry was removed, it does
//! not use it any more.
//!
//! **What is found stays mapped**: it is in `memory`, which a ring replaces only there, too, when
//! no chain of an earlier burst is left.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Access, Iotlb, Iova, PAGE, page_of};
use crate::ChainError;
use crate::mem::{GuestMap, GuestPhysAddr, Hit, RawDesc, RawSeg, Simple};

/// Pages of one buffer that are looked at ahead: those of the largest frame.
const PAGES_MAX: u32 = 17;
/// Places for what was found, by page: more than most guests have buffers in a ring.
const PLACES: usize = 512;

/// What was found last at one of some pages.
#[derive(Debug, Clone, Copy)]
struct Place {
    hit: Hit,
    /// It is good as long as nothing more was lost.
    losses: u64,
}

/// A ring's side of an [`Iotlb`].
#[derive(Debug, Clone)]
pub struct RingIotlb {
    shared: Arc<Iotlb>,
    /// The ring's number.
    ring: u16,
    /// What the ring does with its buffers: a transmitq reads, a receiveq writes.
    access: Access,
    /// As they were at the last refresh.
    changes: u64,
    losses: u64,
    /// What everything that was found is in.
    memory: GuestMap,
    places: Box<[Place]>,
    /// Where the last indirect table was.
    table: Hit,
    /// Whether the next chain has an address that was unknown at the last refresh.
    missed: bool,
    /// Ring entries after the next one that were looked at.
    pub(super) looked: u16,
}

impl RingIotlb {
    /// For a ring that reads its buffers, or one that writes them.
    pub fn new(shared: Arc<Iotlb>, access: Access) -> Self {
        let nothing = Place { hit: Hit::none(), losses: 0 };
        Self {
            shared,
            ring: 0,
            access,
            changes: 0,
            losses: 0,
            memory: GuestMap::nothing(),
            places: vec![nothing; PLACES].into(),
            table: Hit::none(),
            missed: false,
            looked: 0,
        }
    }

    /// The number by which [`Iotlb::take_ready`] calls the ring.
    #[must_use]
    pub fn of_ring(self, ring: u16) -> Self {
        Self { ring, ..self }
    }

    /// Looks whether something changed since the last burst. Returns whether what was found before
    /// must not be used any more.
    #[inline]
    pub(super) fn refresh(&mut self) -> bool {
        // ORDERING: Acquire pairs with the Release in `Iotlb::publish`.
        self.shared.changes.load(Ordering::Acquire) != self.changes && self.catch_up()
    }

    #[cold]
    fn catch_up(&mut self) -> bool {
        let state = self.shared.state();
        // ORDERING: relaxed, it changes under the lock only.
        self.changes = self.shared.changes.load(Ordering::Relaxed);
        self.missed = false;
        if state.losses() == self.losses {
            return false;
        }
        self.losses = state.losses();
        self.memory = state.memory().clone();
        self.table = Hit::none();
        self.looked = 0;
        true
    }

    /// Whether the next chain waits for the front end.
    #[inline]
    pub(crate) fn is_waiting(&self) -> bool {
        // ORDERING: Acquire, as in `refresh`.
        self.missed && self.shared.changes.load(Ordering::Acquire) == self.changes
    }

    /// The place of an address, if what was found there is good.
    #[inline(always)]
    fn place(&self, at: u64) -> Option<&Hit> {
        let place = self.places.get(place_of(at))?;
        (place.losses == self.losses).then_some(&place.hit)
    }

    /// The buffer of a descriptor as `simple` wants it, if the ring has found where it is.
    #[inline(always)]
    pub(crate) fn found(&self, simple: &Simple, desc: RawDesc) -> Option<RawSeg> {
        if !simple.is_like(desc) {
            return None;
        }
        self.place(desc.addr)?.resolve(GuestPhysAddr(desc.addr), desc.len())
    }

    /// Whether the ring has found where a descriptor's buffer is.
    #[inline(always)]
    pub(super) fn knows(&self, desc: RawDesc) -> bool {
        self.place(desc.addr).is_some_and(|hit| hit.holds(desc))
    }

    /// What is in one piece around an address of a buffer.
    #[inline(always)]
    fn find(&mut self, at: u64) -> Option<Hit> {
        match self.place(at) {
            Some(hit) if hit.left(at) > 0 => Some(*hit),
            _ => self.find_shared(at),
        }
    }

    #[inline(never)]
    fn find_shared(&mut self, at: u64) -> Option<Hit> {
        let hit = self.look_up(at, self.access)?;
        if let Some(place) = self.places.get_mut(place_of(at)) {
            // It may be newer than the last refresh: then it is good for this burst only.
            *place = Place { hit, losses: self.losses };
        }
        Some(hit)
    }

    fn look_up(&self, at: u64, access: Access) -> Option<Hit> {
        let state = self.shared.state();
        // What is in another memory is not kept mapped by ours: the next burst takes that.
        let ours = state.memory().same_as(&self.memory);
        state.find(at, access).filter(|_| ours)
    }

    /// The segment of a short buffer, if it is in one piece.
    #[inline(always)]
    pub(crate) fn resolve_one(&mut self, hit: &mut Hit, desc: RawDesc) -> Option<RawSeg> {
        let found = self.find(desc.addr)?;
        *hit = found;
        found.resolve(GuestPhysAddr(desc.addr), desc.len())
    }

    /// As [`GuestMap::resolve_slow`], behind the vIOMMU.
    #[inline(never)]
    pub(crate) fn resolve(
        &mut self,
        hit: &mut Hit,
        addr: GuestPhysAddr,
        len: u32,
        out: &mut impl Extend<RawSeg>,
    ) -> bool {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let Some(found) = self.find(at) else { return false };
            *hit = found;
            let step = u32::try_from(found.left(at)).unwrap_or(u32::MAX).min(left);
            out.extend(found.resolve(GuestPhysAddr(at), step));
            left = left.wrapping_sub(step);
            let Some(next) = at.checked_add(u64::from(step)) else { return left == 0 };
            at = next;
        }
        true
    }

    /// As [`GuestMap::fetch_desc`]: tables are read, whatever the ring does with its buffers.
    #[cold]
    #[inline(never)]
    pub(crate) fn fetch_desc(&mut self, addr: GuestPhysAddr) -> Option<RawDesc> {
        match self.table.fetch_desc(addr) {
            None => self.fetch_desc_slow(addr),
            found => found,
        }
    }

    #[cold]
    fn fetch_desc_slow(&mut self, addr: GuestPhysAddr) -> Option<RawDesc> {
        self.table = self.look_up(addr.0, Access::Read)?;
        Hit::fetch_desc_in_pieces(addr, |at| self.look_up(at, Access::Read))
    }

    /// What of a fault is one behind a vIOMMU: an address that is unknown is asked for, and its
    /// chain waits; one that is known, but not for this access, is a fault.
    pub(super) fn judge(&mut self, fault: ChainError) -> Option<ChainError> {
        let (addr, len, access) = if let ChainError::Unmapped { addr, len } = fault {
            (addr, len, self.access)
        } else if let ChainError::TableUnmapped { addr } = fault {
            (addr, 16, Access::Read)
        } else {
            return Some(fault);
        };
        let mut state = self.shared.state();
        // ORDERING: relaxed, it changes under the lock only.
        if self.shared.changes.load(Ordering::Relaxed) != self.changes {
            // Nothing may be missing any more: the next burst looks.
            return None;
        }
        // It may begin in what is known.
        let at = state.first_missing(Iova(addr.0), u64::from(len), access)?;
        if state.translate(at).is_some() {
            return Some(ChainError::Denied { addr: GuestPhysAddr(at.0) });
        }
        self.missed = true;
        state.block(self.ring, at, access);
        self.shared.ask_locked(state, at, access);
        None
    }

    /// Asks for the buffer of a chain whose turn comes later, if it is unknown.
    #[inline(never)]
    pub(super) fn look_at(&mut self, desc: RawDesc, is_table: bool) {
        let access = if is_table { Access::Read } else { self.access };
        let end = desc.addr.saturating_add(u64::from(desc.len()));
        let mut at = desc.addr;
        // Each page that is missing: an answer to the first does not tell of the next.
        for _ in 0..PAGES_MAX {
            if at >= end {
                return;
            }
            let hit = if is_table { self.look_up(at, access) } else { self.find(at) };
            let next = match hit {
                Some(hit) => at.checked_add(hit.left(at)),
                None => {
                    let state = self.shared.state();
                    if state.translate(Iova(at)).is_none() {
                        self.shared.ask_locked(state, Iova(at), access);
                    }
                    page_of(at).checked_add(PAGE)
                }
            };
            let Some(next) = next else { return };
            at = next;
        }
    }
}

#[inline(always)]
fn place_of(at: u64) -> usize {
    (at / PAGE) as usize & (PLACES - 1)
}

const _: () = assert!(PLACES.is_power_of_two());
