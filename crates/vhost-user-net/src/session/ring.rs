//! One ring's state, and when it runs.

use std::mem::replace;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{FileType, fstat};
use virtio_net::features::{layout, ring_features};
use virtio_net::notify;
use virtq::mem::GuestPhysAddr;
use virtq::{Layout, QueueConfig, RingPosition};

use super::{
    Answer, F_PROTOCOL_FEATURES, FrontendReq, Reply, RingIndex, RingStart, Rings, Session,
    SessionError, SetUpError, VringFd, VringState,
};
use crate::codec::VringAddr;
use crate::memory::FrontendAddr;
use crate::record::Identity;

/// The largest ring that virtio knows.
const SIZE_MAX: u16 = 32768;

/// What the front end said about a ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: Option<u16>,
    pub(super) addr: Option<VringAddr>,
    /// Where to go on, in the encoding of the messages; its meaning depends on the features.
    pub(super) base: Option<u32>,
    /// None until the front end says so.
    pub(super) enabled: Option<bool>,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) err: Option<Arc<OwnedFd>>,
    pub(super) started: bool,
    pub(super) running: bool,
    /// The driver broke it; it does not run until it is started anew.
    pub(super) broken: bool,
    /// Why it could not be started when that was tried last.
    pub(super) wrong: Option<SetUpError>,
    /// It ran since it was started.
    pub(super) resumed: bool,
    /// This session knows better than any record where it is.
    pub(super) known: bool,
    /// When the time is over that the front end has for it.
    pub(super) held_until: Option<Instant>,
    /// The front end took too long to say whether the ring is enabled: it is not.
    pub(super) impatient: bool,
}

impl Ring {
    pub(super) fn is_enabled(&self, from_the_beginning: bool) -> bool {
        self.enabled.unwrap_or(from_the_beginning)
    }

    /// As it was at first, but for call and err, which front ends set once. Returns its kick.
    pub(super) fn reset(&mut self) -> Option<Arc<OwnedFd>> {
        let (call, err, kick) = (self.call.take(), self.err.take(), self.kick.take());
        *self = Self { call, err, enabled: Some(false), known: true, ..Self::default() };
        kick
    }

    /// Returns its kick.
    fn end(&mut self) -> Option<Arc<OwnedFd>> {
        self.wrong = None;
        // A front end may ask on a new connection, before the ring is started: that says nothing.
        self.known |= self.started;
        self.started = false;
        self.broken = false;
        self.resumed = false;
        self.impatient = false;
        self.held_until = None;
        self.kick.take()
    }

    /// Whether the ring is disabled only because the front end has not come to say more yet.
    fn is_held(&self) -> bool {
        self.started && self.enabled.is_none() && !self.impatient
    }
}

impl Session {
    pub(super) fn set_kick(
        &mut self,
        v: VringFd,
        fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let (index, fd) = self.ring_fd(v, fds, FrontendReq::SET_VRING_KICK)?;
        let mut old = None;
        let changed = self.change(index, rings, |ring| {
            old = replace(&mut ring.kick, fd);
            ring.started = true;
        });
        self.let_go_of_event(old);
        changed
    }

    pub(super) fn set_call(
        &mut self,
        v: VringFd,
        fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let (index, fd) = self.ring_fd(v, fds, FrontendReq::SET_VRING_CALL)?;
        let mut old = None;
        let changed = self.change(index, rings, |ring| old = replace(&mut ring.call, fd));
        self.let_go_of_event(old);
        changed
    }

    pub(super) fn set_err(&mut self, v: VringFd, fds: Vec<OwnedFd>) -> Result<(), SessionError> {
        let (index, fd) = self.ring_fd(v, fds, FrontendReq::SET_VRING_ERR)?;
        let old = replace(&mut self.ring_mut(index).err, fd);
        self.let_go_of_event(old);
        Ok(())
    }

