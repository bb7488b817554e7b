//! A hostile front end: any sequence of messages, likely and unlikely ones, with fds of all kinds.
//! Its files hold what it likes: memory, in-flight regions, logs. Translations are of any ranges.
//!
//! Nothing may panic; a ring that the session says is running is one that was started and not
//! stopped; the memory of running rings is mapped (their chains are taken and completed after every
//! message); and in the end no fd is left.
#![no_main]

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;
use vhost_user_net::codec::{
    Decoder, FrontendReq, HEADER_BYTES, Header, InflightSpec, IotlbKind, IotlbMessage, LogArea,
    Message, Request, StateDirection, VringAddr, VringFd, VringState,
};
use vhost_user_net::memory::{FrontendAddr, RegionSpec};
use vhost_user_net::session::{
    FEATURES, PAGEFAULT, PROTOCOL_FEATURES, RingIndex, RingStart, Rings, Session, SessionSettings,
    SetUpError, Stopped,
};
use virtio_net::features::ACCESS_PLATFORM;
use virtq::mem::GuestPhysAddr;
use virtq::{
    Access, ChainBuf, Inflight, Iova, Layout, QueueConfig, Recovery, Virtq, inflight_bytes,
};

const RINGS: u16 = 8;
/// `VIRTIO_F_RING_PACKED`
const RING_PACKED: u64 = 1 << 34;
const PAGE: u64 = 4096;
const FILE_BYTES: u64 = 16 * PAGE;
const USER: u64 = 0x7f00_0000_0000;
/// Entries of the rings of a good beginning.
const SIZE: u16 = 64;

/// The input, read from the front; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, limit: u64) -> u64 {
        u64::from(self.byte()) % limit
    }

    fn u64(&mut self) -> u64 {
        (0..8).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }
}

/// Rings that only remember; a stopped one must have been running.
#[derive(Default)]
struct Shelf(BTreeMap<u16, Shelved>);

struct Shelved {
    queue: Virtq,
    /// Nobody serves its pages: it is not to be touched.
    late: bool,
}

impl Rings for Shelf {
    fn start(&mut self, ring: RingIndex, start: RingStart<'_>) -> Result<(), SetUpError> {
        let area = start.inflight.clone();
        let mut inflight = area.and_then(|area| Inflight::new(area, &start.config));
        let mut position = start.config.position;
        if let Some(inflight) = inflight.as_mut().filter(|_| !start.known)
            && let Recovery::At(recovered) = inflight.recover(&start.config, start.memory)?
        {
            position = recovered;
        }
        let mut queue = QueueConfig { position, ..start.config }.activate(start.memory)?;
        if let Some(inflight) = inflight {
            queue.set_inflight(inflight);
        }
        queue.set_log(start.log);
        queue.set_iotlb(start.iotlb);
        let shelved = Shelved { queue, late: start.late };
        assert!(self.0.insert(ring.0, shelved).is_none(), "ring {} started twice", ring.0);
        Ok(())
    }

    fn stop(&mut self, ring: RingIndex) -> Option<Stopped> {
        let shelved = self.0.remove(&ring.0).expect("stopped, but not running");
        Some(shelved.queue.into())
    }

    fn park(&mut self, ring: RingIndex) -> Option<Stopped> {
        assert!(ring.0 % 2 == 0, "nothing waits for a transmitq here");
        self.stop(ring)
    }

    fn hold(&mut self, ring: RingIndex) {
        assert!(ring.0 % 2 == 0, "nothing waits for a transmitq here");
        assert!(!self.0.contains_key(&ring.0), "it runs");
    }

    fn give_up(&mut self, ring: RingIndex) {
        assert!(!self.0.contains_key(&ring.0), "it runs");
    }

    fn quiesce(&mut self) {}

    fn resume(&mut self, ring: RingIndex) {
        assert!(self.0.contains_key(&ring.0), "it does not run");
    }

    fn wake(&mut self, _: &OwnedFd) {}

    fn forget(&mut self, _: RingIndex) {}

    fn announce(&mut self, mac: [u8; 6]) {
        assert_eq!(mac[0] & 1, 0);
    }
}

fn fd(kind: u8, input: &mut Input<'_>) -> OwnedFd {
    match kind % 4 {
        0..2 => eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"),
        2 => file(input),
        _ => rustix::pipe::pipe().expect("pipe").0,
    }
}

