//! What the tests of this directory share: seeded randomness and a driver with its device.

use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{ChainBuf, Layout, RingFeatures, Virtq};

/// Bytes of each buffer of a bench.
pub(crate) const BUFFER_BYTES: u32 = 256;
/// Entries of an indirect table.
pub(crate) const TABLE_LEN: u16 = 6;

/// A splitmix generator: one seed, one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A driver and a device on one ring.
pub(crate) struct Bench {
    pub(crate) map: GuestMap,
    pub(crate) driver: DriverQueue,
    pub(crate) device: Virtq,
    pub(crate) pool: BufferPool,
    pub(crate) buf: ChainBuf,
}

impl Bench {
    pub(crate) fn new(config: DriverConfig, buffers: u32) -> Self {
        let ring = config.areas(GuestPhysAddr(0)).unwrap().bytes;
        let pool_at = ring.next_multiple_of(4096);
        let bytes = pool_at + u64::from(buffers) * u64::from(BUFFER_BYTES);
        let map = GuestMap::private((bytes as usize).next_multiple_of(4096)).unwrap();
        let driver = DriverQueue::new(&map, config, GuestPhysAddr(0)).unwrap();
        let device = driver.queue_config().activate(&map).unwrap();
        let pool = BufferPool::new(&map, GuestPhysAddr(pool_at), BUFFER_BYTES, buffers).unwrap();
        Self { map, driver, device, pool, buf: ChainBuf::with_capacity(16) }
    }
}

/// Every combination of the three ring features.
pub(crate) fn all_features() -> impl Iterator<Item = RingFeatures> {
    (0..8).map(|bits| RingFeatures {
        event_idx: bits & 1 != 0,
        indirect: bits & 2 != 0,
        in_order: bits & 4 != 0,
    })
}

pub(crate) const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];
