//! vhost-user messages: bytes to requests and replies to bytes, without I/O.
//!
//! ```text
//!  ┌ u32 request ┬ u32 flags ┬ u32 size ┐┌──────── payload: `size` bytes ────────┐  fds beside it
//!  │             │ 1|REPLY|NEED_REPLY   ││ exact for every request               │
//!  └─────────────┴───────────┴──────────┘└───────────────────────────────────────┘
//! ```
//!
//! **Trust.** The front end is hostile: every size, count and value is checked here, once.
//! **Limits.** [`PAYLOAD_MAX`] bytes and [`FDS_MAX`] fds a message; [`TABLE_REGIONS_MAX`] regions
//! in a memory table (more come one by one with `ADD_MEM_REG`).
//! **Units.** Little endian; sizes in bytes.

mod decoder;
mod iotlb;
mod request;

pub use decoder::{Decoder, Message};
pub use iotlb::{IotlbKind, IotlbMessage};
pub(crate) use request::LOG_FLAG;
pub use request::{InflightSpec, LogArea, Request, StateDirection, VringAddr, VringFd, VringState};
pub use vhost::vhost_user::message::FrontendReq;

use crate::memory::RegionSpec;
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag};

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 12;
/// The largest payload that is accepted.
pub const PAYLOAD_MAX: usize = MAX_MSG_SIZE;
/// The most fds beside one message.
pub const FDS_MAX: usize = MAX_ATTACHED_FD_ENTRIES;
/// The most regions in one `SET_MEM_TABLE`: each brings an fd.
pub const TABLE_REGIONS_MAX: usize = FDS_MAX;

/// The one version of the protocol.
const VERSION: u32 = 1;

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What is asked, by number: unknown ones are refused later.
    pub request: u32,
    /// Whether the front end waits for an acknowledgement.
    pub need_reply: bool,
    /// Whether this is a reply.
    pub reply: bool,
    /// Bytes of payload.
    pub size: u32,
}

impl Header {
    /// Reads a header; what it claims is within the limits.
    ///
    /// # Errors
    ///
    /// [`CodecError`] if version, flags or size are not allowed.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, CodecError> {
        let word = |at: usize| {
            let field = bytes.get(at..).and_then(|b| b.first_chunk());
            u32::from_le_bytes(field.copied().unwrap_or_default())
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(CodecError::Version(version));
        }
        let reserved = flags & VhostUserHeaderFlag::RESERVED_BITS.bits();
        if reserved != 0 {
            return Err(CodecError::Flags(reserved));
        }
        if usize::try_from(size).map_or(true, |size| size > PAYLOAD_MAX) {
            return Err(CodecError::TooLarge { request, size });
        }
        let has = |flag: VhostUserHeaderFlag| flags & flag.bits() != 0;
        Ok(Self {
            request,
            need_reply: has(VhostUserHeaderFlag::NEED_REPLY),
            reply: has(VhostUserHeaderFlag::REPLY),
            size,
        })
    }

    /// The bytes of the header.
    pub fn write(&self) -> [u8; HEADER_BYTES] {
        let flag = |on: bool, flag: VhostUserHeaderFlag| if on { flag.bits() } else { 0 };
        let flags = VERSION
            | flag(self.reply, VhostUserHeaderFlag::REPLY)
            | flag(self.need_reply, VhostUserHeaderFlag::NEED_REPLY);
        let mut bytes = [0; HEADER_BYTES];
        for (field, value) in
            bytes.as_chunks_mut().0.iter_mut().zip([self.request, flags, self.size])
        {
            *field = value.to_le_bytes();
        }
        bytes
    }
}

/// What the back end answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, counts, and acknowledgements (0 is success).
    U64(u64),
    /// A ring's state.
    Vring(VringState),
    /// In-flight regions; their file goes beside it.
    Inflight(InflightSpec),
    /// Regions as they were sent, with the addresses where we have them (postcopy).
    Table(Vec<RegionSpec>),
    /// One of them.
    Region(RegionSpec),
    /// Nothing: the answer to `SET_LOG_BASE`, and how `GET_CONFIG` says that it failed.
    Empty,
}

impl Reply {
    /// The whole message that answers `request`.
    pub fn write(&self, request: u32) -> Vec<u8> {
        let payload = match self {
            Self::U64(value) => value.to_le_bytes().to_vec(),
            Self::Vring(state) => state.write().to_vec(),
            Self::Inflight(spec) => spec.write(),
            Self::Table(regions) => request::write_table(regions),
            Self::Region(region) => request::write_single(region),
            Self::Empty => Vec::new(),
        };
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Header { request, need_reply: false, reply: true, size }.write().to_vec();
        bytes.extend(payload);
        bytes
    }
}

/// The name of a request, for people.
pub fn request_name(request: u32) -> String {
    FrontendReq::try_from(request).map_or_else(|_| request.to_string(), |r| format!("{r:?}"))
}

/// What is wrong with a message by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Another version of the protocol.
    #[error("message version {0}, only {VERSION} is known")]
    Version(u32),
    /// Flags without meaning.
    #[error("reserved message flags {0:#x} are set")]
    Flags(u32),
    /// A reply to a question that nobody asked.
    #[error("a reply to {name}, which was not asked", name = request_name(*.0))]
    UnexpectedReply(u32),
    /// More payload than any request has.
    #[error(
        "{name} with {size} bytes, at most {PAYLOAD_MAX} are allowed",
        name = request_name(*.request)
    )]
    TooLarge {
        /// The request.
        request: u32,
        /// Bytes it claims.
        size: u32,
    },
    /// A number that is no request.
    #[error("unknown request {0}")]
    Unknown(u32),
    /// Another size than the request has.
    #[error("{name} with {size} bytes instead of {expected}", name = request_name(*.request))]
    Size {
        /// The request.
        request: u32,
        /// Bytes that came.
        size: usize,
        /// Bytes that the specification says.
        expected: usize,
    },
    /// Too few or too many fds.
    #[error("{name} with {count} fds instead of {expected}", name = request_name(*.request))]
    FdCount {
        /// The request.
        request: u32,
        /// Fds that came.
        count: usize,
        /// Fds that belong to it.
        expected: usize,
    },
    /// More fds than the kernel or we hand over.
    #[error("more than {FDS_MAX} fds beside one message")]
    TooManyFds,
    /// A field with a value that is not allowed.
    #[error("{name}: {field} is {value:#x}, {allowed}", name = request_name(*.request))]
    Value {
        /// The request.
        request: u32,
        /// The field.
        field: &'static str,
        /// What it held.
        value: u64,
        /// What it may hold.
        allowed: &'static str,
    },
}

#[cfg(test)]
mod tests;
