//! One front end's session: a state machine that takes messages and does no I/O on its socket.
//!
//! ```text
//!   Message ──► Session::handle ──► Outcome { reply, refused }
//!                    │ start / stop / announce
//!                    ▼
//!                  Rings (the shell: queues go to the switch and come back)
//! ```
//!
//! A ring has three independent properties. *Started*: from `SET_VRING_KICK` to `GET_VRING_BASE`.
//! *Enabled*: by `SET_VRING_ENABLE`; rings of a front end without protocol features are enabled
//! from the beginning. *Running*: the switch has it. The session runs a ring whenever it is
//! started, everything that it needs is there and, for a receiveq, it is enabled. A transmitq that
//! was started, but of which nobody said yet whether it is enabled, is held for a while, until
//! [`Session::release_held_rings`]. So messages may come in any order, and every change to a
//! running ring is the same: stop, change, start at the position where it stopped.
//!
//! **Trust.** The front end is hostile. A refused message changes nothing; only a ring that its
//! last parameter makes impossible is left as it is then, and stopped.
//! **Limits.** See [`SessionSettings`], [`crate::memory`] and [`crate::fds`].
//! **Not supported.** Configuration space, in-band notifications: not offered, and refused.

mod error;
mod fds;
mod gone;
mod handover;
mod inflight;
mod iotlb;
mod log;
mod offer;
mod postcopy;
mod ring;
mod state;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, fstat};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_net::OffloadSet;
use virtio_net::features::offload_features;
use virtq::mem::{GuestMap, InflightArea};
use virtq::{ChainError, QueueConfig, RingIotlb, RingLog, RingPosition, Virtq};

use crate::codec::{CodecError, Message, Reply, Request, VringFd, VringState};
use crate::fds::Kept;
use crate::memory::{RegionTable, SLOTS_MAX};
use crate::record::Identity;
pub use error::{Lost, SessionError, SetUpError, Unready};
pub use gone::Gone;
use inflight::InflightFile;
use iotlb::Translation;
use log::Logging;
use offer::F_PROTOCOL_FEATURES;
pub use offer::{FEATURES, LOG_ALL, PAGEFAULT, PROTOCOL_FEATURES};
use postcopy::Postcopy;
use ring::Ring;
pub use state::StateAsk;

/// The smallest MTU that IPv4 allows a link to have.
const MTU_MIN: u64 = 68;

/// A ring of the device: `2 * pair` is a receiveq, `2 * pair + 1` a transmitq.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingIndex(pub u16);

impl RingIndex {
    /// The queue pair.
    pub fn pair(self) -> u16 {
        self.0 / 2
    }

    /// Whether the guest transmits on it.
    pub fn is_transmitq(self) -> bool {
        self.0 % 2 == 1
    }
}

/// What bounds a session.
#[derive(Debug, Clone, Copy)]
pub struct SessionSettings {
    /// Queue pairs.
    pub queues: u16,
    /// The largest ring.
    pub queue_size: u16,
    /// The largest MTU that the front end may set, and the one before it does.
    pub mtu: u16,
    /// Offer `VIRTIO_F_RING_RESET`. QEMU up to 10.0 at least lets the guest reset a ring without
    /// telling the back end, which ends that guest's network; so only for other front ends.
    pub ring_reset: bool,
    /// The offloads to offer, in both directions.
    pub offloads: OffloadSet,
    /// Offer postcopy. It gives the front end a way to change all memory of this process: see
    /// [`virtq::mem::Userfault`].
    pub postcopy: bool,
}

/// What a ring starts with.
#[derive(Debug)]
pub struct RingStart<'a> {
    /// Format, size, addresses, position.
    pub config: QueueConfig,
    /// The memory that the addresses are in.
    pub memory: &'a GuestMap,
    /// What the driver writes to wake us; none if the ring is only polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// What we write to interrupt the driver; none if it polls.
    pub call: Option<Arc<OwnedFd>>,
    /// Whether the front end enabled the ring.
    pub enabled: bool,
    /// The negotiated device features.
    pub features: u64,
    /// The MTU in force.
    pub mtu: u16,
    /// Whether the ring ran before: a call may have been lost on the way.
    pub resumed: bool,
    /// Whether the position is certain: if not, a record of the ring is believed rather than the
    /// front end.
    pub known: bool,
    /// Which ring it is, in the files of the memory.
    pub identity: Option<Identity>,
    /// The front end's in-flight region of the ring, if it has one.
    pub inflight: Option<InflightArea>,
    /// Where it notes what it writes, while the guest migrates.
    pub log: Option<RingLog>,
    /// How its addresses are translated behind a vIOMMU.
    pub iotlb: Option<RingIotlb>,
    /// Its memory is still arriving: whoever touches it may sleep for long, this thread too.
    pub late: bool,
}

