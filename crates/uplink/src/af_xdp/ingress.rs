//! Frames from the interface: taken where the kernel wrote them.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{
    BURST_BYTES, BURST_MAX, Batch, DropReason, Frame, FrameBuf, Ingress, Notified, Offload,
    QueueCounters, QueueFault,
};
use virtq::mem::{MapError, Pool, SharedMap, SharedSlots};

use crate::sys::xdp::{Consumer, Desc, Producer};

use super::cut::cut;
use super::layout::{Area, CHUNK, RX_FRAMES, RX_PARTS_MAX};
use super::program::MARK;
use super::socket::{Poked, Socket};
use super::unfinished::unfinished;

#[expect(clippy::cast_possible_truncation, reason = "64 fits")]
const BURST: u32 = BURST_MAX as u32;

/// Turns without a frame after which the driver is polled in one of [`SELDOM`] only: a call that
/// finds nothing takes as long as a frame or two. When nobody polls for a while the driver starts
/// by itself (`deferral`), so no frame waits for the next one longer than that.
const EAGER: u32 = 4;
/// A power of two.
const SELDOM: u32 = 16;

/// Frames that are asked for ahead of the one that is taken: another CPU may have written them.
const AHEAD: u32 = 4;
/// Lines of each: what becomes the head.
const LINES: usize = 2;

/// What an [`AfXdpIngress`] is made of.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) counters: Arc<QueueCounters>,
    pub(super) rx: Consumer<Desc>,
    pub(super) fill: Producer<u64>,
    pub(super) busy_poll: bool,
    /// Frames may have checksums that nobody finished.
    pub(super) unfinished: bool,
    /// Before each frame stands how it is to be cut.
    pub(super) marked: bool,
    /// Dropped last: it has the place that the rings are about.
    pub(super) socket: Arc<Socket>,
}

/// Frames from the interface.
#[derive(Debug)]
pub struct AfXdpIngress {
    parts: Incoming,
    area: Area,
    slots: SharedSlots,
    /// Chunks of the last burst, to be given back.
    pub(super) taken: Vec<u32>,
    fault: Option<QueueFault>,
    /// Turns without a frame since the last one.
    empty: u32,
}

/// What became of the descriptors at the head of the ring.
enum Taken {
    /// A frame of that many descriptors and bytes.
    Frame(u32, u32),
    /// A frame of that many descriptors and bytes that is dropped.
    Dropped(u32, u32, DropReason),
    /// The rest of the frame is not there yet.
    Partial,
    /// A descriptor that cannot be.
    Bad(Desc),
}

impl AfXdpIngress {
    /// `ours` are the chunks that the kernel does not have yet.
    pub(super) fn new(
        parts: Incoming,
        map: &SharedMap,
        (place, ours): (u32, Vec<u32>),
    ) -> Result<Self, MapError> {
        let area = Area::receive(place);
        let slots = SharedSlots::new(map, area.offset(), area.chunks(), CHUNK)?;
        let mut taken = Vec::with_capacity(RX_FRAMES as usize);
        taken.extend(ours);
        let mut new = Self { parts, area, slots, taken, fault: None, empty: 0 };
        new.refill();
        Ok(new)
    }

    /// Gives all taken chunks to the kernel.
    fn refill(&mut self) {
        let fill = &mut self.parts.fill;
        // The ring has an entry for each chunk of the area, so there is room.
        let room = fill.room(u32::try_from(self.taken.len()).unwrap_or(u32::MAX));
        let count = self.taken.len().min(room as usize);
        for chunk in self.taken.drain(..count) {
            fill.put(self.area.address(chunk, 0));
        }
        fill.publish();
    }

    /// Looks for work when there is none: what only a system call can move on.
    #[cold]
    #[inline(never)]
    fn look_closer(&mut self) {
        let socket = &self.parts.socket;
        // ORDERING: a hint between the halves; the kernel's own lock orders the frames.
        // Taken before the system call, so that a hint given meanwhile stays. While the interface
        // is down nothing moves, and trying would keep the worker awake.
        if socket.stuck.swap(false, Ordering::Relaxed)
            && matches!(socket.fds.nudge_tx(), Poked::Again | Poked::Lost)
        {
            socket.stuck.store(true, Ordering::Relaxed);
        }
        self.empty = self.empty.wrapping_add(1);
        let eager = self.empty <= EAGER || self.empty & SELDOM.wrapping_sub(1) == 0;
        if self.parts.busy_poll && eager || self.parts.fill.needs_wakeup() {
            self.poke();
        }
    }

    fn poke(&mut self) {
        if let Poked::Gone(errno) = self.parts.socket.poke_rx() {
            let what = format!("receive from interface {}", self.parts.socket.name());
            let error = io::Error::from(errno).to_string();
            self.fault = Some(QueueFault::Host { what, error });
        }
    }

    /// Asks the CPU for the frame that entry `at` of the ring is of.
    #[inline(always)]
    fn prefetch(&self, at: u32) {
        let desc = self.parts.rx.peek(at);
        let Some(place) = self.area.locate(desc) else { return };
        let before = if self.parts.marked { place.skip.min(MARK) } else { 0 };
        let (skip, len) = (place.skip.wrapping_sub(before), desc.len.saturating_add(before));
        if let Some(piece) = self.slots.store().one(Pool::span(place.chunk, skip, len)) {
            piece.prefetch(if before > 0 { LINES.wrapping_add(1) } else { LINES });
        }
    }

