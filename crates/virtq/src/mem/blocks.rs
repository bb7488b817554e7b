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
pub type Block = [u32; BLOCK / 4];

/// Who sees blocks go by: what it makes of one more.
pub trait Fold<S>: Fn(S, &Block) -> S {}
impl<S, F: Fn(S, &Block) -> S> Fold<S> for F {}

/// Shows `len` bytes from `src` to `fold`, block by block; returns what became of `state`.
///
/// # Safety
///
/// `src` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn look<S>(src: *const u8, len: usize, state: S, fold: impl Fold<S>) -> S {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller's range.
        return unsafe { look_wide(src, len, state, fold) };
    }
    // SAFETY: the caller's range.
    unsafe { look_plain(src, len, state, fold) }
}

/// As [`look`], in vectors of 32 bytes.
///
/// # Safety
///
/// As [`look`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn look_wide<S>(src: *const u8, len: usize, state: S, fold: impl Fold<S>) -> S {
    // SAFETY: the caller's range.
    unsafe { look_plain(src, len, state, fold) }
}

/// As [`look`], in vectors that every CPU of this kind has.
///
/// # Safety
///
/// As [`look`].
#[inline(always)]
unsafe fn look_plain<S>(src: *const u8, len: usize, mut state: S, fold: impl Fold<S>) -> S {
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        let mut block = Block::default();
        // SAFETY: a whole block is left of the caller's range; the block is private.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), BLOCK) };
        state = fold(state, &block);
        at = at.wrapping_add(BLOCK);
    }
    let rest = len.wrapping_sub(at);
    if rest > 0 {
        let mut block = Block::default();
        // SAFETY: the rest of the caller's range, less than a block.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), rest) };
        state = fold(state, &block);
    }
    state
}

/// Copies `len` bytes, and shows them to `fold`, block by block; returns what became of `state`.
///
/// # Safety
///
/// `src` and `dst` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn copy<S>(
    (src, dst): (*const u8, *mut u8),
    len: usize,
    state: S,
    fold: impl Fold<S>,
) -> S {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller's ranges.
        return unsafe { copy_wide((src, dst), len, state, fold) };
    }
    // SAFETY: the caller's ranges.
    unsafe { copy_plain((src, dst), len, state, fold) }
}

/// As [`copy`], in vectors of 32 bytes.
///
/// # Safety
///
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_wide<S>(
    ranges: (*const u8, *mut u8),
    len: usize,
    state: S,
    fold: impl Fold<S>,
) -> S {
    // SAFETY: the caller's ranges.
    unsafe { copy_plain(ranges, len, state, fold) }
}

/// As [`copy`], in vectors that every CPU of this kind has.
///
/// # Safety
///
/// As [`copy`].
#[inline(always)]
unsafe fn copy_plain<S>(
    (src, dst): (*const u8, *mut u8),
    len: usize,
    mut state: S,
    fold: impl Fold<S>,
) -> S {
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        let mut block = Block::default();
        // SAFETY: a whole block is left of the caller's range; the block is private.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), BLOCK) };
        // SAFETY: as above, of the other range.
        unsafe { copy_private(block.as_ptr().cast(), dst.wrapping_add(at), BLOCK) };
        state = fold(state, &block);
        at = at.wrapping_add(BLOCK);
    }
    let rest = len.wrapping_sub(at);
    if rest > 0 {
        let mut block = Block::default();
        // SAFETY: the rest of the caller's range, less than a block.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), rest) };
        // SAFETY: as above, of the other range.
        unsafe { copy_private(block.as_ptr().cast(), dst.wrapping_add(at), rest) };
        state = fold(state, &block);
    }
    state
}

#[cfg(test)]
mod tests {
    use super::{Block, copy, copy_plain, look, look_plain};

    /// Tells blocks apart by what is in them and by their order.
    fn fold(state: u64, block: &Block) -> u64 {
        block.iter().fold(state, |sum, word| sum.rotate_left(5).wrapping_add(u64::from(*word)))
    }

    #[test]
    fn the_same_bytes_pass_whatever_the_cpu_can() {
        let bytes: Vec<u8> = (0..2000).map(|i: u32| (i * 7).to_le_bytes()[0]).collect();
        for len in (0..300).chain([1448, 1999, 2000]) {
            let (mut one, mut other) = (vec![9; 2001], vec![9; 2001]);
            // SAFETY: `bytes` has `len` bytes.
            let looked = unsafe { look(bytes.as_ptr(), len, 1, fold) };
            // SAFETY: as above.
            assert_eq!(unsafe { look_plain(bytes.as_ptr(), len, 1, fold) }, looked);
            let (one_ptr, other_ptr) = (one.as_mut_ptr(), other.as_mut_ptr());
            // SAFETY: as above, and so has where they go.
            assert_eq!(unsafe { copy((bytes.as_ptr(), one_ptr), len, 1, fold) }, looked);
            // SAFETY: as above.
            assert_eq!(unsafe { copy_plain((bytes.as_ptr(), other_ptr), len, 1, fold) }, looked);
            assert!(
                one == other && one[..len] == bytes[..len] && one[len..].iter().all(|b| *b == 9)
            );
        }
    }
}
