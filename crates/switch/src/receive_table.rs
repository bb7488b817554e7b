//! A guest's own table: which receiveq the frames of a hash go to (`VIRTIO_NET_F_RSS`, virtio 1.3,
//! section 5.1.6.5.7).
//!
//! **Trust.** Key, table and kinds are the driver's: it can only mislead itself. A pair that is not
//! attached is never chosen.

use packet::ReceiveHash;

/// The most entries of a table.
const ENTRIES_MAX: usize = 1 << 15;

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveTable {
    hash: ReceiveHash,
    /// A power of two of them.
    pairs: Box<[u16]>,
    unclassified: u16,
}

/// A table that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The hash's low bits are the index.
    #[error("a table of {0} entries: a power of two up to {ENTRIES_MAX} is possible")]
    Entries(usize),
}

impl ReceiveTable {
    /// Frames go to the pair at the low bits of their hash, those that have no hash to
    /// `unclassified`.
    ///
    /// # Errors
    ///
    /// The table's length is no power of two, or larger than 32768.
    pub fn new(
        hash: ReceiveHash,
        pairs: impl Into<Box<[u16]>>,
        unclassified: u16,
    ) -> Result<Self, TableError> {
        let pairs = pairs.into();
        if !pairs.len().is_power_of_two() || pairs.len() > ENTRIES_MAX {
            return Err(TableError::Entries(pairs.len()));
        }
        Ok(Self { hash, pairs, unclassified })
    }

    /// The pair for the frame whose first bytes are `head`.
    #[inline]
    pub(crate) fn pair_of(&self, head: &[u8]) -> u16 {
        let Some((hash, _)) = self.hash.of(head) else { return self.unclassified };
        let index = hash as usize & self.pairs.len().wrapping_sub(1);
        self.pairs.get(index).copied().unwrap_or(self.unclassified)
    }
}

#[cfg(test)]
mod tests {
    use packet::{HashKind, ReceiveHash};

    use super::{ReceiveTable, TableError};

    #[test]
    fn tables_are_powers_of_two() {
        let hash = || ReceiveHash::new(&[1; 40], HashKind::ALL).unwrap();
        for len in [0, 3, 100, 1 << 16] {
            let error = ReceiveTable::new(hash(), vec![0; len], 0).unwrap_err();
            assert_eq!(error, TableError::Entries(len));
        }
        for len in [1, 2, 128, 1 << 15] {
            assert!(ReceiveTable::new(hash(), vec![0; len], 0).is_ok());
        }
    }

    #[test]
    fn what_has_no_hash_is_unclassified() {
        let hash = ReceiveHash::new(&[1; 40], 0).unwrap();
        let table = ReceiveTable::new(hash, [3, 4], 7).unwrap();
        assert_eq!(table.pair_of(&[0; 60]), 7);
    }
}
