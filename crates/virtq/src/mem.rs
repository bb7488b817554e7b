//! Guest memory: the one place that touches bytes which somebody else may write at any time.
//!
//! ```text
//!  GuestMemoryBackend (any VMM's) ──► GuestMap: [gpa, len, host] sorted, keeps the memory mapped
//!                                        │ resolve(gpa, len)
//!                                        ▼
//!                                     RawSeg  ──► Readable<'a> / Writable<'a> ──► Reader / Writer
//! ```
//!
//! **Trust.** Every byte behind a segment is hostile and may change between two reads. Addresses
//! and lengths were checked against the map before a segment exists, and come from private copies.
//! **Limits.** A segment is at most `u32::MAX` bytes; a map has at most [`MAX_REGIONS`] regions.
//! A peer may shorten the file behind it: see [`guard`].
//! **Not supported.** Dirty bitmaps of `vm-memory` regions are not marked.
#![expect(unsafe_code, reason = "the crate's only module that dereferences guest memory")]

mod dirty;
#[cfg(feature = "driver")]
mod driver_words;
mod gather;
pub mod guard;
mod inflight;
mod kept;
mod map;
mod piece;
mod pool;
mod record;
mod rings;
mod segs;
mod shared;
mod sum;
mod userfault;
mod word;

pub use dirty::{DirtyLog, LOG_PAGE};
#[cfg(feature = "driver")]
pub(crate) use driver_words::DriverWords;
pub use gather::{Gather, GatherBuf};
pub use inflight::InflightArea;
pub use map::{GuestMap, GuestPhysAddr, MAX_REGIONS, MapError};
pub(crate) use map::{Hit, HostRange, Simple};
pub use piece::{ReadPiece, WritePiece};
pub use pool::Pool;
pub use record::{RECORD_BYTES, RecordMap, RecordPage};
pub(crate) use rings::{PackedAreas, RawDesc, SplitAreas};
pub(crate) use segs::RawSeg;
pub use segs::{Readable, Reader, SegSpan, SegStore, Writable, Writer};
pub use shared::{SharedMap, SharedSlots};
pub use userfault::Userfault;
pub(crate) use word::Word;
#[cfg(test)]
pub(crate) use word::crash;

// Offsets into a region are cast from u64 to usize.
const _: () = assert!(size_of::<usize>() == size_of::<u64>());

/// Copies `len` bytes that may overlap, may be written concurrently and may live in two guests.
///
/// Two ports may map one file, so even buffers of different ports can alias: the copy is defined
/// for every overlap (`memmove`). A racing writer can only change which bytes arrive.
///
/// # Safety
///
/// `src` and `dst` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(crate) unsafe fn copy_guest(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller keeps both ranges mapped; `copy` allows overlap, and contents are plain
    // bytes of which every value is valid.
    unsafe { std::ptr::copy(src, dst, len) }
}

/// Copies `len` bytes between guest memory and private memory, which never overlap. Short lengths,
/// the heads of frames, are two blocks that may share their middle: no call, no loop.
///
/// # Safety
///
/// As [`copy_guest`]; one of the ranges is private memory that no guest can map.
#[inline(always)]
pub(crate) unsafe fn copy_private(src: *const u8, dst: *mut u8, len: usize) {
    match len {
        32..=64 => {
            // SAFETY: the caller's ranges; the length is one to two blocks.
            unsafe { copy_ends::<32>(src, dst, len) }
        }
        65..=128 => {
            // SAFETY: as above.
            unsafe { copy_ends::<64>(src, dst, len) }
        }
        _ => {
            // SAFETY: as above, of any length.
            unsafe { std::ptr::copy_nonoverlapping(src, dst, len) }
        }
    }
}

/// Copies `len` bytes, `N` to `2 * N`, as a first and a last block.
///
/// # Safety
///
/// As [`copy_private`]; `len` is at least `N` and at most `2 * N`.
#[inline(always)]
unsafe fn copy_ends<const N: usize>(src: *const u8, dst: *mut u8, len: usize) {
    let last = len.wrapping_sub(N);
    // SAFETY: `N` bytes are within `len`, in both ranges.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, N) };
    let (src, dst) = (src.wrapping_add(last), dst.wrapping_add(last));
    // SAFETY: as above, `N` bytes that end at `len`.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, N) };
}

/// Asks the CPU to load the line at `ptr` for reading. Never faults, whatever `ptr` is.
#[inline(always)]
pub(crate) fn prefetch_read(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that does not fault and has no visible effect.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Asks the CPU for the line at `ptr` in a writable state. Never faults, whatever `ptr` is.
#[inline(always)]
pub(crate) fn prefetch_write(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that does not fault and has no visible effect.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(ptr.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}
