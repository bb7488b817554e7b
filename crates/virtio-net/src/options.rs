//! What a queue must know besides its ring.

use port::OffloadSet;

/// How often a delivery looks again at a receiveq that has no room, before it drops.
pub const DEFAULT_RETRIES: u32 = 8;

/// Size of the `virtio_net_hdr` before every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderLen {
    /// 10 bytes: a legacy driver without `MRG_RXBUF`.
    Legacy,
    /// 12 bytes, with `num_buffers`.
    V1,
    /// 20 bytes, with the frame's hash too (`HASH_REPORT`).
    Hash,
}

impl HeaderLen {
    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Legacy => 10,
            Self::V1 => 12,
            Self::Hash => 20,
        }
    }
}

/// What was negotiated and configured for one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueOptions {
    /// Size of the header before every frame.
    pub header_len: HeaderLen,
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may take several receive buffers.
    pub mergeable: bool,
    /// Bytes of the largest frame that is taken from the driver, without the header.
    pub max_frame: u32,
    /// Whether the driver enabled the queue. Frames from a disabled transmitq are dropped, a
    /// disabled receiveq is not filled.
    pub enabled: bool,
    /// How often a delivery looks again at a receiveq without room.
    pub retries: u32,
    /// What the driver may leave to us.
    pub from_driver: OffloadSet,
    /// What we may leave to the driver.
    pub to_driver: OffloadSet,
    /// Segments of one flow are made into large frames, if the driver takes these.
    pub coalesce: bool,
}