/// A ring that ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Where it stopped.
    pub position: RingPosition,
    /// How its driver broke it, if it did.
    pub fault: Option<ChainError>,
}

impl From<Virtq> for Stopped {
    fn from(queue: Virtq) -> Self {
        let fault = queue.fault();
        Self { position: queue.stop().position, fault }
    }
}

/// What a session runs its rings on.
pub trait Rings {
    /// Starts a ring that is not running.
    ///
    /// # Errors
    ///
    /// [`SetUpError`] if the driver set it up wrongly.
    fn start(&mut self, ring: RingIndex, start: RingStart<'_>) -> Result<(), SetUpError>;

    /// Stops a running ring and tells where. When this returns, nobody touches its memory.
    /// None if the ring is lost: its worker had a bug.
    fn stop(&mut self, ring: RingIndex) -> Option<Stopped>;

    /// Stops a running receiveq as [`Self::stop`] does, and frames for it wait from now on, until
    /// it is started or given up. Those for one whose memory is late do not wait.
    fn park(&mut self, ring: RingIndex) -> Option<Stopped>;

    /// The same for a receiveq that does not run; frames may wait for it already.
    fn hold(&mut self, ring: RingIndex);

    /// Nobody goes on with a receiveq that does not run: frames that wait for it are lost.
    fn give_up(&mut self, ring: RingIndex);

    /// Returns when nobody uses any more what was taken from a ring before this was called.
    fn quiesce(&mut self);

    /// Something that frames for a running receiveq may wait for was said: a translation.
    fn resume(&mut self, ring: RingIndex);

    /// Has a running transmitq looked at, as after a kick. The kick's eventfd is the front end's.
    fn wake(&mut self, kick: &OwnedFd);

    /// Forgets where a ring is, if there is a record: the front end knows, or it starts anew.
    fn forget(&mut self, ring: RingIndex);

    /// Tells the network that `mac` is here now.
    fn announce(&mut self, mac: [u8; 6]);
}

/// What becomes of a message.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What to send back.
    pub reply: Option<Vec<u8>>,
    /// Why the request was refused, if the reply says so and the session goes on.
    pub refused: Option<SessionError>,
    /// The ring whose position the reply tells: once it was sent, no record of it is needed.
    pub handed: Option<RingIndex>,
    /// What goes beside the reply.
    pub fd: Option<OwnedFd>,
    /// What the shell is to do, which answers then.
    pub ask: Option<StateAsk>,
}

/// What a request asks back.
enum Answer {
    /// Nothing but, if wanted, an acknowledgement.
    Done,
    /// A reply of its own.
    Reply(Reply),
    /// The same, with an fd beside it.
    WithFd(Reply, OwnedFd),
    /// What the shell answers.
    Shell(StateAsk),
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    settings: SessionSettings,
    /// The offloads that this front end is offered, as feature bits: those of the settings, or of
    /// the settings of the process that its connection was taken over from.
    offloads: u64,
    features: Option<u64>,
    protocol_features: Option<u64>,
    mtu: u16,
    status: u8,
    memory: RegionTable,
    rings: BTreeMap<RingIndex, Ring>,
    /// Rings that turned out to be set up wrongly when something else changed.
    complaints: BTreeMap<RingIndex, SetUpError>,
    logging: Logging,
    translation: Translation,
    /// Where requests of the back end will go; held so that the front end sees it open.
    backend_channel: Option<OwnedFd>,
    /// The front end's in-flight file.
    inflight: Option<InflightFile>,
    postcopy: Postcopy,
    /// How many fds of the front end it keeps.
    kept: Kept,
    /// What is large and not used any more.
    gone: Vec<Gone>,
}