    /// Takes the frame whose first descriptor is entry `at` of the ring.
    #[inline(always)]
    fn take(&mut self, at: u32, frame: &mut Frame) -> Taken {
        let desc = self.parts.rx.peek(at);
        if desc.options & libc::XDP_PKT_CONTD != 0 {
            return self.take_spread(at, frame);
        }
        let Some(place) = self.area.locate(desc) else { return Taken::Bad(desc) };
        self.taken.push(place.chunk);
        let whole = Pool::span(place.chunk, 0, place.skip.wrapping_add(desc.len));
        let piece = self.slots.store().one(whole);
        if piece.is_some_and(|piece| frame.fill_piece(piece, place.skip, place.chunk)) {
            Taken::Frame(1, desc.len)
        } else {
            Taken::Dropped(1, desc.len, DropReason::Runt)
        }
    }

    /// Notes what the sender left undone: that is for the egress to do, or to leave.
    #[inline(always)]
    fn note_undone(&self, at: u32, frame: &mut Frame) -> Result<(), DropReason> {
        let left = unfinished(frame.head());
        if self.parts.marked {
            let (kind, size) = self.mark(at);
            if size != 0 {
                let offload = cut((kind, size), frame, left).ok_or(DropReason::BadOffload)?;
                frame.offload = offload;
                return Ok(());
            }
        }
        if let Some(left) = left {
            frame.offload = left;
        }
        Ok(())
    }

    /// What stands before the frame of entry `at` of the ring.
    #[inline(always)]
    fn mark(&self, at: u32) -> (u32, u32) {
        let place = self.area.locate(self.parts.rx.peek(at));
        let mark = place.and_then(|place| Some((place.chunk, place.skip.checked_sub(MARK)?)));
        mark.map_or((0, 0), |(chunk, skip)| {
            (self.slots.load(chunk, skip), self.slots.load(chunk, skip.wrapping_add(4)))
        })
    }

    /// Takes a frame of several chunks.
    #[cold]
    #[inline(never)]
    fn take_spread(&mut self, at: u32, frame: &mut Frame) -> Taken {
        let first = self.slots.list_len();
        let kept = self.taken.len();
        let (mut parts, mut len) = (0u32, 0u32);
        loop {
            let here = at.saturating_add(parts);
            if self.parts.rx.available(here.saturating_add(1)) <= here {
                self.slots.truncate_list(first);
                self.taken.truncate(kept);
                return Taken::Partial;
            }
            let desc = self.parts.rx.peek(here);
            let Some(place) = self.area.locate(desc) else { return Taken::Bad(desc) };
            self.taken.push(place.chunk);
            parts = parts.saturating_add(1);
            len = len.saturating_add(desc.len);
            if parts <= RX_PARTS_MAX && !self.slots.push(place.chunk, place.skip, desc.len) {
                return Taken::Bad(desc);
            }
            if desc.options & libc::XDP_PKT_CONTD == 0 {
                break;
            }
        }
        if parts > RX_PARTS_MAX {
            self.slots.truncate_list(first);
            return Taken::Dropped(parts, len, DropReason::Oversize);
        }
        let whole = self.slots.list_span(first, len);
        if frame.fill(self.slots.store().reader(whole), whole, Offload::default()) {
            Taken::Frame(parts, len)
        } else {
            Taken::Dropped(parts, len, DropReason::Runt)
        }
    }
}

impl Ingress for AfXdpIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        let most = frames.begin() as u64;
        self.slots.clear_list();
        let mut available = self.parts.rx.available(BURST);
        if available == 0 {
            self.look_closer();
            available = self.parts.rx.available(BURST);
        }
        let mut fault = self.fault.clone();
        let (mut at, mut count, mut bytes) = (0u32, 0u64, 0u64);
        (0..AHEAD.min(available)).for_each(|at| self.prefetch(at));
        while at < available && count < most && bytes < BURST_BYTES {
            let Some(frame) = frames.slot() else { break };
            let next = at.wrapping_add(AHEAD);
            if next < available {
                self.prefetch(next);
            }
            let (parts, len, outcome) = match self.take(at, frame) {
                Taken::Frame(parts, len) => {
                    let noted =
                        if self.parts.unfinished { self.note_undone(at, frame) } else { Ok(()) };
                    (parts, len, noted)
                }
                Taken::Dropped(parts, len, reason) => (parts, len, Err(reason)),
                Taken::Partial => break,
                Taken::Bad(desc) => {
                    fault = Some(bad(&self.parts.socket, desc));
                    break;
                }
            };
            at = at.wrapping_add(parts);
            count = count.wrapping_add(1);
            bytes = bytes.wrapping_add(u64::from(len));
            match outcome {
                Ok(()) => frames.keep(),
                Err(reason) => self.parts.counters.ingress.dropped(reason, 1),
            }
        }
        if count > 0 {
            self.empty = 0;
            self.parts.rx.consume(at);
            self.parts.counters.ingress.received(count, bytes);
        }
        frames.batch(self.slots.store(), fault)
    }

    fn release(&mut self) {
        self.refill();
    }

    fn notify(&mut self) -> Notified {
        if self.parts.fill.needs_wakeup() {
            self.poke();
        }
        Notified::Nobody
    }

    fn arm(&mut self) -> bool {
        // This tells of an interface that is gone, too.
        self.poke();
        // ORDERING: see `look_closer`.
        let stuck = self.parts.socket.stuck.load(Ordering::Relaxed);
        stuck || self.fault.is_some() || self.parts.rx.available(1) > 0
    }

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.parts.socket.fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.parts.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[cold]
fn bad(socket: &Socket, desc: Desc) -> QueueFault {
    QueueFault::Host {
        what: format!("receive from interface {}", socket.name()),
        error: format!("{} bytes at {:#x} are not in a chunk of the queue", desc.len, desc.addr),
    }
}
