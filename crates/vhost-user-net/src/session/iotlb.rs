//! The device behind a vIOMMU (`ACCESS_PLATFORM`): the front end translates, we remember.
//!
//! ```text
//!   ring meets an unknown address ─► Iotlb ─► wake ─► Session::misses ─► MISS on the back channel
//!   front end ─ IOTLB_MSG UPDATE ─► insert, rings that wait are looked at again
//!   front end ─ IOTLB_MSG INVALIDATE ─► remove, wait until no worker is in the turn it was in, ack
//! ```
//!
//! Rings are behind the vIOMMU themselves: one whose own addresses are unknown waits for them, and
//! one whose own addresses are invalidated stops where it is.
//!
//! **Trust.** What an UPDATE translates to must lie in the memory that the front end shares.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use virtio_net::features::ACCESS_PLATFORM;
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{Access, Iotlb, IotlbEntry, Iova, Layout, QueueConfig, RingIotlb};

use super::ring::Ring;
use super::{RingIndex, Rings, Session, SessionError};
use crate::codec::{IotlbKind, IotlbMessage};
use crate::memory::FrontendAddr;

/// Translations, and who is told that some are missing.
#[derive(Debug, Default)]
pub(super) struct Translation {
    iotlb: Option<Arc<Iotlb>>,
    /// Set once; there may be rings before that.
    waker: Arc<OnceLock<Arc<OwnedFd>>>,
    /// [`Iotlb::losses`] of which no worker makes use any more.
    settled: u64,
    /// Something was said that rings may wait for.
    answered: bool,
}

impl Translation {
    pub(super) fn end(&mut self) {
        self.iotlb = None;
    }
}

/// A part of a ring, as (address, bytes, what the device does there).
pub(super) type Part = (Iova, u64, Access);

/// The three parts of a ring.
pub(super) fn parts(config: &QueueConfig) -> [Part; 3] {
    let at = |addr: GuestPhysAddr| Iova(addr.0);
    let size = u64::from(config.size);
    let bytes = |entry: u64| size.saturating_mul(entry);
    match config.layout {
        Layout::Split => [
            (at(config.desc), bytes(16), Access::Read),
            (at(config.driver), bytes(2).saturating_add(6), Access::Read),
            (at(config.device), bytes(8).saturating_add(6), Access::Write),
        ],
        Layout::Packed => [
            (at(config.desc), bytes(16), Access::Write),
            (at(config.driver), 4, Access::Read),
            (at(config.device), 4, Access::Write),
        ],
    }
}

impl Session {
    /// An eventfd of ours that is written when [`Self::misses`] has something.
    pub fn set_waker(&mut self, waker: Arc<OwnedFd>) {
        let _ = self.translation.waker.set(waker);
    }

    /// What the front end is to be asked for, as messages for its back channel.
    pub fn misses(&self) -> Vec<Vec<u8>> {
        let Some(iotlb) = &self.translation.iotlb else { return Vec::new() };
        let ask = |miss: virtq::IotlbMiss| IotlbMessage::miss(miss).write_to_front_end();
        iotlb.take_misses().into_iter().map(ask).collect()
    }

    /// How often rings have asked for something that they had not asked for already.
    pub fn asks(&self) -> u64 {
        self.iotlb().map_or(0, |iotlb| iotlb.asks())
    }

    /// A ring has ended, and what it waited for may be gone with it. When none is left, the front
    /// end does not say any more what is taken back: nothing is known then.
    pub(super) fn forget_questions(&mut self, rings: &mut dyn Rings) {
        let Some(iotlb) = self.translation.iotlb.as_ref() else { return };
        if self.rings.values().any(|ring| ring.started) {
            self.translation.answered |= iotlb.forget_questions();
            // Those that wait for their own place ask anew.
            self.try_start_all(rings);
        } else {
            iotlb.clear();
        }
    }

    /// Translations that are known, if the device is behind a vIOMMU.
    pub fn translations(&self) -> Option<usize> {
        self.iotlb().map(|iotlb| iotlb.len())
    }

    /// The channel for what the back end asks for itself.
    pub fn backend_channel(&self) -> Option<&OwnedFd> {
        self.backend_channel.as_ref()
    }

    /// Begins or ends translation, as the features say.
    pub(super) fn set_translation(&mut self, features: u64) {
        if features & ACCESS_PLATFORM == 0 {
            self.translation.iotlb = None;
        } else if self.translation.iotlb.is_none() {
            let nothing = GuestMap::nothing();
            let memory = self.memory.map().unwrap_or(&nothing);
            let waker = Arc::clone(&self.translation.waker);
            let wake = move || {
                if let Some(waker) = waker.get() {
                    let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
                }
            };
            self.translation.iotlb = Some(Arc::new(Iotlb::new(memory, Box::new(wake))));
            self.translation.settled = 0;
        }
    }

    /// Translates into a new memory table. No ring runs.
    pub(super) fn translate_into(&self) {
        if let Some(iotlb) = &self.translation.iotlb {
            iotlb.set_memory(self.memory.map().unwrap_or(&GuestMap::nothing()));
        }
    }

