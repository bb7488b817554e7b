//! Puts descriptors back that were written over by a device that ended before it published them:
//! see [`crate::inflight`].

use std::sync::atomic::Ordering::Relaxed;

use super::{AVAIL, Place, USED};
use crate::inflight::Saved;
use crate::mem::PackedAreas;
use crate::shared::Shared;

/// Whether the batch that starts at a place was published.
pub(crate) fn is_published(areas: &PackedAreas, (index, wrap): (u16, bool)) -> bool {
    let at = Place { index, wrap };
    areas.desc(index).fourth() & (AVAIL | USED) != at.available()
}

/// Writes `saved` from a place on; false, and nothing is written, if they were not there.
pub(crate) fn put_back(areas: &PackedAreas, (index, wrap): (u16, bool), saved: &[Saved]) -> bool {
    let start = Place { index, wrap };
    let places = || {
        let mut at = start;
        saved.iter().map(move |one| {
            let here = at;
            at = at.forward(1, areas.size());
            (here, one.meta)
        })
    };
    let state = u64::from(AVAIL | USED) << 48;
    let fits = saved.len() <= usize::from(areas.size())
        && places().all(|(at, meta)| meta & state == u64::from(at.available()) << 48);
    if fits {
        places().for_each(|(at, meta)| areas.meta(at.index).store(meta, Relaxed));
    }
    fits
}
