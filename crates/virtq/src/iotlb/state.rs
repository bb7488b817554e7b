//! What is known and what was asked, under the lock of an [`Iotlb`](super::Iotlb).
//!
//! Every step takes logarithmic time, however many entries there are: a front end may send as many
//! messages as it likes.

use std::collections::{BTreeMap, BTreeSet};

use super::{ASKED_MAX, Access, ENTRIES_MAX, IotlbEntry, IotlbMiss, Iova, PAGE, page_of};
use crate::Places;
use crate::mem::{GuestMap, GuestPhysAddr, Hit};

/// Entries on each side that one is joined with if they go on where it ends: front ends translate
/// page by page what is in one piece.
const JOINED_MAX: usize = 16;

/// An entry, and when it came.
#[derive(Debug, Clone, Copy)]
struct Known {
    entry: IotlbEntry,
    number: u64,
}

#[derive(Debug)]
pub(super) struct State {
    memory: GuestMap,
    /// By address, without overlap.
    entries: BTreeMap<u64, Known>,
    /// Addresses of the entries, the oldest first.
    ages: BTreeMap<u64, u64>,
    /// What was asked and is not answered, each with its number.
    asked: BTreeMap<IotlbMiss, u64>,
    /// What is still to be asked, in the order in which it was met; what is not in `asked` under
    /// its number is not any more.
    misses: Vec<(IotlbMiss, u64)>,
    /// Rings whose next chain waits, and for what. A ring that has gone on without being told may
    /// still be here.
    blocked: BTreeMap<u16, IotlbMiss>,
    /// Rings that may go on.
    ready: BTreeSet<u16>,
    /// Of the next entry or question.
    number: u64,
    asks: u64,
    /// Raised by each entry that goes, for whatever reason: rings may have found it.
    losses: u64,
}

impl State {
    pub(super) fn new(memory: GuestMap) -> Self {
        Self {
            memory,
            entries: BTreeMap::new(),
            ages: BTreeMap::new(),
            asked: BTreeMap::new(),
            misses: Vec::new(),
            blocked: BTreeMap::new(),
            ready: BTreeSet::new(),
            number: 0,
            asks: 0,
            losses: 1,
        }
    }

    pub(super) fn memory(&self) -> &GuestMap {
        &self.memory
    }

    pub(super) fn set_memory(&mut self, memory: &GuestMap) {
        self.memory = memory.clone();
        self.losses = self.losses.wrapping_add(1);
    }

    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds an entry in place of what it overlaps. Returns whether somebody waited for it.
    pub(super) fn insert(&mut self, entry: IotlbEntry) -> bool {
        self.forget(entry.iova.0, entry.len);
        let number = self.next_number();
        let _ = self.entries.insert(entry.iova.0, Known { entry, number });
        let _ = self.ages.insert(number, entry.iova.0);
        if self.entries.len() > ENTRIES_MAX
            && let Some((_, oldest)) = self.ages.pop_first()
        {
            let _ = self.entries.remove(&oldest);
            self.losses = self.losses.wrapping_add(1);
        }
        // Whatever it allows, it is the answer.
        self.answer(entry.iova.0, end_of(&entry))
    }

    /// Forgets what overlaps a range, and what was asked about it; what the next chain of a ring
    /// waits for is to be asked once more. Returns whether a ring may go on.
    pub(super) fn remove(&mut self, iova: u64, len: u64) -> bool {
        self.forget(iova, len);
        let last = iova.saturating_add(len.saturating_sub(1));
        if self.drop_questions(iova, last) {
            let waits = |miss: &&IotlbMiss| (page_of(iova)..=last).contains(&miss.iova.0);
            let again: BTreeSet<_> = self.blocked.values().filter(waits).copied().collect();
            again.into_iter().for_each(|miss| self.put_question(miss));
        }
        self.free_rings()
    }

    /// Forgets all that was asked: rings that still want to know it ask anew. Returns whether one
    /// may.
    pub(super) fn forget_questions(&mut self) -> bool {
        self.asked.clear();
        self.misses.clear();
        self.free_rings()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.forget(0, u64::MAX);
        let _ = self.forget_questions();
    }

