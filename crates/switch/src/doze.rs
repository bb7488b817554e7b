//! Whether a worker sleeps: who wants something from one that is awake need not wake it, and one
//! that sleeps touches nothing.
//!
//! ```text
//!  worker   asleep = true, fence, news? ─► no: wait in epoll ─► asleep = false, fence ─► next turn
//!  control  write news,     fence, asleep? ─► yes: wake it, or go on: it will see the news first
//! ```
//!
//! Of the two, one at least sees what the other has written.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Doze {
    asleep: AtomicBool,
}

impl Doze {
    /// Of a worker that runs, or of one that looks at nothing before it is woken.
    pub(crate) fn new(asleep: bool) -> Self {
        Self { asleep: AtomicBool::new(asleep) }
    }

    /// The worker is about to sleep. Returns whether it may: not if there are `news`.
    pub(crate) fn begin(&self, news: impl FnOnce() -> bool) -> bool {
        // ORDERING: Release pairs with the Acquire in `is_asleep`: what it did before is done.
        self.asleep.store(true, Ordering::Release);
        full_fence();
        let may = !news();
        if !may {
            self.end();
        }
        may
    }

    /// The worker is awake: what it looks at from now on is as new as the news that it was not
    /// woken for.
    pub(crate) fn end(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        full_fence();
    }

    /// After news were written: whether the worker sleeps. If not, it looks at them before it does.
    pub(crate) fn is_asleep(&self) -> bool {
        full_fence();
        // ORDERING: see `begin`.
        self.asleep.load(Ordering::Acquire)
    }
}

/// ORDERING: `SeqCst` orders a thread's store to one word before its load of the other one, on both
/// sides.
#[cfg(not(loom))]
fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

#[cfg(loom)]
use proofs::full_fence;

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p switch --release --lib proofs`. Each has a twin
/// without fences, which must fail.
#[cfg(loom)]
mod proofs {
    use std::cell::Cell;

    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
    use loom::sync::atomic::{AtomicBool, AtomicU64, fence};
    use loom::thread;

    use super::Doze;

    thread_local! {
        static FENCED: Cell<bool> = const { Cell::new(true) };
    }

    /// All threads of a model are this one.
    pub(super) fn full_fence() {
        if FENCED.get() {
            fence(SeqCst);
        }
    }

    /// Who sends something beside a worker that is about to sleep wakes it, or it does not sleep.
    fn wakes() {
        loom::model(|| {
            let shared = Arc::new((Doze::new(false), AtomicBool::new(false)));
            let worker = thread::spawn({
                let shared = Arc::clone(&shared);
                move || shared.0.begin(|| shared.1.load(Acquire))
            });
            shared.1.store(true, Release);
            let woken = shared.0.is_asleep();
            assert!(woken || !worker.join().unwrap(), "lost");
        });
    }

    #[test]
    fn no_message_is_lost() {
        wakes();
    }

    #[test]
    #[should_panic(expected = "lost")]
    fn without_fences_a_message_is_lost() {
        FENCED.set(false);
        wakes();
    }

    /// What control takes back, with the word that says that it may be used.
    struct Lent {
        doze: Doze,
        valid: AtomicBool,
        generation: AtomicU64,
        seen: AtomicU64,
        memory: UnsafeCell<()>,
    }

    impl Lent {
        /// A turn: the generation is acknowledged, then what is valid is used.
        fn turn(&self) -> u64 {
            let generation = self.generation.load(Acquire);
            self.seen.store(generation, Release);
            if self.valid.load(Relaxed) {
                // Loom checks that nobody changes it now.
                self.memory.with(|_| ());
            }
            generation
        }
    }

    /// A worker takes a turn, sleeps, and takes another one, while something is taken back.
    fn takes_back() {
        loom::model(|| {
            let lent = Arc::new(Lent {
                doze: Doze::new(false),
                valid: AtomicBool::new(true),
                generation: AtomicU64::new(0),
                seen: AtomicU64::new(0),
                memory: UnsafeCell::new(()),
            });
            let worker = thread::spawn({
                let lent = Arc::clone(&lent);
                move || {
                    let generation = lent.turn();
                    if lent.doze.begin(|| lent.generation.load(Acquire) != generation) {
                        lent.doze.end();
                    }
                    let _ = lent.turn();
                }
            });
            lent.valid.store(false, Relaxed);
            lent.generation.store(1, Release);
            if lent.seen.load(Acquire) == 1 || lent.doze.is_asleep() {
                lent.memory.with_mut(|_| ());
            }
            worker.join().unwrap();
        });
    }

    #[test]
    fn nobody_uses_what_was_taken_back() {
        takes_back();
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn without_fences_somebody_uses_what_was_taken_back() {
        FENCED.set(false);
        takes_back();
    }
}
