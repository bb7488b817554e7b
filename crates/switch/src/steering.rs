//! Virtio's automatic receive steering (virtio 1.3, section 5.1.6.5.6.1): a flow comes to a guest
//! on the pair on which the guest last sent frames of it.
//!
//! ```text
//!  a transmitq's worker ─ note(flow, pair) ─► ┌ set of the flow's hash ┐ ◄─ pair_of(flow) ─ any
//!                                             │ 4 x tag │ when │ pair  │                 worker
//!                                             └────────────────────────┘
//! ```
//!
//! One table for a port with several pairs, made when it gets its second one. A place in a set is
//! one word: readers and writers need no lock, and what two of them do at once is one of both.
//!
//! **Order.** A guest may send the frames of one flow on several queues: its application on one
//! CPU, its answers from the interrupt of another. If each of them moved the flow, frames that it
//! receives would overtake each other all the time. So a flow moves only when it was not seen for
//! [`HOLD`] on the pair where it is: a flow that goes to another queue for good moves once, one
//! that alternates stays.
//!
//! **Trust.** Only frames that a port sent are noted in its table: a hostile guest misleads itself.
//! **Limits.** [`SETS`] times [`WAYS`] flows of a port. A set whose places are all in use takes no
//! other flow: that one goes by its hash.
//! **Cost.** A word is written if it differs, and to say that a flow is still there every
//! [`REFRESH`]: nothing that another worker reads is written by every burst.

use std::sync::atomic::{AtomicU64, Ordering};

use port::{BURST_MAX, Frame};

use crate::room;

/// Sets of flows that are remembered.
const SETS: usize = 1024;
/// Flows in a set.
const WAYS: usize = 4;
/// Ticks for which a flow must be silent on a pair before it moves to another one.
pub(crate) const HOLD: u32 = 20;
/// Ticks after which it is noted anew that a flow is there.
const REFRESH: u32 = 5;
/// Nanoseconds of a tick: about a millisecond.
pub(crate) const TICK_SHIFT: u32 = 20;

const PAIR_BITS: u32 = 16;
const TICK_BITS: u32 = 24;
const TICK_MASK: u32 = (1 << TICK_BITS) - 1;

