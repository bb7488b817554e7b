//! Reading chains from a packed ring.

use super::{AVAIL, Packed, Place, USED};
use crate::ChainError;
use crate::chain::{BURST_SEGS, Chain, ChainBuf, Token};
use crate::mem::{GuestPhysAddr, PackedAreas, RawDesc};
use crate::walk::{INDIRECT, NEXT, Sink, WRITE, Walk, check_indirect, narrow, unmapped};

/// Reads up to `max` chains: descriptors are taken as long as their flags say available.
pub(super) fn burst(q: &mut Packed, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError> {
    let size = q.config.size;
    let mut at = q.avail;
    let mut room = size.saturating_sub(q.fetched);
    let mut result = Ok(());
    let mut sink = Sink { map: q.areas.map(), hit: &mut q.hit, segs: &mut buf.segs };
    // Without room the descriptor here is one that was fetched and not completed.
    while buf.chains.len() < max && room > 0 && sink.segs.len() <= BURST_SEGS {
        let desc = q.areas.desc(at.index);
        let flags = desc.fourth();
        if flags & (AVAIL | USED) != at.available() {
            // What was used in this lap is behind us. Anything else is from the lap before.
            if flags & (AVAIL | USED) == at.used() {
                result = Err(ChainError::WrapCounter { index: at.index, wrap: at.wrap });
            }
            break;
        }
        q.areas.prefetch(at.forward(PREFETCH.min(size), size).index);
        let read = if flags & (NEXT | INDIRECT) == 0 {
            single(&mut sink, desc, size)
        } else {
            let ring = Ring { areas: &q.areas, indirect: q.config.features.indirect, room };
            ring.chained(&mut sink, desc, at)
        };
        match read {
            Ok(chain) => {
                let slots = chain.token.slots;
                at = at.forward(slots, size);
                room = room.wrapping_sub(slots);
                buf.chains.push(chain);
            }
            Err(fault) => {
                result = Err(fault);
                break;
            }
        }
    }
    q.avail = at;
    q.fetched = size.wrapping_sub(room);
    result
}

/// How many descriptors ahead the ring is asked for: the line after this one.
const PREFETCH: u16 = 4;

/// A chain of one direct descriptor: nearly all of them.
#[inline(always)]
fn single(sink: &mut Sink<'_>, desc: RawDesc, size: u16) -> Result<Chain, ChainError> {
    let id = desc.third();
    if id >= size {
        return Err(ChainError::BufferId { id, size });
    }
    let first = sink.segs.len();
    let (addr, len) = (GuestPhysAddr(desc.addr), desc.len());
    if !sink.map.resolve(sink.hit, addr, len, sink.segs) {
        return Err(unmapped(addr, len));
    }
    let segs = narrow(first)..narrow(sink.segs.len());
    Ok(Chain::single(Token { id, slots: 1 }, desc.fourth() & WRITE != 0, segs, len))
}

/// What a walk needs to know of the queue.
struct Ring<'a> {
    areas: &'a PackedAreas,
    indirect: bool,
    /// Slots that are not fetched already.
    room: u16,
}

impl Ring<'_> {
    /// A chain of several descriptors, or with an indirect table.
    #[inline(never)]
    fn chained(
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