    /// Removes entries that overlap `[iova, iova + len)`, whole: their rest is asked for again.
    fn forget(&mut self, iova: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let end = iova.saturating_add(last);
        while let Some((start, known)) = self.entries.range(..=end).next_back() {
            let (start, number) = (*start, known.number);
            if end_of(&known.entry) < iova {
                return;
            }
            let _ = self.entries.remove(&start);
            let _ = self.ages.remove(&number);
            self.losses = self.losses.wrapping_add(1);
        }
    }

    /// Takes back the questions about `[first, last]`. Returns whether somebody waited for an
    /// answer: rings whose next chain does are ready.
    fn answer(&mut self, first: u64, last: u64) -> bool {
        let any = self.drop_questions(first, last);
        self.free_rings() || any
    }

    /// Takes back the questions about `[first, last]`. Returns whether there were any.
    fn drop_questions(&mut self, first: u64, last: u64) -> bool {
        let lowest = IotlbMiss { iova: Iova(page_of(first)), access: Access::Read };
        let mut any = false;
        while let Some((miss, _)) = self.asked.range(lowest..).next() {
            let miss = *miss;
            if miss.iova.0 > last {
                break;
            }
            let _ = self.asked.remove(&miss);
            any = true;
        }
        any
    }

    /// Rings that wait for no answer any more are ready. Returns whether there was one.
    fn free_rings(&mut self) -> bool {
        let Self { asked, blocked, ready, .. } = self;
        if blocked.is_empty() {
            return false;
        }
        let before = blocked.len();
        blocked.retain(|ring, miss| {
            // One that was never asked, for want of room, is asked now.
            let waits = asked.contains_key(miss);
            ready.extend((!waits).then_some(*ring));
            waits
        });
        blocked.len() < before
    }

    /// The next chain of a ring waits for an address.
    pub(super) fn block(&mut self, ring: u16, iova: Iova, access: Access) {
        let _ = self.blocked.insert(ring, question(iova, access));
    }

    /// The rings that may go on since this was called last.
    pub(super) fn take_ready(&mut self) -> BTreeSet<u16> {
        std::mem::take(&mut self.ready)
    }

    /// Asks for the page of an address, unless that was done already. Returns whether there is
    /// something to ask for now, and was not before.
    pub(super) fn ask(&mut self, iova: Iova, access: Access) -> bool {
        let miss = question(iova, access);
        if self.asked.len() >= ASKED_MAX || self.asked.contains_key(&miss) {
            return false;
        }
        let first = self.misses.is_empty();
        self.asks = self.asks.wrapping_add(1);
        self.put_question(miss);
        first
    }

    /// How often something was asked that was not open.
    pub(super) fn asks(&self) -> u64 {
        self.asks
    }

    /// It is to be asked, as if it had never been.
    fn put_question(&mut self, miss: IotlbMiss) {
        let number = self.next_number();
        let _ = self.asked.insert(miss, number);
        self.misses.push((miss, number));
        if self.misses.len() > ASKED_MAX.saturating_mul(2) {
            let asked = &self.asked;
            self.misses.retain(|(miss, number)| asked.get(miss) == Some(number));
        }
    }

    /// What is to be asked for since this was called last.
    pub(super) fn take_misses(&mut self) -> Vec<IotlbMiss> {
        let misses = std::mem::take(&mut self.misses).into_iter();
        let open = misses.filter(|(miss, number)| self.asked.get(miss) == Some(number));
        open.map(|(miss, _)| miss).collect()
    }

    fn next_number(&mut self) -> u64 {
        self.number = self.number.wrapping_add(1);
        self.number
    }

    /// The entry at an address.
    fn at(&self, iova: u64) -> Option<&IotlbEntry> {
        let (_, known) = self.entries.range(..=iova).next_back()?;
        (iova.wrapping_sub(known.entry.iova.0) < known.entry.len).then_some(&known.entry)
    }

