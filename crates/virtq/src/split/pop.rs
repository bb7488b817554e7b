//! Reading chains from a split ring.

use std::sync::atomic::Ordering::Acquire;

use super::Split;
use crate::ChainError;
use crate::chain::{ChainBuf, RUN, Spread, Token};
use crate::config::QueueConfig;
use crate::iotlb::Lookup;
use crate::mem::{Hit, RawDesc, RawSeg, Simple, SplitAreas};
use crate::shared::Shared;
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect};

/// Reads up to `max` chains: one look at the available index, then runs of simple chains, with a
/// careful look at each that ends a run. `BEHIND` a vIOMMU or not.
#[inline(always)]
pub(super) fn burst<const BEHIND: bool>(
    q: &mut Split,
    buf: &mut ChainBuf,
    max: usize,
) -> Result<(), ChainError> {
    let left = ready(q, max)?;
    if left == 0 {
        return Ok(());
    }
    let first = q.next_avail;
    match q.next_head {
        Some(head) if !q.asked => q.areas.prefetch_descs(head, left),
        Some(_) | None => q.asked = false,
    }
    let result = runs::<BEHIND>(q, buf, left);
    q.next_head = in_order(q, first);
    result
}

/// Shows the descriptors of heads that are available: those of the next `most` after `skip`.
#[inline(always)]
pub(super) fn upcoming(
    q: &Split,
    skip: u16,
    most: u16,
    mut look: impl FnMut(RawDesc, bool),
) -> u16 {
    let known = q.seen_avail.wrapping_sub(q.next_avail);
    // ORDERING: acquire, as in `ready`, which has seen what is known.
    let idx = if known > 0 { q.seen_avail } else { q.areas.avail_idx().load(Acquire) };
    let ahead = idx.wrapping_sub(q.next_avail).min(q.config.size).min(most);
    let mut heads = q.areas.heads(q.next_avail.wrapping_add(skip));
    for _ in skip..ahead {
        if let (_, Some(desc)) = heads.next() {
            look(desc, desc.third() & INDIRECT != 0);
        }
    }
    ahead
}

/// Asks for what the next burst of `count` chains will need, if they are available by now.
#[inline(always)]
pub(super) fn prefetch(q: &mut Split, count: usize) {
    if let Some(head) = q.next_head
        && usize::from(q.seen_avail.wrapping_sub(q.next_avail)) >= count
    {
        q.areas.prefetch_avail(q.next_avail, count);
        q.areas.prefetch_descs(head, count);
        q.asked = true;
    }
}

/// The next head, if the driver handed descriptors out in their order from entry `first` on: most
/// do.
#[inline(always)]
fn in_order(q: &Split, first: u16) -> Option<u16> {
    let last = q.next_avail.wrapping_sub(1);
    let (first_head, last_head) = (q.areas.head(first), q.areas.head(last));
    let mask = q.config.size.wrapping_sub(1);
    let step = last.wrapping_sub(first);
    let ordered = first_head.wrapping_add(step) & mask == last_head;
    ordered.then_some(last_head.wrapping_add(1) & mask)
}

#[inline(always)]
fn runs<const BEHIND: bool>(
    q: &mut Split,
    buf: &mut ChainBuf,
    mut left: usize,
) -> Result<(), ChainError> {
    let mut turned = false;
    while left > 0 && !buf.is_full() {
        let run = buf.chains.spare(left.min(RUN));
        let count = run.len();
        let done = if BEHIND {
            found(q, buf.writable, run)
        } else {
            let simple = simple(q.lookup.hit, buf.writable);
            q.areas.heads(q.next_avail).resolve(|desc| simple.resolve(desc), run)
        };
        buf.chains.advance(done);
        left = left.wrapping_sub(done);
        q.next_avail = advanced(q.next_avail, done);
        if done < count {
            left = left.wrapping_sub(odd::<BEHIND>(q, buf, left, &mut turned)?);
        }
    }
    Ok(())
}

