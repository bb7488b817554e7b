//! Where the parts of a queue lie in guest memory.
//!
//! ```text
//!  base ──► desc │ driver area │ device area │ indirect tables, one per id      (each 64-aligned)
//! ```

use super::DriverError;
use crate::config::{Layout, QueueConfig, RingFeatures, RingPosition};
use crate::mem::GuestPhysAddr;

/// Bytes of a descriptor, the same in both layouts.
pub(super) const DESC_BYTES: u64 = 16;
/// The largest queue of the specification.
const MAX_SIZE: u16 = 32768;
/// Areas start on cache lines of their own, so that the two sides do not share one by accident.
const AREA_ALIGN: u64 = 64;

/// What a driver's queue is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverConfig {
    /// Ring format.
    pub layout: Layout,
    /// Entries: a power of two for split rings, 1 to 32768.
    pub size: u16,
    /// Negotiated ring features.
    pub features: RingFeatures,
    /// Entries of each indirect table; 0 for none. There is one table per entry of the queue.
    pub table_len: u16,
    /// Where the ring starts; avail and used are equal.
    pub position: RingPosition,
}

impl DriverConfig {
    /// A queue of `size` that starts at the beginning, without features or indirect tables.
    pub fn new(layout: Layout, size: u16) -> Self {
        let position = RingPosition::start(layout);
        Self { layout, size, features: RingFeatures::default(), table_len: 0, position }
    }

    /// The same with `features`; with `indirect`, tables of `table_len` entries.
    pub fn with_features(self, features: RingFeatures, table_len: u16) -> Self {
        Self { features, table_len, ..self }
    }

    /// Places the areas from `base` on.
    ///
    /// # Errors
    ///
    /// [`DriverError::Size`] if the layout has no such size, [`DriverError::Area`] if the areas
    /// would go beyond the address space.
    pub fn areas(&self, base: GuestPhysAddr) -> Result<Areas, DriverError> {
        let split = self.layout == Layout::Split;
        if !(1..=MAX_SIZE).contains(&self.size) || (split && !self.size.is_power_of_two()) {
            return Err(DriverError::Size(self.size));
        }
        let size = u64::from(self.size);
        let (driver_bytes, device_bytes) = match self.layout {
            // Flags, index and event word around the entries.
            Layout::Split => {
                (size.wrapping_mul(2).wrapping_add(6), size.wrapping_mul(8).wrapping_add(6))
            }
            Layout::Packed => (4, 4),
        };
        let tables = if self.features.indirect { u64::from(self.table_len) } else { 0 };
        let out_of_space = || DriverError::Area(base);
        let mut end = base.0;
        let mut place = |bytes: u64| {
            let start = end.checked_next_multiple_of(AREA_ALIGN).ok_or_else(out_of_space)?;
            end = start.checked_add(bytes).ok_or_else(out_of_space)?;
            Ok(GuestPhysAddr(start))
        };
        let desc = place(size.wrapping_mul(DESC_BYTES))?;
        let driver = place(driver_bytes)?;
        let device = place(device_bytes)?;
        let tables = place(size.wrapping_mul(tables).wrapping_mul(DESC_BYTES))?;
        let bytes = end.wrapping_sub(base.0);
        Ok(Areas { desc, driver, device, tables, driver_bytes, device_bytes, bytes })
    }
}

/// The addresses of a queue's areas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Areas {
    /// Descriptor table or descriptor ring.
    pub desc: GuestPhysAddr,
    /// Available ring, or driver event suppression area.
    pub driver: GuestPhysAddr,
    /// Used ring, or device event suppression area.
    pub device: GuestPhysAddr,
    /// Indirect tables: the table of id `n` is the `n`-th.
    pub tables: GuestPhysAddr,
    /// Bytes of the driver area.
    pub driver_bytes: u64,
    /// Bytes of the device area.
    pub device_bytes: u64,
    /// Bytes from the base to the end of the last area.
    pub bytes: u64,
}

impl Areas {
    /// What the device side activates.
    pub fn queue_config(&self, config: &DriverConfig, position: RingPosition) -> QueueConfig {
        QueueConfig {
            layout: config.layout,
            size: config.size,
            desc: self.desc,
            driver: self.driver,
            device: self.device,
            features: config.features,
            position,
        }
    }
}
