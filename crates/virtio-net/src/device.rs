//! The device model for VMMs that embed us: registers in, actions out, no I/O.
//!
//! ```text
//!  transport (PCI, MMIO) of the VMM                      Device                     data path
//!  ────────────────────────────────                      ──────                     ─────────
//!  feature registers  ──► set_driver_features ──► acked
//!  status register    ──► set_status ───────────► Action::Activate ──► activate() ──► QueuePairs
//!  queue registers    ──► queue_mut                                             └──► ControlQueue
//!  configuration      ◄── read_config        ◄── link, announce, MAC       control() ◄──┘
//! ```
//!
//! **Trust.** Every value that the driver wrote is checked where it is used: features at
//! `FEATURES_OK`, queues at `activate`, commands one by one.
//! **Limits.** 1 to 32767 queue pairs; 64 addresses in each filter table, more turn the filter
//! into "all of that kind", as the specification allows.
//! **Not supported.** Legacy and transitional drivers (`VERSION_1` must be accepted), device reset
//! in the middle of a burst: stop the workers first.

mod activate;
mod config_space;
mod control;
mod filter;
mod offloads;
mod rss;

use virtio_bindings::virtio_config as spec;
use virtq::mem::GuestPhysAddr;

use crate::features;
pub use activate::{ActivateError, Activated, ControlQueue, QueueEvents, QueuePair};
pub use config_space::CONFIG_BYTES;
pub use control::Ack;
pub use filter::{FILTER_ENTRIES, Mac, RxFilter, SharedFilter};
pub(crate) use offloads::SharedOffloads;
pub(crate) use rss::SharedHash;
pub use rss::{Rss, TABLE_MAX};

/// The driver has found the device.
pub const ACKNOWLEDGE: u8 = status_bit(spec::VIRTIO_CONFIG_S_ACKNOWLEDGE);
/// The driver knows how to drive it.
pub const DRIVER: u8 = status_bit(spec::VIRTIO_CONFIG_S_DRIVER);
/// The features are agreed.
pub const FEATURES_OK: u8 = status_bit(spec::VIRTIO_CONFIG_S_FEATURES_OK);
/// The driver is ready.
pub const DRIVER_OK: u8 = status_bit(spec::VIRTIO_CONFIG_S_DRIVER_OK);
/// The device needs a reset.
pub const NEEDS_RESET: u8 = status_bit(spec::VIRTIO_CONFIG_S_NEEDS_RESET);
/// The driver gave up.
pub const FAILED: u8 = status_bit(spec::VIRTIO_CONFIG_S_FAILED);

#[expect(clippy::cast_possible_truncation, reason = "checked by the assertion")]
const fn status_bit(constant: u32) -> u8 {
    assert!(constant < 256, "the status register is a byte");
    constant as u8
}

/// Entries of the largest queue that can be set up.
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// Entries of a queue after a reset.
const QUEUE_SIZE_DEFAULT: u16 = 256;

/// What a device is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSettings {
    /// The address that the device gives to its driver.
    pub mac: Mac,
    /// The MTU that it gives to its driver; without it, frames of any size pass.
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to 32767.
    pub queue_pairs: u16,
    /// Features that are not to be offered.
    pub without: u64,
}

/// Why a device cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Not a unicast address.
    #[error("{0} is not a unicast address")]
    Mac(Mac),
    /// The specification's smallest MTU is 68.
    #[error("an MTU of {0} is not allowed: 68 to 65535")]
    Mtu(u16),
    /// Number of queue pairs.
    #[error("{0} queue pairs are not allowed: 1 to 32767")]
    QueuePairs(u16),
}

/// What the VMM has to do after something changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Call [`Device::activate`]: the driver is ready.
    Activate,
    /// Stop all queues and drop what [`Device::activate`] gave; the device is as new.
    Reset,
    /// Raise the configuration interrupt.
    ConfigInterrupt,
    /// The driver uses this many queue pairs from now on: enable those, disable the others. Which
    /// receiveq a frame goes to is up to the device again.
    QueuePairs(u16),
    /// The same, but the driver says which receiveq a frame goes to: see [`Device::rss`].
    Rss(u16),
    /// The driver changed its address.
    MacChanged(Mac),
    /// The driver has announced itself.
    Announced,
}

