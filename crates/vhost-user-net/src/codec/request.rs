//! Every request of a front end, with its payload parsed.

use virtq::mem::GuestPhysAddr;

use super::iotlb::IotlbMessage;
use super::{CodecError, FrontendReq, Header, Message, TABLE_REGIONS_MAX};
use crate::memory::{FrontendAddr, RegionSpec};

/// A ring and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringState {
    /// The ring.
    pub ring: u32,
    /// Size, position or switch.
    pub num: u32,
}

impl VringState {
    /// The payload.
    pub fn write(&self) -> [u8; 8] {
        (u64::from(self.ring) | u64::from(self.num).wrapping_shl(32)).to_le_bytes()
    }
}

/// Where the front end has the parts of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddr {
    /// The ring.
    pub ring: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table or descriptor ring.
    pub desc: FrontendAddr,
    /// Used ring or device event suppression area.
    pub used: FrontendAddr,
    /// Available ring or driver event suppression area.
    pub avail: FrontendAddr,
    /// Guest address to log writes to the used ring at; unused without dirty logging.
    pub log: u64,
}

/// Where in its file the log of written pages is (`SET_LOG_BASE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogArea {
    /// Bytes of the bitmap.
    pub bytes: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

/// Where in-flight regions are in their file, and for which queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightSpec {
    /// Bytes of all regions.
    pub bytes: u64,
    /// Where they start in the file.
    pub offset: u64,
    /// Rings.
    pub queues: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Four bytes follow: some front ends pad the message, and expect a reply of that size.
    pub padded: bool,
}

impl InflightSpec {
    /// The payload.
    pub fn write(&self) -> Vec<u8> {
        let mut bytes = self.bytes.to_le_bytes().to_vec();
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.queues.to_le_bytes());
        bytes.extend(self.queue_size.to_le_bytes());
        bytes.extend(if self.padded { &[0; 4][..] } else { &[] });
        bytes
    }
}

/// How the device's state is to be transferred (`SET_DEVICE_STATE_FD`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDirection {
    /// We write it.
    Save,
    /// We read it.
    Load,
}

/// A ring, and whether an fd comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    /// The ring.
    pub ring: u32,
    /// Whether an fd is beside the message; if not, the ring does without.
    pub has_fd: bool,
}

/// Bit of the payload that says that no fd comes along.
const NOFD: u64 = 0x100;
const RING_MASK: u64 = 0xff;
/// `VHOST_VRING_F_LOG`, the only flag.
pub(crate) const LOG_FLAG: u32 = 1;
const REGION_BYTES: usize = 32;

/// A request with its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after the specification's requests, which document them")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionSpec>),
    SetLogBase(LogArea),
    SetLogFd,
    Iotlb(IotlbMessage),
    SetVringNum(VringState),
    SetVringAddr(VringAddr),
    SetVringBase(VringState),
    GetVringBase {
        ring: u32,
    },
    GetInflightFd(InflightSpec),
    SetInflightFd(InflightSpec),
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        ring: u32,
        enable: bool,
    },
    SendRarp([u8; 6]),
    NetSetMtu(u64),
    SetBackendReqFd,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec),
    RemMemReg(RegionSpec),
    SetStatus(u8),
    GetStatus,
    SetDeviceStateFd(StateDirection),
    CheckDeviceState,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyEnd,
    /// That the addresses in the replies to `ADD_MEM_REG` were heard, in postcopy: the number of
    /// the last request about memory, which says nothing, and zero instead of a region. An empty
    /// `SET_MEM_TABLE` looks the same.
    MemoryHeard,
    /// One that belongs to a feature that is not offered; its payload is not looked at.
    NotOffered(FrontendReq),
}

impl Request {
    /// Whether the request is answered with something that is not an acknowledgement.
    pub(crate) fn has_own_reply(request: u32) -> bool {
        let Ok(kind) = FrontendReq::try_from(request) else { return false };
        matches!(
            kind,
            FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_VRING_BASE
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::GET_STATUS
                | FrontendReq::SET_LOG_BASE
                | FrontendReq::GET_INFLIGHT_FD
                | FrontendReq::GET_SHARED_OBJECT
                | FrontendReq::GET_SHMEM_CONFIG
                | FrontendReq::CREATE_CRYPTO_SESSION
                | FrontendReq::POSTCOPY_ADVISE
                | FrontendReq::POSTCOPY_END
                | FrontendReq::SET_DEVICE_STATE_FD
                | FrontendReq::CHECK_DEVICE_STATE
        )
    }

