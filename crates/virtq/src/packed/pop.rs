//! Reading chains from a packed ring.

use super::{AVAIL, Packed, Place, USED};
use crate::ChainError;
use crate::chain::{BURST_SEGS, Chain, ChainBuf, RUN, Token};
use crate::mem::{Descs, GuestPhysAddr, Hit, PackedAreas, RawDesc, RawSeg};
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect, narrow};

/// Reads up to `max` chains: runs of simple chains, each within one lap, with a careful look at
/// each descriptor that ends a run.
pub(super) fn burst(q: &mut Packed, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    let size = q.config.size;
    // Without room the descriptor here is one that was fetched and not completed.
    while q.fetched < size && buf.segs.len() <= BURST_SEGS {
        let room = size.wrapping_sub(q.fetched);
        let run = max.saturating_sub(buf.chains.len()).min(RUN).min(usize::from(room));
        if run == 0 {
            break;
        }
        let first = narrow(buf.segs.len());
        let descs = q.areas.descs(q.avail.index, run);
        let want = Want { flags: q.avail.available(), size };
        let places = (buf.chains.spare(run), buf.segs.spare(run));
        let (done, odd) = singles(descs, q.hit, (want, first), places);
        buf.chains.advance(usize::from(done));
        buf.segs.advance(usize::from(done));
        q.fetch(done);
        let Some(desc) = odd else { continue };
        let state = desc.fourth() & (AVAIL | USED);
        if state == q.avail.used() {
            // What was used in this lap is behind us. Anything else is from the lap before.
            return Err(ChainError::WrapCounter { index: q.avail.index, wrap: q.avail.wrap });
        }
        if state != q.avail.available() {
            break;
        }
        let first = buf.segs.len();
        let room = size.wrapping_sub(q.fetched);
        let ring = Ring { areas: &q.areas, indirect: q.config.features.indirect, room };
        let mut sink = Sink { map: q.areas.map(), hit: &mut q.hit, segs: &mut buf.segs };
        let chain = ring.careful(&mut sink, desc, q.avail);
        let slots = buf.settle(first, chain)?.slots;
        q.fetch(slots);
    }
    Ok(())
}

impl Packed {
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
    (want, mut first): (Want, u32),
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

/// What a walk needs to know of the queue.
struct Ring<'a> {
    areas: &'a PackedAreas,
    indirect: bool,
    /// Slots that are not fetched already.
    room: u16,
}

impl Ring<'_> {
    /// Any chain.
    #[inline(never)]
    fn careful(
        &self,
        sink: &mut Sink<'_>,
        mut desc: RawDesc,
        mut at: Place,
    ) -> Result<Chain, ChainError> {
        let size = self.areas.size();
        let mut walk = Walk::new(sink, size);
        for slots in 1..=self.room {
            let flags = desc.fourth();
            if flags & INDIRECT != 0 {
                check_indirect(self.indirect, flags, at.index)?;
                walk.add_flat_table(desc)?;
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
            if slots == self.room {
                break;
            }
            at = at.forward(1, size);
            desc = self.areas.desc(at.index);
            if desc.fourth() & (AVAIL | USED) != at.available() {
                return Err(ChainError::NotAvailable { index: at.index });
            }
        }
        let count = u32::from(self.room).saturating_add(1);
        Err(ChainError::TooLong { count, limit: self.room })
    }
}
