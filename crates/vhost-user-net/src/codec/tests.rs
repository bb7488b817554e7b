#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::mem::size_of;
use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserU64,
    VhostUserVringAddr, VhostUserVringState,
};
use virtq::mem::GuestPhysAddr;
use virtq::{Access, Iova};

use super::{
    CodecError, Decoder, FDS_MAX, FrontendReq, HEADER_BYTES, Header, InflightSpec, IotlbKind,
    IotlbMessage, LogArea, Message, PAYLOAD_MAX, Reply, Request, StateDirection, VringAddr,
    VringFd, VringState,
};
use crate::memory::{FrontendAddr, RegionSpec};

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect()
}

/// Feeds `bytes` in pieces of `step` and gives the one message.
fn decode(bytes: &[u8], step: usize, count: usize) -> Result<Message, CodecError> {
    let mut decoder = Decoder::default();
    let mut fds = Some(fds(count));
    let mut left = bytes;
    loop {
        let space = decoder.space();
        let len = space.len().min(step).min(left.len());
        assert!(len > 0, "the decoder asks for more than the message");
        space[..len].copy_from_slice(&left[..len]);
        left = &left[len..];
        if let Some(message) = decoder.advance(len, fds.take().unwrap_or_default())? {
            assert!(left.is_empty(), "the decoder left {} bytes", left.len());
            assert!(!decoder.is_partial());
            return Ok(message);
        }
        assert!(decoder.is_partial());
    }
}

fn region(n: u64) -> RegionSpec {
    RegionSpec {
        guest: GuestPhysAddr(n << 32),
        size: 0x1000 + n,
        user: FrontendAddr(0x7f00_0000_0000 + (n << 32)),
        mmap_offset: n << 12,
    }
}

fn addr() -> VringAddr {
    let [desc, used, avail] = [1, 2, 3].map(|n| FrontendAddr(n << 20));
    VringAddr { ring: 3, flags: 1, desc, used, avail, log: 77 }
}

/// Every request, with the fds that belong to it.
fn iotlb(kind: IotlbKind) -> IotlbMessage {
    IotlbMessage { iova: Iova(1 << 40), size: 4096, user: FrontendAddr(7 << 40), kind }
}

fn requests() -> Vec<(Request, usize)> {
    let state = VringState { ring: 5, num: 256 };
    let fd = |has_fd| VringFd { ring: 4, has_fd };
    vec![
        (Request::GetFeatures, 0),
        (Request::SetFeatures(0x1234_5678_9abc_def0), 0),
        (Request::SetOwner, 0),
        (Request::ResetOwner, 0),
        (Request::SetMemTable(vec![]), 0),
        (Request::SetMemTable((1..=8).map(region).collect()), 8),
        (Request::SetMemTable((1..=32).map(region).collect()), 32),
        (Request::SetLogFd, 1),
        (Request::SetVringNum(state), 0),
        (Request::SetVringAddr(addr()), 0),
        (Request::SetVringBase(state), 0),
        (Request::GetVringBase { ring: 9 }, 0),
        (Request::SetVringKick(fd(true)), 1),
        (Request::SetVringKick(fd(false)), 0),
        (Request::SetVringCall(fd(true)), 1),
        (Request::SetVringErr(fd(false)), 0),
        (Request::GetProtocolFeatures, 0),
        (Request::SetProtocolFeatures(7), 0),
        (Request::GetQueueNum, 0),
        (Request::SetVringEnable { ring: 1, enable: true }, 0),
        (Request::SetVringEnable { ring: 1, enable: false }, 0),
        (Request::SendRarp([2, 1, 2, 3, 4, 5]), 0),
        (Request::NetSetMtu(9000), 0),
        (Request::SetBackendReqFd, 1),
        (Request::ResetDevice, 0),
        (Request::GetMaxMemSlots, 0),
        (Request::AddMemReg(region(1)), 1),
        (Request::RemMemReg(region(1)), 0),
        (Request::RemMemReg(region(1)), 1),
        (Request::SetStatus(15), 0),
        (Request::GetStatus, 0),
        (Request::SetDeviceStateFd(StateDirection::Save), 1),
        (Request::SetDeviceStateFd(StateDirection::Load), 1),
        (Request::CheckDeviceState, 0),
        (Request::Iotlb(iotlb(IotlbKind::Update(Access::ReadWrite))), 0),
        (Request::Iotlb(iotlb(IotlbKind::Invalidate)), 0),
        (Request::NotOffered(FrontendReq::SET_VRING_ENDIAN), 0),
        (Request::GetInflightFd(inflight(false)), 0),
        (Request::SetInflightFd(inflight(true)), 1),
        (Request::SetLogBase(LogArea { bytes: 1 << 20, offset: 8192 }), 1),
        (Request::SetLogFd, 1),
    ]
}

