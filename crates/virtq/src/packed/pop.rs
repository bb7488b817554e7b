//! Reading chains from a packed ring.

use super::{AVAIL, Packed, USED};
use crate::ChainError;
use crate::chain::{ChainBuf, RUN, Spread, Token};
use crate::iotlb::Lookup;
use crate::mem::{RawDesc, RawSeg, Simple};
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect};

/// Reads up to `max` chains: runs of simple chains, each within one lap, with a careful look at
/// each descriptor that ends a run. `BEHIND` a vIOMMU or not.
#[inline(always)]
pub(super) fn burst<const BEHIND: bool>(
    q: &mut Packed,
    buf: &mut ChainBuf,
    max: usize,
) -> Result<(), ChainError> {
    let room = q.room(buf, max);
    if room == 0 || !q.check_state(q.areas.desc(q.avail.index))? {
        return Ok(());
    }
    let room = u16::try_from(room).unwrap_or(u16::MAX);
    q.areas.prefetch(q.avail.index, q.expected.min(room));
    let result = runs::<BEHIND>(q, buf, max);
    if buf.chains.len() > 0 {
        q.expected = u16::try_from(buf.chains.len()).unwrap_or(u16::MAX);
    }
    result
}

/// Shows the descriptors that are available: those of the next `most` after `skip`.
#[inline(always)]
pub(super) fn upcoming(
    q: &Packed,
    skip: u16,
    most: u16,
    mut look: impl FnMut(RawDesc, bool),
) -> u16 {
    let most = q.config.size.wrapping_sub(q.fetched).min(most);
    let mut seen = skip.min(most);
    // Two laps at most.
    for _ in 0..2 {
        let at = q.avail.forward(seen, q.config.size);
        let descs = q.areas.descs(at.index, usize::from(most.wrapping_sub(seen)));
        let here = descs.show(AVAIL | USED, at.available(), |desc| {
            look(desc, desc.fourth() & INDIRECT != 0);
        });
        seen = seen.wrapping_add(here);
    }
    seen
}

#[inline(always)]
fn runs<const BEHIND: bool>(
    q: &mut Packed,
    buf: &mut ChainBuf,
    max: usize,
) -> Result<(), ChainError> {
    let mut turned = false;
    loop {
        let run = q.room(buf, max).min(RUN);
        if run == 0 {
            return Ok(());
        }
        let done = if BEHIND {
            found(q, buf.writable, buf.chains.spare(run))
        } else {
            let simple = q.simple(buf.writable);
            let descs = q.areas.descs(q.avail.index, run);
            descs.resolve(|desc| simple.resolve(desc), buf.chains.spare(run))
        };
        buf.chains.advance(usize::from(done));
        q.fetch(done);
        if usize::from(done) < run && !odd::<BEHIND>(q, buf, max, &mut turned)? {
            return Ok(());
        }
    }
}

/// A run behind a vIOMMU: buffers may be wherever the ring has found something.
#[inline(never)]
fn found(q: &Packed, writable: bool, run: &mut [RawSeg]) -> u16 {
    let Some(iotlb) = &q.lookup.iotlb else { return 0 };
    let simple = q.simple(writable);
    let find = |desc| simple.resolve(desc).or_else(|| iotlb.found(&simple, desc));
    q.areas.descs(q.avail.index, run.len()).resolve(find, run)
}

