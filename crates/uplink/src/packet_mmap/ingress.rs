//! Frames from the receive ring, handed out where they are.
//!
//! A batch may span blocks. A block is given back when all its frames were taken and the batch
//! that had the last ones was released.
//!
//! **Trust.** Headers are copied and checked by `block`; what the virtio-net header says is left to
//! do is checked against the frame's private head.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{
    BURST_BYTES, Batch, DropReason, Frame, FrameBuf, Ingress, Notified, QueueCounters, QueueFault,
};
use serde::{Deserialize, Serialize};

use crate::sys::packet as socket;
use crate::vnet::{self, HEADER, SHORT};

use super::block::{BlockError, Packet, Walk};
use super::ring::ReceiveRing;
use super::socket::Queue;

/// The kernel leaves room for what `PACKET_VNET_HDR_SZ` says, and writes the short header right
/// before the frame, whatever that was (seen on Linux 6.1 and 6.18).
#[expect(clippy::cast_possible_truncation, reason = "10 fits")]
const SHORT_BYTES: u32 = SHORT as u32;
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
    /// Looks in vain until the socket is asked for errors.
    looks: u32,
}

/// Where in the ring the next frame is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Position {
    block: u32,
    /// Where in the block, and how many frames are left.
    walk: Option<(u32, u32)>,
}

/// What one burst counts.
#[derive(Debug, Default)]
struct Tally {
    frames: u64,
    bytes: u64,
    /// How many frames it may have.
    most: u64,
}

impl Tally {
    #[inline(always)]
    fn is_full(&self) -> bool {
        self.frames >= self.most || self.bytes >= BURST_BYTES
    }

    #[inline(always)]
    fn count(&mut self, bytes: u32) {
        self.frames = self.frames.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(u64::from(bytes));
    }
}

impl PacketMmapIngress {
    pub(super) fn new(queue: Queue, ring: ReceiveRing) -> Self {
        Self { queue, ring, walk: None, block: 0, done: 0, looks: LOOKS }
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
        Ok(new)
    }

    /// Where another process has to go on, when everything was released.
    pub(super) fn position(&self) -> Position {
        Position { block: self.block, walk: self.walk.and_then(|walk| walk.position()) }
    }

    /// Fills `frames` from as many blocks as it takes.
    #[inline]
    fn fill(&mut self, frames: &mut FrameBuf, tally: &mut Tally) -> Result<(), BlockError> {
        while let Some(mut walk) = self.current()? {
            let taken = self.take(&mut walk, frames, tally);
            self.walk = Some(walk);
            taken?;
            if walk.header_at().is_some() {
                break;
            }
            self.walk = None;
            self.next_block();
        }
        Ok(())
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

    /// Takes frames of one block until it or the room ends.
    #[inline]
    fn take(
        &mut self,
        walk: &mut Walk,
        frames: &mut FrameBuf,
        tally: &mut Tally,
    ) -> Result<(), BlockError> {
        let ingress = &self.queue.counters.ingress;
        while let (Some(at), Some(frame)) = (walk.header_at(), frames.slot()) {
            if tally.is_full() {
                break;
            }
            let Some(header) = self.ring.header(self.block, at) else { break };
            let Some(packet) = walk.take(&header)? else {
                // ORDERING: a number of its own.
                let _ = self.queue.given_up.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            match make(&self.ring, self.block, &packet, frame) {
                Ok(()) => {
                    tally.count(frame.len());
                    frames.keep();
                }
                Err(reason) => {
                    tally.count(packet.len);
                    ingress.dropped(reason, 1);
                }
            }
        }
        Ok(())
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

/// Makes a frame of `packet`.
#[inline(always)]
fn make(
    ring: &ReceiveRing,
    block: u32,
    packet: &Packet,
    frame: &mut Frame,
) -> Result<(), DropReason> {
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
        return Ok(());
    }
    frame.offload = offload;
    finish(packet, frame)
}

/// Puts back what the kernel took out of the frame, and checks what its sender left undone.
#[inline(never)]
fn finish(packet: &Packet, frame: &mut Frame) -> Result<(), DropReason> {
    if let Some((tpid, tci)) = packet.tag {
        if !frame.set_tag(false, Some(tci)) {
            return Err(DropReason::Runt);
        }
        let place = frame.head_mut().get_mut(TPID_AT..).and_then(<[u8]>::first_chunk_mut);
        if let Some(place) = place {
            *place = tpid.to_be_bytes();
        }
    }
    let checked = frame.offload.checked(frame.head(), frame.len());
    frame.offload = checked.ok_or(DropReason::BadOffload)?;
    Ok(())
}

impl Ingress for PacketMmapIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        let most = frames.begin() as u64;
        self.release();
        let mut tally = Tally { most, ..Tally::default() };
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
        self.walk.is_some() || (self.done < self.ring.count() && self.ring.is_ready(self.block))
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