impl Session {
    /// A session that has heard nothing yet.
    pub fn new(settings: SessionSettings) -> Self {
        Self {
            settings,
            offloads: offload_features(settings.offloads),
            features: None,
            protocol_features: None,
            mtu: settings.mtu,
            status: 0,
            memory: RegionTable::default(),
            rings: BTreeMap::new(),
            complaints: BTreeMap::new(),
            logging: Logging::default(),
            translation: Translation::default(),
            backend_channel: None,
            inflight: None,
            postcopy: Postcopy::Off,
            kept: Kept::default(),
            gone: Vec::new(),
        }
    }

    /// Handles one message. After the last one that is there comes [`Self::end_turn`].
    ///
    /// # Errors
    ///
    /// [`SessionError`] if the message is refused and the protocol has no way to say so: the
    /// connection must be closed.
    pub fn handle(
        &mut self,
        mut message: Message,
        rings: &mut dyn Rings,
    ) -> Result<Outcome, SessionError> {
        let header = message.header;
        let parsed = Request::parse(&message);
        let brings_fds = !matches!(parsed, Ok(Request::Iotlb(_)));
        let result = match parsed {
            Ok(request) => self
                .admit(&request)
                .and_then(|()| self.apply(request, std::mem::take(&mut message.fds), rings)),
            Err(error) => Err(error.into()),
        };
        if brings_fds {
            self.count_fds();
        }
        // The features as they are now: SET_PROTOCOL_FEATURES itself may want to be acknowledged.
        let ack = header.need_reply && self.has_protocol(VhostUserProtocolFeatures::REPLY_ACK);
        let write = |reply: Reply| Some(reply.write(header.request));
        match result {
            Ok(Answer::WithFd(reply, fd)) => {
                let reply = write(reply);
                Ok(Outcome { reply, fd: Some(fd), ..Outcome::default() })
            }
            Ok(Answer::Shell(ask)) => Ok(Outcome { ask: Some(ask), ..Outcome::default() }),
            Ok(Answer::Reply(reply)) => {
                let handed = match &reply {
                    Reply::Vring(state) => self.handed(state.ring),
                    Reply::U64(_) | Reply::Empty | Reply::Inflight(_) => None,
                    Reply::Table(_) | Reply::Region(_) => None,
                };
                Ok(Outcome { reply: write(reply), handed, ..Outcome::default() })
            }
            Ok(Answer::Done) if ack => {
                Ok(Outcome { reply: write(Reply::U64(0)), ..Outcome::default() })
            }
            Ok(Answer::Done) => Ok(Outcome::default()),
            Err(error) if header.request == u32::from(FrontendReq::GET_CONFIG) => {
                let (reply, refused) = (write(Reply::Empty), Some(error));
                Ok(Outcome { reply, refused, ..Outcome::default() })
            }
            Err(error) if self.answers_state(header.request) => {
                let reply = Some(StateAsk::reply(header.request, false));
                Ok(Outcome { reply, refused: Some(error), ..Outcome::default() })
            }
            Err(error) if ack && !Request::has_own_reply(header.request) => {
                let (reply, refused) = (write(Reply::U64(1)), Some(error));
                Ok(Outcome { reply, refused, ..Outcome::default() })
            }
            Err(error) => Err(error),
        }
    }

    /// Stops all rings: the front end is gone.
    pub fn close(&mut self, rings: &mut dyn Rings) {
        let abandoned = self.abandon();
        for index in self.indexes() {
            let _ = self.stop_ring(index, rings);
            rings.give_up(index);
            if abandoned {
                // What was written last reached nobody.
                rings.forget(index);
            }
        }
        self.swap_channel(None);
    }

    /// Takes a ring out of service that its driver broke. It starts again after `GET_VRING_BASE`
    /// or `RESET_DEVICE`. Returns whether the ring is broken: word of a fault may come when the
    /// ring that it is about was stopped already, and one that is sound goes on.
    pub fn ring_fault(&mut self, index: RingIndex, rings: &mut dyn Rings) -> bool {
        if !self.is_running(index) {
            return false;
        }
        let broken = self.stop_ring(index, rings);
        match self.rings.get_mut(&index) {
            Some(ring) if broken => {
                ring.broken = true;
                rings.give_up(index);
            }
            _ => self.start_again(index, rings),
        }
        broken
    }

    /// What is written when a ring breaks.
    pub fn err_eventfd(&self, index: RingIndex) -> Option<&Arc<OwnedFd>> {
        self.rings.get(&index)?.err.as_ref()
    }