/// One queue, as the driver sets it up through the transport's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: GuestPhysAddr,
    /// Available ring, or driver event suppression area.
    pub driver: GuestPhysAddr,
    /// Used ring, or device event suppression area.
    pub device: GuestPhysAddr,
    /// Whether the driver enabled the queue.
    pub ready: bool,
}

impl Default for QueueSetup {
    fn default() -> Self {
        let nowhere = GuestPhysAddr(0);
        let size = QUEUE_SIZE_DEFAULT;
        Self { size, desc: nowhere, driver: nowhere, device: nowhere, ready: false }
    }
}

/// A virtio-net device without transport and without I/O.
#[derive(Debug)]
pub struct Device {
    settings: DeviceSettings,
    offered: u64,
    acked: u64,
    status: u8,
    /// Counts changes of the configuration space, modulo 256.
    generation: u8,
    link_up: bool,
    /// The driver has been asked to announce itself and has not said that it did.
    announcing: bool,
    /// Queue pairs that the driver uses.
    active_pairs: u16,
    queues: Vec<QueueSetup>,
    filter: SharedFilter,
    /// How frames are spread over the receiveqs, if the driver says so.
    rss: Option<Rss>,
    /// The hash that receiveqs report.
    hash: SharedHash,
    /// Offloads towards the driver that are on.
    guest_offloads: SharedOffloads,
}

impl Device {
    /// A device after power-on, its link up.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] names the setting that is not allowed.
    pub fn new(settings: DeviceSettings) -> Result<Self, SettingsError> {
        if !settings.mac.is_unicast() {
            return Err(SettingsError::Mac(settings.mac));
        }
        if let Some(mtu @ ..68) = settings.mtu {
            return Err(SettingsError::Mtu(mtu));
        }
        let pairs = settings.queue_pairs;
        let queue_count = match pairs {
            1..=32767 => usize::from(pairs).saturating_mul(2).saturating_add(1),
            _ => return Err(SettingsError::QueuePairs(pairs)),
        };
        let mut absent = settings.without;
        if pairs == 1 {
            absent |= features::MQ | features::RSS;
        }
        if settings.mtu.is_none() {
            absent |= features::MTU;
        }
        Ok(Self {
            settings,
            offered: features::EMBEDDED_FEATURES & !absent,
            acked: 0,
            status: 0,
            generation: 0,
            link_up: true,
            announcing: false,
            active_pairs: 1,
            queues: vec![QueueSetup::default(); queue_count],
            filter: SharedFilter::new(RxFilter::new(settings.mac)),
            rss: None,
            hash: SharedHash::default(),
            guest_offloads: SharedOffloads::default(),
        })
    }

    /// The features that the device offers.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// The features that the driver accepted (or is about to).
    pub fn acked_features(&self) -> u64 {
        self.acked
    }

