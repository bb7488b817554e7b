//! What a queue is made from: everything that the driver may still change before it starts.

use std::fmt;
use std::sync::atomic::Ordering;

use crate::mem::{GuestMap, GuestPhysAddr, SplitAreas};
use crate::packed::Packed;
use crate::queue::Virtq;
use crate::shared::Shared;
use crate::split::Split;

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
            Layout::Packed => Self::Packed { avail: 0, avail_wrap: true, used: 0, used_wrap: true },
        }
    }

    /// Reads the encoding of vhost-user's `SET_VRING_BASE`. For packed rings a high half of zero
    /// means that used equals avail. For split rings it holds avail only, used is taken as equal:
    /// [`QueueConfig::resume_at_used`] knows better.
    pub fn from_vhost_base(layout: Layout, base: u32) -> Self {
        let [b0, b1, b2, b3] = base.to_le_bytes();
        let (low, high) = (u16::from_le_bytes([b0, b1]), u16::from_le_bytes([b2, b3]));
        match layout {
            Layout::Split => Self::Split { avail: low, used: low },
            Layout::Packed => {
                let used = if high == 0 { low } else { high };
                Self::Packed {
                    avail: low & !WRAP_BIT,
                    avail_wrap: low & WRAP_BIT != 0,
                    used: used & !WRAP_BIT,
                    used_wrap: used & WRAP_BIT != 0,
                }
            }
        }
    }

    /// The encoding of vhost-user's `GET_VRING_BASE`: both halves for packed rings, avail for
    /// split ones.
    pub fn to_vhost_base(self) -> u32 {
        let half = |index: u16, wrap: bool| {
            u32::from(if wrap { index | WRAP_BIT } else { index & !WRAP_BIT })
        };
        match self {
            Self::Split { avail, .. } => u32::from(avail),
            Self::Packed { avail, avail_wrap, used, used_wrap } => {
                half(avail, avail_wrap) | half(used, used_wrap) << 16
            }
        }
    }

    /// The position that gives the chains again which were fetched and not completed: avail
    /// becomes used.
    pub fn refetch(self) -> Self {
        match self {
            Self::Split { used, .. } => Self::Split { avail: used, used },
            Self::Packed { used, used_wrap, .. } => {
                Self::Packed { avail: used, avail_wrap: used_wrap, used, used_wrap }
            }
        }
    }

    /// How many slots avail is ahead of used, if a ring of `size` can be in this position.
    pub(crate) fn outstanding(self, size: u16) -> Option<u16> {
        let ahead = match self {
            Self::Split { avail, used } => Some(avail.wrapping_sub(used)),
            Self::Packed { avail, used, .. } if avail >= size || used >= size => None,
            Self::Packed { avail, avail_wrap, used, used_wrap } if avail_wrap == used_wrap => {
                avail.checked_sub(used)
            }
            Self::Packed { avail, used, .. } => {
                used.checked_sub(avail).and_then(|behind| size.checked_sub(behind))
            }
        };
        ahead.filter(|ahead| *ahead <= size)
    }
}

