//! Reading chains from a split ring.

use std::sync::atomic::Ordering::Acquire;

use super::Split;
use crate::ChainError;
use crate::chain::{BURST_SEGS, ChainBuf, RUN, Spread, Token};
use crate::mem::{Heads, Hit, RawDesc, RawSeg, Simple, SplitAreas};
use crate::shared::Shared;
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect};

/// Reads up to `max` chains: one look at the available index, then runs of simple chains, with a
/// careful look at each that ends a run.
pub(super) fn burst(q: &mut Split, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    let mut left = ready(q)?.min(max);
    let mut turned = false;
    while left > 0 && buf.segs.len() <= BURST_SEGS {
        let simple = simple(q.hit, buf.writable);
        let run = buf.chains.spare(left.min(RUN));
        let (done, mut odd) = singles(q.areas.heads(q.next_avail), simple, run);
        buf.chains.advance(done);
        left = left.wrapping_sub(done);
        q.next_avail = advanced(q.next_avail, done);
        if let Some((_, Some(desc))) = odd
            && desc.third() & (NEXT | INDIRECT) == 0
            && (desc.third() & WRITE != 0) != buf.writable
            && buf.is_undecided()
            && !turned
        {
            turned = true;
            buf.writable = !buf.writable;
            continue;
        }
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
                .filter(|(_, desc)| desc.is_none_or(|d| d.third() & (NEXT | INDIRECT) != 0));
        }
    }
    Ok(())
}

/// What chains of one segment look like: one direct descriptor.
#[inline(always)]
fn simple(hit: Hit, writable: bool) -> Simple {
    let want = if writable { WRITE } else { 0 };
    hit.simple(u64::from(NEXT | INDIRECT | WRITE) << 32, u64::from(want) << 32)
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

/// A head, and its descriptor if the head is in range.
type Start = (u16, Option<RawDesc>);

/// The hot loop: simple chains, nearly all of them. Ends at the first that is not, and returns it.
#[inline(always)]
fn singles(mut heads: Heads<'_>, simple: Simple, chains: &mut [RawSeg]) -> (usize, Option<Start>) {
    let mut done = 0usize;
    for chain in chains {
        let (head, desc) = heads.next();
        let Some(found) = desc.and_then(|desc| simple.resolve(desc)) else {
            return (done, Some((head, desc)));
        };
        *chain = found.tagged(u32::from(head));
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
    (head, desc): Start,
) -> Result<Spread, ChainError> {
    let size = areas.mask().wrapping_add(1);
    let Some(mut desc) = desc else { return Err(ChainError::Head { head, size }) };
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
