//! What passes, in blocks, for who sums it while it is copied: one pass over the bytes instead of
//! two.
//!
//! **Trust.** A block is a private copy; what is copied on is what was seen.
//! Where source and destination overlap, which only a guest that maps its neighbour's memory can
//! bring about, what arrives is not what a `memmove` would have moved: that guest's loss.

use super::copy_private;

/// Bytes of a block.
const BLOCK: usize = 64;

/// 64 bytes as words in the machine's order; zeros behind the last byte.
pub type Block = [u64; BLOCK / 8];

/// Shows `len` bytes from `src` to `seen`, block by block.
///
/// # Safety
///
/// `src` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn look(src: *const u8, len: usize, seen: &mut impl FnMut(&Block)) {
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        let mut block = Block::default();
        // SAFETY: a whole block is left of the caller's range; the block is private.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), BLOCK) };
        seen(&block);
        at = at.wrapping_add(BLOCK);
    }
    let rest = len.wrapping_sub(at);
    if rest > 0 {
        let mut block = Block::default();
        // SAFETY: the rest of the caller's range, less than a block.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), rest) };
        seen(&block);
    }
}

/// Copies `len` bytes, and shows them to `seen`, block by block.
///
/// # Safety
///
/// `src` and `dst` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize, seen: &mut impl FnMut(&Block)) {
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        let mut block = Block::default();
        // SAFETY: a whole block is left of the caller's range; the block is private.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), BLOCK) };
        // SAFETY: as above, of the other range.
        unsafe { copy_private(block.as_ptr().cast(), dst.wrapping_add(at), BLOCK) };
        seen(&block);
        at = at.wrapping_add(BLOCK);
    }
    let rest = len.wrapping_sub(at);
    if rest > 0 {
        let mut block = Block::default();
        // SAFETY: the rest of the caller's range, less than a block.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), rest) };
        // SAFETY: as above, of the other range.
        unsafe { copy_private(block.as_ptr().cast(), dst.wrapping_add(at), rest) };
        seen(&block);
    }
}
