//! Reading chains from a split ring.

use std::sync::atomic::Ordering::Acquire;

use super::Split;
use crate::ChainError;
use crate::chain::{BURST_SEGS, Chain, ChainBuf, Token};
use crate::mem::{GuestPhysAddr, RawDesc, SplitAreas};
use crate::shared::Shared;
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect, narrow, unmapped};

/// Reads up to `max` chains: one look at the available index, then one pass over the entries.
pub(super) fn burst(q: &mut Split, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    // ORDERING: acquire pairs with the driver's release of `avail.idx`: the entries before it, and
    // the descriptors that they name, are written.
    let avail = q.areas.avail_idx().load(Acquire);
    let ahead = avail.wrapping_sub(q.next_avail);
    let fetched = q.next_avail.wrapping_sub(q.published);
    let room = q.config.size.saturating_sub(fetched);
    if ahead > room {
        return Err(ChainError::AvailIndex { ahead, room });
    }
    let count = ahead.min(u16::try_from(max).unwrap_or(u16::MAX));
    let mut next = q.next_avail;
    let end = next.wrapping_add(count);
    let mut result = Ok(());
    let mut sink = Sink { map: q.areas.map(), hit: &mut q.hit, segs: &mut buf.segs };
    while next != end && sink.segs.len() <= BURST_SEGS {
        let head = q.areas.avail_entry(next);
        let read = if head > q.areas.mask() {
            Err(ChainError::Head { head, size: q.config.size })
        } else {
            q.areas.prefetch_desc(q.areas.avail_entry(next.wrapping_add(PREFETCH)));
            let desc = q.areas.desc(head);
            if desc.third() & (NEXT | INDIRECT) == 0 {
                single(&mut sink, desc, head)
            } else {
                chained(&q.areas, &mut sink, q.config.features.indirect, (head, desc))
            }
        };
        match read {
            Ok(chain) => buf.chains.push(chain),
            Err(fault) => {
                result = Err(fault);
                break;
            }
        }
        next = next.wrapping_add(1);
    }
    q.next_avail = next;
    result
}

/// How many entries ahead descriptors are asked for. An entry that is not available yet names a
/// stale descriptor, which costs nothing but the prefetch.
const PREFETCH: u16 = 4;

/// A chain of one direct descriptor: nearly all of them.
#[inline(always)]
fn single(sink: &mut Sink<'_>, desc: RawDesc, head: u16) -> Result<Chain, ChainError> {
    let first = sink.segs.len();
    let (addr, len) = (GuestPhysAddr(desc.addr), desc.len());
    if !sink.map.resolve(sink.hit, addr, len, sink.segs) {
        return Err(unmapped(addr, len));
    }
    let segs = narrow(first)..narrow(sink.segs.len());
    Ok(Chain::single(Token { id: head, slots: 1 }, desc.third() & WRITE != 0, segs, len))
}

/// A chain of several descriptors, or with an indirect table.
#[inline(never)]
fn chained(
    areas: &SplitAreas,
    sink: &mut Sink<'_>,
    indirect: bool,
    (head, mut desc): (u16, RawDesc),
) -> Result<Chain, ChainError> {
    let size = areas.mask().wrapping_add(1);
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
        if next > areas.mask() {
            return Err(ChainError::Next { next, table: u32::from(size) });
        }
        index = next;
        desc = areas.desc(index);
    }
    Err(ChainError::Loop { head, table: u32::from(size) })
}