    /// Parses a complete message's payload and counts its fds.
    ///
    /// # Errors
    ///
    /// [`CodecError`] if request, size, a value or the number of fds is wrong.
    pub fn parse(message: &Message) -> Result<Self, CodecError> {
        let code = message.header.request;
        if code == 0 && message.payload == [0; 8] && message.fds.is_empty() {
            // QEMU's, when the regions are those of before.
            return Ok(Self::MemoryHeard);
        }
        let kind = FrontendReq::try_from(code).map_err(|_| CodecError::Unknown(code))?;
        let fields = Fields { request: code, bytes: &message.payload };
        let request = Self::parse_payload(kind, &fields)?;
        let count = message.fds.len();
        let expected = request.fd_count();
        // Some front ends pass the fd of the region that they remove: it is closed unused.
        let spare = usize::from(matches!(request, Self::RemMemReg(_) | Self::SetLogFd));
        let fits = count == expected || count == expected.saturating_add(spare);
        if !fits && !matches!(request, Self::NotOffered(_)) {
            return Err(CodecError::FdCount { request: code, count, expected });
        }
        Ok(request)
    }

    fn parse_payload(kind: FrontendReq, fields: &Fields<'_>) -> Result<Self, CodecError> {
        type K = FrontendReq;
        Ok(match kind {
            K::GET_FEATURES => fields.none(Self::GetFeatures)?,
            K::SET_FEATURES => Self::SetFeatures(fields.u64()?),
            K::SET_OWNER => fields.none(Self::SetOwner)?,
            K::RESET_OWNER => fields.none(Self::ResetOwner)?,
            K::SET_MEM_TABLE => Self::SetMemTable(fields.table()?),
            // Some front ends send a payload beside the fd, some do not.
            K::SET_LOG_FD => Self::SetLogFd,
            K::SET_VRING_NUM => Self::SetVringNum(fields.state()?),
            K::SET_VRING_ADDR => Self::SetVringAddr(fields.addr()?),
            K::SET_VRING_BASE => Self::SetVringBase(fields.state()?),
            // The number in the request is garbage with some front ends.
            K::GET_VRING_BASE => Self::GetVringBase { ring: fields.state()?.ring },
            K::GET_INFLIGHT_FD => Self::GetInflightFd(fields.inflight()?),
            K::SET_INFLIGHT_FD => Self::SetInflightFd(fields.inflight()?),
            K::SET_VRING_KICK => Self::SetVringKick(fields.fd()?),
            K::SET_VRING_CALL => Self::SetVringCall(fields.fd()?),
            K::SET_VRING_ERR => Self::SetVringErr(fields.fd()?),
            K::GET_PROTOCOL_FEATURES => fields.none(Self::GetProtocolFeatures)?,
            K::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(fields.u64()?),
            K::GET_QUEUE_NUM => fields.none(Self::GetQueueNum)?,
            K::SET_VRING_ENABLE => fields.enable()?,
            K::SEND_RARP => fields.mac()?,
            K::NET_SET_MTU => Self::NetSetMtu(fields.u64()?),
            K::SET_BACKEND_REQ_FD => fields.none(Self::SetBackendReqFd)?,
            K::RESET_DEVICE => fields.none(Self::ResetDevice)?,
            K::GET_MAX_MEM_SLOTS => fields.none(Self::GetMaxMemSlots)?,
            K::ADD_MEM_REG | K::REM_MEM_REG if fields.bytes == [0; 8] => Self::MemoryHeard,
            K::ADD_MEM_REG => Self::AddMemReg(fields.single_region()?),
            K::REM_MEM_REG => Self::RemMemReg(fields.single_region()?),
            K::SET_STATUS => Self::SetStatus(fields.status()?),
            K::GET_STATUS => fields.none(Self::GetStatus)?,
            K::POSTCOPY_ADVISE => fields.none(Self::PostcopyAdvise)?,
            K::POSTCOPY_LISTEN => fields.none(Self::PostcopyListen)?,
            K::POSTCOPY_END => fields.none(Self::PostcopyEnd)?,
            K::SET_LOG_BASE => Self::SetLogBase(fields.log_area()?),
            K::SET_DEVICE_STATE_FD => fields.direction()?,
            K::CHECK_DEVICE_STATE => fields.none(Self::CheckDeviceState)?,
            K::IOTLB_MSG => Self::Iotlb(IotlbMessage::parse(fields)?),
            K::SET_VRING_ENDIAN
            | K::GET_CONFIG
            | K::SET_CONFIG
            | K::CREATE_CRYPTO_SESSION
            | K::CLOSE_CRYPTO_SESSION
            | K::GPU_SET_SOCKET
            | K::VRING_KICK
            | K::GET_SHARED_OBJECT
            | K::GET_SHMEM_CONFIG => Self::NotOffered(kind),
        })
    }

