//! Why an interface could not be opened with packet sockets, in words that say what to do.

use std::io;

use crate::interface::InterfaceError;

use super::geometry::{BLOCKS_MAX, BLOCKS_MIN, RETIRE_MS_MAX, RING_BYTES_MAX};

/// Why an interface could not be opened with packet sockets.
#[derive(Debug, thiserror::Error)]
pub enum PacketMmapError {
    /// The interface is missing, or may not be changed.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No queue at all, or more than a fan-out group has.
    #[error("queues {0} must be 1 to {max}", max = super::QUEUES_MAX)]
    Queues(u16),
    /// A block that the kernel cannot make.
    #[error("block-size {size} must be a multiple of the page size, {page} (try {hint})")]
    BlockSize {
        /// What was asked for.
        size: u32,
        /// Bytes of a page.
        page: u32,
        /// A power of two that would do.
        hint: u32,
    },
    /// Too few blocks to fill one while another is read, or too many.
    #[error("blocks {0} must be {BLOCKS_MIN} to {BLOCKS_MAX}")]
    Blocks(u32),
    /// The ring as a whole would be too large.
    #[error("block-size {size} times blocks {blocks} must be at most {RING_BYTES_MAX} bytes")]
    Ring {
        /// Bytes of a block.
        size: u32,
        /// Number of blocks.
        blocks: u32,
    },
    /// A time that is none, or too long to be meant.
    #[error("retire-ms {0} must be 1 to {RETIRE_MS_MAX}")]
    Retire(u32),
    /// The kernel has no memory for the rings.
    #[error("no memory for {queues} rings of {blocks} blocks of {size} bytes: take fewer blocks")]
    Memory {
        /// Queues.
        queues: u16,
        /// Blocks of each.
        blocks: u32,
        /// Bytes of each block.
        size: u32,
    },
    /// The interface is not Ethernet.
    #[error("interface {name} carries no Ethernet frames (its hardware type is {kind})")]
    NotEthernet {
        /// The interface.
        name: String,
        /// The kernel's number, `ARPHRD_...`.
        kind: u16,
    },
    /// The kernel is too old.
    #[error("this kernel cannot {0}: packet-mmap needs Linux 6.1 or newer")]
    Kernel(&'static str),
}

impl PacketMmapError {
    /// What needs `CAP_NET_RAW` failed.
    pub(super) fn raw(what: impl Into<String>, error: io::Error) -> Self {
        Self::Interface(InterfaceError::needs("CAP_NET_RAW", what, error))
    }
}