    /// Where in the guest's memory an address is.
    pub(super) fn translate(&self, iova: Iova) -> Option<GuestPhysAddr> {
        let entry = self.at(iova.0)?;
        let offset = iova.0.wrapping_sub(entry.iova.0);
        Some(GuestPhysAddr(entry.addr.0.wrapping_add(offset)))
    }

    /// Where in the guest's memory the pieces of a range are, if all are known.
    pub(super) fn places(&self, iova: Iova, len: u64) -> Option<Places> {
        let (mut at, mut left) = (iova.0, len);
        let mut pieces = Vec::new();
        while left > 0 {
            let entry = self.at(at)?;
            let offset = at.wrapping_sub(entry.iova.0);
            let step = entry.len.wrapping_sub(offset).min(left);
            pieces.push((GuestPhysAddr(entry.addr.0.wrapping_add(offset)), step));
            left = left.wrapping_sub(step);
            at = at.wrapping_add(step);
        }
        Some(Places::of(pieces))
    }

    /// What is in one piece around an address, there and here, and may be used so.
    pub(super) fn find(&self, iova: u64, access: Access) -> Option<Hit> {
        let entry = self.at(iova).filter(|entry| entry.access.allows(access))?;
        self.memory.seen_from(self.joined(entry, access), iova)
    }

    /// An entry with those that go on where it begins and ends, as (address there, here, bytes).
    fn joined(&self, entry: &IotlbEntry, access: Access) -> (u64, u64, u64) {
        let IotlbEntry { iova: Iova(mut iova), addr: GuestPhysAddr(mut addr), mut len, .. } =
            *entry;
        let open = |known: &&Known| known.entry.access.allows(access);
        let before = self.entries.range(..iova).rev().map(|(_, known)| known);
        for Known { entry, .. } in before.take(JOINED_MAX).take_while(open) {
            let (there, here) =
                (entry.iova.0.checked_add(entry.len), entry.addr.0.checked_add(entry.len));
            let Some(sum) = len.checked_add(entry.len) else { break };
            if (there, here) != (Some(iova), Some(addr)) {
                break;
            }
            (iova, addr, len) = (entry.iova.0, entry.addr.0, sum);
        }
        let after = iova.saturating_add(len);
        let after = self.entries.range(after..).map(|(_, known)| known);
        for Known { entry, .. } in after.take(JOINED_MAX).take_while(open) {
            let ends = (iova.checked_add(len), addr.checked_add(len));
            let Some(sum) = len.checked_add(entry.len) else { break };
            if ends != (Some(entry.iova.0), Some(entry.addr.0)) {
                break;
            }
            len = sum;
        }
        (iova, addr, len)
    }

    /// The first address of a range that is not known with this access.
    pub(super) fn first_missing(&self, iova: Iova, len: u64, access: Access) -> Option<Iova> {
        let (mut at, mut left) = (iova.0, len);
        while left > 0 {
            let Some(hit) = self.find(at, access) else { return Some(Iova(at)) };
            let step = hit.left(at).clamp(1, left);
            left = left.wrapping_sub(step);
            at = at.checked_add(step)?;
        }
        None
    }

    /// The entries that overlap a range, as (address there, here, bytes), by address.
    pub(super) fn pieces(&self, iova: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        let end = iova.saturating_add(len.saturating_sub(1));
        let first = self.at(iova).map_or(iova, |entry| entry.iova.0);
        let piece = |known: &Known| (known.entry.iova.0, known.entry.addr.0, known.entry.len);
        self.entries.range(first..=end.max(first)).map(move |(_, known)| piece(known))
    }
}

/// What is asked about an address.
fn question(iova: Iova, access: Access) -> IotlbMiss {
    IotlbMiss { iova: Iova(page_of(iova.0)), access }
}

/// The last address of an entry.
fn end_of(entry: &IotlbEntry) -> u64 {
    entry.iova.0.saturating_add(entry.len.saturating_sub(1))
}

const _: () = assert!(PAGE.is_power_of_two());
