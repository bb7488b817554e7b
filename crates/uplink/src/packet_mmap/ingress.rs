//! Frames from the receive ring, handed out where they are.
//!
//! A batch may span blocks. A block is given back when all its frames were taken and the batch
//! that had the last ones was released.
//!
//! **Trust.** Headers are copied and checked by `block`; the virtio-net header contradicts itself
//! or it does not, places in it are checked by who acts on them.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use packet::{Checksum, Cut};
use port::{Batch, DropReason, Frame, FrameBuf, Gso, Ingress, Notified, QueueCounters, QueueFault};
use serde::{Deserialize, Serialize};
use virtq::mem::Pool;

use crate::sys::packet as socket;
use crate::vnet::{self, HEADER, SHORT};
use port::finish_checksum;

use super::block::{BlockError, FRAME_HEADER, Packet, Walk};
use super::ring::ReceiveRing;
use super::socket::Queue;

/// The kernel leaves room for what `PACKET_VNET_HDR_SZ` says, and writes the short header right
/// before the frame, whatever that was (seen on Linux 6.1 and 6.18).
#[expect(clippy::cast_possible_truncation, reason = "10 fits")]
const SHORT_BYTES: u32 = SHORT as u32;
/// Bytes of a tag that was taken out of a frame.
const TAG: u32 = 4;
/// Where in a frame the kind of its tag stands.
const TPID_AT: usize = 12;
/// After so many looks in vain the socket is asked for errors, also if it is never armed.
const LOOKS: u32 = 1 << 16;

/// Frames from the interface.
#[derive(Debug)]
pub struct PacketMmapIngress {
    queue: Queue,
    pub(super) ring: ReceiveRing,
    /// The frames that are left of block `block`, if it was begun.
    walk: Option<Walk>,
    block: u32,
    /// How many blocks before `block` are to be given back.
    done: u32,
    /// A large frame of block `block` that is being cut.
    large: Option<Large>,
    /// Looks in vain until the socket is asked for errors.
    looks: u32,
}

/// A large frame, and how far it is cut.
#[derive(Debug)]
struct Large {
    /// Where in the block its header is.
    at: u32,
    cut: Cut,
    next: u32,
    /// Where in the block byte 0 of the frame would be, a tag that was put back counted.
    origin: u32,
}

/// Where in the ring the next frame is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Position {
    block: u32,
    /// Where in the block, and how many frames are left.
    walk: Option<(u32, u32)>,
    /// A large frame: where, and the segment that comes next.
    large: Option<(u32, u32)>,
}

/// What one burst counts.
#[derive(Debug, Default)]
struct Tally {
    frames: u64,
    bytes: u64,
}

impl Tally {
    #[inline(always)]
    fn count(&mut self, bytes: u32) {
        self.frames = self.frames.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(u64::from(bytes));
    }
}

impl PacketMmapIngress {
    pub(super) fn new(queue: Queue, ring: ReceiveRing) -> Self {
        Self { queue, ring, walk: None, block: 0, done: 0, large: None, looks: LOOKS }
    }

    /// Goes on where another process stopped.
    pub(super) fn at(
        queue: Queue,
        ring: ReceiveRing,
        position: &Position,
    ) -> Result<Self, BlockError> {
        let mut new = Self::new(queue, ring);
        new.block = position.block.min(new.ring.count().saturating_sub(1));
        let bytes = new.ring.block_bytes();
        if let Some((at, left)) = position.walk {
            new.walk = Some(Walk::at(at, left, bytes)?);
        }
        if let Some((at, next)) = position.large {
            let header = new.ring.header(new.block, at).unwrap_or([0; FRAME_HEADER]);
            if let Some(packet) = Walk::at(at, 1, bytes)?.take(&header)? {
                // It could be cut before, so it can be now.
                let large = make(&new.ring, new.block, at, &packet, &mut Frame::default());
                new.large = large.ok().flatten().map(|large| Large { next, ..large });
            }
        }
        Ok(new)
    }

