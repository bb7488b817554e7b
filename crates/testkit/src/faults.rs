//! Middleware that makes a port fail on purpose, as a seed says.
//!
//! ```text
//!  switch ─► FaultyEgress ─► any Egress          now and then: a panic, a fault, a spurious wake
//!  switch ◄─ FaultyIngress ◄─ any Ingress
//! ```

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use port::{Batch, Egress, FrameBuf, Ingress, Notified, QueueCounters, QueueFault};
use virtq::mem::SegStore;

use crate::Rng;

/// How often what goes wrong: once in so many calls on average; 0 is never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// The half panics, as a bug would make it.
    pub panic: u64,
    /// The half reports a host fault.
    pub fault: u64,
    /// An ingress gives nothing although it has frames (a late wake-up).
    pub nothing: u64,
    /// Arming says that there is work although there is none.
    pub spurious: u64,
}

impl Faults {
    fn happens(rng: &mut Rng, of: u64) -> bool {
        of > 0 && rng.one_in(of)
    }
}

fn injected() -> QueueFault {
    QueueFault::Host { what: "injected".into(), error: "by the test's seed".into() }
}

#[expect(clippy::panic, reason = "the bug that the switch has to contain")]
fn panic_now() -> ! {
    panic!("injected panic");
}

/// An ingress that fails.
#[derive(Debug)]
pub struct FaultyIngress<I> {
    inner: I,
    faults: Faults,
    rng: Rng,
    /// Whether the inner ingress has a batch to release.
    received: bool,
}

impl<I: Ingress> FaultyIngress<I> {
    /// Wraps `inner`.
    pub fn new(inner: I, faults: Faults, seed: u64) -> Self {
        Self { inner, faults, rng: Rng::new(seed), received: false }
    }

    /// What was wrapped.
    pub fn into_inner(self) -> I {
        self.inner
    }
}

impl<I: Ingress + 'static> Ingress for FaultyIngress<I> {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        self.received = false;
        if Faults::happens(&mut self.rng, self.faults.panic) {
            panic_now();
        }
        if Faults::happens(&mut self.rng, self.faults.nothing) {
            frames.clear();
            return frames.batch(SegStore::empty(), None);
        }
        if Faults::happens(&mut self.rng, self.faults.fault) {
            frames.clear();
            return frames.batch(SegStore::empty(), Some(injected()));
        }
        self.received = true;
        self.inner.receive(frames)
    }

    fn release(&mut self) {
        if self.received {
            self.inner.release();
        }
    }

    fn notify(&mut self) -> Notified {
        self.inner.notify()
    }

    fn arm(&mut self) -> bool {
        self.inner.arm() || Faults::happens(&mut self.rng, self.faults.spurious)
    }

    fn disarm(&mut self) {
        self.inner.disarm();
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.inner.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// An egress that fails.
#[derive(Debug)]
pub struct FaultyEgress<E> {
    inner: E,
    faults: Faults,
    rng: Rng,
}

impl<E: Egress> FaultyEgress<E> {
    /// Wraps `inner`.
    pub fn new(inner: E, faults: Faults, seed: u64) -> Self {
        Self { inner, faults, rng: Rng::new(seed) }
    }

    /// What was wrapped.
    pub fn into_inner(self) -> E {
        self.inner
    }
}

impl<E: Egress + 'static> Egress for FaultyEgress<E> {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if Faults::happens(&mut self.rng, self.faults.panic) {
            panic_now();
        }
        if Faults::happens(&mut self.rng, self.faults.fault) {
            let frames = u64::try_from(picked.len()).unwrap_or(0);
            self.inner.counters().egress.dropped(port::DropReason::UplinkError, frames);
            return Err(injected());
        }
        self.inner.send(batch, picked)
    }

    fn held(&self) -> u64 {
        self.inner.held()
    }

    fn resume(&mut self) -> Result<(), QueueFault> {
        self.inner.resume()
    }

    fn notify(&mut self) -> Notified {
        self.inner.notify()
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.inner.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}