fn inflight(padded: bool) -> InflightSpec {
    InflightSpec { bytes: 1 << 14, offset: 64, queues: 4, queue_size: 256, padded }
}

#[test]
fn every_request_survives_a_round_trip_in_pieces_of_any_size() {
    for (request, count) in requests() {
        for need_reply in [false, true] {
            let bytes = request.write(need_reply);
            for step in [1, 5, 12, 13, 4096] {
                let message = decode(&bytes, step, count).unwrap();
                assert_eq!(message.header.need_reply, need_reply);
                assert_eq!(message.fds.len(), count);
                assert_eq!(Request::parse(&message), Ok(request.clone()));
            }
        }
    }
}

#[test]
fn payloads_are_as_long_as_those_of_the_vhost_crate() {
    let len = |request: Request| request.write(false).len() - HEADER_BYTES;
    assert_eq!(len(Request::SetFeatures(0)), size_of::<VhostUserU64>());
    let state = VringState { ring: 0, num: 0 };
    assert_eq!(len(Request::SetVringNum(state)), size_of::<VhostUserVringState>());
    assert_eq!(len(Request::SetVringAddr(addr())), size_of::<VhostUserVringAddr>());
    let table = size_of::<VhostUserMemory>() + 2 * size_of::<VhostUserMemoryRegion>();
    assert_eq!(len(Request::SetMemTable(vec![region(1), region(2)])), table);
    let single = size_of::<VhostUserSingleMemoryRegion>();
    assert_eq!(len(Request::AddMemReg(region(1))), single);
}

#[test]
fn ring_addresses_come_in_the_order_descriptor_used_available() {
    let bytes = Request::SetVringAddr(addr()).write(false);
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!([field(20), field(28), field(36)], [1 << 20, 2 << 20, 3 << 20]);
}

#[test]
fn a_wrong_size_is_refused_for_every_request() {
    for (request, count) in requests() {
        if matches!(request, Request::NotOffered(_) | Request::SetLogFd) {
            continue;
        }
        for change in [-1isize, 1] {
            let mut bytes = request.write(false);
            let size = bytes.len() - HEADER_BYTES;
            let Some(wrong) = size.checked_add_signed(change) else { continue };
            bytes[8..12].copy_from_slice(&(wrong as u32).to_le_bytes());
            bytes.resize(HEADER_BYTES + wrong, 0);
            let message = decode(&bytes, 4096, count).unwrap();
            let error = Request::parse(&message).unwrap_err();
            assert!(matches!(error, CodecError::Size { size, .. } if size == wrong), "{error}");
        }
    }
}

#[test]
fn a_wrong_number_of_fds_is_refused_for_every_request() {
    for (request, count) in requests() {
        if matches!(request, Request::NotOffered(_)) {
            continue;
        }
        let most =
            if matches!(request, Request::RemMemReg(_) | Request::SetLogFd) { 1 } else { count };
        let mut wrong = vec![most + 1];
        wrong.extend(
            count.checked_sub(1).filter(|_| most == count && count != 1 || fixed(&request)),
        );
        for got in wrong.into_iter().filter(|n| *n <= FDS_MAX) {
            let message = decode(&request.write(false), 4096, got).unwrap();
            let error = Request::parse(&message).unwrap_err();
            assert!(matches!(error, CodecError::FdCount { count, .. } if count == got), "{error}");
        }
    }
}

/// Whether a request must have its fd.
fn fixed(request: &Request) -> bool {
    matches!(
        request,
        Request::SetVringKick(VringFd { has_fd: true, .. })
            | Request::SetVringCall(VringFd { has_fd: true, .. })
            | Request::AddMemReg(_)
            | Request::SetBackendReqFd
    )
}

fn refusal(kind: FrontendReq, payload: &[u8]) -> String {
    let size = payload.len() as u32;
    let header = Header { request: kind.into(), need_reply: false, reply: false, size };
    let message = Message { header, payload: payload.to_vec(), fds: Vec::new() };
    Request::parse(&message).unwrap_err().to_string()
}

