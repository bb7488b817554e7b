//! What can go wrong on the driver's side.

use crate::mem::GuestPhysAddr;

/// Why the driver could not do something: its own caller's mistakes, and each rule that a device
/// can break with a used entry. After one of the latter the ring is of no use until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DriverError {
    /// A queue size that the layout does not have.
    #[error("queue size {0} is not allowed: 1 to 32768, a power of two for split rings")]
    Size(u16),
    /// A start position of the other layout, outside of the ring, or with buffers in flight.
    #[error("a driver cannot start at this ring position: avail and used must be equal")]
    Position,
    /// A ring area that is not mapped in one piece, or not aligned.
    #[error("the ring area at {0} is not mapped in one aligned piece")]
    Area(GuestPhysAddr),
    /// A chain without buffers.
    #[error("a chain needs at least one buffer")]
    Empty,
    /// Not enough free descriptors at the moment.
    #[error("the chain needs {needed} descriptors, {free} are free")]
    Full {
        /// Descriptors that the chain takes.
        needed: usize,
        /// Descriptors that are free.
        free: u16,
    },
    /// An indirect chain for a queue without `VIRTIO_F_INDIRECT_DESC` or without tables.
    #[error("the queue has no indirect tables")]
    NoIndirect,
    /// More buffers than an indirect table has room for.
    #[error("{needed} buffers in an indirect table of {room}")]
    Table {
        /// Buffers of the chain.
        needed: usize,
        /// Entries of a table.
        room: u16,
    },
    /// The device published more used entries than buffers are outstanding.
    #[error("the used index is {ahead} ahead, {outstanding} buffers are outstanding")]
    UsedIndex {
        /// Entries between the last seen and the published index.
        ahead: u16,
        /// Buffers that the device has.
        outstanding: u16,
    },
    /// A used entry with an id outside of the queue.
    #[error("used id {id} is outside of a queue of {size}")]
    UsedId {
        /// The id that the device gave.
        id: u32,
        /// Entries of the queue.
        size: u16,
    },
    /// A used entry for a buffer that the device does not have.
    #[error("used id {0} is not outstanding")]
    NotOutstanding(u16),
    /// A used length above what the device could write.
    #[error("used length {len} of a buffer with {writable} writable bytes")]
    UsedLength {
        /// The length that the device gave.
        len: u32,
        /// Device-writable bytes of the buffer.
        writable: u32,
    },
    /// With `VIRTIO_F_IN_ORDER`, a used entry that stands for more buffers than were published.
    #[error("used id {id} stands for more buffers than the used index was moved by")]
    BatchTooLong {
        /// The id that the device gave.
        id: u16,
    },
}