    pub(super) fn set_num(
        &mut self,
        state: VringState,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(state.ring)?;
        let limit = self.settings.queue_size.min(SIZE_MAX);
        let size = u16::try_from(state.num).ok().filter(|size| (1..=limit).contains(size));
        let error = SessionError::RingSize { ring: state.ring, size: state.num, limit };
        let size = size.ok_or(error)?;
        let ring = self.ring_mut(index);
        if ring.size == Some(size) {
            return Ok(());
        }
        if ring.running {
            let request = FrontendReq::SET_VRING_NUM;
            return Err(SessionError::RingRuns { request, ring: state.ring });
        }
        self.change(index, rings, |ring| ring.size = Some(size))
    }

    pub(super) fn set_addr(
        &mut self,
        addr: VringAddr,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(addr.ring)?;
        let places = |a: &VringAddr| (a.desc, a.used, a.avail);
        let same = self.ring_mut(index).addr.as_ref().map(places) == Some(places(&addr));
        if same && self.is_running(index) && !self.is_logging() {
            // The log's address may be another one, which matters when logging begins.
            self.ring_mut(index).addr = Some(addr);
            return Ok(());
        }
        self.change(index, rings, |ring| ring.addr = Some(addr))
    }

    pub(super) fn set_base(
        &mut self,
        state: VringState,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(state.ring)?;
        if self.is_running(index) {
            let request = FrontendReq::SET_VRING_BASE;
            return Err(SessionError::RingRuns { request, ring: state.ring });
        }
        self.change(index, rings, |ring| ring.base = Some(state.num))
    }

    pub(super) fn get_base(
        &mut self,
        ring: u32,
        rings: &mut dyn Rings,
    ) -> Result<Answer, SessionError> {
        let index = self.index(ring)?;
        let _ = self.stop_ring(index, rings);
        rings.give_up(index);
        let fresh = self.features.map_or(0, |f| RingPosition::start(layout(f)).to_vhost_base());
        let state = self.ring_mut(index);
        let kick = state.end();
        let num = state.base.unwrap_or(fresh);
        self.let_go_of_event(kick);
        self.forget_questions(rings);
        Ok(Answer::Reply(Reply::Vring(VringState { ring, num })))
    }

    pub(super) fn set_enable(
        &mut self,
        ring: u32,
        enable: bool,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(ring)?;
        let negotiated = self.features.is_none_or(|f| f & F_PROTOCOL_FEATURES != 0);
        if !negotiated && self.protocol_features.is_none() {
            return Err(SessionError::NotNegotiated(FrontendReq::SET_VRING_ENABLE));
        }
        if self.ring_mut(index).enabled == Some(enable) {
            return Ok(());
        }
        // Frames take another pair from now on.
        let _ = self.stop_ring(index, rings);
        self.change(index, rings, |ring| ring.enabled = Some(enable))
    }

    /// Stops the ring if it runs, changes it, and starts it if it can run. If the driver set it up
    /// wrongly the ring stays as it is now, and stopped.
    fn change(
        &mut self,
        index: RingIndex,
        rings: &mut dyn Rings,
        change: impl FnOnce(&mut Ring),
    ) -> Result<(), SessionError> {
        self.park_ring(index, rings);
        change(self.ring_mut(index));
        let started = self.start_if_complete(index, rings);
        started.map_err(|error| SessionError::SetUp { index, error })
    }

    /// Stops the ring if it runs. Returns whether it ran and is broken or lost.
    pub(super) fn stop_ring(&mut self, index: RingIndex, rings: &mut dyn Rings) -> bool {
        let Some(ring) = self.rings.get_mut(&index).filter(|ring| ring.running) else {
            return false;
        };
        ring.running = false;
        let Some(stopped) = rings.stop(index) else { return true };
        ring.base = Some(stopped.position.to_vhost_base());
        stopped.fault.is_some()
    }

    /// Stops the ring if it runs, and it will go on: at once, or when the front end has said again
    /// where it is. Frames wait meanwhile, those that the guest sends in the ring itself.
    pub(super) fn park_ring(&mut self, index: RingIndex, rings: &mut dyn Rings) {
        if index.is_transmitq() || self.is_late() {
            let _ = self.stop_ring(index, rings);
            return;
        }
        let Some(ring) = self.rings.get_mut(&index).filter(|ring| ring.running) else { return };
        ring.running = false;
        if let Some(stopped) = rings.park(index) {
            ring.base = Some(stopped.position.to_vhost_base());
        }
    }