/// A run behind a vIOMMU: buffers may be wherever the ring has found something.
#[inline(never)]
fn found(q: &Split, writable: bool, run: &mut [RawSeg]) -> usize {
    let Some(iotlb) = &q.lookup.iotlb else { return 0 };
    let simple = simple(q.lookup.hit, writable);
    let find = |desc| simple.resolve(desc).or_else(|| iotlb.found(&simple, desc));
    q.areas.heads(q.next_avail).resolve(find, run)
}

/// Reads the chains that a run left, until one looks simple again; returns how many.
#[inline(never)]
fn odd<const BEHIND: bool>(
    q: &mut Split,
    buf: &mut ChainBuf,
    left: usize,
    turned: &mut bool,
) -> Result<usize, ChainError> {
    let mut done = 0usize;
    while done < left && !buf.is_full() {
        let (head, desc) = q.areas.heads(q.next_avail).next();
        let flags = desc.map_or(INDIRECT, RawDesc::third);
        if flags & (NEXT | INDIRECT) == 0 {
            let simple = simple(q.lookup.hit, buf.writable);
            let again = done > 0 && desc.is_some_and(|desc| simple.resolve(desc).is_some());
            if again || buf.turn(flags & WRITE != 0, turned) {
                break;
            }
            if let Some(seg) = desc.and_then(|desc| q.lookup.resolve::<BEHIND>(&simple, desc)) {
                buf.chains.push(seg.tagged(u32::from(head)));
                q.next_avail = advanced(q.next_avail, 1);
                done = done.wrapping_add(1);
                continue;
            }
        }
        let first = buf.segs.len();
        let Lookup { hit, iotlb, .. } = &mut q.lookup;
        let iotlb = if BEHIND { iotlb.as_deref_mut() } else { None };
        let sink = Sink { map: q.areas.map(), iotlb, hit, segs: &mut buf.segs };
        let chain = careful(&q.areas, sink, &q.config, (head, desc));
        let _ = buf.settle(first, chain)?;
        q.next_avail = advanced(q.next_avail, 1);
        done = done.wrapping_add(1);
    }
    Ok(done)
}

/// What chains of one segment look like: one direct descriptor.
#[inline(always)]
fn simple(hit: Hit, writable: bool) -> Simple {
    let want = if writable { WRITE } else { 0 };
    hit.simple(u64::from(NEXT | INDIRECT | WRITE) << 32, u64::from(want) << 32)
}

/// The number of available entries, or `max` if there are more. Looks at the driver's index only
/// if what it was last does not do: its line is in the driver's cache, where it is written.
#[inline(always)]
fn ready(q: &mut Split, max: usize) -> Result<usize, ChainError> {
    let known = usize::from(q.seen_avail.wrapping_sub(q.next_avail));
    if known >= max {
        return Ok(max);
    }
    // ORDERING: acquire pairs with the driver's release of `avail.idx`: the entries before it, and
    // the descriptors that they name, are written.
    let avail = q.areas.avail_idx().load(Acquire);
    let ahead = avail.wrapping_sub(q.next_avail);
    let fetched = q.next_avail.wrapping_sub(q.published);
    let room = q.config.size.saturating_sub(fetched);
    if ahead > room {
        return Err(ChainError::AvailIndex { ahead, room });
    }
    q.seen_avail = avail;
    Ok(usize::from(ahead).min(max))
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a run has at most 256 chains")]
fn advanced(index: u16, run: usize) -> u16 {
    index.wrapping_add(run as u16)
}

/// A head, and its descriptor if the head is in range.
type Start = (u16, Option<RawDesc>);

/// Any chain.
#[inline(always)]
fn careful(
    areas: &SplitAreas,
    sink: Sink<'_>,
    config: &QueueConfig,
    (head, desc): Start,
) -> Result<Spread, ChainError> {
    let size = config.size;
    let Some(mut desc) = desc else { return Err(ChainError::Head { head, size }) };
    let mut walk = Walk::new(sink, size);
    let mut index = head;
    for _ in 0..size {
        let (flags, next) = (desc.third(), desc.fourth());
        if flags & INDIRECT != 0 {
            check_indirect(config.features.indirect, flags, index)?;
            walk.add_linked_table(desc, head)?;
        } else {
            walk.add_one(desc, flags, index)?;
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
