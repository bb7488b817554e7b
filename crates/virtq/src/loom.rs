//! Proofs of the orderings in `crate::notify`: loom runs the functions that the rings run through
//! every interleaving, and every value that a load may return.
//!
//! Each proof has a twin whose words have lost their fence and their release: it must fail, or the
//! proof would show nothing. Run with `RUSTFLAGS="--cfg loom" cargo test -p virtq --release loom`.

use loom::sync::Arc;
use loom::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};
use loom::thread;

use crate::config::WRAP_BIT;
use crate::notify::{self, EVENT_DESC, EVENT_DISABLE, PackedStep, packed_event, split_event};
use crate::shared::Shared;

/// A word of loom's. Without `INTACT` its stores are relaxed and its fence is none.
struct Word<A, const INTACT: bool>(A);

macro_rules! loom_word {
    ($int:ty, $atomic:ty) => {
        impl<const INTACT: bool> Shared<$int> for Word<$atomic, INTACT> {
            fn load(&self, order: Ordering) -> $int {
                self.0.load(order)
            }

            fn store(&self, value: $int, order: Ordering) {
                self.0.store(value, if INTACT { order } else { Relaxed });
            }

            fn full_fence() {
                if INTACT {
                    fence(SeqCst);
                }
            }
        }

        impl<const INTACT: bool> Word<$atomic, INTACT> {
            /// The word as the driver sees it, whose side is always intact.
            fn driver(&self) -> &$atomic {
                &self.0
            }
        }
    };
}

loom_word!(u16, AtomicU16);
loom_word!(u32, AtomicU32);
loom_word!(u64, AtomicU64);

/// Runs the device beside the driver in every interleaving; `sound` judges what both returned.
fn prove<S, D, R>(
    shared: fn() -> S,
    device: fn(&S) -> D,
    driver: fn(&S) -> R,
    sound: fn(D, R) -> bool,
) where
    S: Send + Sync + 'static,
    D: 'static,
    R: Send + 'static,
{
    loom::model(move || {
        let shared = Arc::new(shared());
        let other = thread::spawn({
            let shared = shared.clone();
            move || driver(&shared)
        });
        let here = device(&shared);
        assert!(sound(here, other.join().unwrap()), "lost");
    });
}

/// A word that is notified about, and the word that says whether to: split, then packed.
struct Split<const INTACT: bool> {
    index: Word<AtomicU16, INTACT>,
    event: Word<AtomicU16, INTACT>,
}

struct Packed<const INTACT: bool> {
    meta: Word<AtomicU64, INTACT>,
    event: Word<AtomicU32, INTACT>,
}

/// As an event index far from where the ring stands; as flags `NO_NOTIFICATION`.
const NOT_WANTED: u16 = 0x8000 | notify::NO_NOTIFICATION;

fn split<const INTACT: bool>() -> Split<INTACT> {
    Split { index: Word(AtomicU16::new(0)), event: Word(AtomicU16::new(NOT_WANTED)) }
}

fn packed<const INTACT: bool>() -> Packed<INTACT> {
    let event = packed_event(0, false, EVENT_DISABLE);
    Packed { meta: Word(AtomicU64::new(0)), event: Word(AtomicU32::new(event)) }
}

/// The device falls asleep while the driver makes a chain available: it must see the chain, or
/// be kicked.
fn kicks_split<const INTACT: bool>() {
    prove(
        split::<INTACT>,
        |ring| notify::arm(&ring.event, 0, || ring.index.load(Acquire) != 0),
        |ring| {
            ring.index.driver().store(1, Release);
            fence(SeqCst);
            notify::passes(ring.event.driver().load(Relaxed), 1, 0)
        },
        |seen, kicked| seen || kicked,
    );
}