/// A file with zeros, and something else in some places; in-flight regions, perhaps.
fn file(input: &mut Input<'_>) -> OwnedFd {
    let fd = memfd_create("m", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, FILE_BYTES).expect("ftruncate");
    let put = |at: u64, bytes: &[u8]| drop(pwrite(&fd, bytes, at));
    let kind = input.byte();
    let regions = match kind % 4 {
        0 => Some(Layout::Split),
        1 => Some(Layout::Packed),
        _ => None,
    };
    let each = regions.map_or(PAGE, |layout| inflight_bytes(layout, SIZE) as u64);
    for ring in (0..4).filter(|_| regions.is_some()) {
        // Version and size of one that is in use.
        put(ring * each + 8, &[1, 0, SIZE.to_le_bytes()[0], 0]);
    }
    for _ in 0..kind / 4 {
        let at = input.below(16) * each + u64::from(input.byte()) * 2;
        match input.byte() {
            0 => put(at, &input.u64().to_le_bytes()),
            low => put(at, &[low, input.byte() / 64]),
        }
    }
    fd
}

fn region(input: &mut Input<'_>) -> RegionSpec {
    let at = input.below(8) * 8 * PAGE;
    match input.byte() {
        255 => RegionSpec {
            guest: GuestPhysAddr(input.u64()),
            size: input.u64(),
            user: FrontendAddr(input.u64()),
            mmap_offset: input.u64(),
        },
        odd => RegionSpec {
            guest: GuestPhysAddr(at),
            size: (input.below(20) + 1) * PAGE - u64::from(odd % 2),
            user: FrontendAddr(USER + at),
            mmap_offset: input.below(4) * PAGE + u64::from(odd / 128) * 16,
        },
    }
}

fn state(input: &mut Input<'_>, ring: u32) -> VringState {
    let nums = [1, 2, 16, 64, 100, 256, 0x8000, 0x8000_8000, 0, u32::MAX];
    let num = nums[usize::try_from(input.below(10)).expect("small")];
    VringState { ring, num }
}

fn place(input: &mut Input<'_>) -> FrontendAddr {
    let odd = if input.byte() > 250 { input.u64() } else { 0 };
    FrontendAddr((USER + input.below(64) * PAGE).wrapping_add(odd))
}

fn inflight(input: &mut Input<'_>) -> InflightSpec {
    let sizes = [SIZE, SIZE, SIZE, 1, 100, 256, 1024, u16::MAX];
    let queue_size = sizes[usize::try_from(input.below(8)).expect("small")];
    let queues = u16::from(input.byte() % 10);
    let layout = if input.byte() % 2 == 0 { Layout::Split } else { Layout::Packed };
    let bytes = match input.byte() {
        255 => input.u64(),
        less => (u64::from(queues) * inflight_bytes(layout, queue_size) as u64)
            .saturating_sub(u64::from(less) / 200),
    };
    let offset = if input.byte() > 250 { input.u64() } else { input.below(3) * PAGE };
    InflightSpec { bytes, offset, queues, queue_size, padded: input.byte() % 2 == 0 }
}

fn translation(input: &mut Input<'_>) -> IotlbMessage {
    let access = [Access::Read, Access::Write, Access::ReadWrite, Access::ReadWrite];
    let access = access[usize::try_from(input.below(4)).expect("small")];
    let kind = match input.byte() % 16 {
        0 => IotlbKind::Miss(access),
        1..6 => IotlbKind::Invalidate,
        _ => IotlbKind::Update(access),
    };
    let (iova, user) = (Iova(place(input).0), place(input));
    let size = match input.byte() {
        255 => input.u64(),
        pages => u64::from(pages % 20) * PAGE - u64::from(pages / 240).min(u64::from(pages % 20)),
    };
    IotlbMessage { iova, size, user, kind }
}

