//! The front end's in-flight regions: words in a file that it keeps while the back end is away.
//!
//! **Trust.** The front end may write every byte at any time: whatever is read here is checked
//! where it is used. A file that is cut short is noticed by [`super::guard`].

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release};

use super::guard::Watch;
use super::kept::Kept;
use super::word::RingMem;
use super::{SharedMap, Word};
use crate::shared::Shared;

/// What parts of an in-flight file are aligned to.
const ALIGN: u64 = 64;

/// The in-flight region of one ring. Invariant: `bytes` bytes from `mem` on are mapped while `_map`
/// lives, aligned to 8.
#[derive(Clone)]
pub struct InflightArea {
    mem: RingMem,
    bytes: usize,
    watch: Arc<Watch>,
    _map: SharedMap,
}

// SAFETY: the pointer is as good in every thread, and words are only accessed atomically.
unsafe impl Send for InflightArea {}
// SAFETY: as above.
unsafe impl Sync for InflightArea {}

impl InflightArea {
    /// Maps `bytes` bytes of `file` from `offset` on.
    ///
    /// # Errors
    ///
    /// If the file is shorter than that or has huge pages, the offset is not a multiple of 64, or
    /// the kernel does not map it.
    pub fn from_file(file: File, offset: u64, bytes: usize) -> io::Result<Self> {
        if !offset.is_multiple_of(ALIGN) {
            let what = format!("a region at {offset}, which is no multiple of {ALIGN}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let Kept { map, watch, skip } = Kept::map(file, offset, bytes)?;
        let mem = RingMem { ptr: map.as_ptr().wrapping_add(skip) };
        Ok(Self { mem, bytes, watch, _map: map })
    }

    /// The part of `bytes` bytes at `offset`; none if it is not inside, or not aligned.
    pub fn part(&self, offset: usize, bytes: usize) -> Option<Self> {
        let inside = offset.saturating_add(bytes) <= self.bytes && offset.is_multiple_of(8);
        let mem = RingMem { ptr: self.mem.ptr.wrapping_add(offset) };
        inside.then(|| Self { mem, bytes, ..self.clone() })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether its file was cut short.
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    #[inline(always)]
    fn word16(&self, at: usize) -> Option<Word<'_, u16>> {
        let inside = at.saturating_add(2) <= self.bytes && at.is_multiple_of(2);
        // SAFETY: inside of the region, aligned to its size.
        inside.then(|| unsafe { self.mem.word(at) })
    }

    #[inline(always)]
    fn word64(&self, at: usize) -> Option<Word<'_, u64>> {
        let inside = at.saturating_add(8) <= self.bytes && at.is_multiple_of(8);
        // SAFETY: inside of the region, aligned to its size.
        inside.then(|| unsafe { self.mem.word(at) })
    }

    /// The 16 bits at `at`; zero outside.
    #[inline(always)]
    pub(crate) fn get16(&self, at: usize) -> u16 {
        self.word16(at).map_or(0, |word| word.load(Relaxed))
    }

    /// The 64 bits at `at`; zero outside.
    #[inline(always)]
    pub(crate) fn get64(&self, at: usize) -> u64 {
        self.word64(at).map_or(0, |word| word.load(Relaxed))
    }

    /// Stores 16 bits.
    #[inline(always)]
    pub(crate) fn put16(&self, at: usize, value: u16) {
        if let Some(word) = self.word16(at) {
            // ORDERING: release: a successor that finds us dead sees stores in their order.
            word.store(value, Release);
        }
    }

    /// Stores 64 bits.
    #[inline(always)]
    pub(crate) fn put64(&self, at: usize, value: u64) {
        if let Some(word) = self.word64(at) {
            // ORDERING: as in `put16`.
            word.store(value, Release);
        }
    }
}

impl fmt::Debug for InflightArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InflightArea({} B)", self.bytes)
    }
}