/// The time in ticks.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "ticks are compared modulo 2^24")]
pub(crate) fn ticks(now_ns: u64) -> u32 {
    (now_ns >> TICK_SHIFT) as u32
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Steering {
    sets: Box<[Set; SETS]>,
}

/// In one cache line.
#[derive(Debug)]
#[repr(align(32))]
struct Set([Place; WAYS]);

/// The word of a [`Note`].
#[derive(Debug)]
struct Place(AtomicU64);

impl Default for Steering {
    fn default() -> Self {
        let sets = [const { Set([const { Place(AtomicU64::new(0)) }; WAYS]) }; SETS];
        Self { sets: Box::new(sets) }
    }
}

/// Tag of a flow, when it was noted, its pair and one; 0 is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Note(u64);

impl Note {
    /// The tag is what the set's index does not tell of the hash, and more.
    #[inline(always)]
    fn new(hash: u32, pair: u16, now: u32) -> Self {
        let who = u64::from(pair).wrapping_add(1);
        let when = u64::from(now & TICK_MASK) << PAIR_BITS;
        Self(u64::from(hash >> 8) << (PAIR_BITS + TICK_BITS) | when | who)
    }

    #[inline(always)]
    fn is_of(self, hash: u32) -> bool {
        self.0 >> (PAIR_BITS + TICK_BITS) == u64::from(hash >> 8) && self.0 != 0
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the bits of the pair")]
    fn pair(self) -> Option<u16> {
        (self.0 as u16).checked_sub(1)
    }

    /// The hash of a flow that is noted in set `index`: its high bits are the tag, and its low
    /// ones, as many as the tag leaves out and more, are the set's number.
    fn hash(self, index: u32) -> u32 {
        ((self.0 >> (PAIR_BITS + TICK_BITS)) as u32) << 8 | index & 0xff
    }

    /// Ticks since it was written.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the bits of the time")]
    fn age(self, now: u32) -> u32 {
        now.wrapping_sub((self.0 >> PAIR_BITS) as u32) & TICK_MASK
    }
}

impl Place {
    #[inline(always)]
    fn note(&self) -> Note {
        // ORDERING: a word by itself: nothing else is to be seen with it.
        Note(self.0.load(Ordering::Relaxed))
    }

    #[inline(always)]
    fn put(&self, note: Note) {
        // ORDERING: as in `note`.
        self.0.store(note.0, Ordering::Relaxed);
    }
}

/// The hashes of a burst's flows, where the port that it came from notes them: so that the port to
/// which it goes need not look into the frames again.
#[derive(Debug, Default)]
pub(crate) struct FlowHashes(Vec<u32>);

impl FlowHashes {
    /// Makes room for a burst, so that nothing is allocated later.
    pub(crate) fn fit(&mut self) {
        room::reserve(&mut self.0, BURST_MAX);
    }

    /// Forgets them: another burst begins.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The hash of frame `index` of the burst.
    #[inline(always)]
    pub(crate) fn of(&self, index: u16, frame: &Frame) -> u32 {
        match self.0.get(usize::from(index)) {
            Some(hash) => *hash,
            None => packet::flow_hash(frame.head()),
        }
    }
}

impl Steering {
    #[inline(always)]
    fn set(&self, hash: u32) -> &Set {
        // The low bits: the tag has the others.
        const { assert!(SETS.is_power_of_two() && SETS >= 1 << 8) };
        #[expect(clippy::indexing_slicing, reason = "the mask is the length less one")]
        &self.sets[hash as usize & (SETS - 1)]
    }

    /// The guest sent a frame of the flow on `pair`.
    #[inline(always)]
    fn note(&self, hash: u32, pair: u16, now: u32) {
        let set = self.set(hash);
        let mut oldest = (HOLD, None);
        for place in &set.0 {
            let old = place.note();
            if old.is_of(hash) {
                let stays = if old.pair() == Some(pair) { REFRESH } else { HOLD };
                if old.age(now) >= stays {
                    place.put(Note::new(hash, pair, now));
                }
                return;
            }
            let age = if old.pair().is_none() { u32::MAX } else { old.age(now) };
            if age >= oldest.0 && (oldest.1.is_none() || age > oldest.0) {
                oldest = (age, Some(place));
            }
        }
        if let (_, Some(place)) = oldest {
            place.put(Note::new(hash, pair, now));
        }
    }

    /// The guest sent these frames on `pair`. Keeps the hashes of their flows.
    #[inline(never)]
    pub(crate) fn note_all(
        &self,
        frames: &[Frame],
        (pair, now): (u16, u32),
        hashes: &mut FlowHashes,
    ) {
        hashes.0.clear();
        for frame in frames {
            let hash = packet::flow_hash(frame.head());
            self.note(hash, pair, now);
            hashes.0.push(hash);
        }
    }

    /// All flows: hash, pair, and ticks since they were noted.
    pub(crate) fn places(&self, now: u32) -> Vec<(u32, u16, u32)> {
        let of_set = |(index, set): (u32, &Set)| {
            set.0.each_ref().map(|place| {
                let note = place.note();
                Some((note.hash(index), note.pair()?, note.age(now)))
            })
        };
        (0..).zip(self.sets.iter()).flat_map(of_set).flatten().collect()
    }

    /// A flow that was noted elsewhere so many ticks before now, if there is a place for it.
    pub(crate) fn restore(&self, hash: u32, pair: u16, (now, age): (u32, u32)) {
        let age = age.min(TICK_MASK / 2);
        let places = &self.set(hash).0;
        let free = || places.iter().find(|place| place.note().pair().is_none());
        if let Some(place) = places.iter().find(|place| place.note().is_of(hash)).or_else(free) {
            place.put(Note::new(hash, pair, now.wrapping_sub(age)));
        }
    }

    /// The pair on which the guest last sent frames of the flow.
    #[inline(always)]
    pub(crate) fn pair_of(&self, hash: u32) -> Option<u16> {
        let notes = self.set(hash).0.each_ref().map(Place::note);
        notes.into_iter().find(|note| note.is_of(hash))?.pair()
    }
}

#[cfg(test)]
mod tests {
    use super::{HOLD, Place, REFRESH, SETS, Steering, TICK_MASK, WAYS};

    /// A flow of the same set as flow 7.
    fn of_set_7(number: usize) -> u32 {
        u32::try_from(number.wrapping_mul(SETS).wrapping_add(7)).unwrap()
    }

    #[test]
    fn a_new_flow_is_where_it_was_seen_first() {
        let steering = Steering::default();
        assert_eq!(steering.pair_of(7), None);
        steering.note(7, 255, 1);
        assert_eq!(steering.pair_of(7), Some(255));
        assert_eq!(steering.pair_of(of_set_7(1)), None);
        steering.note(0, 0, 0);
        assert_eq!(steering.pair_of(0), Some(0), "nothing but zeros is a flow too");
    }

    #[test]
    fn a_flow_moves_when_it_left_its_pair_and_not_when_it_alternates() {
        let steering = Steering::default();
        for now in 0..200 {
            steering.note(7, 1, now);
            steering.note(7, 2, now);
            assert_eq!(steering.pair_of(7), Some(1), "it alternates");
        }
        let mut moved = None;
        for now in 200..300 {
            steering.note(7, 2, now);
            if moved.is_none() && steering.pair_of(7) == Some(2) {
                moved = Some(now - 199);
            }
        }
        assert!(moved.is_some_and(|ticks| (HOLD - REFRESH..=HOLD).contains(&ticks)), "{moved:?}");
    }

    #[test]
    fn a_full_set_takes_another_flow_when_one_of_its_own_is_silent() {
        // Around the end of the clock's bits too.
        for start in [0, TICK_MASK - HOLD / 2] {
            let steering = Steering::default();
            let pairs = || [0, 1, 2, 3, 4].map(|n| steering.pair_of(of_set_7(n)));
            for n in 0..WAYS {
                steering.note(of_set_7(n), 1, start);
            }
            steering.note(of_set_7(WAYS), 2, start + HOLD - 1);
            assert_eq!(pairs(), [Some(1), Some(1), Some(1), Some(1), None]);
            for n in 1..WAYS {
                steering.note(of_set_7(n), 1, start + HOLD);
            }
            steering.note(of_set_7(WAYS), 2, start + HOLD);
            assert_eq!(pairs(), [None, Some(1), Some(1), Some(1), Some(2)]);
        }
    }

    #[test]
    fn silent_flows_keep_their_places_while_others_are_free() {
        let steering = Steering::default();
        for n in 0..WAYS {
            steering.note(of_set_7(n), 1, u32::try_from(n).unwrap() * 2 * HOLD);
        }
        for n in 0..WAYS {
            assert_eq!(steering.pair_of(of_set_7(n)), Some(1), "{n}");
        }
        steering.note(of_set_7(WAYS), 2, 20 * HOLD);
        assert_eq!(steering.pair_of(of_set_7(0)), None, "the oldest goes first");
        assert_eq!(steering.pair_of(of_set_7(1)), Some(1));
    }

    #[test]
    fn flows_go_on_in_another_table() {
        let (old, new) = (Steering::default(), Steering::default());
        let flows = [(0, 0), (0xffff_ffff, 1), (0x1234_5678, 2), (of_set_7(9), 3)];
        for (hash, pair) in flows {
            old.note(hash, pair, 100);
        }
        let places = old.places(103);
        assert_eq!(places.len(), flows.len());
        for (hash, pair, age) in places {
            assert_eq!(age, 3);
            new.restore(hash, pair, (7, age));
        }
        for (hash, pair) in flows {
            assert_eq!(new.pair_of(hash), Some(pair), "{hash:#x}");
        }
        assert_eq!(new.places(7).iter().map(|place| place.2).max(), Some(3), "as old as it was");
        // A full set takes nothing more.
        for n in 0..=WAYS {
            new.restore(of_set_7(n + 20), 4, (7, u32::MAX));
        }
        assert_eq!(new.pair_of(of_set_7(9)), Some(3));
        assert_eq!(new.places(7).len(), 3 + WAYS);
    }

    #[test]
    fn nothing_is_written_while_nothing_changes() {
        let steering = Steering::default();
        steering.note(7, 1, 10);
        let word = |steering: &Steering| steering.set(7).0.each_ref().map(Place::note);
        let before = word(&steering);
        for now in 10..10 + REFRESH {
            steering.note(7, 1, now);
        }
        assert_eq!(word(&steering), before);
        steering.note(7, 1, 10 + REFRESH);
        assert_ne!(word(&steering), before);
    }
}
