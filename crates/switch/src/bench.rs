//! What benchmarks of the parts need and nobody else: behind the feature `bench`, no stable API.

use packet::MacAddr;
use port::PortId;

use crate::FdbLimits;
use crate::fdb::{self, Key, Source};

/// Stations to be learned.
#[derive(Debug)]
pub struct Stations(Vec<Key>);

impl Stations {
    /// These, in one VLAN.
    pub fn new(vlan: u16, macs: impl Iterator<Item = MacAddr>) -> Self {
        Self(macs.map(|mac| Key::new(vlan, mac.to_u64())).collect())
    }
}

/// The forwarding database by itself.
#[derive(Debug)]
pub struct Fdb(fdb::Fdb);

impl Fdb {
    /// An empty one.
    pub fn new(limits: FdbLimits) -> Self {
        Self(fdb::Fdb::new(limits, 0, 5))
    }

    /// Where a station of a VLAN is.
    #[inline]
    pub fn lookup(&self, vlan: u16, mac: MacAddr) -> Option<PortId> {
        self.0.lookup(Key::new(vlan, mac.to_u64()))
    }

    /// Notes that a station sent from `port`. Returns whether it is known there.
    #[inline]
    pub fn touch(&self, vlan: u16, mac: MacAddr, port: PortId, now: u32) -> bool {
        self.0.touch(Key::new(vlan, mac.to_u64()), port, now) == Source::Known
    }

    /// Learns where stations are, under one hold of the lock.
    #[inline]
    pub fn learn(&self, stations: &Stations, port: PortId, now: u32) {
        self.0.learn(&stations.0, port, now);
    }

    /// Forgets the stations of a port. Returns how many.
    pub fn flush(&self, port: PortId) -> usize {
        self.0.flush(Some(port))
    }

    /// Number of entries.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u32 {
        self.0.usage().0
    }
}