fn request(input: &mut Input<'_>) -> Request {
    let ring = u32::from(input.byte() % 16 % 9);
    let v = VringFd { ring, has_fd: input.byte() % 8 != 0 };
    match input.below(38) {
        0 => Request::GetFeatures,
        1 => Request::SetFeatures(match input.byte() {
            255 => input.u64(),
            mask => FEATURES & !(u64::from(mask) << 28),
        }),
        2 => Request::SetOwner,
        3 => Request::ResetOwner,
        4 => Request::SetMemTable((0..input.below(4)).map(|_| region(input)).collect()),
        5 => Request::SetLogFd,
        6 => Request::SetVringNum(state(input, ring)),
        7 => {
            let (desc, used, avail) = (place(input), place(input), place(input));
            let flags = u32::from(input.byte() % 4);
            Request::SetVringAddr(VringAddr { ring, flags, desc, used, avail, log: 0 })
        }
        8 => Request::SetVringBase(state(input, ring)),
        9 => Request::GetVringBase { ring },
        10 | 11 => Request::SetVringKick(v),
        12 => Request::SetVringCall(v),
        13 => Request::SetVringErr(v),
        14 => Request::GetProtocolFeatures,
        15 => {
            let offered = PROTOCOL_FEATURES | PAGEFAULT;
            Request::SetProtocolFeatures(offered & !u64::from(input.byte() / 32))
        }
        16 => Request::GetQueueNum,
        17 | 18 => Request::SetVringEnable { ring, enable: input.byte() % 4 != 0 },
        19 => Request::SendRarp([input.byte(), 0, 0, 0, 0, 1]),
        20 => Request::NetSetMtu(u64::from(input.byte()) * 64),
        21 => Request::SetBackendReqFd,
        22 => Request::ResetDevice,
        23 => Request::GetMaxMemSlots,
        24 => Request::AddMemReg(region(input)),
        25 => Request::RemMemReg(region(input)),
        26 => Request::SetStatus(input.byte()),
        27 => Request::SetDeviceStateFd(match input.byte() % 2 {
            0 => StateDirection::Save,
            _ => StateDirection::Load,
        }),
        28 => Request::CheckDeviceState,
        29 => match input.byte() % 4 {
            0 => Request::PostcopyAdvise,
            1 => Request::PostcopyListen,
            2 => Request::MemoryHeard,
            _ => Request::PostcopyEnd,
        },
        30 => Request::GetInflightFd(inflight(input)),
        31 | 32 => Request::SetInflightFd(inflight(input)),
        33 => {
            let bytes = if input.byte() > 250 { input.u64() } else { input.below(4) * PAGE };
            Request::SetLogBase(LogArea { bytes, offset: input.below(4) * PAGE })
        }
        34..37 => Request::Iotlb(translation(input)),
        _ => {
            let kind = FrontendReq::try_from(u32::from(input.byte() % 46));
            Request::NotOffered(kind.unwrap_or(FrontendReq::GET_STATUS))
        }
    }
}

/// How many fds a good front end sends along.
fn fds_of(request: &Request, bytes: &[u8]) -> usize {
    match request {
        Request::SetMemTable(regions) => regions.len(),
        Request::SetVringKick(v) | Request::SetVringCall(v) | Request::SetVringErr(v) => {
            usize::from(v.has_fd)
        }
        Request::AddMemReg(_)
        | Request::SetBackendReqFd
        | Request::SetDeviceStateFd(_)
        | Request::SetInflightFd(_)
        | Request::SetLogBase(_) => 1,
        _ => bytes.len() % 2,
    }
}

/// The next message, decoded from pieces; None if the decoder refuses it.
fn message(input: &mut Input<'_>) -> Option<Message> {
    let request = request(input);
    let mut bytes = request.write(input.byte() % 2 == 0);
    let mut count = fds_of(&request, &bytes);
    let mut kind = match request {
        Request::SetMemTable(_)
        | Request::AddMemReg(_)
        | Request::SetInflightFd(_)
        | Request::SetLogBase(_) => 2,
        Request::SetDeviceStateFd(_) => u8::MAX,
        _ => 0,
    };
    if input.byte() > 230 {
        // Now and then something is wrong.
        let at = usize::from(input.byte()) % bytes.len();
        bytes[at] = input.byte();
        count = usize::from(input.byte() % 40);
        kind = input.byte();
    }
    let step = usize::from(input.byte() % 16) + 1;
    let mut fds = Some((0..count).map(|_| fd(kind, input)).collect::<Vec<_>>());
    let mut decoder = Decoder::default();
    let mut left = &bytes[..];
    loop {
        let space = decoder.space();
        let len = space.len().min(step).min(left.len());
        if len == 0 {
            // The size field was changed to more than there is.
            assert!(decoder.is_partial() && bytes.len() >= HEADER_BYTES);
            return None;
        }
        space[..len].copy_from_slice(&left[..len]);
        left = &left[len..];
        if let Some(message) = decoder.advance(len, fds.take().unwrap_or_default()).ok()? {
            return Some(message);
        }
    }
}

/// What there is besides two pairs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Inflight,
    Iommu,
}

