//! What a session offers, and what of it was agreed.

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_net::features::{ACCESS_PLATFORM, DEVICE_FEATURES, OFFLOADS, RING_RESET};

use super::{Session, SessionError};

/// The protocol features that a session offers.
pub const PROTOCOL_FEATURES: u64 = VhostUserProtocolFeatures::MQ.bits()
    | VhostUserProtocolFeatures::LOG_SHMFD.bits()
    | VhostUserProtocolFeatures::RARP.bits()
    | VhostUserProtocolFeatures::REPLY_ACK.bits()
    | VhostUserProtocolFeatures::MTU.bits()
    | VhostUserProtocolFeatures::BACKEND_REQ.bits()
    | VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits()
    | VhostUserProtocolFeatures::RESET_DEVICE.bits()
    | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS.bits()
    | VhostUserProtocolFeatures::STATUS.bits()
    | VhostUserProtocolFeatures::DEVICE_STATE.bits();

/// What is offered besides with [`postcopy`](super::SessionSettings::postcopy).
pub const PAGEFAULT: u64 = VhostUserProtocolFeatures::PAGEFAULT.bits();

/// The feature bit that vhost-user adds to those of virtio.
pub(super) const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The device features that every session offers; `RING_RESET` needs a front end that forwards it.
pub const FEATURES: u64 =
    DEVICE_FEATURES & !RING_RESET | F_PROTOCOL_FEATURES | LOG_ALL | ACCESS_PLATFORM;
/// The feature bit by which writes are logged; it changes while rings run.
pub const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

impl Session {
    /// The device features that the session offers.
    pub fn offered(&self) -> u64 {
        let ring_reset = if self.settings.ring_reset { RING_RESET } else { 0 };
        FEATURES & !OFFLOADS | self.offloads | ring_reset
    }

    /// The protocol features that the session offers.
    pub fn protocol_offered(&self) -> u64 {
        PROTOCOL_FEATURES | if self.settings.postcopy { PAGEFAULT } else { 0 }
    }

    pub(super) fn has_protocol(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features.unwrap_or(0) & feature.bits() != 0
    }

    pub(super) fn needs(
        &self,
        feature: VhostUserProtocolFeatures,
        request: FrontendReq,
    ) -> Result<(), SessionError> {
        let negotiated = self.has_protocol(feature);
        if negotiated { Ok(()) } else { Err(SessionError::NotNegotiated(request)) }
    }
}