/// Where vhost-user and the event suppression areas have the wrap counter of a packed position.
pub(crate) const WRAP_BIT: u16 = 1 << 15;

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
    /// Validates the configuration against `memory` and starts the queue. Nothing is written to
    /// the ring; buffers that are there already are found by the first [`Virtq::pop`].
    ///
    /// # Errors
    ///
    /// [`QueueError`] if size, alignment, position or an address is wrong.
    pub fn activate(self, memory: &GuestMap) -> Result<Virtq, QueueError> {
        self.check_size()?;
        match self.layout {
            Layout::Split => Split::new(memory, self).map(Virtq::Split),
            Layout::Packed => Packed::new(memory, self).map(Virtq::Packed),
        }
    }

    /// The configuration with the position at which a device goes on that does not know what
    /// became of the chains its predecessor had fetched: at the first one that is not in the used
    /// ring. For split rings that is `used.idx` in `memory`.
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the configuration is wrong, or the position is not one that the ring can
    /// be in.
    pub fn resume_at_used(mut self, memory: &GuestMap) -> Result<Self, QueueError> {
        self.check_size()?;
        self.check_position()?;
        if let RingPosition::Split { avail, .. } = self.position {
            // ORDERING: relaxed; whoever wrote it has stopped, and the message that told us so
            // orders its stores before this.
            let used = SplitAreas::new(memory, &self)?.used_idx().load(Ordering::Relaxed);
            self.position = RingPosition::Split { avail, used };
        }
        let _ = self.outstanding()?;
        self.position = self.position.refetch();
        Ok(self)
    }

    /// Where a split ring goes on if it cannot be where the configuration says: at `used.idx`.
    /// Front ends that do not know where a lost device was say zero (DPDK's do).
    ///
    /// # Errors
    ///
    /// [`QueueError`] if the configuration is wrong.
    pub fn rescue(&self, memory: &GuestMap) -> Result<Option<RingPosition>, QueueError> {
        let RingPosition::Split { avail, .. } = self.position else { return Ok(None) };
        self.check_size()?;
        let areas = SplitAreas::new(memory, self)?;
        // ORDERING: relaxed, as in `resume_at_used`.
        let used = areas.used_idx().load(Ordering::Relaxed);
        let ahead = |of: u16| areas.avail_idx().load(Ordering::Relaxed).wrapping_sub(of);
        let lost = ahead(avail) > self.size && ahead(used) <= self.size;
        Ok(lost.then_some(RingPosition::Split { avail: used, used }))
    }

    pub(crate) fn check_size(&self) -> Result<(), QueueError> {
        let allowed = match self.layout {
            Layout::Split => self.size.is_power_of_two(),
            Layout::Packed => self.size > 0,
        };
        if allowed && self.size <= MAX_SIZE { Ok(()) } else { Err(QueueError::Size(self.size)) }
    }

    fn check_position(&self) -> Result<(), QueueError> {
        match (self.layout, self.position) {
            (Layout::Split, RingPosition::Split { .. })
            | (Layout::Packed, RingPosition::Packed { .. }) => Ok(()),
            (layout, _) => Err(QueueError::PositionLayout(layout)),
        }
    }

    /// The slots that are fetched and not completed.
    pub(crate) fn outstanding(&self) -> Result<u16, QueueError> {
        self.position
            .outstanding(self.size)
            .ok_or(QueueError::Position { position: self.position, size: self.size })
    }
}

/// The largest queue of either format.
const MAX_SIZE: u16 = 32768;

/// The three areas that a driver gives for a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RingArea {
    /// Descriptor table or descriptor ring.
    Descriptors,
    /// Available ring, or driver event suppression area.
    Driver,
    /// Used ring, or device event suppression area.
    Device,
}

impl fmt::Display for RingArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "descriptor area",
            Self::Driver => "driver area",
            Self::Device => "device area",
        })
    }
}

/// Why a queue could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Size zero, above 32768, or no power of two for a split ring.
    #[error("queue size {0} is not allowed: 1 to 32768, a power of two for split rings")]
    Size(u16),
    /// An area's guest address is not a multiple of what its format asks for.
    #[error("the {area} at {addr} is not aligned to {align} bytes")]
    Unaligned {
        /// Which area.
        area: RingArea,
        /// Where it was to be.
        addr: GuestPhysAddr,
        /// What it should be a multiple of.
        align: u64,
    },
    /// A byte of an area is not in guest memory.
    #[error("the {area} at {addr} with {len} bytes is not in guest memory")]
    Unmapped {
        /// Which area.
        area: RingArea,
        /// Where it was to be.
        addr: GuestPhysAddr,
        /// Bytes that it needs.
        len: u64,
    },
    /// An area is in one piece for the driver, but not in this process: it spans memory regions, or
    /// pages behind a vIOMMU.
    #[error(
        "the {area} at {addr} with {len} bytes is in pieces that are apart in memory, which is not \
         supported; a smaller queue size may keep it in one"
    )]
    Scattered {
        /// Which area.
        area: RingArea,
        /// Where it was to be.
        addr: GuestPhysAddr,
        /// Bytes that it needs.
        len: u64,
    },
    /// An area's guest address is aligned, but its memory region is mapped at an odd address.
    #[error("the {area} at {addr} is mapped at a host address that is no multiple of {align}")]
    HostUnaligned {
        /// Which area.
        area: RingArea,
        /// Where it was to be.
        addr: GuestPhysAddr,
        /// What the host address should be a multiple of.
        align: u64,
    },
    /// A position of the other ring format.
    #[error("the position does not belong to a {0:?} ring")]
    PositionLayout(Layout),
    /// A position that a ring of this size cannot be in.
    #[error("{position:?} is not possible in a queue of {size}")]
    Position {
        /// What was given.
        position: RingPosition,
        /// Entries of the queue.
        size: u16,
    },
}

#[cfg(test)]
mod tests;
