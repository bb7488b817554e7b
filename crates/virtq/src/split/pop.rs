//! Reading chains from a split ring.

use std::sync::atomic::Ordering::Acquire;

use super::Split;
use crate::ChainError;
use crate::chain::{BURST_SEGS, Chain, ChainBuf, RUN, Token};
use crate::mem::{GuestPhysAddr, Heads, Hit, RawDesc, RawSeg, SplitAreas};
use crate::shared::Shared;
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect, narrow};

/// Reads up to `max` chains: one look at the available index, then runs of simple chains, with a
/// careful look at each that ends a run.
pub(super) fn burst(q: &mut Split, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    let mut left = ready(q)?.min(max);
    while left > 0 && buf.segs.len() <= BURST_SEGS {
        let run = left.min(RUN);
        let first = narrow(buf.segs.len());
        let places = (buf.chains.spare(run), buf.segs.spare(run));
        let (done, mut odd) = singles(q.areas.heads(q.next_avail), q.hit, first, places);
        buf.chains.advance(done);
        buf.segs.advance(done);
        left = left.wrapping_sub(done);
        q.next_avail = advanced(q.next_avail, done);
        while let Some(start) = odd {
            let first = buf.segs.len();
            let mut sink = Sink { map: q.areas.map(), hit: &mut q.hit, segs: &mut buf.segs };
            let chain = careful(&q.areas, &mut sink, q.config.features.indirect, start);
            let _ = buf.settle(first, chain)?;
            left = left.wrapping_sub(1);
            q.next_avail = advanced(q.next_avail, 1);
            // Odd chains come in company: no new run for each.
            let more = left > 0 && buf.segs.len() <= BURST_SEGS;
            odd = more
                .then(|| q.areas.heads(q.next_avail).next())
                .filter(|(_, desc)| desc.third() & (NEXT | INDIRECT) != 0);
        }
    }
    Ok(())
}

/// The number of available entries.
#[inline(always)]
fn ready(q: &Split) -> Result<usize, ChainError> {
    // ORDERING: acquire pairs with the driver's release of `avail.idx`: the entries before it, and
    // the descriptors that they name, are written.
    let avail = q.areas.avail_idx().load(Acquire);
    let ahead = avail.wrapping_sub(q.next_avail);
    let fetched = q.next_avail.wrapping_sub(q.published);
    let room = q.config.size.saturating_sub(fetched);
    if ahead > room { Err(ChainError::AvailIndex { ahead, room }) } else { Ok(usize::from(ahead)) }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a run has at most 256 chains")]
fn advanced(index: u16, run: usize) -> u16 {
    index.wrapping_add(run as u16)
}

/// A head, and its descriptor.
type Start = (u16, RawDesc);

/// The hot loop: chains of one direct descriptor in the region that was used last, nearly all of
/// them. Ends at the first that is not, and returns it.
#[inline(always)]
fn singles(
    mut heads: Heads<'_>,
    hit: Hit,
    mut first: u32,
    (chains, segs): (&mut [Chain], &mut [RawSeg]),
) -> (usize, Option<Start>) {
    let mut done = 0usize;
    for (chain, seg) in chains.iter_mut().zip(segs) {
        let (head, desc) = heads.next();
        let (flags, len) = (desc.third(), desc.len());
        let simple = flags & (NEXT | INDIRECT) == 0 && heads.has(head);
        let Some(found) = hit.resolve(GuestPhysAddr(desc.addr), len).filter(|_| simple) else {
            return (done, Some((head, desc)));
        };
        *seg = found;
        *chain = Chain::single(Token { id: head, slots: 1 }, first, flags & WRITE != 0, len);
        first = first.wrapping_add(1);
        done = done.wrapping_add(1);
    }
    (done, None)
}

/// Any chain.
#[inline(never)]
fn careful(
    areas: &SplitAreas,
    sink: &mut Sink<'_>,
    indirect: bool,
    (head, mut desc): Start,
) -> Result<Chain, ChainError> {
    let size = areas.mask().wrapping_add(1);
    if head >= size {
        return Err(ChainError::Head { head, size });
    }
    let mut walk = Walk::new(sink, size);
    let mut index = head;
    for _ in 0..size {
        let (flags, next) = (desc.third(), desc.fourth());
        if flags & INDIRECT != 0 {
            check_indirect(indirect, flags, index)?;
            walk.add_linked_table(desc, head)?;
        } else {
            walk.add(desc, flags, index)?;
        }
        if flags & NEXT == 0 {
            return Ok(walk.finish(Token { id: head, slots: 1 }));
        }
        if next >= size {
            return Err(ChainError::Next { next, table: u32::from(size) });
        }
        index = next;
        desc = areas.desc(index);
    }
    Err(ChainError::Loop { head, table: u32::from(size) })
}