    /// Where another process has to go on, when everything was released.
    pub(super) fn position(&self) -> Position {
        Position {
            block: self.block,
            walk: self.walk.and_then(|walk| walk.position()),
            large: self.large.as_ref().map(|large| (large.at, large.next)),
        }
    }

    /// Fills `frames` from as many blocks as it takes.
    #[inline]
    fn fill(&mut self, frames: &mut FrameBuf, tally: &mut Tally) -> Result<(), BlockError> {
        loop {
            if !self.cut_on(frames, tally) {
                return Ok(());
            }
            let Some(mut walk) = self.current()? else { return Ok(()) };
            let taken = self.take(&mut walk, frames, tally);
            self.walk = Some(walk);
            taken?;
            if walk.header_at().is_some() {
                if self.large.is_some() {
                    continue;
                }
                return Ok(());
            }
            self.walk = None;
            if self.large.is_none() {
                self.next_block();
            }
        }
    }

    /// The block to read from, if there is one.
    #[inline]
    fn current(&mut self) -> Result<Option<Walk>, BlockError> {
        if self.walk.is_some() {
            return Ok(self.walk);
        }
        // Blocks that were taken and not given back still say that they are ours.
        if self.done >= self.ring.count() || !self.ring.is_ready(self.block) {
            return Ok(None);
        }
        let description = self.ring.description(self.block);
        Walk::new(&description, self.ring.block_bytes()).map(Some)
    }

    #[inline]
    fn next_block(&mut self) {
        self.done = self.done.wrapping_add(1);
        let next = self.block.wrapping_add(1);
        self.block = if next >= self.ring.count() { 0 } else { next };
    }