    /// The driver writes its features; ignored once they are agreed.
    pub fn set_driver_features(&mut self, features: u64) {
        if self.status & FEATURES_OK == 0 {
            self.acked = features;
        }
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes the status register: 0 resets; bits can be added only. `FEATURES_OK`
    /// stays clear if the features do not go together, `DRIVER_OK` if they are not agreed.
    pub fn set_status(&mut self, status: u8) -> Option<Action> {
        if status == 0 {
            self.reset();
            return Some(Action::Reset);
        }
        let mut new = status & !self.status;
        if new & FEATURES_OK != 0 && !self.features_go_together() {
            new &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        // Only the device says that it needs a reset.
        self.status |= new & !NEEDS_RESET;
        if new & FEATURES_OK != 0 {
            self.filter.update(|filter| filter.vlan_filter = self.has(features::CTRL_VLAN));
            self.guest_offloads.set(self.acked);
        }
        (new & DRIVER_OK != 0).then_some(Action::Activate)
    }

    /// Whether the driver may use several pairs: with `MQ`, or with `RSS` alone.
    fn has_pairs(&self) -> bool {
        self.acked & (features::MQ | features::RSS) != 0
    }

    /// Whether the driver accepted all of `bits`.
    fn has(&self, bits: u64) -> bool {
        self.acked & bits == bits
    }

    fn features_go_together(&self) -> bool {
        let needs_control = features::CTRL_RX
            | features::CTRL_VLAN
            | features::GUEST_ANNOUNCE
            | features::MQ
            | features::RSS
            | features::HASH_REPORT
            | features::CTRL_MAC_ADDR
            | features::CTRL_GUEST_OFFLOADS;
        self.acked & !self.offered == 0
            && self.has(features::VERSION_1)
            && features::offloads_go_together(self.acked)
            && (self.acked & needs_control == 0 || self.has(features::CTRL_VQ))
            && (!self.has(features::CTRL_RX_EXTRA) || self.has(features::CTRL_RX))
    }

    fn reset(&mut self) {
        self.acked = 0;
        self.status = 0;
        self.announcing = false;
        self.active_pairs = 1;
        self.rss = None;
        self.hash.set(None);
        self.guest_offloads.set(0);
        self.queues.fill(QueueSetup::default());
        self.filter.update(|filter| *filter = RxFilter::new(self.settings.mac));
    }

    /// A guest fault broke the device: tells the driver that a reset is needed.
    pub fn needs_reset(&mut self) -> Option<Action> {
        self.status |= NEEDS_RESET;
        (self.status & DRIVER_OK != 0).then_some(Action::ConfigInterrupt)
    }

    /// Number of queues: pairs, then the control queue.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The registers of queue `index` (receiveq of pair i: `2 * i`, transmitq: `2 * i + 1`).
    pub fn queue_mut(&mut self, index: usize) -> Option<&mut QueueSetup> {
        self.queues.get_mut(index)
    }

    /// Index of the control queue; none without `CTRL_VQ`. Without `MQ` it is queue 2.
    pub fn control_index(&self) -> Option<usize> {
        if !self.has(features::CTRL_VQ) {
            return None;
        }
        let pairs = if self.has_pairs() { self.settings.queue_pairs } else { 1 };
        Some(usize::from(pairs).saturating_mul(2))
    }

    /// The driver resets one queue (`RING_RESET`): returns whether it may. Stop the queue before
    /// the driver reads the register back; it comes again by [`Self::activate_queue`].
    pub fn reset_queue(&mut self, index: usize) -> bool {
        if !self.has(features::RING_RESET) || self.status & DRIVER_OK == 0 {
            return false;
        }
        let Some(queue) = self.queues.get_mut(index) else { return false };
        *queue = QueueSetup::default();
        true
    }

    /// The link went up or down.
    pub fn set_link(&mut self, up: bool) -> Option<Action> {
        if self.link_up == up {
            return None;
        }
        self.link_up = up;
        self.config_changed(features::STATUS)
    }

    /// Asks the driver to announce its addresses (after a migration or a new uplink). None if it
    /// cannot: then send a RARP for it.
    pub fn announce(&mut self) -> Option<Action> {
        let ready = self.status & DRIVER_OK != 0 && self.link_up;
        if !ready || !self.has(features::GUEST_ANNOUNCE | features::STATUS) {
            return None;
        }
        self.announcing = true;
        self.config_changed(features::STATUS)
    }

    /// The address of the device, as the driver last set it.
    pub fn mac(&self) -> Mac {
        self.filter.read(|filter| filter.mac)
    }

    /// Queue pairs that the driver uses.
    pub fn active_pairs(&self) -> u16 {
        self.active_pairs
    }

    /// What the driver wants to receive. Receiveqs that [`Self::activate`] made apply it.
    pub fn filter(&self) -> &SharedFilter {
        &self.filter
    }

    fn config_changed(&mut self, feature: u64) -> Option<Action> {
        self.generation = self.generation.wrapping_add(1);
        (self.status & DRIVER_OK != 0 && self.has(feature)).then_some(Action::ConfigInterrupt)
    }
}

#[cfg(test)]
mod tests;