/// Reads the chains that a run left, until one looks simple again. False if there are no more.
#[inline(never)]
fn odd<const BEHIND: bool>(
    q: &mut Packed,
    buf: &mut ChainBuf,
    max: usize,
    turned: &mut bool,
) -> Result<bool, ChainError> {
    let mut first_one = true;
    while q.room(buf, max) > 0 {
        let desc = q.areas.desc(q.avail.index);
        let flags = desc.fourth();
        if !q.check_state(desc)? {
            return Ok(false);
        }
        let again = !std::mem::take(&mut first_one);
        if flags & (NEXT | INDIRECT) == 0 {
            let simple = q.simple(buf.writable);
            let again = again && simple.resolve(desc).is_some();
            if again || buf.turn(flags & WRITE != 0, turned) {
                break;
            }
            if let Some(seg) = q.lookup.resolve::<BEHIND>(&simple, desc) {
                buf.chains.push(seg.tagged(u32::from(desc.third())));
                q.fetch(1);
                continue;
            }
        }
        let first = buf.segs.len();
        let chain = q.careful::<BEHIND>(buf, desc);
        let slots = buf.settle(first, chain)?.slots;
        q.fetch(slots);
    }
    Ok(true)
}

impl Packed {
    /// How many chains there may be more: without room in the ring, the descriptor here is one
    /// that was fetched and not completed.
    #[inline(always)]
    fn room(&self, buf: &ChainBuf, max: usize) -> usize {
        let slots = usize::from(self.config.size.wrapping_sub(self.fetched));
        let room = max.saturating_sub(buf.chains.len()).min(slots);
        if buf.is_full() { 0 } else { room }
    }

    /// What chains of one segment look like here: one direct descriptor with a small id.
    #[inline(always)]
    fn simple(&self, writable: bool) -> Simple {
        let flags = u64::from(AVAIL | USED | NEXT | INDIRECT | WRITE);
        let want = self.avail.available() | if writable { WRITE } else { 0 };
        // Ids of a size that is no power of two are all looked at carefully from there on.
        let ids = u64::from(self.small_ids ^ u16::MAX);
        self.lookup.hit.simple(flags << 48 | ids << 32, u64::from(want) << 48)
    }

    /// Whether the driver has made the descriptor available.
    #[inline(always)]
    fn check_state(&self, desc: RawDesc) -> Result<bool, ChainError> {
        let state = desc.fourth() & (AVAIL | USED);
        if state == self.avail.used() {
            // What was used in this lap is behind us. Anything else is from the lap before.
            return Err(ChainError::WrapCounter { index: self.avail.index, wrap: self.avail.wrap });
        }
        Ok(state == self.avail.available())
    }

    /// Passes `slots` that were read.
    #[inline(always)]
    fn fetch(&mut self, slots: u16) {
        self.avail = self.avail.forward(slots, self.config.size);
        self.fetched = self.fetched.wrapping_add(slots);
    }
}

impl Packed {
    /// Any chain, which starts with `desc` at the next place.
    #[inline(always)]
    fn careful<const BEHIND: bool>(
        &mut self,
        buf: &mut ChainBuf,
        mut desc: RawDesc,
    ) -> Result<Spread, ChainError> {
        let size = self.config.size;
        let room = size.wrapping_sub(self.fetched);
        let mut at = self.avail;
        let Lookup { hit, iotlb, .. } = &mut self.lookup;
        let iotlb = if BEHIND { iotlb.as_deref_mut() } else { None };
        let sink = Sink { map: self.areas.map(), iotlb, hit, segs: &mut buf.segs };
        let mut walk = Walk::new(sink, size);
        for slots in 1..=room {
            let flags = desc.fourth();
            if flags & INDIRECT != 0 {
                check_indirect(self.config.features.indirect, flags, at.index)?;
                walk.add_flat_table(desc, self.table_flags)?;
            } else {
                walk.add_one(desc, flags, at.index)?;
            }
            if flags & NEXT == 0 {
                let id = desc.third();
                if id >= size {
                    return Err(ChainError::BufferId { id, size });
                }
                return Ok(walk.finish(Token { id, slots }));
            }
            if slots == room {
                break;
            }
            at = at.forward(1, size);
            desc = self.areas.desc(at.index);
            if desc.fourth() & (AVAIL | USED) != at.available() {
                return Err(ChainError::NotAvailable { index: at.index });
            }
        }
        Err(ChainError::TooLong { count: u32::from(room).saturating_add(1), limit: room })
    }
}