#[test]
fn no_kick_is_lost_in_a_split_ring() {
    kicks_split::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_fence_a_kick_is_lost_in_a_split_ring() {
    kicks_split::<false>();
}

fn kicks_packed<const INTACT: bool>() {
    prove(
        packed::<INTACT>,
        |ring| {
            let event = packed_event(0, true, EVENT_DESC);
            notify::arm(&ring.event, event, || ring.meta.load(Acquire) != 0)
        },
        |ring| {
            ring.meta.driver().store(1, Release);
            fence(SeqCst);
            let (position, flags) = split_event(ring.event.driver().load(Relaxed));
            flags == EVENT_DESC && position == WRAP_BIT
        },
        |seen, kicked| seen || kicked,
    );
}

#[test]
fn no_kick_is_lost_in_a_packed_ring() {
    kicks_packed::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_fence_a_kick_is_lost_in_a_packed_ring() {
    kicks_packed::<false>();
}

/// The driver falls asleep while the device publishes: it must see the entry, or be called. The
/// fence is the one that the caller of `needs_call` owes.
fn calls_split<const INTACT: bool>() {
    prove(
        split::<INTACT>,
        |ring| {
            notify::publish(&ring.index, 1);
            Word::<AtomicU16, INTACT>::full_fence();
            notify::split_wants_call(&ring.event, 1, 0)
        },
        |ring| {
            ring.event.driver().store(0, Relaxed);
            fence(SeqCst);
            ring.index.driver().load(Acquire) == 1
        },
        |called, seen| called || seen,
    );
}

#[test]
fn no_call_is_lost_in_a_split_ring() {
    calls_split::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_fence_a_call_is_lost_in_a_split_ring() {
    calls_split::<false>();
}

fn calls_by_flag<const INTACT: bool>() {
    prove(
        split::<INTACT>,
        |ring| {
            notify::publish(&ring.index, 1);
            Word::<AtomicU16, INTACT>::full_fence();
            notify::split_allows_call(&ring.event)
        },
        |ring| {
            ring.event.driver().store(0, Relaxed);
            fence(SeqCst);
            ring.index.driver().load(Acquire) == 1
        },
        |called, seen| called || seen,
    );
}

#[test]
fn no_call_is_lost_by_flag() {
    calls_by_flag::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_fence_a_call_is_lost_by_flag() {
    calls_by_flag::<false>();
}

fn calls_packed<const INTACT: bool>() {
    prove(
        packed::<INTACT>,
        |ring| {
            notify::publish(&ring.meta, 1);
            Word::<AtomicU64, INTACT>::full_fence();
            let step = PackedStep { index: 1, wrap: true, passed: 1, size: 4, event_idx: true };
            notify::packed_wants_call(&ring.event, step, false)
        },
        |ring| {
            ring.event.driver().store(packed_event(0, true, EVENT_DESC), Relaxed);
            fence(SeqCst);
            ring.meta.driver().load(Acquire) == 1
        },
        |called, seen| called || seen,
    );
}

#[test]
fn no_call_is_lost_in_a_packed_ring() {
    calls_packed::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_fence_a_call_is_lost_in_a_packed_ring() {
    calls_packed::<false>();
}

/// An entry, and what publishes it.
struct Batch<const INTACT: bool> {
    entry: Word<AtomicU64, INTACT>,
    split: Word<AtomicU16, INTACT>,
    packed: Word<AtomicU64, INTACT>,
}

fn batch<const INTACT: bool>() -> Batch<INTACT> {
    Batch {
        entry: Word(AtomicU64::new(0)),
        split: Word(AtomicU16::new(0)),
        packed: Word(AtomicU64::new(0)),
    }
}

/// Who sees the used index sees the entries before it.
fn publish_split<const INTACT: bool>() {
    prove(
        batch::<INTACT>,
        |ring| {
            ring.entry.store(7, Relaxed);
            notify::publish(&ring.split, 1);
        },
        |ring| ring.split.driver().load(Acquire) == 0 || ring.entry.driver().load(Relaxed) == 7,
        |(), whole| whole,
    );
}

#[test]
fn a_used_index_publishes_its_entries() {
    publish_split::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_release_a_used_index_publishes_nothing() {
    publish_split::<false>();
}

/// Who sees the first descriptor of a batch used sees the second one used.
fn publish_packed<const INTACT: bool>() {
    prove(
        batch::<INTACT>,
        |ring| {
            ring.entry.store(7, Relaxed);
            notify::publish(&ring.packed, 1);
        },
        |ring| ring.packed.driver().load(Acquire) == 0 || ring.entry.driver().load(Relaxed) == 7,
        |(), whole| whole,
    );
}

#[test]
fn the_first_flags_publish_the_batch() {
    publish_packed::<true>();
}

#[test]
#[should_panic(expected = "lost")]
fn without_the_release_the_first_flags_publish_nothing() {
    publish_packed::<false>();
}
