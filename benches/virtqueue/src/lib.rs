//! A driver and a device on one ring, for benches: what is measured is the device's part.
//!
//! The driver's part and the device's are functions of their own that are never inlined, so that
//! callgrind tells them apart.
#![forbid(unsafe_code)]

mod large;
mod pairs;
mod path;
mod translations;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub use large::{Merges, Segments};
pub use pairs::{Pair, Traffic, pairs};
pub use path::Path;
pub use translations::Translations;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtq::driver::{Buffer, DriverConfig, DriverError, DriverQueue, Used};
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{ChainBuf, Layout, RingFeatures, Token, Virtq};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Entries of the ring, and so the most chains per round.
pub const SIZE: u16 = 256;
/// Bytes of each buffer: a frame of the usual size.
const BUFFER_BYTES: u32 = 1536;
const RING_AT: GuestPhysAddr = GuestPhysAddr(0x1_0000);
const THEIR_RING_AT: GuestPhysAddr = GuestPhysAddr(0x8_0000);
const BUFFERS_AT: u64 = 0x10_0000;
const MEMORY_BYTES: usize = 0x20_0000;

/// Which kind of chains go through which kind of ring.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// Ring format.
    pub layout: Layout,
    /// Each buffer through an indirect table.
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER`, with one used entry per batch.
    pub in_order: bool,
}

impl Variant {
    /// Direct chains, completed one by one.
    pub fn plain(layout: Layout) -> Self {
        Self { layout, indirect: false, in_order: false }
    }

    fn config(self) -> DriverConfig {
        let features =
            RingFeatures { event_idx: true, indirect: self.indirect, in_order: self.in_order };
        DriverConfig::new(self.layout, SIZE).with_features(features, 2)
    }
}

/// The guest: chains of one readable buffer.
#[derive(Debug)]
struct Guest {
    driver: DriverQueue,
    indirect: bool,
    used: Vec<Used>,
}

impl Guest {
    fn new(map: &GuestMap, variant: Variant, at: GuestPhysAddr) -> anyhow::Result<Self> {
        let mut driver = DriverQueue::new(map, variant.config(), at)?;
        // A guest under load polls: no calls.
        driver.disable_calls();
        let used = vec![Used::default(); usize::from(SIZE)];
        Ok(Self { driver, indirect: variant.indirect, used })
    }

    #[inline(never)]
    fn offer(&mut self, count: u16) -> Result<(), DriverError> {
        for index in 0..count {
            let offset = u64::from(index).wrapping_mul(2048);
            let addr = GuestPhysAddr(BUFFERS_AT.wrapping_add(offset));
            let buffer = Buffer { addr, len: BUFFER_BYTES };
            if self.indirect {
                self.driver.add_indirect(&[buffer], &[], u64::from(index))?;
            } else {
                self.driver.add_readable(&[buffer], u64::from(index))?;
            }
        }
        self.driver.publish();
        Ok(())
    }

    #[inline(never)]
    fn reclaim(&mut self) -> Result<usize, DriverError> {
        self.driver.poll_burst(&mut self.used)
    }
}

/// A guest's memory.
pub type Memory = Arc<GuestMemoryMmap<()>>;

/// Memory with room for the rings of both devices and for the buffers.
///
/// # Errors
///
/// If it cannot be mapped.
pub fn memory() -> anyhow::Result<Memory> {
    Ok(Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?))
}

/// Our device with its guest.
#[derive(Debug)]
pub struct Ours {
    guest: Guest,
    device: Virtq,
    buf: ChainBuf,
    tokens: Vec<Token>,
    in_order: bool,
}

impl Ours {
    /// Sets both sides up.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped or a side refuses the configuration.
    pub fn new(variant: Variant) -> anyhow::Result<Self> {
        Self::on(&memory()?, variant)
    }

    /// As [`Self::new`], on this memory.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn on(memory: &Memory, variant: Variant) -> anyhow::Result<Self> {
        let map = GuestMap::new(Arc::clone(memory))?;
        let guest = Guest::new(&map, variant, RING_AT)?;
        let mut device = guest.driver.queue_config().activate(&map)?;
        device.disable_kicks();
        let buf = ChainBuf::with_capacity(usize::from(SIZE));
        let tokens = Vec::with_capacity(usize::from(SIZE));
        Ok(Self { guest, device, buf, tokens, in_order: variant.in_order })
    }

    /// The driver's part before: makes `count` chains available.
    ///
    /// # Errors
    ///
    /// If they do not fit.
    #[inline]
    pub fn offer(&mut self, count: u16) -> Result<(), DriverError> {
        self.guest.offer(count)
    }

    /// The device's part: serves bursts of up to `batch` until nothing is available; returns the
    /// sum of the chains' lengths.
    #[inline(never)]
    pub fn serve(&mut self, batch: usize) -> u64 {
        let mut bytes = 0u64;
        loop {
            let chains = self.device.pop(&mut self.buf, batch);
            if chains.is_empty() {
                return bytes;
            }
            self.tokens.clear();
            for index in 0..chains.len() {
                bytes = bytes.wrapping_add(u64::from(chains.readable(index).len()));
                self.tokens.push(chains.token(index));
            }
            if self.in_order {
                self.device.complete_all(&self.tokens);
            } else {
                for token in &self.tokens {
                    self.device.complete(*token, 0);
                }
            }
            self.device.publish();
            // ORDERING: the fence that the interface asks for between publication and look.
            fence(Ordering::SeqCst);
            let _ = std::hint::black_box(self.device.needs_call());
        }
    }

    /// The driver's part after: takes back what was used; how many chains.
    ///
    /// # Errors
    ///
    /// If the device broke a rule.
    #[inline]
    pub fn reclaim(&mut self) -> Result<usize, DriverError> {
        self.guest.reclaim()
    }
}

/// `virtio-queue`'s device, split rings only, with the same guest.
#[derive(Debug)]
pub struct Theirs {
    guest: Guest,
    queue: Queue,
    memory: Arc<GuestMemoryMmap<()>>,
    translate: bool,
}

impl Theirs {
    /// Sets both sides up. With `translate`, the device also looks up the host address of each
    /// buffer, which is part of what our chains are.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped or a side refuses the configuration.
    pub fn new(indirect: bool, translate: bool) -> anyhow::Result<Self> {
        Self::on(&memory()?, indirect, translate)
    }

    /// As [`Self::new`], on this memory, beside a ring of [`Ours::on`] and with the same buffers.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn on(memory: &Memory, indirect: bool, translate: bool) -> anyhow::Result<Self> {
        let memory = Arc::clone(memory);
        let map = GuestMap::new(Arc::clone(&memory))?;
        let variant = Variant { indirect, ..Variant::plain(Layout::Split) };
        let guest = Guest::new(&map, variant, THEIR_RING_AT)?;
        let config = guest.driver.queue_config();
        let mut queue = Queue::new(SIZE)?;
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(config.desc.0))?;
        queue.try_set_avail_ring_address(GuestAddress(config.driver.0))?;
        queue.try_set_used_ring_address(GuestAddress(config.device.0))?;
        queue.set_event_idx(true);
        queue.set_ready(true);
        anyhow::ensure!(queue.is_valid(memory.as_ref()), "virtio-queue refuses the queue");
        Ok(Self { guest, queue, memory, translate })
    }

    /// As [`Ours::offer`].
    ///
    /// # Errors
    ///
    /// If they do not fit.
    #[inline]
    pub fn offer(&mut self, count: u16) -> Result<(), DriverError> {
        self.guest.offer(count)
    }

    /// As [`Ours::serve`]: one look at the available ring per burst, as its iterator does.
    ///
    /// # Errors
    ///
    /// If the queue is not ready or memory not mapped.
    #[inline(never)]
    pub fn serve(&mut self, batch: usize) -> anyhow::Result<u64> {
        let memory = self.memory.as_ref();
        let mut bytes = 0u64;
        let mut heads = [0u16; SIZE as usize];
        loop {
            let mut count = 0usize;
            for (chain, head) in self.queue.iter(memory)?.take(batch).zip(&mut heads) {
                *head = chain.head_index();
                for desc in chain {
                    bytes = bytes.wrapping_add(u64::from(desc.len()));
                    if self.translate {
                        let _ = std::hint::black_box(memory.get_host_address(desc.addr())?);
                    }
                }
                count = count.wrapping_add(1);
            }
            for head in heads.iter().take(count) {
                self.queue.add_used(memory, *head, 0)?;
            }
            if count == 0 {
                return Ok(bytes);
            }
            let _ = std::hint::black_box(self.queue.needs_notification(memory)?);
        }
    }

    /// As [`Ours::reclaim`].
    ///
    /// # Errors
    ///
    /// If the device broke a rule.
    #[inline]
    pub fn reclaim(&mut self) -> Result<usize, DriverError> {
        self.guest.reclaim()
    }
}

#[cfg(test)]
mod tests {
    use super::{Layout, Ours, SIZE, Theirs, Variant};

    #[test]
    fn every_variant_serves_every_chain() {
        for layout in [Layout::Split, Layout::Packed] {
            for bits in 0..4 {
                let variant = Variant { layout, indirect: bits & 1 != 0, in_order: bits & 2 != 0 };
                let mut ours = Ours::new(variant).unwrap();
                for batch in [1, 7, 256] {
                    for _ in 0..1000 {
                        ours.offer(SIZE).unwrap();
                        assert_eq!(ours.serve(batch), 256 * 1536, "{variant:?}");
                        assert_eq!(ours.reclaim(), Ok(256));
                    }
                }
            }
        }
        for indirect in [false, true] {
            let mut theirs = Theirs::new(indirect, true).unwrap();
            for batch in [1, 7, 256] {
                theirs.offer(SIZE).unwrap();
                assert_eq!(theirs.serve(batch).unwrap(), 256 * 1536);
                assert_eq!(theirs.reclaim(), Ok(256));
            }
        }
    }
}