/// A good beginning: most of the inputs start with two pairs that run, if what is in the in-flight
/// regions lets them.
fn begin(
    (session, shelf): (&mut Session, &mut Shelf),
    input: &mut Input<'_>,
    (features, beside): (u64, Beside),
) {
    let spec = RegionSpec {
        guest: GuestPhysAddr(0),
        size: FILE_BYTES,
        user: FrontendAddr(USER),
        mmap_offset: 0,
    };
    let features = if beside == Beside::Iommu { features } else { features & !ACCESS_PLATFORM };
    let mut requests = vec![
        Request::SetProtocolFeatures(PROTOCOL_FEATURES),
        Request::SetFeatures(features),
        Request::SetMemTable(vec![spec]),
    ];
    let (iova, size, user) = (Iova(USER), FILE_BYTES, FrontendAddr(USER));
    let kind = IotlbKind::Update(Access::ReadWrite);
    let layout = if features & RING_PACKED == 0 { Layout::Split } else { Layout::Packed };
    let bytes = 4 * inflight_bytes(layout, SIZE) as u64;
    let regions = InflightSpec { bytes, offset: 0, queues: 4, queue_size: SIZE, padded: false };
    requests.extend(match beside {
        Beside::Nothing => None,
        Beside::Inflight => Some(Request::SetInflightFd(regions)),
        Beside::Iommu => Some(Request::Iotlb(IotlbMessage { iova, size, user, kind })),
    });
    for ring in 0..4u32 {
        let part = |n: u64| FrontendAddr(USER + (u64::from(ring) * 3 + n) * PAGE);
        let (desc, used, avail) = (part(0), part(1), part(2));
        requests.extend([
            Request::SetVringNum(VringState { ring, num: u32::from(SIZE) }),
            Request::SetVringBase(VringState { ring, num: 0 }),
            Request::SetVringAddr(VringAddr { ring, flags: 0, desc, used, avail, log: 0 }),
            Request::SetVringKick(VringFd { ring, has_fd: true }),
            Request::SetVringEnable { ring, enable: true },
        ]);
    }
    for request in requests {
        let bytes = request.write(false);
        let (count, kind) = match request {
            Request::SetMemTable(_) | Request::SetInflightFd(_) => (1, 2),
            Request::SetVringKick(_) => (1, 0),
            _ => (0, 0),
        };
        let header = Header::parse(bytes[..HEADER_BYTES].try_into().expect("a header"));
        let header = header.expect("a good header");
        let payload = bytes[HEADER_BYTES..].to_vec();
        let fds = (0..count).map(|_| fd(kind, input)).collect();
        let outcome = session.handle(Message { header, payload, fds }, shelf).expect("accepted");
        assert!(outcome.refused.is_none());
    }
    assert!(shelf.0.len() == 4 || beside == Beside::Inflight);
}

fn check(session: &mut Session, shelf: &mut Shelf) {
    for ring in 0..RINGS {
        assert_eq!(session.is_running(RingIndex(ring)), shelf.0.contains_key(&ring));
    }
    let mut buf = ChainBuf::default();
    for Shelved { queue, .. } in shelf.0.values_mut().filter(|shelved| !shelved.late) {
        let count = queue.pop(&mut buf, 4).len();
        // One of several is taken back.
        queue.complete_read_first(&buf, count - usize::from(count > 1));
        queue.publish();
        let _ = (queue.needs_call(), queue.enable_kicks());
    }
    let _ = (session.misses(), session.take_gone());
    let _ = session.ready().is_ok();
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fuzz_target!(|data: &[u8]| {
    // What the process needs once is there.
    let _ = virtio_net::notify::can_block();
    let before = open_fds();
    let settings = SessionSettings {
        queues: RINGS / 2,
        queue_size: 1024,
        mtu: 9000,
        ring_reset: false,
        offloads: port::OffloadSet::ALL,
        postcopy: true,
    };
    let mut input = Input(data);
    let (mut session, mut shelf) = (Session::new(settings), Shelf::default());
    let kind = input.byte() % 8;
    let features = if kind % 2 == 0 { FEATURES & !RING_PACKED } else { FEATURES };
    let beside = match kind / 2 {
        0 => Some(Beside::Nothing),
        1 => Some(Beside::Inflight),
        2 => Some(Beside::Iommu),
        _ => None,
    };
    if let Some(beside) = beside {
        begin((&mut session, &mut shelf), &mut input, (features, beside));
    }
    while !input.0.is_empty() {
        match input.byte() {
            250..252 => {
                let _ = session.ring_fault(RingIndex(u16::from(input.byte() % 10)), &mut shelf);
            }
            252..254 => {
                let now = Instant::now();
                let _ = session.hold_rings(now);
                session.release_held_rings(now, &mut shelf);
            }
            _ => {}
        }
        let went_on = match message(&mut input) {
            Some(message) => session.handle(message, &mut shelf).is_ok(),
            None => true,
        };
        // More may have come with it.
        if !went_on || !input.0.len().is_multiple_of(4) {
            session.end_turn(&mut shelf);
        }
        check(&mut session, &mut shelf);
        if !went_on {
            session.close(&mut shelf);
            assert!(shelf.0.is_empty());
            session = Session::new(settings);
        }
    }
    session.close(&mut shelf);
    assert!(shelf.0.is_empty());
    drop((session, shelf));
    assert_eq!(open_fds(), before, "fds are left");
});
