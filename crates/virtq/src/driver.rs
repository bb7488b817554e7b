//! The driver side of a virtqueue: the guest in tests, benches and `causeway-guest`.
//!
//! ```text
//!  add ──► add ──► publish ──► needs_kick ──► (kick)        the device works
//!                                                                 │
//!  cookie, len ◄── poll_used ◄── enable_calls / (call) ◄──────────┘
//! ```
//!
//! **Trust.** The device may be as hostile as a driver can be: used indexes, ids and lengths are
//! checked against private state, descriptors and available entries are never read back.
//! **Limits.** As in the specification: 32768 entries, one indirect table per entry.
//! **Not supported.** Notification data.
//!
//! ```
//! use virtq::Layout;
//! use virtq::driver::{Buffer, DriverConfig, DriverQueue};
//! use virtq::mem::{GuestMap, GuestPhysAddr};
//!
//! let map = GuestMap::private(1 << 20)?;
//! let mut queue = DriverQueue::new(&map, DriverConfig::new(Layout::Packed, 8), GuestPhysAddr(0))?;
//! queue.add_readable(&[Buffer { addr: GuestPhysAddr(0x8000), len: 64 }], 7)?;
//! queue.publish();
//! assert!(queue.needs_kick());
//! assert_eq!(queue.poll_used()?, None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod areas;
mod error;
mod packed;
mod pool;
mod slots;
mod split;
#[cfg(test)]
mod tests;

pub use areas::{Areas, DriverConfig};
pub use error::DriverError;
pub use pool::BufferPool;

use crate::config::{Layout, QueueConfig};
use crate::mem::{DriverWords, GuestMap, GuestPhysAddr};
use packed::PackedDriver;
use slots::Slots;
use split::SplitDriver;

/// A piece of guest memory that a descriptor names. It need not be mapped: that is for the device
/// to find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub addr: GuestPhysAddr,
    /// Its length in bytes.
    pub len: u32,
}

/// A chain that the device has given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Used {
    /// What the chain was added with.
    pub cookie: u64,
    /// Bytes that the device wrote. With `IN_ORDER`, chains for which the device wrote no used
    /// entry count as completely written.
    pub len: u32,
}

/// A running virtqueue, driver side.
#[derive(Debug)]
pub struct DriverQueue {
    ring: Ring,
    config: DriverConfig,
    areas: Areas,
    map: GuestMap,
}

#[derive(Debug)]
enum Ring {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// Calls the same method of either ring.
macro_rules! either {
    ($ring:expr, $r:ident => $call:expr) => {
        match $ring {
            Ring::Split($r) => $call,
            Ring::Packed($r) => $call,
        }
    };
}

impl DriverQueue {
    /// Lays the queue out from `base` on and initialises its memory. The device must not run yet.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if size or position are not legal or the areas are not mapped.
    pub fn new(
        map: &GuestMap,
        config: DriverConfig,
        base: GuestPhysAddr,
    ) -> Result<Self, DriverError> {
        let areas = config.areas(base)?;
        let ring = Ring::new(map, &config, &areas)?;
        Ok(Self { ring, config, areas, map: map.clone() })
    }

    /// What a device activates to serve this queue from its start.
    pub fn queue_config(&self) -> QueueConfig {
        self.areas.queue_config(&self.config, self.config.position)
    }

    /// What a device activates that lost its own position (a back end that crashed): it goes on
    /// after the last chain that it used. Take all used chains first, and only rely on it if the
    /// old device used chains in order.
    pub fn resume_config(&self) -> QueueConfig {
        let position = either!(&self.ring, r => r.device_position());
        self.areas.queue_config(&self.config, position)
    }

    /// `used.idx` of a split ring as the device last wrote it, which is where a device that lost
    /// its position goes on.
    pub fn used_index(&self) -> Option<u16> {
        match &self.ring {
            Ring::Split(ring) => Some(ring.used_index()),
            Ring::Packed(_) => None,
        }
    }

    /// Adds a chain: `readable` buffers for the device to read, then `writable` ones for it to
    /// write. The device sees it after [`Self::publish`].
    ///
    /// # Errors
    ///
    /// [`DriverError::Full`] if not enough descriptors are free, [`DriverError::Empty`] if there
    /// is no buffer.
    #[inline]
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        cookie: u64,
    ) -> Result<(), DriverError> {
        let parts = Parts { readable, writable };
        either!(&mut self.ring, r => r.add(parts, cookie))
    }

    /// Adds a chain of buffers for the device to read.
    ///
    /// # Errors
    ///
    /// As [`Self::add`].
    #[inline]
    pub fn add_readable(&mut self, buffers: &[Buffer], cookie: u64) -> Result<(), DriverError> {
        self.add(buffers, &[], cookie)
    }

    /// Adds a chain of buffers for the device to write.
    ///
    /// # Errors
    ///
    /// As [`Self::add`].
    #[inline]
    pub fn add_writable(&mut self, buffers: &[Buffer], cookie: u64) -> Result<(), DriverError> {
        self.add(&[], buffers, cookie)
    }

    /// Like [`Self::add`], but through an indirect table: it takes one descriptor of the ring.
    ///
    /// # Errors
    ///
    /// As [`Self::add`]; [`DriverError::NoIndirect`] and [`DriverError::Table`] if the queue has
    /// no tables or they are too short.
    #[inline]
    pub fn add_indirect(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        cookie: u64,
    ) -> Result<(), DriverError> {
        let parts = Parts { readable, writable };
        either!(&mut self.ring, r => r.add_indirect(parts, cookie))
    }

    /// Lets the device see all added chains, with one store.
    #[inline]
    pub fn publish(&mut self) {
        either!(&mut self.ring, r => r.publish());
    }

