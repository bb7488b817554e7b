//! What passes a port, copied to somebody who looks: a tap around both halves of every pair.
//!
//! ```text
//!  Ingress ◄─ TappedIngress ─┐ one ring per half:        ┌─► Capture::drain ─► frames by time
//!  Egress  ◄─ TappedEgress  ─┤ one producer, no lock ────┤   (a thread of its own)
//!            (worker)        └─ eventfd if it sleeps ────┘
//! ```
//!
//! A tap is wrapped around a half when a capture begins and taken off when it ends, so that it
//! costs nothing when it is off. Frames are copied whole (up to the snap length) into a ring of
//! bounded size; what finds no room is counted as skipped, and the worker goes on.
//!
//! **What is shown.** *In*: frames as they came, before the switch edits their tags. *Out*: frames
//! as they leave, after the edits. Frames that were dropped are shown only if that is asked for,
//! with their reason: those of the way in that the switch dropped, and those that the way out
//! could not deliver. What an ingress or the kernel refuses never becomes a frame of the switch,
//! and is only counted at the port.
//!
//! **The books.** For each direction: `accepted = stored + skipped`, and without a filter
//! `accepted = seen`, which is what passed (with dropped frames: what came to an end) meanwhile.
//!
//! **Limits.** [`SNAPLEN_MAX`] bytes of a frame, [`RING_BYTES`] of a ring.
//!
//! **Cost when on.** Frames are handed to a tapped egress one by one, so that each one's fate is
//! known; and every frame is copied once more.

mod egress;
pub mod filter;
mod ingress;
mod reader;
mod ring;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::{Counter, DropReason};
pub use egress::EgressTap;
pub use filter::{Filter, FilterError};
pub use ingress::{Fates, IngressTap};
pub use reader::{Capture, Captured};

/// The most bytes of a frame that are copied: the largest frame and its tags.
pub const SNAPLEN_MAX: u32 = 65_535 + 128;
/// Bytes of the ring of one half.
pub const RING_BYTES: usize = 2 * 1024 * 1024;

/// Which way a frame goes, as the switch sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Into the switch.
    In,
    /// Out of the switch.
    Out,
}

/// What is to be captured.
#[derive(Debug, Clone)]
pub struct CaptureSettings {
    /// Which frames.
    pub filter: Filter,
    /// At most so many bytes of each.
    pub snaplen: u32,
    /// Dropped frames too.
    pub drops: bool,
    /// Bytes of the ring of each half.
    pub ring_bytes: usize,
}

impl Default for CaptureSettings {
    fn default() -> Self {
        Self {
            filter: Filter::default(),
            snaplen: SNAPLEN_MAX,
            drops: false,
            ring_bytes: RING_BYTES,
        }
    }
}

/// What was counted in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptureTotals {
    /// Frames that passed, whether the filter let them through or not.
    pub seen: u64,
    /// Frames that the filter let through.
    pub accepted: u64,
    /// Accepted frames for which there was no room.
    pub skipped: u64,
}

/// The switch's end of a capture: makes a tap for each half of a port.
#[derive(Debug, Clone)]
pub struct Tap(Arc<Shared>);

impl Tap {
    /// Ends the capture for `reason`, which the other end is told. The first reason stays.
    pub fn end(&self, reason: &str) {
        let _ = self.0.ended().get_or_insert_with(|| reason.to_owned());
        self.0.wake();
    }

    /// Whether both are of the same capture.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What both ends of a capture share.
#[derive(Debug)]
struct Shared {
    settings: CaptureSettings,
    /// Rings that the reader has not seen yet.
    new: Mutex<Vec<ring::Outlet>>,
    ended: Mutex<Option<String>>,
    wake: OwnedFd,
    /// The reader waits: it is to be woken.
    asleep: AtomicBool,
}

impl Shared {
    fn new(settings: CaptureSettings) -> std::io::Result<Self> {
        Ok(Self {
            settings,
            new: Mutex::default(),
            ended: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            asleep: AtomicBool::new(false),
        })
    }

    fn new_rings(&self) -> MutexGuard<'_, Vec<ring::Outlet>> {
        self.new.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> MutexGuard<'_, Option<String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the reader if it sleeps; once per burst.
    fn wake_if_asleep(&self) {
        // ORDERING: SeqCst orders the bytes that were published before the look at `asleep`; it
        // pairs with the fence in `fall_asleep`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    fn wake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// From now on the reader is woken. It has to look once more before it waits.
    fn fall_asleep(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        self.asleep.store(true, Ordering::Relaxed);
        // ORDERING: SeqCst orders the announcement before the look at the rings; it pairs with
        // the fence in `wake_if_asleep`.
        fence(Ordering::SeqCst);
    }

    /// The reader does not want to be woken by frames.
    fn stay_awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Counters of one ring; its producer writes.
#[derive(Debug, Default)]
struct Counts {
    seen: Counter,
    accepted: Counter,
    skipped: Counter,
}

impl Counts {
    fn read(&self) -> CaptureTotals {
        // What is accepted was seen before: read the other way round, it is never more.
        let skipped = self.skipped.get();
        let accepted = self.accepted.get();
        CaptureTotals { seen: self.seen.get(), accepted, skipped }
    }
}

impl CaptureTotals {
    fn add(&mut self, other: &Self) {
        self.seen = self.seen.wrapping_add(other.seen);
        self.accepted = self.accepted.wrapping_add(other.accepted);
        self.skipped = self.skipped.wrapping_add(other.skipped);
    }
}

/// A reason as a byte; 0 is none.
fn code(reason: Option<DropReason>) -> u8 {
    reason.map_or(0, |reason| (reason as u8).wrapping_add(1))
}

/// The reason of a byte that [`code`] made.
fn reason(code: u8) -> Option<DropReason> {
    DropReason::ALL.get(usize::from(code.checked_sub(1)?)).copied()
}
