//! Memory that outlives the process: one page for the record of each ring.
//!
//! ```text
//!   0         8                64                                4096
//!   │ place   │ owner's words  │ bytes written, u32 for each chain │
//! ```
//!
//! **Trust.** The file is ours alone, but what a predecessor left in it is checked where it is
//! used: it may be of another version, or cut short by a full disk.
//! **Limits.** [`RECORD_LENS`] lengths; chains beyond count as nothing written.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::{FileOffset, MmapRegion};

use super::word::RingMem;
use super::{Word, copy_private};
use crate::shared::Shared;

/// Bytes of one ring's record.
pub const RECORD_BYTES: usize = 4096;
/// Words at the start of a page: the place, and those of the page's owner.
const WORDS: usize = 8;
/// Lengths that a page has room for.
pub(crate) const RECORD_LENS: usize = 1008;

const LENS_AT: usize = WORDS * 8;
const _: () = assert!(LENS_AT + RECORD_LENS * 4 == RECORD_BYTES);

/// A file of records, mapped: page 0 is its owner's, then one page for each ring.
#[derive(Clone)]
pub struct RecordMap(Arc<MmapRegion>);

impl RecordMap {
    /// Maps `pages` pages of `file`, which has them (a file with holes, on a full disk, would end
    /// the process at the first store).
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn from_file(file: File, pages: usize) -> io::Result<Self> {
        let bytes = pages.saturating_mul(RECORD_BYTES);
        let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes);
        region.map(|region| Self(Arc::new(region))).map_err(io::Error::other)
    }

    /// Pages that end with the process: for tests, and for positions that only it needs.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn private(pages: usize) -> io::Result<Self> {
        let region = MmapRegion::new(pages.saturating_mul(RECORD_BYTES));
        region.map(|region| Self(Arc::new(region))).map_err(io::Error::other)
    }

    /// A page.
    pub fn page(&self, index: usize) -> Option<RecordPage> {
        let at = index.saturating_mul(RECORD_BYTES);
        let inside = at.saturating_add(RECORD_BYTES) <= self.0.size();
        let mem = RingMem { ptr: self.0.as_ptr().wrapping_add(at) };
        inside.then(|| RecordPage { mem, _map: self.clone() })
    }
}

impl fmt::Debug for RecordMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordMap({} B)", self.0.size())
    }
}

/// One page of a [`RecordMap`]. Invariant: it lies in the map, aligned to 8.
#[derive(Clone)]
pub struct RecordPage {
    mem: RingMem,
    _map: RecordMap,
}

// SAFETY: the pointer is as good in every thread, and words are only accessed atomically; the
// lengths are written by the queue that has the page, and read by who resumes after its end.
unsafe impl Send for RecordPage {}
// SAFETY: as above.
unsafe impl Sync for RecordPage {}

impl RecordPage {
    /// The owner's word `index`, 1 to 7; others are zero.
    pub fn get(&self, index: usize) -> u64 {
        if (1..WORDS).contains(&index) { self.word(index).load(Relaxed) } else { 0 }
    }

    /// Sets the owner's word `index`, 1 to 7; others stay.
    pub fn set(&self, index: usize, value: u64) {
        if (1..WORDS).contains(&index) {
            self.word(index).store(value, Relaxed);
        }
    }

    /// Where the device is.
    #[inline(always)]
    pub(crate) fn place(&self) -> Word<'_, u64> {
        self.word(0)
    }

    #[inline(always)]
    fn word(&self, index: usize) -> Word<'_, u64> {
        // SAFETY: one of the words at the start of the page, which the map keeps mapped.
        unsafe { self.mem.word((index % WORDS).wrapping_mul(8)) }
    }

    /// Writes the lengths from the first one on, as many as there is room for.
    #[inline(always)]
    pub(crate) fn write_lens(&self, lens: &[u32]) {
        super::word::crash_point();
        let count = lens.len().min(RECORD_LENS);
        let to = self.mem.ptr.wrapping_add(LENS_AT);
        // SAFETY: the lengths fit behind the words; nobody else has the page while a queue does,
        // and the slice is private memory.
        unsafe { copy_private(lens.as_ptr().cast(), to, count.wrapping_mul(4)) }
    }

    /// Length `index`; none beyond the room.
    pub(crate) fn len_at(&self, index: usize) -> u32 {
        if index >= RECORD_LENS {
            return 0;
        }
        // SAFETY: one of the lengths behind the words.
        let len: Word<'_, u32> =
            unsafe { self.mem.word(LENS_AT.wrapping_add(index.wrapping_mul(4))) };
        len.load(Relaxed)
    }
}

impl fmt::Debug for RecordPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordPage({:#x})", self.place().load(Relaxed))
    }
}