    /// How many fds belong to the request.
    fn fd_count(&self) -> usize {
        match self {
            Self::SetMemTable(regions) => regions.len(),
            Self::SetVringKick(v) | Self::SetVringCall(v) | Self::SetVringErr(v) => {
                usize::from(v.has_fd)
            }
            Self::SetInflightFd(_)
            | Self::SetBackendReqFd
            | Self::AddMemReg(_)
            | Self::SetLogBase(_)
            | Self::SetDeviceStateFd(_) => 1,
            Self::GetFeatures
            | Self::SetFeatures(_)
            | Self::SetOwner
            | Self::ResetOwner
            | Self::SetLogFd
            | Self::Iotlb(_)
            | Self::SetVringNum(_)
            | Self::SetVringAddr(_)
            | Self::SetVringBase(_)
            | Self::GetVringBase { .. }
            | Self::GetInflightFd(_)
            | Self::GetProtocolFeatures
            | Self::SetProtocolFeatures(_)
            | Self::GetQueueNum
            | Self::SetVringEnable { .. }
            | Self::SendRarp(_)
            | Self::NetSetMtu(_)
            | Self::ResetDevice
            | Self::GetMaxMemSlots
            | Self::RemMemReg(_)
            | Self::SetStatus(_)
            | Self::GetStatus
            | Self::CheckDeviceState
            | Self::PostcopyAdvise
            | Self::PostcopyListen
            | Self::PostcopyEnd
            | Self::MemoryHeard
            | Self::NotOffered(_) => 0,
        }
    }

    /// The request as a front end sends it; fds go beside it.
    pub fn write(&self, need_reply: bool) -> Vec<u8> {
        let (kind, payload) = self.parts();
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let header = Header { request: kind.into(), need_reply, reply: false, size };
        let mut bytes = header.write().to_vec();
        bytes.extend_from_slice(&payload);
        bytes
    }

    fn parts(&self) -> (FrontendReq, Vec<u8>) {
        type K = FrontendReq;
        let number = |n: u64| n.to_le_bytes().to_vec();
        match self {
            Self::GetFeatures => (K::GET_FEATURES, Vec::new()),
            Self::SetFeatures(bits) => (K::SET_FEATURES, number(*bits)),
            Self::SetOwner => (K::SET_OWNER, Vec::new()),
            Self::ResetOwner => (K::RESET_OWNER, Vec::new()),
            Self::SetMemTable(regions) => (K::SET_MEM_TABLE, write_table(regions)),
            Self::SetLogBase(area) => {
                let fields = [area.bytes, area.offset];
                (K::SET_LOG_BASE, fields.into_iter().flat_map(u64::to_le_bytes).collect())
            }
            Self::SetLogFd => (K::SET_LOG_FD, Vec::new()),
            Self::Iotlb(message) => (K::IOTLB_MSG, message.write()),
            Self::SetVringNum(state) => (K::SET_VRING_NUM, state.write().to_vec()),
            Self::SetVringAddr(addr) => (K::SET_VRING_ADDR, write_addr(addr)),
            Self::SetVringBase(state) => (K::SET_VRING_BASE, state.write().to_vec()),
            Self::GetVringBase { ring } => (K::GET_VRING_BASE, number(u64::from(*ring))),
            Self::GetInflightFd(spec) => (K::GET_INFLIGHT_FD, spec.write()),
            Self::SetInflightFd(spec) => (K::SET_INFLIGHT_FD, spec.write()),
            Self::SetVringKick(v) => (K::SET_VRING_KICK, number(write_fd(*v))),
            Self::SetVringCall(v) => (K::SET_VRING_CALL, number(write_fd(*v))),
            Self::SetVringErr(v) => (K::SET_VRING_ERR, number(write_fd(*v))),
            Self::GetProtocolFeatures => (K::GET_PROTOCOL_FEATURES, Vec::new()),
            Self::SetProtocolFeatures(bits) => (K::SET_PROTOCOL_FEATURES, number(*bits)),
            Self::GetQueueNum => (K::GET_QUEUE_NUM, Vec::new()),
            Self::SetVringEnable { ring, enable } => {
                let state = VringState { ring: *ring, num: u32::from(*enable) };
                (K::SET_VRING_ENABLE, state.write().to_vec())
            }
            Self::SendRarp([a, b, c, d, e, f]) => {
                (K::SEND_RARP, vec![*a, *b, *c, *d, *e, *f, 0, 0])
            }
            Self::NetSetMtu(mtu) => (K::NET_SET_MTU, number(*mtu)),
            Self::SetBackendReqFd => (K::SET_BACKEND_REQ_FD, Vec::new()),
            Self::ResetDevice => (K::RESET_DEVICE, Vec::new()),
            Self::GetMaxMemSlots => (K::GET_MAX_MEM_SLOTS, Vec::new()),
            Self::AddMemReg(region) => (K::ADD_MEM_REG, write_single(region)),
            Self::RemMemReg(region) => (K::REM_MEM_REG, write_single(region)),
            Self::SetStatus(status) => (K::SET_STATUS, number(u64::from(*status))),
            Self::GetStatus => (K::GET_STATUS, Vec::new()),
            Self::SetDeviceStateFd(direction) => {
                let direction = u64::from(*direction == StateDirection::Load);
                (K::SET_DEVICE_STATE_FD, number(direction))
            }
            Self::CheckDeviceState => (K::CHECK_DEVICE_STATE, Vec::new()),
            Self::PostcopyAdvise => (K::POSTCOPY_ADVISE, Vec::new()),
            Self::PostcopyListen => (K::POSTCOPY_LISTEN, Vec::new()),
            Self::PostcopyEnd => (K::POSTCOPY_END, Vec::new()),
            Self::MemoryHeard => (K::ADD_MEM_REG, number(0)),
            Self::NotOffered(kind) => (*kind, Vec::new()),
        }
    }
}

