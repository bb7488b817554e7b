//! A scripted front end with real memory, and rings that record what happens to them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_net::OffloadSet;
use virtio_net::features::{RING_PACKED, VERSION_1};
use virtq::mem::{GuestPhysAddr, InflightArea};
use virtq::{ChainBuf, RingPosition, Virtq};

use crate::codec::{Decoder, Request, VringAddr, VringFd, VringState};
use crate::memory::{FrontendAddr, RegionSpec};
use crate::record::Identity;
use crate::session::{
    F_PROTOCOL_FEATURES, Outcome, PROTOCOL_FEATURES, RingIndex, RingStart, Rings, Session,
    SessionError, SessionSettings, SetUpError, Stopped,
};

pub(super) const REGION_BYTES: u64 = 1 << 20;
/// Guest-physical and front-end addresses differ, so that mixing them up is seen.
pub(super) const GUEST: u64 = 0x4000_0000;
pub(super) const USER: u64 = 0x7f12_0000_0000;
pub(super) const PLAIN: u64 = VERSION_1 | F_PROTOCOL_FEATURES;
pub(super) const PACKED: u64 = PLAIN | RING_PACKED;

/// What happened to a ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    Started { ring: u16, enabled: bool, position: RingPosition },
    Stopped(u16),
    Parked(u16),
    Announced([u8; 6]),
    Quiesced,
    Resumed(u16),
    Forgotten(u16),
}

#[derive(Default)]
pub(super) struct Recorder {
    pub(super) events: Vec<Event>,
    pub(super) queues: BTreeMap<u16, Running>,
    /// Receiveqs for which frames wait.
    pub(super) parked: BTreeSet<u16>,
}

pub(super) struct Running {
    pub(super) queue: Virtq,
    pub(super) desc: GuestPhysAddr,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) mtu: u16,
    pub(super) resumed: bool,
    pub(super) known: bool,
    pub(super) identity: Option<Identity>,
    pub(super) inflight: Option<InflightArea>,
    pub(super) late: bool,
}

impl Rings for Recorder {
    fn start(&mut self, ring: RingIndex, start: RingStart<'_>) -> Result<(), SetUpError> {
        let mut queue = start.config.activate(start.memory)?;
        queue.set_log(start.log);
        queue.set_iotlb(start.iotlb);
        let position = start.config.position;
        self.events.push(Event::Started { ring: ring.0, enabled: start.enabled, position });
        let running = Running {
            queue,
            desc: start.config.desc,
            call: start.call,
            kick: start.kick,
            mtu: start.mtu,
            resumed: start.resumed,
            known: start.known,
            identity: start.identity,
            inflight: start.inflight,
            late: start.late,
        };
        assert!(self.queues.insert(ring.0, running).is_none(), "started twice");
        let _ = self.parked.remove(&ring.0);
        Ok(())
    }

    fn stop(&mut self, ring: RingIndex) -> Option<Stopped> {
        self.events.push(Event::Stopped(ring.0));
        let running = self.queues.remove(&ring.0).expect("stopped, but not running");
        Some(running.queue.into())
    }

    fn park(&mut self, ring: RingIndex) -> Option<Stopped> {
        assert!(self.parked.insert(ring.0), "parked, but running");
        self.events.push(Event::Parked(ring.0));
        let running = self.queues.remove(&ring.0).expect("parked, but not running");
        Some(running.queue.into())
    }

    fn hold(&mut self, ring: RingIndex) {
        assert!(!self.queues.contains_key(&ring.0), "it runs");
        let _ = self.parked.insert(ring.0);
    }

    fn give_up(&mut self, ring: RingIndex) {
        assert!(!self.queues.contains_key(&ring.0), "it runs");
        let _ = self.parked.remove(&ring.0);
    }

    fn forget(&mut self, ring: RingIndex) {
        self.events.push(Event::Forgotten(ring.0));
    }

    fn quiesce(&mut self) {
        self.events.push(Event::Quiesced);
    }

    fn resume(&mut self, ring: RingIndex) {
        self.events.push(Event::Resumed(ring.0));
    }

    fn wake(&mut self, kick: &OwnedFd) {
        virtio_net::notify::signal(kick);
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.events.push(Event::Announced(mac));
    }
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// One end of a connection.
pub(super) fn socket() -> OwnedFd {
    std::os::unix::net::UnixStream::pair().unwrap().0.into()
}

pub(super) fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

pub(super) fn region(n: u64) -> RegionSpec {
    RegionSpec {
        guest: GuestPhysAddr(GUEST + n * REGION_BYTES),
        size: REGION_BYTES,
        user: FrontendAddr(USER + n * REGION_BYTES),
        mmap_offset: 0,
    }
}

/// Where the front end has ring `ring`: each in 64 KiB of the region.
pub(super) fn ring_addr(ring: u32) -> VringAddr {
    let base = USER + (u64::from(ring) << 16);
    VringAddr {
        ring,
        flags: 0,
        desc: FrontendAddr(base),
        used: FrontendAddr(base + 0x8000),
        avail: FrontendAddr(base + 0x4000),
        log: 0,
    }
}

pub(super) struct Front {
    pub(super) session: Session,
    pub(super) rings: Recorder,
    /// The file of the first region.
    shared: OwnedFd,
}

impl Front {
    pub(super) fn new() -> Self {
        Self::with(|_| ())
    }

