//! Reading chains from a packed ring.

use super::{AVAIL, Packed, USED};
use crate::ChainError;
use crate::chain::{BURST_SEGS, Chain, ChainBuf, RUN, Token};
use crate::mem::{Descs, GuestPhysAddr, Hit, RawDesc, RawSeg};
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect, narrow};

/// Reads up to `max` chains: runs of simple chains, each within one lap, with a careful look at
/// each descriptor that ends a run.
pub(super) fn burst(q: &mut Packed, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    loop {
        let run = q.room(buf, max).min(RUN);
        if run == 0 {
            return Ok(());
        }
        let first = narrow(buf.segs.len());
        let want = Want { flags: q.avail.available(), size: q.config.size };
        let places = (buf.chains.spare(run), buf.segs.spare(run));
        let (done, mut odd) =
            singles(q.areas.descs(q.avail.index, run), q.hit, want, first, places);
        buf.chains.advance(usize::from(done));
        buf.segs.advance(usize::from(done));
        q.fetch(done);
        while let Some(desc) = odd {
            if !q.check_state(desc)? {
                return Ok(());
            }
            let first = buf.segs.len();
            let chain = q.careful(buf, desc);
            let slots = buf.settle(first, chain)?.slots;
            q.fetch(slots);
            // Odd chains come in company: no new run for each.
            odd = (q.room(buf, max) > 0)
                .then(|| q.areas.desc(q.avail.index))
                .filter(|desc| desc.fourth() & (NEXT | INDIRECT) != 0);
        }
    }
}

impl Packed {
    /// How many chains there may be more: without room in the ring, the descriptor here is one
    /// that was fetched and not completed.
    #[inline(always)]
    fn room(&self, buf: &ChainBuf, max: usize) -> usize {
        let slots = usize::from(self.config.size.wrapping_sub(self.fetched));
        let room = max.saturating_sub(buf.chains.len()).min(slots);
        if buf.segs.len() > BURST_SEGS { 0 } else { room }
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

/// What the descriptors of a run must be like.
#[derive(Clone, Copy)]
struct Want {
    flags: u16,
    size: u16,
}

/// The hot loop: chains of one direct descriptor in the region that was used last, nearly all of
/// them. Ends at the first that is not, and returns it.
#[inline(always)]
fn singles(
    mut descs: Descs<'_>,
    hit: Hit,
    want: Want,
    mut first: u32,
    (chains, segs): (&mut [Chain], &mut [RawSeg]),
) -> (u16, Option<RawDesc>) {
    let mut done = 0u16;
    for (chain, seg) in chains.iter_mut().zip(segs) {
        let Some(desc) = descs.next() else { break };
        let (flags, len, id) = (desc.fourth(), desc.len(), desc.third());
        let simple = flags & (AVAIL | USED | NEXT | INDIRECT) == want.flags && id < want.size;
        let Some(found) = hit.resolve(GuestPhysAddr(desc.addr), len).filter(|_| simple) else {
            return (done, Some(desc));
        };
        *seg = found;
        *chain = Chain::single(Token { id, slots: 1 }, first, flags & WRITE != 0, len);
        first = first.wrapping_add(1);
        done = done.wrapping_add(1);
    }
    (done, None)
}

impl Packed {
    /// Any chain, which starts with `desc` at the next place.
    #[inline(never)]
    fn careful(&mut self, buf: &mut ChainBuf, mut desc: RawDesc) -> Result<Chain, ChainError> {
        let size = self.config.size;
        let room = size.wrapping_sub(self.fetched);
        let mut at = self.avail;
        let mut sink = Sink { map: self.areas.map(), hit: &mut self.hit, segs: &mut buf.segs };
        let mut walk = Walk::new(&mut sink, size);
        for slots in 1..=room {
            let flags = desc.fourth();
            if flags & INDIRECT != 0 {
                check_indirect(self.config.features.indirect, flags, at.index)?;
                walk.add_flat_table(desc, self.table_flags)?;
            } else {
                walk.add(desc, flags, at.index)?;
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