    /// After a change to all rings: those whose set-up does not fit (any more) wait.
    pub(super) fn try_start_all(&mut self, rings: &mut dyn Rings) {
        for index in self.indexes() {
            self.start_again(index, rings);
        }
    }

    pub(super) fn start_again(&mut self, index: RingIndex, rings: &mut dyn Rings) {
        let known = self.rings.get(&index).and_then(|ring| ring.wrong);
        if let Err(error) = self.start_if_complete(index, rings)
            && known != Some(error)
        {
            let _ = self.complaints.insert(index, error);
        }
    }

    /// Transmitqs that wait to hear whether they are enabled since now wait until `until`. Returns
    /// when the first of all that wait has waited long enough.
    pub fn hold_rings(&mut self, until: Instant) -> Option<Instant> {
        if self.rings_start_enabled() {
            return None;
        }
        let waits =
            |(index, ring): &(&RingIndex, &mut Ring)| index.is_transmitq() && ring.is_held();
        let held = self.rings.iter_mut().filter(waits);
        held.map(|(_, ring)| *ring.held_until.get_or_insert(until)).min()
    }

    /// The front end had its time for some rings: those that it did not enable are disabled.
    pub fn release_held_rings(&mut self, now: Instant, rings: &mut dyn Rings) {
        for ring in self.rings.values_mut() {
            let over = ring.held_until.is_some_and(|until| until <= now);
            ring.impatient |= ring.is_held() && over;
        }
        self.try_start_all(rings);
    }

    fn start_if_complete(
        &mut self,
        index: RingIndex,
        rings: &mut dyn Rings,
    ) -> Result<(), SetUpError> {
        let result = self.try_start(index, rings);
        if let Some(ring) = self.rings.get_mut(&index) {
            ring.wrong = result.err();
        }
        if !matches!(result, Ok(true)) {
            rings.give_up(index);
        }
        result.map(|_| ())
    }

    /// Returns whether the ring runs, or will as soon as its place is known.
    fn try_start(&mut self, index: RingIndex, rings: &mut dyn Rings) -> Result<bool, SetUpError> {
        let from_the_beginning = self.rings_start_enabled();
        let (Some(features), Some(memory)) = (self.features, self.memory.map()) else {
            return Ok(false);
        };
        let Some(ring) = self.rings.get(&index) else { return Ok(false) };
        let enabled = ring.is_enabled(from_the_beginning);
        // A disabled receiveq is never filled; a disabled transmitq is emptied and counted. Not so
        // between start and the first word about it: a guest that never stopped sending, while its
        // front end found a new back end, must not lose what it sent.
        let runs = enabled || (index.is_transmitq() && !ring.is_held());
        if !ring.started || ring.running || ring.broken || !runs {
            return Ok(ring.running);
        }
        let Some(config) = self.queue_config(ring, features)? else { return Ok(false) };
        let behind = self.iotlb().cloned();
        if behind.as_ref().is_some_and(|iotlb| !Self::is_known(iotlb, &self.needed(ring, &config)))
        {
            return Ok(self.wait_for_place(index, rings));
        }
        let translated = behind.map(|iotlb| Self::map_of(&iotlb, &config));
        let start = RingStart {
            config,
            memory: translated.as_ref().unwrap_or(memory),
            kick: ring.kick.clone(),
            call: ring.call.clone(),
            enabled,
            features,
            mtu: self.mtu,
            resumed: ring.resumed,
            // A guest brings its positions along; no record of ours is about it.
            known: ring.known || self.is_late(),
            identity: self.identity(ring, &config),
            inflight: self.ring_inflight(index, &config),
            log: self.ring_log(ring, &config),
            iotlb: self.ring_iotlb(index),
            late: self.is_late(),
        };
        rings.start(index, start)?;
        let ring = self.ring_mut(index);
        ring.running = true;
        ring.resumed = true;
        ring.known = true;
        Ok(true)
    }

