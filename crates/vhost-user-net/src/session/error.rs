//! Why a session refuses a message, and why its port is not up.

use vhost::vhost_user::message::FrontendReq;
use virtq::QueueError;
use virtq::mem::GuestPhysAddr;

use super::RingIndex;
use crate::codec::CodecError;
use crate::fds::FdLimit;
use crate::memory::MemoryError;

/// Memory of the front end that is gone: its file was cut short while we had it mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// A region of the guest's memory.
    #[error("the memory region at {0}")]
    Region(GuestPhysAddr),
    /// The log of pages that were written.
    #[error("the log of written pages")]
    Log,
    /// The in-flight file.
    #[error("the in-flight regions")]
    Inflight,
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// An in-flight file that cannot be made or used.
    #[error("in-flight regions for {queues} queues of {queue_size}: {error}")]
    Inflight {
        /// Rings.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
        /// What is wrong, or what the kernel says.
        error: String,
    },
    /// A message about postcopy that does not follow what was agreed.
    #[error("{0}")]
    PostcopyOrder(&'static str),
    /// The kernel does not do what postcopy needs.
    #[error("postcopy: {what}: {error}")]
    Postcopy {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        error: std::io::Error,
    },
    /// The message is wrong by itself.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// There is no room for what it brings.
    #[error("{0}")]
    Fds(FdLimit),
    /// A memory region is refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Features that were not offered.
    #[error("SET_FEATURES with {0:#x}, which was not offered")]
    Features(u64),
    /// Other features while a ring runs.
    #[error("SET_FEATURES with other features while ring {index} runs", index = .0.0)]
    FeaturesWhileRunning(RingIndex),
    /// Protocol features that were not offered.
    #[error("SET_PROTOCOL_FEATURES with {0:#x}, which was not offered")]
    ProtocolFeatures(u64),
    /// A request of a feature that was offered, but not negotiated.
    #[error("{0:?} without its protocol feature")]
    NotNegotiated(FrontendReq),
    /// A request of a feature that is not offered.
    #[error("{0:?} belongs to a feature that is not offered")]
    NotOffered(FrontendReq),
    /// A ring that the port does not have.
    #[error("ring {ring}, but the port has {limit} rings")]
    NoSuchRing {
        /// The ring.
        ring: u32,
        /// Rings of the port.
        limit: u32,
    },
    /// A ring's size is out of bounds.
    #[error("ring {ring} with {size} entries, 1 to {limit} are allowed")]
    RingSize {
        /// The ring.
        ring: u32,
        /// Entries wanted.
        size: u32,
        /// The port's limit.
        limit: u16,
    },
    /// Size or position of a running ring was to change.
    #[error("{request:?} while ring {ring} runs")]
    RingRuns {
        /// What was asked.
        request: FrontendReq,
        /// The ring.
        ring: u32,
    },
    /// An fd that is no eventfd.
    #[error("{request:?} for ring {ring} with an fd that is no eventfd")]
    NoEventFd {
        /// What was asked.
        request: FrontendReq,
        /// The ring.
        ring: u32,
    },
    /// A ring cannot be started as it is set up.
    #[error("ring {index}: {error}", index = .index.0)]
    SetUp {
        /// The ring.
        index: RingIndex,
        /// What is wrong.
        error: SetUpError,
    },
    /// The log of written pages cannot be used.
    #[error("a log of {bytes} bytes: {error}")]
    Log {
        /// Its size.
        bytes: u64,
        /// What is wrong.
        error: String,
    },
    /// What is to be signalled for the log is no eventfd.
    #[error("SET_LOG_FD with an fd that is no eventfd")]
    LogCall,
    /// An fd through which no state can go.
    #[error("SET_DEVICE_STATE_FD with an fd that is no pipe")]
    StateFd,
    /// An fd through which nothing can be asked.
    #[error("SET_BACKEND_REQ_FD with an fd that is no socket")]
    BackendFd,
    /// A translation without a vIOMMU.
    #[error("IOTLB_MSG without ACCESS_PLATFORM")]
    NoIommu,
    /// A question that only back ends ask.
    #[error("IOTLB_MSG with a miss, which only back ends have")]
    IotlbMiss,
    /// A translation that leads out of the shared memory.
    #[error(
        "the translation of {iova:#x}, {size:#x} bytes, to {user:#x} is not within the memory \
         that the front end shares"
    )]
    IotlbOutside {
        /// What is translated.
        iova: u64,
        /// Bytes.
        size: u64,
        /// Where to, in the front end's addresses.
        user: u64,
    },
    /// An MTU out of bounds.
    #[error("MTU {mtu}, 68 to {limit} are allowed")]
    Mtu {
        /// What was asked.
        mtu: u64,
        /// The port's limit.
        limit: u16,
    },
}

impl From<FdLimit> for SessionError {
    fn from(limit: FdLimit) -> Self {
        Self::Fds(limit)
    }
}

/// Why a ring cannot be started, although all is known that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SetUpError {
    /// A position that a split ring cannot have.
    #[error("position {0:#x}, a split ring has 16 bits")]
    Base(u32),
    /// A rule for rings is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// Memory that is still arriving needs a thread, and there is none left.
    #[error("no thread is left to serve a ring whose memory is still arriving")]
    NoThread,
    /// Frames for a ring behind a vIOMMU may have to wait, and there is no memory for that.
    #[error("no memory is left for frames that wait for translations")]
    NoRoom,
}

/// Why a connected port carries no frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unready {
    /// Rings were not started.
    #[error("the driver has not set up its rings")]
    NotSetUp,
    /// A ring is started and not enabled.
    #[error("ring {index} not enabled by the driver", index = .0.0)]
    NotEnabled(RingIndex),
    /// A ring's addresses are not usable in the memory that the front end shares.
    #[error("ring {index} is not within the memory that the front end shares", index = .0.0)]
    NoMemory(RingIndex),
    /// A ring's addresses are behind a vIOMMU, and the front end has not translated them.
    #[error("the addresses of ring {index} have not been translated by the IOMMU", index = .0.0)]
    NoTranslation(RingIndex),
    /// A ring is set up wrongly.
    #[error("ring {index} cannot be started: {error}", index = .0.0, error = .1)]
    SetUp(RingIndex, SetUpError),
    /// The driver broke a ring.
    #[error("ring {index} is broken until the driver resets it", index = .0.0)]
    Broken(RingIndex),
}
