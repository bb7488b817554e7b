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

/// Who sees what passes: all whole blocks, and then words. It is made, and ends, where the loop is:
/// handed through memory it would cost more than a short frame.
pub trait Passing: Default {
    /// What becomes of it.
    type Result;

    /// One more block.
    #[must_use]
    fn block(self, block: &Block) -> Self;

    /// One more word in the machine's order; the last one is filled up with zeros.
    #[must_use]
    fn word(self, word: u64) -> Self;

    /// All has passed.
    fn end(self) -> Self::Result;
}

/// Shows `len` bytes from `src` to a new `P`.
///
/// # Safety
///
/// `src` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn look<P: Passing>(src: *const u8, len: usize) -> P::Result {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller's range.
        return unsafe { look_wide::<P>(src, len) };
    }
    // SAFETY: the caller's range.
    unsafe { pass::<P, false>((src, std::ptr::null_mut()), len) }
}

/// As [`look`], in vectors of 32 bytes.
///
/// # Safety
///
/// As [`look`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn look_wide<P: Passing>(src: *const u8, len: usize) -> P::Result {
    // SAFETY: the caller's range.
    unsafe { pass::<P, false>((src, std::ptr::null_mut()), len) }
}

/// Copies `len` bytes, and shows them to a new `P`.
///
/// # Safety
///
/// `src` and `dst` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn copy<P: Passing>(src: *const u8, dst: *mut u8, len: usize) -> P::Result {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller's ranges.
        return unsafe { copy_wide::<P>(src, dst, len) };
    }
    // SAFETY: the caller's ranges.
    unsafe { pass::<P, true>((src, dst), len) }
}

/// As [`copy`], in vectors of 32 bytes.
///
/// # Safety
///
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_wide<P: Passing>(src: *const u8, dst: *mut u8, len: usize) -> P::Result {
    // SAFETY: the caller's ranges.
    unsafe { pass::<P, true>((src, dst), len) }
}

/// Shows `len` bytes from `src`, in vectors as the caller has them, and with `COPIES` writes them
/// to `dst`.
///
/// # Safety
///
/// `src`, and with `COPIES` `dst`, must be valid for `len` bytes of mapped memory.
#[inline(always)]
unsafe fn pass<P: Passing, const COPIES: bool>(
    (src, dst): (*const u8, *mut u8),
    len: usize,
) -> P::Result {
    let mut passing = P::default();
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        let mut block = Block::default();
        // SAFETY: a whole block is left of the caller's range; the block is private.
        unsafe { copy_private(src.wrapping_add(at), block.as_mut_ptr().cast(), BLOCK) };
        if COPIES {
            // SAFETY: as above, of the other range.
            unsafe { copy_private(block.as_ptr().cast(), dst.wrapping_add(at), BLOCK) };
        }
        passing = passing.block(&block);
        at = at.wrapping_add(BLOCK);
    }
    while len.wrapping_sub(at) >= 8 {
        // SAFETY: eight bytes are left of the caller's ranges.
        let word = unsafe { one::<8, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        passing = passing.word(u64::from_ne_bytes(word));
        at = at.wrapping_add(8);
    }
    let mut last = [0; 8];
    for place in &mut last {
        if at >= len {
            break;
        }
        // SAFETY: a byte is left of the caller's ranges.
        let [byte] = unsafe { one::<1, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        *place = byte;
        at = at.wrapping_add(1);
    }
    passing.word(u64::from_ne_bytes(last)).end()
}

/// Reads `N` bytes, and with `COPIES` writes them to `dst`.
///
/// # Safety
///
/// As [`pass`], of `N` bytes.
#[inline(always)]
unsafe fn one<const N: usize, const COPIES: bool>(src: *const u8, dst: *mut u8) -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: the caller's range; the bytes are private.
    unsafe { copy_private(src, bytes.as_mut_ptr(), N) };
    if COPIES {
        // SAFETY: as above, of the other range.
        unsafe { copy_private(bytes.as_ptr(), dst, N) };
    }
    bytes
}

/// Bytes as they passed, with zeros behind, for tests.
#[cfg(test)]
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen(pub(crate) Vec<u8>);

#[cfg(test)]
impl Passing for Seen {
    type Result = Vec<u8>;

    fn block(mut self, block: &Block) -> Self {
        self.0.extend(block.iter().flat_map(|word| word.to_ne_bytes()));
        self
    }

    fn word(mut self, word: u64) -> Self {
        self.0.extend(word.to_ne_bytes());
        self
    }

    fn end(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::{Seen, copy, look, pass};

    #[test]
    fn the_same_bytes_pass_whatever_the_cpu_can() {
        let bytes: Vec<u8> = (0..2000).map(|i: u32| (i * 7).to_le_bytes()[0] | 1).collect();
        for len in (0..300).chain([1448, 1999, 2000]) {
            let (mut one, mut other) = (vec![9; 2001], vec![9; 2001]);
            let from = bytes.as_ptr();
            // SAFETY: `bytes` has `len` bytes.
            let looked = unsafe { look::<Seen>(from, len) };
            assert!(looked[..len] == bytes[..len] && looked[len..].iter().all(|byte| *byte == 0));
            // SAFETY: as above, and so has where they go.
            assert_eq!(unsafe { copy::<Seen>(from, one.as_mut_ptr(), len) }, looked);
            // SAFETY: as above.
            assert_eq!(unsafe { pass::<Seen, true>((from, other.as_mut_ptr()), len) }, looked);
            assert!(one == other && one[..len] == bytes[..len]);
            assert!(one[len..].iter().all(|byte| *byte == 9));
        }
    }
}
