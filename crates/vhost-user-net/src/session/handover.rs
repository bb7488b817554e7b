//! A session's state, out of one process and into another.

use std::io;
use std::time::{Duration, Instant};

use virtio_net::features::OFFLOADS;

use super::ring::Ring;
use super::{RegionTable, RingIndex, Rings, Session, SessionSettings};
use crate::codec::VringAddr;
use crate::handover::{AdoptError, Incoming, Outgoing, RingBase, RingHandover, SessionHandover};
use crate::memory::FrontendAddr;

impl Session {
    /// The state, with positions that are right if the rings are paused.
    ///
    /// # Errors
    ///
    /// The process has no fd left.
    pub fn export(&self, fds: &mut Outgoing, now: Instant) -> io::Result<SessionHandover> {
        let rings = self.rings.iter().map(|(index, ring)| ring.export(*index, fds, now));
        Ok(SessionHandover {
            features: self.features,
            offloads: Some(self.offloads),
            protocol_features: self.protocol_features,
            mtu: self.mtu,
            status: self.status,
            rings: rings.collect::<io::Result<_>>()?,
            regions: self.memory.export(fds)?,
            backend_channel: match &self.backend_channel {
                Some(fd) => Some(fds.add(fd)?),
                None => None,
            },
            log: self.export_log(fds)?,
            inflight: self.export_inflight(fds)?,
        })
    }

    /// A session that goes on from `state`. Nothing runs before [`Self::resume`].
    ///
    /// # Errors
    ///
    /// [`AdoptError`] if this program or `settings` do not allow what is in use. How many fds come
    /// along does not matter: see [`Self::set_fd_pool`].
    pub fn adopt(
        settings: SessionSettings,
        state: &SessionHandover,
        fds: &mut Incoming,
        now: Instant,
    ) -> Result<Self, AdoptError> {
        let mut session = Self::new(settings);
        // A front end may use at any time what it was offered, so the offer stays that of its
        // connection; the next one hears of `settings`.
        let in_use = || session.offloads | state.features.unwrap_or(0);
        session.offloads = state.offloads.unwrap_or_else(in_use) & OFFLOADS;
        let unknown = state.features.unwrap_or(0) & !session.offered();
        if unknown != 0 {
            return Err(AdoptError::Features(unknown));
        }
        let unknown = state.protocol_features.unwrap_or(0) & !session.protocol_offered();
        if unknown != 0 {
            return Err(AdoptError::ProtocolFeatures(unknown));
        }
        session.features = state.features;
        session.protocol_features = state.protocol_features;
        session.mtu = state.mtu;
        session.status = state.status;
        session.memory = RegionTable::adopt(&state.regions, fds)?;
        // What the front end translated is asked for again.
        session.set_translation(state.features.unwrap_or(0));
        session.backend_channel = state.backend_channel.map(|fd| fds.take(fd)).transpose()?;
        if let Some(log) = state.log {
            session.adopt_log(log, fds)?;
        }
        if let Some(inflight) = state.inflight {
            session.adopt_inflight(inflight, fds)?;
        }
        for ring in &state.rings {
            let limit = u32::from(settings.queues).saturating_mul(2);
            if u32::from(ring.index) >= limit {
                return Err(AdoptError::Ring { ring: ring.index, limit });
            }
            let limit = settings.queue_size;
            if let Some(size) = ring.size.filter(|size| *size > limit) {
                return Err(AdoptError::Size { ring: ring.index, size, limit });
            }
            let _ = session.rings.insert(RingIndex(ring.index), Ring::adopt(ring, fds, now)?);
        }
        Ok(session)
    }

    /// Stops the rings that run, of one direction, for [`Self::resume`]: here, or in another
    /// process that adopts the state.
    pub fn pause(&mut self, transmitqs: bool, rings: &mut dyn Rings) {
        for index in self.indexes() {
            if index.is_transmitq() == transmitqs {
                let _ = self.stop_ring(index, rings);
                rings.give_up(index);
            }
        }
    }

    /// Starts the rings of one direction that can run.
    pub fn resume(&mut self, transmitqs: bool, rings: &mut dyn Rings) {
        for index in self.indexes() {
            if index.is_transmitq() == transmitqs {
                self.start_again(index, rings);
            }
        }
    }

    /// Another process may have served the rings meanwhile: a record knows better where they are.
    pub fn doubt_positions(&mut self) {
        self.rings.values_mut().for_each(|ring| ring.known = false);
    }

    /// Where the rings stopped.
    pub fn positions(&self) -> Vec<RingBase> {
        let of_ring =
            |(index, ring): (&RingIndex, &Ring)| RingBase { index: index.0, base: ring.base };
        self.rings.iter().map(of_ring).collect()
    }

    /// Where the rings go on.
    pub fn set_positions(&mut self, positions: &[RingBase]) {
        for position in positions {
            if let Some(ring) = self.rings.get_mut(&RingIndex(position.index)) {
                ring.base = position.base;
            }
        }
    }
}

impl Ring {
    fn export(
        &self,
        index: RingIndex,
        fds: &mut Outgoing,
        now: Instant,
    ) -> io::Result<RingHandover> {
        let left = |until: Instant| {
            u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(0)
        };
        let addr = self.addr.as_ref();
        Ok(RingHandover {
            index: index.0,
            size: self.size,
            addr: addr.map(|addr| [addr.desc.0, addr.used.0, addr.avail.0]),
            addr_flags: addr.map_or(0, |addr| addr.flags),
            log: addr.map_or(0, |addr| addr.log),
            base: self.base,
            enabled: self.enabled,
            kick: fds.add_some(self.kick.as_ref())?,
            call: fds.add_some(self.call.as_ref())?,
            err: fds.add_some(self.err.as_ref())?,
            started: self.started,
            broken: self.broken,
            resumed: self.resumed,
            known: self.known,
            held_ms: self.held_until.map(left),
            impatient: self.impatient,
        })
    }

    fn adopt(state: &RingHandover, fds: &mut Incoming, now: Instant) -> Result<Self, AdoptError> {
        let addr = state.addr.map(|[desc, used, avail]| VringAddr {
            ring: u32::from(state.index),
            flags: state.addr_flags,
            desc: FrontendAddr(desc),
            used: FrontendAddr(used),
            avail: FrontendAddr(avail),
            log: state.log,
        });
        Ok(Self {
            size: state.size,
            addr,
            base: state.base,
            enabled: state.enabled,
            kick: fds.take_some(state.kick)?,
            call: fds.take_some(state.call)?,
            err: fds.take_some(state.err)?,
            started: state.started,
            broken: state.broken,
            resumed: state.resumed,
            known: state.known,
            held_until: state.held_ms.and_then(|ms| now.checked_add(Duration::from_millis(ms))),
            impatient: state.impatient,
            ..Self::default()
        })
    }
}