    /// Takes frames of one block until it or the room ends, or a large frame comes.
    #[inline]
    fn take(
        &mut self,
        walk: &mut Walk,
        frames: &mut FrameBuf,
        tally: &mut Tally,
    ) -> Result<(), BlockError> {
        let ingress = &self.queue.counters.ingress;
        while let (Some(at), Some(frame)) = (walk.header_at(), frames.slot()) {
            let Some(header) = self.ring.header(self.block, at) else { break };
            let Some(packet) = walk.take(&header)? else {
                // ORDERING: a number of its own.
                let _ = self.queue.given_up.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            match make(&self.ring, self.block, at, &packet, frame) {
                Ok(None) => {
                    tally.count(frame.len());
                    frames.keep();
                }
                Ok(large) => {
                    self.large = large;
                    break;
                }
                Err(reason) => {
                    tally.count(packet.len);
                    ingress.dropped(reason, 1);
                }
            }
        }
        Ok(())
    }

    /// Goes on cutting a large frame. False if there is no room for all of it now.
    #[inline]
    fn cut_on(&mut self, frames: &mut FrameBuf, tally: &mut Tally) -> bool {
        let Some(large) = &mut self.large else { return true };
        while large.next < large.cut.count() {
            let Some(frame) = frames.slot() else { return false };
            large.segment(&self.ring, self.block, frame);
            tally.count(frame.len());
            frames.keep();
        }
        self.large = None;
        if self.walk.is_none() {
            self.next_block();
        }
        true
    }

    /// Asks the socket whether something happened to the interface.
    #[cold]
    fn ask(&mut self) -> Option<QueueFault> {
        self.looks = LOOKS;
        // An interface that is set down says so too: it comes back.
        let said = rustix::net::sockopt::socket_error(&self.queue.fd);
        if matches!(said, Ok(Ok(()))) {
            return None;
        }
        match socket::hardware_type(self.queue.fd.as_fd()) {
            Ok(Some(_)) => None,
            Ok(None) => Some(self.queue.fault("receive from interface", &"it is gone")),
            Err(error) => Some(self.queue.fault("receive from interface", &error)),
        }
    }
}

impl Large {
    /// Makes the next segment in `frame`.
    fn segment(&mut self, ring: &ReceiveRing, block: u32, frame: &mut Frame) {
        let range = self.cut.range(self.next);
        let len = range.end.saturating_sub(range.start);
        let span = Pool::span(block, self.origin.saturating_add(range.start), len);
        let mut sum = Checksum::default();
        port::sum_body(&mut sum, ring.reader(span));
        let header = self.cut.header(self.next, sum);
        frame.fill_private(header.bytes());
        frame.body = span;
        self.next = self.next.saturating_add(1);
    }
}

/// Makes a frame of `packet`, or says that it is a large one.
#[inline(always)]
fn make(
    ring: &ReceiveRing,
    block: u32,
    at: u32,
    packet: &Packet,
    frame: &mut Frame,
) -> Result<Option<Large>, DropReason> {
    // The walk saw to it that the packet is within the block.
    let piece = ring.piece(block, packet.end()).ok_or(DropReason::Runt)?;
    let mut header = [0; HEADER];
    let short = header.first_chunk_mut::<SHORT>();
    let before = packet.start.wrapping_sub(SHORT_BYTES);
    if !short.is_some_and(|short| piece.copy_to(before, short)) {
        return Err(DropReason::Runt);
    }
    if packet.is_truncated() {
        return Err(DropReason::KernelTruncated);
    }
    let offload = vnet::decode(&header).ok_or(DropReason::BadOffload)?;
    if !frame.fill_piece(piece, packet.start, block) {
        return Err(DropReason::Runt);
    }
    if packet.tag.is_none() && offload.is_plain() {
        return Ok(None);
    }
    frame.offload = offload;
    Ok(finish(ring, block, packet, frame)?.map(|large| Large { at, ..large }))
}

/// Puts back what the kernel took out of the frame, and does what its sender left undone.
#[inline(never)]
fn finish(
    ring: &ReceiveRing,
    block: u32,
    packet: &Packet,
    frame: &mut Frame,
) -> Result<Option<Large>, DropReason> {
    let mut origin = packet.start;
    if let Some((tpid, tci)) = packet.tag {
        if !frame.set_tag(false, Some(tci)) {
            return Err(DropReason::Runt);
        }
        let place = frame.head_mut().get_mut(TPID_AT..).and_then(<[u8]>::first_chunk_mut);
        if let Some(place) = place {
            *place = tpid.to_be_bytes();
        }
        // A block begins with more than a tag's bytes of description.
        origin = origin.wrapping_sub(TAG);
    }
    if frame.offload.gso == Gso::None {
        let body = ring.reader(frame.body);
        let done = finish_checksum(frame, body);
        return if done { Ok(None) } else { Err(DropReason::BadOffload) };
    }
    let cut = Cut::new(frame.head(), frame.len(), frame.offload.gso_size)
        .map_err(|_| DropReason::BadOffload)?;
    debug_assert_eq!(frame.body.first, block);
    Ok(Some(Large { at: 0, cut, next: 0, origin }))
}

impl Ingress for PacketMmapIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        frames.clear();
        self.release();
        let mut tally = Tally::default();
        let broken = self.fill(frames, &mut tally).err();
        let mut fault = broken.map(|error| self.queue.fault("read the ring of interface", &error));
        if tally.frames > 0 {
            self.queue.counters.ingress.received(tally.frames, tally.bytes);
        } else if fault.is_none() {
            self.looks = self.looks.saturating_sub(1);
            if self.looks == 0 {
                fault = self.ask();
            }
        }
        frames.batch(self.ring.store(), fault)
    }

    #[inline]
    fn release(&mut self) {
        let count = self.ring.count();
        while self.done > 0 {
            // The oldest one first: the kernel wants them in this order.
            let ahead = self.block.wrapping_add(count).wrapping_sub(self.done);
            let block = if ahead >= count { ahead.wrapping_sub(count) } else { ahead };
            self.ring.give_back(block);
            self.done = self.done.wrapping_sub(1);
        }
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn arm(&mut self) -> bool {
        self.large.is_some()
            || self.walk.is_some()
            || (self.done < self.ring.count() && self.ring.is_ready(self.block))
    }

    fn disarm(&mut self) {
        // What woke us may be an error.
        self.looks = 1;
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.queue.fd.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.queue.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}