    /// Why the port cannot carry frames yet: pair 0 decides.
    ///
    /// # Errors
    ///
    /// [`Unready`], to be shown to people.
    pub fn ready(&self) -> Result<(), Unready> {
        if let Some((index, _)) = self.rings.iter().find(|(_, ring)| ring.broken) {
            return Err(Unready::Broken(*index));
        }
        for index in [RingIndex(0), RingIndex(1)] {
            let ring = self.rings.get(&index).filter(|ring| ring.started);
            let ring = ring.ok_or(Unready::NotSetUp)?;
            let (Some(_), Some(_), Some(_)) = (self.features, ring.size, ring.addr) else {
                return Err(Unready::NotSetUp);
            };
            if !ring.is_enabled(self.rings_start_enabled()) {
                return Err(Unready::NotEnabled(index));
            }
            if !ring.running {
                let wrong = ring.wrong.map(|error| Unready::SetUp(index, error));
                let missing = match self.iotlb() {
                    Some(_) => Unready::NoTranslation(index),
                    None => Unready::NoMemory(index),
                };
                return Err(wrong.unwrap_or(missing));
            }
        }
        Ok(())
    }

    /// What is wrong with rings that became complete by a message which was not about them, such
    /// as the one that shares the memory: it is not refused. Each is told once.
    pub fn take_complaints(&mut self) -> Vec<SessionError> {
        let all = std::mem::take(&mut self.complaints).into_iter();
        all.map(|(index, error)| SessionError::SetUp { index, error }).collect()
    }

    /// What was lost of the front end's memory, if something was: its file shrank. There are zeros
    /// now, so the session is of no use any more.
    pub fn memory_lost(&self) -> Option<Lost> {
        let region = self.memory.lost().map(Lost::Region);
        let inflight = || self.inflight.as_ref().filter(|file| file.is_lost());
        let log = || self.logging.is_lost().then_some(Lost::Log);
        region.or_else(log).or_else(|| inflight().map(|_| Lost::Inflight))
    }

    /// The device features that were negotiated, if they were.
    pub fn features(&self) -> Option<u64> {
        self.features
    }

    /// The protocol features that were negotiated, if they were.
    pub fn protocol_features(&self) -> Option<u64> {
        self.protocol_features
    }

    /// Memory regions that the front end shares.
    pub fn regions(&self) -> usize {
        self.memory.len()
    }

