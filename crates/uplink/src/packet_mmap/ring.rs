//! The two rings of a socket in mapped memory: who owns a block or a slot, and its bytes.

use virtq::mem::{Pool, ReadPiece, SegStore, SharedSlots, WritePiece, Writer};

use super::block::{BLOCK_STATUS, DESCRIPTION, FRAME_HEADER};
use super::geometry::SLOT_HEADER;

/// A block belongs to the kernel.
const TO_KERNEL: u32 = 0;
/// A block belongs to us.
const TO_USER: u32 = 1;

/// Where in a slot's header its length and its status are.
const SLOT_LEN: u32 = 16;
const SLOT_STATUS: u32 = 20;
/// Status of a slot: free; to be sent; being sent; refused.
const AVAILABLE: u32 = 0;
const SEND_REQUEST: u32 = 1;
const SENDING: u32 = 2;
const WRONG_FORMAT: u32 = 4;

/// Blocks of received frames.
#[derive(Debug)]
pub(super) struct ReceiveRing(SharedSlots);

impl ReceiveRing {
    pub(super) fn new(blocks: SharedSlots) -> Self {
        Self(blocks)
    }

    #[inline(always)]
    pub(super) fn count(&self) -> u32 {
        self.0.count()
    }

    #[inline(always)]
    pub(super) fn block_bytes(&self) -> u32 {
        self.0.slot_bytes()
    }

    /// Whether the kernel has handed the block over.
    #[inline(always)]
    pub(super) fn is_ready(&self, block: u32) -> bool {
        self.0.load(block, BLOCK_STATUS) & TO_USER != 0
    }

    /// Gives the block back: nothing of it may be read any more.
    #[inline(always)]
    pub(super) fn give_back(&self, block: u32) {
        self.0.publish(block, BLOCK_STATUS, TO_KERNEL);
    }

    pub(super) fn description(&self, block: u32) -> [u8; DESCRIPTION] {
        self.piece(block, self.block_bytes()).and_then(ReadPiece::first).unwrap_or([0; DESCRIPTION])
    }

    #[inline(always)]
    pub(super) fn header(&self, block: u32, at: u32) -> Option<[u8; FRAME_HEADER]> {
        let mut header = [0; FRAME_HEADER];
        self.piece(block, self.block_bytes())?.copy_to(at, &mut header).then_some(header)
    }

    /// The first `len` bytes of a block.
    #[inline(always)]
    pub(super) fn piece(&self, block: u32, len: u32) -> Option<ReadPiece<'_>> {
        self.0.store().one(Pool::span(block, 0, len))
    }

    #[inline(always)]
    pub(super) fn store(&self) -> SegStore<'_> {
        self.0.store()
    }
}

/// What became of a slot that was handed to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The kernel took its frame.
    Taken,
    /// It has not looked at it yet.
    Waiting,
    /// It refuses the frame, and looks at nothing behind it.
    Refused,
}

/// Slots of frames to send. The kernel looks at them in turns, each time from where it stopped.
#[derive(Debug)]
pub(super) struct TransmitRing(SharedSlots);

impl TransmitRing {
    pub(super) fn new(slots: SharedSlots) -> Self {
        Self(slots)
    }

    #[inline(always)]
    pub(super) fn count(&self) -> u32 {
        self.0.count()
    }

    #[inline(always)]
    pub(super) fn slot_bytes(&self) -> u32 {
        self.0.slot_bytes()
    }

    /// The most bytes that a slot takes, the vnet header included.
    #[inline(always)]
    pub(super) fn room(&self) -> u32 {
        self.0.slot_bytes().saturating_sub(SLOT_HEADER)
    }

    #[inline(always)]
    pub(super) fn is_free(&self, slot: u32) -> bool {
        self.status(slot) & (SEND_REQUEST | SENDING | WRONG_FORMAT) == AVAILABLE
    }

    #[inline(always)]
    pub(super) fn fate(&self, slot: u32) -> Fate {
        let status = self.status(slot);
        if status & WRONG_FORMAT != 0 {
            Fate::Refused
        } else if status & SEND_REQUEST != 0 {
            Fate::Waiting
        } else {
            Fate::Taken
        }
    }

    /// The data of a free slot, to write at once.
    #[inline(always)]
    pub(super) fn piece(&mut self, slot: u32) -> Option<WritePiece<'_>> {
        self.0.piece(slot, SLOT_HEADER)
    }

    /// The same, to write in parts.
    pub(super) fn writer(&mut self, slot: u32) -> Writer<'_> {
        self.0.writer(slot, SLOT_HEADER)
    }

    /// Hands a slot with `len` bytes of data to the kernel, which looks when it is called.
    #[inline(always)]
    pub(super) fn hand_over(&self, slot: u32, len: u32) {
        self.0.publish(slot, SLOT_LEN, len);
        self.0.publish(slot, SLOT_STATUS, SEND_REQUEST);
    }

    /// Takes a slot back that the kernel has not taken.
    pub(super) fn take_back(&self, slot: u32) {
        self.0.publish(slot, SLOT_STATUS, AVAILABLE);
    }

    #[inline(always)]
    fn status(&self, slot: u32) -> u32 {
        self.0.load(slot, SLOT_STATUS)
    }
}
