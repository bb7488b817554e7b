//! Walking the frames of a block of the receive ring: what the kernel wrote about them, checked.
//!
//! ```text
//!  block ┌ description ┐┌ frame header │ … │ vnet header │ frame ┐┌ frame header │ …
//!        │ num_pkts    ││ next ────────────────────────────────►│
//!        │ first ──────►│ mac ────────────────────────►         │
//!        └─────────────┘└───────────────────────────────────────┘
//! ```
//!
//! **Trust.** The kernel wrote all of this, but nothing here believes it: a place or a length that
//! leaves the block ends the walk with [`BlockError`]. The functions take private copies of the
//! headers and give numbers, so that any bytes can be tried.
//! **Limits.** A block has as many frames as headers fit into it.

use crate::vnet::SHORT;

/// Bytes of a block's description (`struct tpacket_block_desc`).
pub(crate) const DESCRIPTION: usize = 48;
/// Bytes of a frame's header (`struct tpacket3_hdr`).
pub(crate) const FRAME_HEADER: usize = 48;
const DESCRIPTION_BYTES: u32 = 48;
const FRAME_HEADER_BYTES: u32 = 48;
#[expect(clippy::cast_possible_truncation, reason = "10 fits")]
const VNET_BYTES: u32 = SHORT as u32;

/// Where in a block's description its status is.
pub(crate) const BLOCK_STATUS: u32 = 8;

/// The kernel wrote all of the header, and the frame.
const STATUS_USER: u32 = 1;
/// The kernel took the frame's tag out of it.
const STATUS_VLAN_VALID: u32 = 1 << 4;
/// It also said of which kind the tag was.
const STATUS_VLAN_TPID_VALID: u32 = 1 << 6;
const TPID_VLAN: u16 = 0x8100;

/// What cannot be true of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BlockError {
    #[error("the frame header at {at} is not within the block of {block} bytes")]
    Header { at: u32, block: u32 },
    #[error("the frame at {at} ends at {end}, outside of the block of {block} bytes")]
    Frame { at: u64, end: u64, block: u32 },
    #[error("the frame at {at} leaves no room for its header")]
    Overlap { at: u64 },
}

/// A walk over the frames of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    /// Where the next frame's header is.
    at: u32,
    /// Frames that are left.
    left: u32,
    block: u32,
}

/// One frame of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    /// Where the frame begins in the block; the vnet header ends there.
    pub(crate) start: u32,
    /// Bytes of it that are in the block.
    pub(crate) len: u32,
    /// Bytes that it had.
    pub(crate) original_len: u32,
    /// The tag that was taken out of it: kind, and control information.
    pub(crate) tag: Option<(u16, u16)>,
}

impl Packet {
    /// Whether the end of the frame is missing.
    #[inline(always)]
    pub(crate) fn is_truncated(&self) -> bool {
        self.original_len > self.len
    }

    /// Where the frame ends.
    #[inline(always)]
    pub(crate) fn end(&self) -> u32 {
        self.start.wrapping_add(self.len)
    }
}

impl Walk {
    /// Starts at the first frame of a block of `block` bytes.
    #[inline]
    pub(crate) fn new(description: &[u8; DESCRIPTION], block: u32) -> Result<Self, BlockError> {
        let walk = Self { at: word(description, 16), left: word(description, 12), block };
        walk.check_header(DESCRIPTION_BYTES)?;
        Ok(walk)
    }

    /// Goes on at the header at `at`, before `left` frames, where another process stopped.
    pub(crate) fn at(at: u32, left: u32, block: u32) -> Result<Self, BlockError> {
        let walk = Self { at, left, block };
        walk.check_header(DESCRIPTION_BYTES)?;
        Ok(walk)
    }

    /// Where the next header is and how many frames are left; none behind the last one.
    pub(crate) fn position(&self) -> Option<(u32, u32)> {
        (self.left > 0).then_some((self.at, self.left))
    }

    /// Where the next frame's header is: within the block. `None` behind the last one.
    #[inline(always)]
    pub(crate) fn header_at(&self) -> Option<u32> {
        (self.left > 0).then_some(self.at)
    }

    /// Takes the frame whose header [`Self::header_at`] named. None if the kernel made room for it
    /// and then gave it up (SCTP that is to be segmented, before Linux knew a header for it): of
    /// its header only the place of the next one is new.
    #[inline]
    pub(crate) fn take(
        &mut self,
        header: &[u8; FRAME_HEADER],
    ) -> Result<Option<Packet>, BlockError> {
        let (snap_len, status) = (word(header, 12), word(header, 20));
        if status & STATUS_USER == 0 {
            return self.step(header).map(|()| None);
        }
        let mac = u32::from(half(header, 24));
        let start = u64::from(self.at).wrapping_add(u64::from(mac));
        let end = start.wrapping_add(u64::from(snap_len));
        if mac < FRAME_HEADER_BYTES.wrapping_add(VNET_BYTES) {
            return Err(BlockError::Overlap { at: start });
        }
        if end > u64::from(self.block) {
            return Err(BlockError::Frame { at: start, end, block: self.block });
        }
        let packet = Packet {
            start: self.at.wrapping_add(mac),
            len: snap_len,
            original_len: word(header, 16),
            tag: tag(header, status),
        };
        self.step(header)?;
        Ok(Some(packet))
    }

    /// Goes on to the next header.
    #[inline(always)]
    fn step(&mut self, header: &[u8; FRAME_HEADER]) -> Result<(), BlockError> {
        self.left = self.left.wrapping_sub(1);
        let least = self.at.saturating_add(FRAME_HEADER_BYTES);
        self.at = self.at.saturating_add(word(header, 0));
        self.check_header(least)
    }

    /// Whether there is a header where the next frame should be, if there is one: at `least` or
    /// behind, aligned as the kernel does it, and within the block.
    #[inline(always)]
    fn check_header(&self, least: u32) -> Result<(), BlockError> {
        let room = self.block.checked_sub(FRAME_HEADER_BYTES).is_some_and(|last| self.at <= last);
        if self.left == 0 || (room && self.at >= least && self.at.is_multiple_of(8)) {
            return Ok(());
        }
        Err(BlockError::Header { at: self.at, block: self.block })
    }
}

#[inline(always)]
fn tag(header: &[u8; FRAME_HEADER], status: u32) -> Option<(u16, u16)> {
    if status & STATUS_VLAN_VALID == 0 {
        return None;
    }
    let [_, _, a, b] = word(header, 32).to_be_bytes();
    let tpid = if status & STATUS_VLAN_TPID_VALID != 0 { half(header, 36) } else { TPID_VLAN };
    Some((tpid, u16::from_be_bytes([a, b])))
}

#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
    field.copied().map_or(0, u32::from_ne_bytes)
}

#[inline(always)]
fn half<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
    field.copied().map_or(0, u16::from_ne_bytes)
}

#[cfg(test)]
mod tests;
