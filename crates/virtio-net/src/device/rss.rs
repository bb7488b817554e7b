//! Receive side scaling and reported hashes: `VIRTIO_NET_F_RSS` and `VIRTIO_NET_F_HASH_REPORT`
//! (virtio 1.3, sections 5.1.6.5.6.4 and 5.1.6.5.7).
//!
//! ```text
//!  RSS_CONFIG:  types: le32 │ mask: le16 │ unclassified: le16 │ table: (mask + 1) x le16
//!               │ max_tx_vq: le16 │ key length: u8 │ key
//!  HASH_CONFIG: types: le32 │ reserved: 4 x le16 │ key length: u8 │ key
//! ```
//!
//! **Limits.** Keys of up to 40 bytes, tables of up to [`TABLE_MAX`] entries: the least that the
//! specification allows. Kinds of hash: IPv4 and IPv6, TCP and UDP over them.

use std::sync::{Arc, PoisonError, RwLock};

use packet::{HASH_KEY_MAX, HashKind, ReceiveHash};

use super::control::{Answer, DONE};
use super::{Action, Device};
use crate::features;

/// Entries of the longest indirection table.
pub const TABLE_MAX: u16 = 128;

/// How the driver wants frames spread over its receiveqs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rss {
    /// The hash that the table is for.
    pub hash: ReceiveHash,
    /// Pairs, by the low bits of the hash; a power of two of them.
    pub table: Box<[u16]>,
    /// The pair for frames without a hash.
    pub unclassified: u16,
}

/// The hash that receiveqs report; the control queue writes it, they read it once per burst.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedHash(Arc<RwLock<Option<ReceiveHash>>>);

impl SharedHash {
    pub(crate) fn get(&self) -> Option<ReceiveHash> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, hash: Option<ReceiveHash>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hash;
    }
}

impl Device {
    /// How the driver wants frames spread over its receiveqs: none if it leaves that to the device
    /// (automatic receive steering), because it never said or gave the number of pairs last.
    pub fn rss(&self) -> Option<&Rss> {
        self.rss.as_ref()
    }

    /// The fields of the configuration space from `rss_max_key_size` on.
    pub(super) fn rss_limits(&self) -> [u8; 7] {
        if self.offered & (features::RSS | features::HASH_REPORT) == 0 {
            return [0; 7];
        }
        let key = const {
            assert!(HASH_KEY_MAX < 256);
            HASH_KEY_MAX.to_le_bytes()[0]
        };
        let [t0, t1] = TABLE_MAX.to_le_bytes();
        let [k0, k1, k2, k3] = HashKind::ALL.to_le_bytes();
        [key, t0, t1, k0, k1, k2, k3]
    }

    pub(super) fn set_rss(&mut self, data: &[u8]) -> Answer {
        if !self.has(features::RSS) {
            return None;
        }
        let pairs = self.settings.queue_pairs;
        let (kinds, rest) = le32(data)?;
        let (mask, rest) = le16(rest)?;
        let entries = mask.checked_add(1).filter(|n| n.is_power_of_two() && *n <= TABLE_MAX)?;
        let (unclassified, rest) = le16(rest)?;
        let (table, rest) = rest.split_at_checked(usize::from(entries).wrapping_mul(2))?;
        let (transmit, rest) = le16(rest)?;
        let hash = hash(kinds, rest)?;
        let table = table.as_chunks::<2>().0.iter().map(|entry| u16::from_le_bytes(*entry));
        let table: Box<[u16]> = table.collect();
        let highest = table.iter().copied().fold(unclassified, u16::max);
        if highest >= pairs || !(1..=pairs).contains(&transmit) {
            return None;
        }
        self.active_pairs = transmit.max(highest.saturating_add(1));
        self.hash.set(Some(hash.clone()));
        self.rss = Some(Rss { hash, table, unclassified });
        Some(Some(Action::Rss(self.active_pairs)))
    }

    pub(super) fn set_hash(&mut self, data: &[u8]) -> Answer {
        // With RSS the hash that it uses is the one that is reported.
        if !self.has(features::HASH_REPORT) || self.has(features::RSS) {
            return None;
        }
        let (kinds, rest) = le32(data)?;
        let (_reserved, rest) = rest.split_first_chunk::<8>()?;
        self.hash.set(Some(hash(kinds, rest)?));
        DONE
    }
}

/// A hash of these kinds with the key that `data` is: its length, then so many bytes.
fn hash(kinds: u32, data: &[u8]) -> Option<ReceiveHash> {
    let (len, key) = data.split_first()?;
    ReceiveHash::new(key, kinds).filter(|_| usize::from(*len) == key.len())
}

fn le16(data: &[u8]) -> Option<(u16, &[u8])> {
    let (bytes, rest) = data.split_first_chunk()?;
    Some((u16::from_le_bytes(*bytes), rest))
}

fn le32(data: &[u8]) -> Option<(u32, &[u8])> {
    let (bytes, rest) = data.split_first_chunk()?;
    Some((u32::from_le_bytes(*bytes), rest))
}

#[cfg(test)]
mod tests;
