//! What a queue is made from: everything that the driver may still change before it starts.

use crate::mem::{GuestMap, GuestPhysAddr};
use crate::queue::Virtq;

/// The two ring formats (virtio 1.3, sections 2.7 and 2.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Descriptor table, available ring, used ring.
    Split,
    /// One descriptor ring and two event suppression areas.
    Packed,
}

/// The negotiated features that change how a ring is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER`
    pub in_order: bool,
}

/// Where a device is in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingPosition {
    /// Free-running indexes.
    Split {
        /// Next available entry to read.
        avail: u16,
        /// Next used entry to write.
        used: u16,
    },
    /// Descriptor index and wrap counter, twice.
    Packed {
        /// Next descriptor to read, below the queue size.
        avail: u16,
        /// Wrap counter that goes with `avail`.
        avail_wrap: bool,
        /// Next descriptor to write.
        used: u16,
        /// Wrap counter that goes with `used`.
        used_wrap: bool,
    },
}

impl RingPosition {
    /// Where a fresh ring starts.
    pub fn start(layout: Layout) -> Self {
        match layout {
            Layout::Split => Self::Split { avail: 0, used: 0 },
            Layout::Packed => {
                Self::Packed { avail: 0, avail_wrap: true, used: 0, used_wrap: true }
            }
        }
    }

    /// Reads the encoding of vhost-user's `SET_VRING_BASE`. For packed rings a high half of zero
    /// means that used equals avail.
    pub fn from_vhost_base(layout: Layout, base: u32) -> Self {
        let _ = (layout, base);
        todo!()
    }

    /// The encoding of vhost-user's `GET_VRING_BASE`: both halves for packed rings.
    pub fn to_vhost_base(self) -> u32 {
        todo!()
    }
}

/// A queue that does not run: what the driver set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Ring format.
    pub layout: Layout,
    /// Entries: a power of two for split rings, 1 to 32768.
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: GuestPhysAddr,
    /// Available ring, or driver event suppression area.
    pub driver: GuestPhysAddr,
    /// Used ring, or device event suppression area.
    pub device: GuestPhysAddr,
    /// Negotiated ring features.
    pub features: RingFeatures,
    /// Where to go on.
    pub position: RingPosition,
}

impl QueueConfig {
    /// Validates the configuration against `memory` and starts the queue.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if size, alignment, position or an address is wrong.
    pub fn activate(self, memory: &GuestMap) -> Result<Virtq, QueueError> {
        let _ = memory;
        todo!()
    }
}

/// Why a queue could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Size zero, above 32768, or no power of two for a split ring.
    #[error("queue size {0} is not allowed: 1 to 32768, a power of two for split rings")]
    Size(u16),
}