    pub(super) fn with(change: impl Fn(&mut SessionSettings)) -> Self {
        let mut settings = SessionSettings {
            queues: 4,
            queue_size: 1024,
            mtu: 9000,
            ring_reset: false,
            offloads: OffloadSet::ALL,
            postcopy: false,
        };
        change(&mut settings);
        let shared = memory(REGION_BYTES);
        Self { session: Session::new(settings), rings: Recorder::default(), shared }
    }

    /// One message, which is all that has come.
    pub(super) fn bytes(
        &mut self,
        bytes: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Outcome, SessionError> {
        let outcome = self.part(bytes, fds);
        self.session.end_turn(&mut self.rings);
        outcome
    }

    /// One message, after which more have come.
    pub(super) fn part(
        &mut self,
        bytes: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Outcome, SessionError> {
        let mut decoder = Decoder::default();
        let (head, payload) = bytes.split_at(12);
        decoder.space().copy_from_slice(head);
        let message = match decoder.advance(12, fds)? {
            Some(message) => message,
            None => {
                decoder.space().copy_from_slice(payload);
                decoder.advance(payload.len(), [])?.expect("complete")
            }
        };
        self.session.handle(message, &mut self.rings)
    }

    pub(super) fn ask(&mut self, request: &Request, fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let outcome = self.bytes(&request.write(false), fds).unwrap();
        assert!(outcome.refused.is_none());
        outcome.reply
    }

    /// Sends a request that has no reply.
    pub(super) fn say(&mut self, request: Request) {
        assert_eq!(self.ask(&request, Vec::new()), None);
    }

    pub(super) fn say_fd(&mut self, request: Request, fd: OwnedFd) {
        assert_eq!(self.ask(&request, vec![fd]), None);
    }

    /// Sends a request that is answered with a number.
    pub(super) fn get(&mut self, request: Request) -> u64 {
        let reply = self.ask(&request, Vec::new()).expect("a reply");
        u64::from_le_bytes(reply[12..].try_into().unwrap())
    }

    /// Sends a request that wants to be acknowledged.
    pub(super) fn ack(&mut self, request: Request, fds: Vec<OwnedFd>) -> u64 {
        let reply = self.bytes(&request.write(true), fds).unwrap().reply.expect("a reply");
        u64::from_le_bytes(reply[12..].try_into().unwrap())
    }

    pub(super) fn refused(&mut self, request: Request, fds: Vec<OwnedFd>) -> String {
        self.bytes(&request.write(false), fds).unwrap_err().to_string()
    }

    pub(super) fn base(&mut self, ring: u32) -> u32 {
        let reply = self.get(Request::GetVringBase { ring });
        assert_eq!(reply & 0xffff_ffff, u64::from(ring));
        u32::try_from(reply >> 32).unwrap()
    }

    pub(super) fn negotiate(&mut self, features: u64) {
        let _ = self.get(Request::GetFeatures);
        let _ = self.get(Request::GetProtocolFeatures);
        self.say(Request::SetProtocolFeatures(PROTOCOL_FEATURES));
        self.say(Request::SetOwner);
        self.say(Request::SetFeatures(features));
    }

    pub(super) fn share(&mut self) {
        let table = Request::SetMemTable(vec![region(0)]);
        let file = rustix::io::dup(&self.shared).unwrap();
        self.say_fd(table, file);
    }

    pub(super) fn describe(&mut self, ring: u32, base: u32) {
        self.say(Request::SetVringNum(VringState { ring, num: 256 }));
        self.say(Request::SetVringBase(VringState { ring, num: base }));
        self.say(Request::SetVringAddr(ring_addr(ring)));
    }

    pub(super) fn kick(&mut self, ring: u32) {
        self.say_fd(Request::SetVringKick(VringFd { ring, has_fd: true }), event());
    }

    pub(super) fn enable(&mut self, ring: u32, enable: bool) {
        self.say(Request::SetVringEnable { ring, enable });
    }

    /// Everything until `pairs` pairs run.
    pub(super) fn up(&mut self, features: u64, pairs: u32) {
        self.negotiate(features);
        self.share();
        for ring in 0..pairs * 2 {
            self.describe(ring, if features & RING_PACKED != 0 { 0x8000 } else { 0 });
            self.kick(ring);
            self.enable(ring, true);
        }
        let all: Vec<u16> = (0..u16::try_from(pairs * 2).unwrap()).collect();
        assert_eq!(self.running(), all);
    }

    /// Writes into the first region.
    pub(super) fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.shared, bytes, at).unwrap(), bytes.len());
    }

    /// The driver of a split ring puts the number of a descriptor that is none into the available
    /// ring, and the device sees it.
    pub(super) fn break_ring(&mut self, ring: u16) {
        let available = ring_addr(u32::from(ring)).avail.0 - USER;
        let _ = rustix::io::pwrite(&self.shared, &[0, 0, 1, 0, 0xff, 0xff], available).unwrap();
        let mut chains = ChainBuf::with_capacity(1);
        let queue = &mut self.rings.queues.get_mut(&ring).unwrap().queue;
        assert!(queue.pop(&mut chains, 1).fault().is_some());
    }

    pub(super) fn running(&self) -> Vec<u16> {
        self.rings.queues.keys().copied().collect()
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.rings.events)
    }
}