    /// All that a ring lacks are translations of its own addresses. Returns whether frames for it
    /// wait until it has them.
    fn wait_for_place(&mut self, index: RingIndex, rings: &mut dyn Rings) -> bool {
        let waits = !index.is_transmitq() && !self.is_late();
        if waits {
            rings.hold(index);
        }
        waits
    }

    /// The ring, if this session knows better than a record where it is.
    pub(super) fn handed(&self, ring: u32) -> Option<RingIndex> {
        let index = u16::try_from(ring).ok().map(RingIndex)?;
        self.rings.get(&index).filter(|ring| ring.known).map(|_| index)
    }

    /// Which ring it is, in the files of the memory.
    fn identity(&self, ring: &Ring, config: &QueueConfig) -> Option<Identity> {
        // Addresses behind a vIOMMU are not those of a file.
        let addr = ring.addr.filter(|_| self.iotlb().is_none())?;
        let place = |addr| self.memory.file_place(addr);
        let places = [place(addr.desc)?, place(addr.avail)?, place(addr.used)?];
        Some(Identity::new(config, places))
    }

    /// The ring's configuration, if all of it is known and in memory.
    pub(super) fn queue_config(
        &self,
        ring: &Ring,
        features: u64,
    ) -> Result<Option<QueueConfig>, SetUpError> {
        let (Some(size), Some(addr)) = (ring.size, ring.addr) else { return Ok(None) };
        let part = |addr: FrontendAddr| match self.iotlb() {
            // Not known here, but to be looked up where buffers are.
            Some(_) => Some(GuestPhysAddr(addr.0)),
            None => self.memory.translate(addr),
        };
        let (desc, driver, device) = (part(addr.desc), part(addr.avail), part(addr.used));
        let (Some(desc), Some(driver), Some(device)) = (desc, driver, device) else {
            return Ok(None);
        };
        let layout = layout(features);
        let position = match ring.base {
            None => RingPosition::start(layout),
            Some(base) if layout == Layout::Split && base > u32::from(u16::MAX) => {
                return Err(SetUpError::Base(base));
            }
            Some(base) => RingPosition::from_vhost_base(layout, base),
        };
        let features = ring_features(features);
        Ok(Some(QueueConfig { layout, size, desc, driver, device, features, position }))
    }

    /// Whether rings are enabled without being told: a front end without protocol features has
    /// no way to tell.
    pub(super) fn rings_start_enabled(&self) -> bool {
        self.features.is_some_and(|f| f & F_PROTOCOL_FEATURES == 0)
    }

    /// Whether the switch has the ring.
    pub fn is_running(&self, index: RingIndex) -> bool {
        self.rings.get(&index).is_some_and(|ring| ring.running)
    }

    pub(super) fn indexes(&self) -> Vec<RingIndex> {
        self.rings.keys().copied().collect()
    }

    fn ring_mut(&mut self, index: RingIndex) -> &mut Ring {
        self.rings.entry(index).or_default()
    }

    /// Checks a ring's number.
    fn index(&self, ring: u32) -> Result<RingIndex, SessionError> {
        let limit = u32::from(self.settings.queues).saturating_mul(2);
        let number = u16::try_from(ring).ok().filter(|_| ring < limit);
        number.map(RingIndex).ok_or(SessionError::NoSuchRing { ring, limit })
    }

    /// Checks the ring's number and its fd, if it has one.
    fn ring_fd(
        &self,
        v: VringFd,
        mut fds: Vec<OwnedFd>,
        request: FrontendReq,
    ) -> Result<(RingIndex, Option<Arc<OwnedFd>>), SessionError> {
        let index = self.index(v.ring)?;
        let fd = fds.pop();
        if fd.as_ref().is_some_and(is_no_eventfd) {
            return Err(SessionError::NoEventFd { request, ring: v.ring });
        }
        Ok((index, fd.map(Arc::new)))
    }
}

/// Anything else is kept away from the workers: it could fail in their poll set. Where the kernel
/// does not say what it is: eventfds have no file type.
pub(super) fn is_no_eventfd(fd: &OwnedFd) -> bool {
    let untyped =
        || fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Unknown);
    !notify::is_eventfd(fd).unwrap_or_else(untyped)
}