    pub(super) fn iotlb(&self) -> Option<&Arc<Iotlb>> {
        self.translation.iotlb.as_ref()
    }

    /// A ring's side, if it is behind a vIOMMU.
    pub(super) fn ring_iotlb(&self, index: RingIndex) -> Option<RingIotlb> {
        let access = if index.is_transmitq() { Access::Read } else { Access::Write };
        Some(RingIotlb::new(Arc::clone(self.iotlb()?), access).of_ring(index.0))
    }

    /// Whether all parts of a ring are known; those that are not are asked for.
    pub(super) fn is_known(iotlb: &Iotlb, parts: &[Part]) -> bool {
        let mut known = true;
        for (addr, len, access) in parts {
            if let Some(missing) = iotlb.first_missing(*addr, *len, *access) {
                iotlb.ask(missing, *access);
                known = false;
            }
        }
        known
    }

    /// The memory that a ring is in, as its addresses have it.
    pub(super) fn map_of(iotlb: &Iotlb, config: &QueueConfig) -> GuestMap {
        iotlb.map_of(&parts(config).map(|(addr, len, _)| (addr, len)))
    }

    /// What has to be known for a ring to run: its parts, and where one of them is noted, if the
    /// front end says so.
    pub(super) fn needed(&self, ring: &Ring, config: &QueueConfig) -> Vec<Part> {
        let [desc, driver, device] = parts(config);
        let log = ring.addr.as_ref().and_then(|addr| self.log_addr(addr));
        let log = log.map(|addr| (Iova(addr), device.1, device.2));
        [desc, driver, device].into_iter().chain(log).collect()
    }

    pub(super) fn iotlb_message(
        &mut self,
        message: IotlbMessage,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let Some(iotlb) = self.iotlb().cloned() else { return Err(SessionError::NoIommu) };
        match message.kind {
            IotlbKind::Update(access) => {
                let entries = self.entries(&message, access)?;
                if iotlb.insert(&entries) {
                    self.translation.answered = true;
                    self.try_start_all(rings);
                }
            }
            IotlbKind::Invalidate => {
                for index in self.indexes() {
                    if self.is_hit(index, &message) {
                        self.park_ring(index, rings);
                    }
                }
                self.translation.answered |= iotlb.remove(message.iova, message.size);
                // What was lost before may still be in use, too; if nothing was, nobody waits.
                let losses = iotlb.losses();
                if self.translation.settled != losses {
                    rings.quiesce();
                    self.translation.settled = losses;
                }
                self.try_start_all(rings);
            }
            IotlbKind::Miss(_) => return Err(SessionError::IotlbMiss),
        }
        Ok(())
    }

    /// The regions' parts of what a message translates to.
    fn entries(
        &self,
        message: &IotlbMessage,
        access: Access,
    ) -> Result<Vec<IotlbEntry>, SessionError> {
        let IotlbMessage { iova, size, user, .. } = *message;
        let outside = SessionError::IotlbOutside { iova: iova.0, size, user: user.0 };
        if size == 0 || iova.0.checked_add(size.wrapping_sub(1)).is_none() {
            return Err(outside);
        }
        let mut entries = Vec::new();
        let mut done = 0u64;
        while done < size {
            let at = FrontendAddr(user.0.wrapping_add(done));
            let Some((addr, here)) = self.memory.piece(at) else { return Err(outside) };
            let len = here.min(size.saturating_sub(done));
            let iova = Iova(iova.0.wrapping_add(done));
            entries.push(IotlbEntry { iova, addr, len, access });
            done = done.saturating_add(len);
        }
        Ok(entries)
    }

    /// Whether a part of a running ring is in what is invalidated.
    fn is_hit(&self, index: RingIndex, message: &IotlbMessage) -> bool {
        let Some(ring) = self.rings.get(&index).filter(|ring| ring.running) else { return false };
        let Ok(Some(config)) = self.queue_config(ring, self.features.unwrap_or(0)) else {
            return true;
        };
        let end = message.iova.0.saturating_add(message.size);
        self.needed(ring, &config)
            .iter()
            .any(|(addr, len, _)| addr.0 < end && message.iova.0 < addr.0.saturating_add(*len))
    }

    /// All messages that have come are handled: looks at rings again whose next chain waited for
    /// what they said, transmitqs by workers, as after a kick. Once for all of them, since front
    /// ends translate page by page.
    pub fn end_turn(&mut self, rings: &mut dyn Rings) {
        let answered = std::mem::take(&mut self.translation.answered);
        let Some(iotlb) = self.iotlb().filter(|_| answered) else { return };
        let ready = iotlb.take_ready().into_iter().map(RingIndex);
        let ready = ready.filter_map(|index| self.rings.get_key_value(&index));
        for (index, ring) in ready.filter(|(_, ring)| ring.running) {
            if !index.is_transmitq() {
                rings.resume(*index);
            } else if let Some(kick) = &ring.kick {
                rings.wake(kick);
            }
        }
    }
}