    /// Whether the device wants a kick for what was published since the last time that this was
    /// asked. Contains the fence that must stand after [`Self::publish`].
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        either!(&mut self.ring, r => r.needs_kick())
    }

    /// Takes the next chain that the device gave back. The used index is read once per burst.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if the device broke a rule; the ring should then be reset.
    #[inline]
    pub fn poll_used(&mut self) -> Result<Option<Used>, DriverError> {
        either!(&mut self.ring, r => r.poll_used())
    }

    /// Takes up to `out.len()` chains; returns how many.
    ///
    /// # Errors
    ///
    /// As [`Self::poll_used`], if the first chain of the burst is the broken one: one after valid
    /// chains ends the burst and comes up at the next call.
    #[inline]
    pub fn poll_burst(&mut self, out: &mut [Used]) -> Result<usize, DriverError> {
        match &mut self.ring {
            Ring::Split(ring) => fill(out, || ring.poll_used()),
            Ring::Packed(ring) => fill(out, || ring.poll_used()),
        }
    }

    /// Whether a chain was given back and not taken yet.
    #[inline]
    pub fn has_used(&self) -> bool {
        either!(&self.ring, r => r.has_used())
    }

    /// Asks the device for a call when it uses the next chain, then looks once more: true if a
    /// chain was used already (the caller must not sleep). Contains the fence that makes it safe.
    #[inline]
    pub fn enable_calls(&mut self) -> bool {
        either!(&mut self.ring, r => r.enable_calls())
    }

    /// Tells the device that calls are not needed.
    #[inline]
    pub fn disable_calls(&mut self) {
        either!(&mut self.ring, r => r.disable_calls());
    }

    /// Starts the ring anew after the device was stopped (`VIRTIO_F_RING_RESET`, device reset):
    /// `reclaimed` gets the cookie of every chain that the device still had, in no order.
    ///
    /// # Errors
    ///
    /// None in practice: what was laid out once can be laid out again.
    pub fn reset(&mut self, reclaimed: impl FnMut(u64)) -> Result<(), DriverError> {
        self.slots().cookies().for_each(reclaimed);
        self.config.position = crate::config::RingPosition::start(self.config.layout);
        self.ring = Ring::new(&self.map, &self.config, &self.areas)?;
        Ok(())
    }

    /// Descriptors that are free.
    #[inline]
    pub fn free(&self) -> u16 {
        self.slots().free_entries()
    }

    /// Chains that were added and not taken back.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.slots().outstanding()
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// Where the areas are.
    pub fn areas(&self) -> &Areas {
        &self.areas
    }

    fn slots(&self) -> &Slots {
        either!(&self.ring, r => r.slots())
    }
}

impl Ring {
    fn new(map: &GuestMap, config: &DriverConfig, areas: &Areas) -> Result<Self, DriverError> {
        Ok(match config.layout {
            Layout::Split => Self::Split(SplitDriver::new(map, config, areas)?),
            Layout::Packed => Self::Packed(PackedDriver::new(map, config, areas)?),
        })
    }
}

/// The buffers of one chain, in the order of the specification.
#[derive(Debug, Clone, Copy)]
struct Parts<'a> {
    readable: &'a [Buffer],
    writable: &'a [Buffer],
}

impl<'a> Parts<'a> {
    #[inline(always)]
    fn count(self) -> usize {
        self.readable.len().saturating_add(self.writable.len())
    }

    #[inline(always)]
    fn writable_len(self) -> u32 {
        self.writable.iter().fold(0u32, |sum, b| sum.saturating_add(b.len))
    }

    /// Each buffer, and whether the device may write it.
    #[inline(always)]
    fn iter(self) -> impl Iterator<Item = (Buffer, bool)> + 'a {
        let readable = self.readable.iter().map(|b| (*b, false));
        readable.chain(self.writable.iter().map(|b| (*b, true)))
    }

    fn check_table(self, room: u16) -> Result<usize, DriverError> {
        let needed = self.count();
        if needed > usize::from(room) {
            return Err(DriverError::Table { needed, room });
        }
        Ok(needed)
    }
}

#[inline(always)]
fn fill(
    out: &mut [Used],
    mut poll: impl FnMut() -> Result<Option<Used>, DriverError>,
) -> Result<usize, DriverError> {
    let mut count = 0usize;
    for place in out {
        match poll() {
            Ok(Some(used)) => *place = used,
            Ok(None) => break,
            Err(error) if count == 0 => return Err(error),
            Err(_) => break,
        }
        count = count.wrapping_add(1);
    }
    Ok(count)
}

/// The memory of the indirect tables, if the queue has them.
fn map_tables(
    map: &GuestMap,
    config: &DriverConfig,
    areas: &Areas,
) -> Result<Option<DriverWords>, DriverError> {
    if !config.features.indirect || config.table_len == 0 {
        return Ok(None);
    }
    let entries = u64::from(config.size).wrapping_mul(u64::from(config.table_len));
    let bytes = entries.wrapping_mul(areas::DESC_BYTES);
    let words = DriverWords::new(map, areas.tables, bytes);
    words.map(Some).ok_or(DriverError::Area(areas.tables))
}

/// The descriptor of the table that starts at entry `first` and has `count` entries.
fn table(tables: GuestPhysAddr, first: usize, count: usize) -> Buffer {
    let offset = (first as u64).wrapping_mul(areas::DESC_BYTES);
    let bytes = (count as u64).wrapping_mul(areas::DESC_BYTES);
    // At most 65535 entries: the bytes fit.
    let len = u32::try_from(bytes).unwrap_or(u32::MAX);
    Buffer { addr: GuestPhysAddr(tables.0.wrapping_add(offset)), len }
}
