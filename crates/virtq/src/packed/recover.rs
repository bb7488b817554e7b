//! Going on after a device that ended at any instruction: see the module `record`.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::fence;

use super::complete::used_meta;
use super::{AVAIL, Place, USED};
use crate::config::RingPosition;
use crate::mem::{PackedAreas, RawDesc, RecordPage};
use crate::notify;
use crate::record::{Entry, Recovery};
use crate::shared::Shared;
use crate::walk::NEXT;

/// What a slot's flags say, seen from a place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The driver has made it available in this lap.
    Available,
    /// The device has used it in this lap.
    Used,
    /// The driver has it available for the next lap.
    Next,
    /// Used in the lap before.
    Before,
}

/// A used descriptor that is to be written.
struct Missing {
    place: Place,
    meta: u64,
}

struct Ring<'a> {
    areas: &'a PackedAreas,
    size: u16,
}

/// Where to go on.
pub(crate) fn packed(areas: &PackedAreas, entry: Entry, record: &RecordPage) -> Recovery {
    let ring = Ring { areas, size: areas.size() };
    let (Some(from), Some(to)) = (ring.place(entry.from), ring.place(entry.to)) else {
        return Recovery::Unlikely("the place is beyond the ring");
    };
    // A device that ran never leaves zero there; a driver that sets a ring up does.
    if areas.device_event().load(Relaxed) == 0 {
        return Recovery::Unlikely("the device area is as new");
    }
    if !entry.meant {
        let last = entry.last.map(|last| ring.place(last));
        return ring.settled(to, last);
    }
    match ring.state(from) {
        State::Used | State::Next => Recovery::At(position(to)),
        State::Before => Recovery::Unlikely("the last burst was never available"),
        State::Available => match ring.missing((from, to), entry, record) {
            Some(missing) => {
                ring.publish(&missing);
                Recovery::At(position(to))
            }
            None => Recovery::Unlikely("the chains of the last burst are others"),
        },
    }
}

fn position(place: Place) -> RingPosition {
    let Place { index, wrap } = place;
    RingPosition::Packed { avail: index, avail_wrap: wrap, used: index, used_wrap: wrap }
}

impl Ring<'_> {
    fn place(&self, raw: u16) -> Option<Place> {
        Some(Place::from_raw(raw)).filter(|place| place.index < self.size)
    }

    fn state(&self, at: Place) -> State {
        let flags = self.desc(at).fourth();
        match (flags & AVAIL != 0, flags & USED != 0) {
            (avail, used) if avail == used && used == at.wrap => State::Used,
            (avail, used) if avail == used => State::Before,
            (avail, _) if avail == at.wrap => State::Available,
            _ => State::Next,
        }
    }

    fn desc(&self, at: Place) -> RawDesc {
        self.areas.desc(at.index)
    }

    /// Nothing was on its way: whether the ring can be at `to`, with its last used descriptor at
    /// `last`.
    fn settled(&self, to: Place, last: Option<Option<Place>>) -> Recovery {
        let here = self.state(to);
        if here == State::Used {
            return Recovery::Unlikely("the next descriptor is used");
        }
        let behind = match last {
            None => State::Used,
            Some(None) => return Recovery::Unlikely("the last descriptor is beyond the ring"),
            Some(Some(last)) => self.state(last),
        };
        // The driver makes descriptors available in their order: not what is behind us before
        // what is ahead.
        let full = here == State::Available;
        if behind == State::Used || (behind == State::Next && full) {
            Recovery::At(position(to))
        } else {
            Recovery::Unlikely("the last descriptor is not used")
        }
    }

    /// The used descriptors that the burst lacks, the first one first. None if the ring does not
    /// hold that burst.
    fn missing(
        &self,
        (from, to): (Place, Place),
        entry: Entry,
        record: &RecordPage,
    ) -> Option<Vec<Missing>> {
        let mut left = distance(from, to, self.size)?;
        let mut missing = Vec::new();
        let (mut at, mut chain) = (from, 0usize);
        while left > 0 {
            let whole = self.state(at) == State::Available;
            if !whole && !entry.shape.single {
                // What follows was written already.
                break;
            }
            let (id, slots) = if whole { self.chain(at, left)? } else { (0, 1) };
            if whole {
                let len = if entry.shape.lens { record.len_at(chain) } else { 0 };
                missing.push(Missing { place: at, meta: used_meta(at, id, len) });
            } else if self.state(at) != State::Used {
                return None;
            }
            at = at.forward(slots, self.size);
            left = left.checked_sub(slots)?;
            chain = chain.saturating_add(1);
        }
        if entry.shape.one {
            // The first descriptor stands for all, with the last id.
            let last = missing.pop()?;
            let meta = used_meta(from, RawDesc { addr: 0, meta: last.meta }.third(), 0);
            return Some(vec![Missing { place: from, meta }]);
        }
        Some(missing)
    }

    /// Buffer id and slots of the chain at `at`, which has at most `left`.
    fn chain(&self, mut at: Place, left: u16) -> Option<(u16, u16)> {
        for slots in 1..=left {
            let desc = self.desc(at);
            if desc.fourth() & NEXT == 0 {
                return Some((desc.third(), slots));
            }
            at = at.forward(1, self.size);
        }
        None
    }

    /// Writes `missing`, the first one last: the driver sees all of them with it.
    fn publish(&self, missing: &[Missing]) {
        for one in missing.iter().skip(1).rev() {
            self.areas.meta(one.place.index).store(one.meta, Relaxed);
            // ORDERING: for a successor that finds us dead in the middle: as the device does, one
            // after the other from the end.
            fence(Release);
        }
        if let Some(first) = missing.first() {
            notify::publish(&self.areas.meta(first.place.index), first.meta);
        }
    }
}

/// Slots from one place to the other, in a ring of `size`; none if that is more than a lap.
fn distance(from: Place, to: Place, size: u16) -> Option<u16> {
    if from.wrap == to.wrap {
        to.index.checked_sub(from.index)
    } else {
        size.checked_sub(from.index)?.checked_add(to.index).filter(|slots| *slots <= size)
    }
}
