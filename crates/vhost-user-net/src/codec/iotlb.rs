//! Translations of a vIOMMU: `IOTLB_MSG` of front ends, `BACKEND_IOTLB_MSG` of back ends.
//!
//! ```text
//!  0 iova │ 8 size │ 16 address in the front end │ 24 permission │ 25 type │ 26 padding, 6 bytes
//! ```

use vhost::vhost_user::message::BackendReq;
use virtq::{Access, IotlbMiss, Iova};

use super::request::Fields;
use super::{CodecError, Header};
use crate::memory::FrontendAddr;

/// Bytes of the payload: those of the kernel's `struct vhost_iotlb_msg`.
const PAYLOAD_BYTES: u32 = 32;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// What a message says of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IotlbKind {
    /// The device met it, and does not know where it is.
    Miss(Access),
    /// It is at an address of the front end, for this access.
    Update(Access),
    /// It is no more.
    Invalidate,
}

/// A message about a range of addresses of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IotlbMessage {
    /// Where the range begins.
    pub iova: Iova,
    /// Its bytes.
    pub size: u64,
    /// Where the front end has it.
    pub user: FrontendAddr,
    /// What it says.
    pub kind: IotlbKind,
}

impl IotlbMessage {
    /// The question that follows from a miss.
    pub fn miss(miss: IotlbMiss) -> Self {
        let kind = IotlbKind::Miss(miss.access);
        Self { iova: miss.iova, size: 0, user: FrontendAddr(0), kind }
    }

    pub(super) fn parse(fields: &Fields<'_>) -> Result<Self, CodecError> {
        fields.exactly(PAYLOAD_BYTES as usize)?;
        let [perm, kind, ..] = fields.u64_at(24).to_le_bytes();
        let access = match perm {
            1 => Some(Access::Read),
            2 => Some(Access::Write),
            3 => Some(Access::ReadWrite),
            _ => None,
        };
        let bad_access = || fields.value("the permission", perm.into(), "1 to 3 are allowed");
        let kind = match (kind, access) {
            (INVALIDATE, _) => IotlbKind::Invalidate,
            (MISS, Some(access)) => IotlbKind::Miss(access),
            (UPDATE, Some(access)) => IotlbKind::Update(access),
            (MISS | UPDATE, None) => return bad_access(),
            (other, _) => return fields.value("the type", other.into(), "2 and 3 are allowed"),
        };
        let (iova, size) = (Iova(fields.u64_at(0)), fields.u64_at(8));
        Ok(Self { iova, size, user: FrontendAddr(fields.u64_at(16)), kind })
    }

    /// The payload.
    pub fn write(&self) -> Vec<u8> {
        let perm = |access: Access| match access {
            Access::Read => 1,
            Access::Write => 2,
            Access::ReadWrite => 3,
        };
        let (perm, kind) = match self.kind {
            IotlbKind::Miss(access) => (perm(access), MISS),
            IotlbKind::Update(access) => (perm(access), UPDATE),
            IotlbKind::Invalidate => (0, INVALIDATE),
        };
        let last = u64::from_le_bytes([perm, kind, 0, 0, 0, 0, 0, 0]);
        let words = [self.iova.0, self.size, self.user.0, last];
        words.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// The whole message on the channel of the back end; no reply is asked for.
    pub fn write_to_front_end(&self) -> Vec<u8> {
        let request = u32::from(BackendReq::IOTLB_MSG);
        let header = Header { request, need_reply: false, reply: false, size: PAYLOAD_BYTES };
        [header.write().to_vec(), self.write()].concat()
    }
}