fn write_fd(v: VringFd) -> u64 {
    u64::from(v.ring) | if v.has_fd { 0 } else { NOFD }
}

fn write_addr(addr: &VringAddr) -> Vec<u8> {
    let first = VringState { ring: addr.ring, num: addr.flags }.write();
    let rest = [addr.desc.0, addr.used.0, addr.avail.0, addr.log];
    first.into_iter().chain(rest.into_iter().flat_map(u64::to_le_bytes)).collect()
}

fn write_region(region: &RegionSpec) -> impl Iterator<Item = u8> {
    [region.guest.0, region.size, region.user.0, region.mmap_offset]
        .into_iter()
        .flat_map(u64::to_le_bytes)
}

pub(super) fn write_single(region: &RegionSpec) -> Vec<u8> {
    [0; 8].into_iter().chain(write_region(region)).collect()
}

pub(super) fn write_table(regions: &[RegionSpec]) -> Vec<u8> {
    let count = u64::try_from(regions.len()).unwrap_or(u64::MAX);
    count.to_le_bytes().into_iter().chain(regions.iter().flat_map(write_region)).collect()
}

/// A payload, to be read by field.
pub(super) struct Fields<'a> {
    request: u32,
    bytes: &'a [u8],
}

impl Fields<'_> {
    pub(super) fn exactly(&self, expected: usize) -> Result<(), CodecError> {
        let (request, size) = (self.request, self.bytes.len());
        if size == expected { Ok(()) } else { Err(CodecError::Size { request, size, expected }) }
    }

    pub(super) fn value<T>(
        &self,
        field: &'static str,
        value: u64,
        allowed: &'static str,
    ) -> Result<T, CodecError> {
        Err(CodecError::Value { request: self.request, field, value, allowed })
    }

    pub(super) fn u64_at(&self, at: usize) -> u64 {
        let field = self.bytes.get(at..).and_then(|b| b.first_chunk());
        u64::from_le_bytes(field.copied().unwrap_or_default())
    }

    fn u32_at(&self, at: usize) -> u32 {
        let field = self.bytes.get(at..).and_then(|b| b.first_chunk());
        u32::from_le_bytes(field.copied().unwrap_or_default())
    }

    fn none(&self, request: Request) -> Result<Request, CodecError> {
        self.exactly(0).map(|()| request)
    }

    fn u64(&self) -> Result<u64, CodecError> {
        self.exactly(8).map(|()| self.u64_at(0))
    }

    fn state(&self) -> Result<VringState, CodecError> {
        self.exactly(8)?;
        Ok(VringState { ring: self.u32_at(0), num: self.u32_at(4) })
    }

    fn log_area(&self) -> Result<LogArea, CodecError> {
        self.exactly(16)?;
        Ok(LogArea { bytes: self.u64_at(0), offset: self.u64_at(8) })
    }

    fn inflight(&self) -> Result<InflightSpec, CodecError> {
        let padded = self.bytes.len() == 24;
        if !padded {
            self.exactly(20)?;
        }
        let numbers = self.u32_at(16);
        Ok(InflightSpec {
            bytes: self.u64_at(0),
            offset: self.u64_at(8),
            queues: u16::try_from(numbers & 0xffff).unwrap_or(u16::MAX),
            queue_size: u16::try_from(numbers >> 16).unwrap_or(u16::MAX),
            padded,
        })
    }

    fn enable(&self) -> Result<Request, CodecError> {
        let state = self.state()?;
        match state.num {
            0 | 1 => Ok(Request::SetVringEnable { ring: state.ring, enable: state.num == 1 }),
            other => self.value("the switch", u64::from(other), "0 or 1 are allowed"),
        }
    }

    fn fd(&self) -> Result<VringFd, CodecError> {
        let value = self.u64()?;
        if value & !(RING_MASK | NOFD) != 0 {
            return self.value("the ring", value, "only bits 0 to 8 have a meaning");
        }
        let ring = u32::try_from(value & RING_MASK).unwrap_or(u32::MAX);
        Ok(VringFd { ring, has_fd: value & NOFD == 0 })
    }

    fn mac(&self) -> Result<Request, CodecError> {
        let [a, b, c, d, e, f, _, _] = self.u64()?.to_le_bytes();
        if a & 1 != 0 {
            return self.value("the address", self.u64_at(0), "group addresses are not allowed");
        }
        Ok(Request::SendRarp([a, b, c, d, e, f]))
    }

    fn direction(&self) -> Result<Request, CodecError> {
        self.exactly(8)?;
        let (direction, phase) = (self.u32_at(0), self.u32_at(4));
        if phase != 0 {
            return self.value("the phase", phase.into(), "0 (all rings are stopped) is allowed");
        }
        match direction {
            0 => Ok(Request::SetDeviceStateFd(StateDirection::Save)),
            1 => Ok(Request::SetDeviceStateFd(StateDirection::Load)),
            _ => self.value("the direction", direction.into(), "0 (save) or 1 (load) are allowed"),
        }
    }

    fn status(&self) -> Result<u8, CodecError> {
        let value = self.u64()?;
        u8::try_from(value).or_else(|_| self.value("the status", value, "it is one byte"))
    }

    fn addr(&self) -> Result<VringAddr, CodecError> {
        self.exactly(40)?;
        let addr = VringAddr {
            ring: self.u32_at(0),
            flags: self.u32_at(4),
            desc: FrontendAddr(self.u64_at(8)),
            used: FrontendAddr(self.u64_at(16)),
            avail: FrontendAddr(self.u64_at(24)),
            log: self.u64_at(32),
        };
        if addr.flags & !LOG_FLAG != 0 {
            return self.value("flags", u64::from(addr.flags), "only bit 0 has a meaning");
        }
        Ok(addr)
    }

    fn region_at(&self, at: usize) -> RegionSpec {
        let field = |n: usize| self.u64_at(at.saturating_add(n));
        RegionSpec {
            guest: GuestPhysAddr(field(0)),
            size: field(8),
            user: FrontendAddr(field(16)),
            mmap_offset: field(24),
        }
    }

    fn single_region(&self) -> Result<RegionSpec, CodecError> {
        self.exactly(40).map(|()| self.region_at(8))
    }

    fn table(&self) -> Result<Vec<RegionSpec>, CodecError> {
        if self.bytes.len() < 8 {
            self.exactly(8)?;
        }
        let count = usize::try_from(self.u32_at(0)).unwrap_or(usize::MAX);
        if count > TABLE_REGIONS_MAX {
            let value = u64::from(self.u32_at(0));
            return self.value("the number of regions", value, "at most 32 are allowed");
        }
        self.exactly(count.saturating_mul(REGION_BYTES).saturating_add(8))?;
        Ok((0..count)
            .map(|i| self.region_at(i.saturating_mul(REGION_BYTES).saturating_add(8)))
            .collect())
    }
}