#[test]
fn wrong_values_are_refused_and_named() {
    let two = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let text = refusal(FrontendReq::SET_VRING_ENABLE, &two(1, 2));
    assert_eq!(text, "SET_VRING_ENABLE: the switch is 0x2, 0 or 1 are allowed");
    let text = refusal(FrontendReq::SET_VRING_KICK, &0x200u64.to_le_bytes());
    assert_eq!(text, "SET_VRING_KICK: the ring is 0x200, only bits 0 to 8 have a meaning");
    let text = refusal(FrontendReq::SET_STATUS, &0x100u64.to_le_bytes());
    assert_eq!(text, "SET_STATUS: the status is 0x100, it is one byte");
    let text = refusal(FrontendReq::SEND_RARP, &1u64.to_le_bytes());
    assert_eq!(text, "SEND_RARP: the address is 0x1, group addresses are not allowed");
    let text = refusal(FrontendReq::SET_MEM_TABLE, &two(33, 0));
    assert_eq!(text, "SET_MEM_TABLE: the number of regions is 0x21, at most 32 are allowed");
    let mut flags = Request::SetVringAddr(addr()).write(false)[HEADER_BYTES..].to_vec();
    flags[4] = 2;
    let text = refusal(FrontendReq::SET_VRING_ADDR, &flags);
    assert_eq!(text, "SET_VRING_ADDR: flags is 0x2, only bit 0 has a meaning");
}

#[test]
fn wrong_headers_are_refused() {
    let header = |words: [u32; 3]| {
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        Header::parse(bytes.try_into().unwrap())
    };
    assert_eq!(header([1, 0, 0]), Err(CodecError::Version(0)));
    assert_eq!(header([1, 2, 0]), Err(CodecError::Version(2)));
    assert_eq!(header([1, 0x11, 0]), Err(CodecError::Flags(0x10)));
    let size = PAYLOAD_MAX as u32 + 1;
    assert_eq!(header([1, 1, size]), Err(CodecError::TooLarge { request: 1, size }));
    assert!(header([1, 1, PAYLOAD_MAX as u32]).is_ok());
    let reply = Reply::U64(1).write(1);
    assert_eq!(decode(&reply, 4096, 0).unwrap_err(), CodecError::UnexpectedReply(1));
    let unknown = Header { request: 999, need_reply: true, reply: false, size: 0 };
    let message = decode(&unknown.write(), 4096, 0).unwrap();
    assert_eq!(Request::parse(&message), Err(CodecError::Unknown(999)));
}

#[test]
fn more_fds_than_a_message_may_have_end_the_stream() {
    let bytes = Request::GetFeatures.write(false);
    assert_eq!(decode(&bytes, 4096, FDS_MAX + 1).unwrap_err(), CodecError::TooManyFds);
}

#[test]
fn replies_carry_version_and_reply_flag() {
    let state = VringState { ring: 1, num: 0x8001_8001 };
    let bytes = Reply::Vring(state).write(FrontendReq::GET_VRING_BASE.into());
    let words: Vec<u32> =
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [11, 5, 8, 1, 0x8001_8001]);
    assert_eq!(Reply::Empty.write(24).len(), HEADER_BYTES);
}

/// Another process goes on with half a message, wherever it was cut.
#[test]
fn a_decoder_resumes_anywhere_in_a_message() {
    let bytes = Request::SetVringNum(VringState { ring: 3, num: 256 }).write(false);
    for cut in 0..bytes.len() {
        let mut first = Decoder::default();
        let feed = |decoder: &mut Decoder, bytes: &[u8]| {
            let mut message = None;
            for byte in bytes {
                decoder.space()[0] = *byte;
                message = decoder.advance(1, []).unwrap();
            }
            message
        };
        assert!(feed(&mut first, &bytes[..cut]).is_none());
        let (read, fds) = first.unfinished();
        assert_eq!((read.as_slice(), fds.len()), (&bytes[..cut], 0));
        let mut second = Decoder::resume(&read, Vec::new()).unwrap();
        assert_eq!(second.is_partial(), cut > 0);
        let message = feed(&mut second, &bytes[cut..]).expect("complete");
        assert_eq!(
            Request::parse(&message).unwrap(),
            Request::SetVringNum(VringState { ring: 3, num: 256 })
        );
    }
    assert!(Decoder::resume(&bytes, Vec::new()).is_none(), "that is a whole message");
    assert!(Decoder::resume(&[0xff; 12], Vec::new()).is_none());
}