    fn apply(
        &mut self,
        request: Request,
        mut fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<Answer, SessionError> {
        type P = VhostUserProtocolFeatures;
        let number = |n: u64| Ok(Answer::Reply(Reply::U64(n)));
        match request {
            Request::GetFeatures => return number(self.offered()),
            Request::SetFeatures(bits) => self.set_features(bits, rings)?,
            // Nothing depends on the owner, and back ends are advised to ignore the second one.
            Request::SetOwner | Request::ResetOwner => {}
            Request::GetProtocolFeatures => return number(self.protocol_offered()),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits)?,
            Request::GetQueueNum => return number(u64::from(self.settings.queues.max(2))),
            Request::GetMaxMemSlots => {
                self.needs(P::CONFIGURE_MEM_SLOTS, FrontendReq::GET_MAX_MEM_SLOTS)?;
                return number(u64::try_from(SLOTS_MAX).unwrap_or(0));
            }
            Request::SetMemTable(specs) => return self.set_mem_table(&specs, fds, rings),
            Request::AddMemReg(spec) => return self.add_mem_reg(spec, fds, rings),
            Request::RemMemReg(spec) => return self.remove_mem_reg(&spec, rings),
            Request::MemoryHeard => self.memory_heard(rings)?,
            Request::PostcopyAdvise => return self.postcopy_advise(),
            Request::PostcopyListen => self.postcopy_listen()?,
            Request::PostcopyEnd => return self.postcopy_end(rings),
            Request::SetLogBase(area) => {
                self.needs(P::LOG_SHMFD, FrontendReq::SET_LOG_BASE)?;
                let fd = fds.pop().ok_or(CodecError::TooManyFds)?;
                self.set_log_base(area, fd, rings)?;
                return Ok(Answer::Reply(Reply::Empty));
            }
            Request::Iotlb(message) => self.iotlb_message(message, rings)?,
            Request::SetLogFd => self.set_log_call(fds.pop(), rings)?,
            Request::SetVringNum(state) => self.set_num(state, rings)?,
            Request::SetVringAddr(addr) => self.set_addr(addr, rings)?,
            Request::SetVringBase(state) => self.set_base(state, rings)?,
            Request::GetInflightFd(asked) => return self.make_inflight(asked),
            Request::SetInflightFd(spec) => self.set_inflight(spec, fds, rings)?,
            Request::GetVringBase { ring } => return self.get_base(ring, rings),
            Request::SetVringKick(v) => self.set_kick(v, fds, rings)?,
            Request::SetVringCall(v) => self.set_call(v, fds, rings)?,
            Request::SetVringErr(v) => self.set_err(v, fds)?,
            Request::SetVringEnable { ring, enable } => self.set_enable(ring, enable, rings)?,
            Request::SendRarp(mac) => {
                self.needs(P::RARP, FrontendReq::SEND_RARP)?;
                rings.announce(mac);
            }
            Request::NetSetMtu(mtu) => self.set_mtu(mtu, rings)?,
            Request::SetBackendReqFd => {
                self.needs(P::BACKEND_REQ, FrontendReq::SET_BACKEND_REQ_FD)?;
                let fd = fds.pop().ok_or(CodecError::TooManyFds)?;
                // Anything else could take long to be closed.
                let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
                if kind != Ok(FileType::Socket) {
                    return Err(SessionError::BackendFd);
                }
                self.swap_channel(Some(fd));
            }
            Request::ResetDevice => self.reset(rings)?,
            Request::SetStatus(status) => {
                self.needs(P::STATUS, FrontendReq::SET_STATUS)?;
                self.status = status;
            }
            Request::GetStatus => {
                self.needs(P::STATUS, FrontendReq::GET_STATUS)?;
                return number(self.device_status());
            }
            Request::SetDeviceStateFd(to) => return self.set_state_fd(to, fds.pop()),
            Request::CheckDeviceState => return self.check_state(),
            Request::NotOffered(kind) => return Err(SessionError::NotOffered(kind)),
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, bits: u64, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let unknown = bits & !self.offered();
        if unknown != 0 {
            return Err(SessionError::Features(unknown));
        }
        if self.features == Some(bits) {
            return Ok(());
        }
        if self.features.map(|now| now ^ bits) == Some(LOG_ALL) {
            self.restart_all(rings, |session| session.features = Some(bits));
            return Ok(());
        }
        if let Some(index) = self.indexes().into_iter().find(|i| self.is_running(*i)) {
            return Err(SessionError::FeaturesWhileRunning(index));
        }
        self.features = Some(bits);
        self.set_translation(bits);
        self.try_start_all(rings);
        Ok(())
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<(), SessionError> {
        let unknown = bits & !self.protocol_offered();
        if unknown != 0 {
            return Err(SessionError::ProtocolFeatures(unknown));
        }
        self.protocol_features = Some(bits);
        Ok(())
    }

    fn set_mtu(&mut self, mtu: u64, rings: &mut dyn Rings) -> Result<(), SessionError> {
        self.needs(VhostUserProtocolFeatures::MTU, FrontendReq::NET_SET_MTU)?;
        let limit = self.settings.mtu;
        match u16::try_from(mtu) {
            Ok(value) if mtu >= MTU_MIN && value <= limit => self.mtu = value,
            _ => return Err(SessionError::Mtu { mtu, limit }),
        }
        self.restart_all(rings, |_| ());
        Ok(())
    }

    fn reset(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        self.needs(VhostUserProtocolFeatures::RESET_DEVICE, FrontendReq::RESET_DEVICE)?;
        for index in self.indexes() {
            let _ = self.stop_ring(index, rings);
            rings.give_up(index);
        }
        for (index, ring) in &mut self.rings {
            let kick = ring.reset();
            self.gone.extend(kick.map(Gone::Event));
            rings.forget(*index);
        }
        self.features = None;
        self.translation.end();
        self.status = 0;
        Ok(())
    }

    fn device_status(&self) -> u64 {
        let broken = self.rings.values().any(|ring| ring.broken);
        u64::from(self.status) | if broken { u64::from(VIRTIO_CONFIG_S_NEEDS_RESET) } else { 0 }
    }
}

#[cfg(test)]
mod tests;
