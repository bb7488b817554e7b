//! Frames that cannot be delivered yet, in private memory, in their order.
//!
//! ```text
//!  put ─► parcel, parcel, parcel ─► take ─► delivered as far as it goes ─► give_back ─┐
//!         ▲                                  put: what became of those before         │
//!         └──────────────────────── the rest, behind that ◄───────────────────────────┘
//! ```
//!
//! **Limits.** As many parcels as it was made with, of a burst or 128 KiB each; what has no room is
//! not taken. While one is taken out, what becomes of its frames may need a few more (segments).

mod parked;

use std::collections::VecDeque;
use std::io;

use crate::lane::Parcel;
use crate::{Batch, Frame, FrameBuf};
pub use parked::Parked;

/// Parcels for what became of frames that waited.
const EARLY: usize = 4;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Backlog {
    parcels: VecDeque<Waiting>,
    /// Empty ones.
    spare: Vec<Waiting>,
    /// What became of the frames of the parcel that is taken out, before its rest.
    early: Option<VecDeque<Waiting>>,
}

/// A parcel that waits.
#[derive(Debug)]
pub struct Waiting {
    parcel: Box<Parcel>,
    /// Frames at its beginning that are dealt with.
    done: usize,
}

impl Waiting {
    /// The frames that wait.
    pub fn batch<'a>(&'a self, frames: &'a mut FrameBuf) -> Batch<'a> {
        self.parcel.batch(self.done, frames)
    }

    fn len(&self) -> usize {
        self.parcel.len().saturating_sub(self.done)
    }
}

impl Backlog {
    /// Has room for so many parcels.
    ///
    /// # Errors
    ///
    /// There is no memory left.
    pub fn new(parcels: usize) -> io::Result<Self> {
        let all = parcels.saturating_add(EARLY);
        let new = |_| Ok(Waiting { parcel: Parcel::new()?, done: 0 });
        let spare = (0..all).map(new).collect::<io::Result<_>>()?;
        Ok(Self { parcels: VecDeque::new(), spare, early: None })
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }

    /// Frames that wait.
    pub fn frames(&self) -> u64 {
        self.parcels.iter().map(|waiting| waiting.len() as u64).sum()
    }

    /// Copies a frame, one of `batch`, behind the others; while a parcel is taken out, before the
    /// rest of that. Returns false if there is no room.
    pub fn put(&mut self, batch: &Batch<'_>, frame: &Frame) -> bool {
        let Self { parcels, spare, early } = self;
        let kept = if early.is_some() { 0 } else { EARLY };
        let list = early.as_mut().unwrap_or(parcels);
        if list.back_mut().is_some_and(|last| last.parcel.put(batch, frame)) {
            return true;
        }
        if spare.len() <= kept {
            return false;
        }
        list.extend(spare.pop());
        list.back_mut().is_some_and(|last| last.parcel.put(batch, frame))
    }

    /// Copies the frames `picked` of a batch, as [`Self::put`] does. Returns for how many there is
    /// no room.
    pub fn put_picked(&mut self, batch: &Batch<'_>, picked: &[u16]) -> u64 {
        let mut lost = 0u64;
        for index in picked {
            let frame = batch.frames().get(usize::from(*index));
            lost = lost.wrapping_add(u64::from(frame.is_none_or(|f| !self.put(batch, f))));
        }
        lost
    }

    /// Takes the first parcel out; it comes back with [`Self::give_back`].
    pub fn take(&mut self) -> Option<Waiting> {
        let waiting = self.parcels.pop_front()?;
        self.early = Some(VecDeque::new());
        Some(waiting)
    }

    /// Takes a parcel back whose next `done` frames are dealt with.
    pub fn give_back(&mut self, mut waiting: Waiting, done: usize) {
        waiting.done = waiting.done.saturating_add(done);
        if waiting.len() > 0 {
            self.parcels.push_front(waiting);
        } else {
            waiting.parcel.clear();
            self.spare.push(Waiting { done: 0, ..waiting });
        }
        for waiting in self.early.take().into_iter().flatten().rev() {
            self.parcels.push_front(waiting);
        }
    }

    /// Forgets everything. Returns how many frames waited.
    pub fn clear(&mut self) -> u64 {
        let count = self.frames();
        for mut waiting in self.parcels.drain(..) {
            waiting.parcel.clear();
            self.spare.push(Waiting { done: 0, ..waiting });
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::Backlog;
    use crate::{Batch, Frame, FrameBuf};

    fn with_frames<T>(numbers: &[u8], then: impl FnOnce(&Batch<'_>) -> T) -> T {
        let mut frames = FrameBuf::default();
        for number in numbers {
            frames.slot().unwrap().fill_private(&[*number; 60]);
            frames.keep();
        }
        then(&frames.batch(virtq::mem::SegStore::empty(), None))
    }

    fn put(backlog: &mut Backlog, numbers: &[u8]) -> usize {
        with_frames(numbers, |batch| {
            let put = |frame: &&Frame| backlog.put(batch, frame);
            batch.frames().iter().take_while(put).count()
        })
    }

    fn numbers(backlog: &mut Backlog) -> Vec<u8> {
        let mut all = Vec::new();
        let mut frames = FrameBuf::default();
        while let Some(waiting) = backlog.take() {
            let found: Vec<u8> =
                waiting.batch(&mut frames).frames().iter().map(|f| f.head()[0]).collect();
            backlog.give_back(waiting, found.len());
            all.extend(found);
        }
        all
    }

    #[test]
    fn frames_stay_in_their_order_whatever_becomes_of_those_before() {
        let mut backlog = Backlog::new(4).unwrap();
        assert_eq!(put(&mut backlog, &[1, 2, 3, 4]), 4);
        let first = backlog.take().unwrap();
        // The first was delivered, the second became two that wait.
        assert_eq!(put(&mut backlog, &[20, 21]), 2);
        backlog.give_back(first, 2);
        assert_eq!(put(&mut backlog, &[5]), 1);
        assert_eq!(backlog.frames(), 5);
        assert_eq!(numbers(&mut backlog), [20, 21, 3, 4, 5]);
        assert!(backlog.is_empty());
    }

    #[test]
    fn it_takes_no_more_than_it_has_room_for_and_has_it_again() {
        let mut backlog = Backlog::new(2).unwrap();
        let burst: Vec<u8> = (0..64).collect();
        for _ in 0..3 {
            let taken: usize = (0..3).map(|_| put(&mut backlog, &burst)).sum();
            assert_eq!((taken, backlog.frames()), (128, 128));
            assert_eq!(numbers(&mut backlog), [burst.clone(), burst.clone()].concat());
            assert_eq!(put(&mut backlog, &[1]), 1);
            assert_eq!((backlog.clear(), backlog.frames()), (1, 0));
        }
    }
}
