//! What a driver can do wrong with a chain: guest faults, expected, never a reason to panic.

use crate::mem::GuestPhysAddr;

/// Each rule of the specification that a driver can break with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ChainError {
    /// A byte of a buffer is not in guest memory.
    #[error("a buffer of {len} bytes at {addr} is not in guest memory")]
    Unmapped {
        /// Where the buffer starts.
        addr: GuestPhysAddr,
        /// Its length.
        len: u32,
    },
    /// A descriptor of an indirect table is not in guest memory.
    #[error("the descriptor at {addr}, of an indirect table, is not in guest memory")]
    TableUnmapped {
        /// Where the descriptor is.
        addr: GuestPhysAddr,
    },
    /// The vIOMMU knows the address, and does not allow this access.
    #[error("the IOMMU does not allow the device what it would do at {addr}")]
    Denied {
        /// The first such address.
        addr: GuestPhysAddr,
    },
    /// A buffer or an indirect table that ends above the highest address.
    #[error("a buffer of {len} bytes at {addr} wraps around the address space")]
    AddressOverflow {
        /// Where the buffer starts.
        addr: GuestPhysAddr,
        /// Its length.
        len: u32,
    },
    /// More descriptors than the queue has entries.
    #[error("a chain of {count} or more descriptors, the queue allows {limit}")]
    TooLong {
        /// Descriptors seen when the walk ended.
        count: u32,
        /// Entries of the queue; for packed rings those that are not fetched already.
        limit: u16,
    },
    /// More descriptors than the table has: the chain comes back to itself.
    #[error("the chain of head {head} has a loop: its table has only {table} descriptors")]
    Loop {
        /// The chain's head.
        head: u16,
        /// Descriptors in the table that the chain is in.
        table: u32,
    },
    /// Buffers in more pieces than any driver has. (This rule is ours.)
    #[error("a chain in {segments} or more pieces of memory, at most {limit} are allowed")]
    Scattered {
        /// Pieces seen when the walk ended.
        segments: u32,
        /// As many as descriptors, and 4096.
        limit: u32,
    },
    /// More bytes than a chain may have. (The specification's limit is one byte higher: 2^32. A
    /// length here has 32 bits.)
    #[error("a chain of {total} or more bytes, at most 4294967295 are allowed")]
    TotalLength {
        /// Bytes seen when the walk ended.
        total: u64,
    },
    /// A device-readable descriptor after a device-writable one.
    #[error("the readable descriptor {index} stands behind a writable one, which must be last")]
    ReadableAfterWritable {
        /// The descriptor's index in its table.
        index: u16,
    },
    /// An indirect descriptor in an indirect table.
    #[error("descriptor {index} of an indirect table is indirect itself, one level is allowed")]
    NestedIndirect {
        /// The descriptor's index in its table.
        index: u16,
    },
    /// `INDIRECT` and `NEXT` in one descriptor.
    #[error("descriptor {index} is indirect and has a next one, only one of both is allowed")]
    IndirectNext {
        /// The descriptor's index.
        index: u16,
    },
    /// `INDIRECT` although `VIRTIO_F_INDIRECT_DESC` was not negotiated.
    #[error("descriptor {index} is indirect, which was not negotiated")]
    IndirectNotNegotiated {
        /// The descriptor's index.
        index: u16,
    },
    /// An indirect table of no descriptors, or of a part of one.
    #[error("an indirect table of {len} bytes, it must be a multiple of 16 and not zero")]
    IndirectLength {
        /// The table's length.
        len: u32,
    },
    /// An indirect table with more descriptors than a 16-bit index reaches.
    #[error("an indirect table of {len} bytes, at most {limit} are allowed")]
    IndirectTooLarge {
        /// The table's length.
        len: u32,
        /// The largest one.
        limit: u32,
    },
    /// A head index outside of the queue.
    #[error("head index {head} is outside of a queue of {size}")]
    Head {
        /// The index that the driver gave.
        head: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A next index outside of the table.
    #[error("next index {next} is outside of a table of {table}")]
    Next {
        /// The index that the driver gave.
        next: u16,
        /// Descriptors in the table.
        table: u32,
    },
    /// The available index moved back, or too far.
    #[error("the available index is {ahead} ahead, the queue has room for {room}")]
    AvailIndex {
        /// Entries that the driver says are available.
        ahead: u16,
        /// Entries of the queue that are not fetched already.
        room: u16,
    },
    /// A packed descriptor where the next chain should start is marked used in the current lap.
    #[error("descriptor {index} is marked used in a lap with wrap counter {wrap} that is not over")]
    WrapCounter {
        /// The descriptor's index.
        index: u16,
        /// The device's wrap counter.
        wrap: bool,
    },
    /// A packed chain goes on with a descriptor that the driver has not made available.
    #[error("a chain goes on at descriptor {index}, which is not available")]
    NotAvailable {
        /// The descriptor's index.
        index: u16,
    },
    /// A packed buffer id outside of the queue.
    #[error("buffer id {id} is outside of a queue of {size}")]
    BufferId {
        /// The id that the driver gave.
        id: u16,
        /// Entries of the queue.
        size: u16,
    },
}
