//! The Internet sum (RFC 1071) of bytes that pass: one look at them instead of two.
//!
//! ```text
//!  16 bits each:  word - 2^15 (as the sign), in pairs ─► 32 bits ─► four sums of 8 or 16 lanes
//!  portable:      32 bits each ─► 64 bits ─► sixteen lanes
//! ```
//!
//! **Trust.** What is summed is what is copied on: both come from one read, into registers or a
//! private block. Where source and destination overlap, which only a guest that maps its
//! neighbour's memory can bring about, what arrives is not what a `memmove` would have moved: that
//! guest's loss.
//! **Units.** Sums are folded to 16 bits, as if the first byte were at an even place.

use super::copy_private;

#[cfg(target_arch = "x86_64")]
mod wider;

/// Bytes of a block of the portable way.
const BLOCK: usize = 64;

/// Sums `len` bytes from `src`.
///
/// # Safety
///
/// `src` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn look(src: *const u8, len: usize) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if wider::can() {
        // SAFETY: the CPU has AVX-512; the caller's range.
        return unsafe { wider::look(src, len) };
    }
    // SAFETY: the caller's range; nothing is written.
    unsafe { pass::<false>((src, std::ptr::null_mut()), len) }
}

/// Copies `len` bytes, and sums them.
///
/// # Safety
///
/// `src` and `dst` must be valid for `len` bytes of mapped memory.
#[inline(always)]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) -> u16 {
    // SAFETY: the caller's ranges.
    unsafe { pass::<true>((src, dst), len) }
}

/// Sums `len` bytes from `src`, and with `COPIES` writes them to `dst`.
///
/// # Safety
///
/// `src`, and with `COPIES` `dst`, must be valid for `len` bytes of mapped memory.
#[inline(always)]
unsafe fn pass<const COPIES: bool>((src, dst): (*const u8, *mut u8), len: usize) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2; the caller's ranges.
        return unsafe { wide::pass::<COPIES>((src, dst), len) };
    }
    // SAFETY: the caller's ranges.
    unsafe { portable::<COPIES>((src, dst), len) }
}

/// [`pass`] on any CPU.
///
/// # Safety
///
/// As [`pass`].
unsafe fn portable<const COPIES: bool>((src, dst): (*const u8, *mut u8), len: usize) -> u16 {
    // 2^32 words fit into a lane.
    let mut lanes = [0u64; BLOCK / 4];
    let mut at = 0;
    while len.wrapping_sub(at) >= BLOCK {
        // SAFETY: a whole block is left of the caller's ranges.
        let block = unsafe { one::<BLOCK, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        // Words that become wider are what the compiler knows to do in vectors.
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane = lane.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
        }
        at = at.wrapping_add(BLOCK);
    }
    let (src, dst) = (src.wrapping_add(at), dst.wrapping_add(at));
    // SAFETY: what is left of the caller's ranges.
    let rest = unsafe { rest::<COPIES>((src, dst), len.wrapping_sub(at)) };
    fold(lanes.iter().fold(rest, |sum, lane| sum.wrapping_add(halves(*lane))))
}

/// The sum of less than a block, not folded.
///
/// # Safety
///
/// As [`pass`].
#[inline(always)]
unsafe fn rest<const COPIES: bool>((src, dst): (*const u8, *mut u8), len: usize) -> u64 {
    let (mut sum, mut at) = (0u64, 0usize);
    while len.wrapping_sub(at) >= 8 {
        // SAFETY: eight bytes are left of the caller's ranges.
        let word = unsafe { one::<8, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        sum = sum.wrapping_add(halves(u64::from_ne_bytes(word)));
        at = at.wrapping_add(8);
    }
    if len & 4 != 0 {
        // SAFETY: four bytes are left.
        let word = unsafe { one::<4, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        sum = sum.wrapping_add(u64::from(u32::from_ne_bytes(word)));
        at = at.wrapping_add(4);
    }
    if len & 2 != 0 {
        // SAFETY: two bytes are left.
        let word = unsafe { one::<2, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        sum = sum.wrapping_add(u64::from(u16::from_ne_bytes(word)));
        at = at.wrapping_add(2);
    }
    if len & 1 != 0 {
        // SAFETY: a byte is left.
        let [byte] = unsafe { one::<1, COPIES>(src.wrapping_add(at), dst.wrapping_add(at)) };
        sum = sum.wrapping_add(u64::from(u16::from_ne_bytes([byte, 0])));
    }
    sum
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

/// A sum of 64 bits in 33.
#[inline(always)]
fn halves(sum: u64) -> u64 {
    (sum & 0xffff_ffff).wrapping_add(sum >> 32)
}

/// The sum of words in the machine's order in 16 bits, as a number: sums are the same in either
/// order of bytes, but for the order of their own.
#[inline(always)]
fn fold(sum: u64) -> u16 {
    // The upper half of a word and its turned self: both halves, and what came in from below.
    let half = u32::try_from(sum.wrapping_add(sum.rotate_left(32)) >> 32).unwrap_or(u32::MAX);
    let sum = half.wrapping_add(half.rotate_left(16)) >> 16;
    u16::from_be(u16::try_from(sum).unwrap_or(u16::MAX))
}

/// With AVX2: 32 bytes in three steps, half of what it takes to make words wider.
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_shuffle_epi32, _mm256_add_epi32,
        _mm256_castsi256_si128, _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_madd_epi16,
        _mm256_set1_epi16, _mm256_setzero_si256, _mm256_storeu_si256, _mm256_xor_si256,
    };

    use super::{fold, rest};

    /// Bytes of a vector, and of the vectors of a step: each has a sum, so that none waits.
    const VECTOR: usize = 32;
    const STEP: usize = 4 * VECTOR;
    /// Steps after which lanes of 32 bits are emptied: each adds at most 2^16 to the size of each,
    /// and so do three vectors more. All lanes together fit into 32 bits, too.
    const STEPS: usize = 1000;
    const _: () = assert!((STEPS * 4 + 3) * 8 * (1 << 16) < 1 << 31);

    /// See [`super::pass`].
    ///
    /// # Safety
    ///
    /// As [`super::pass`]; the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn pass<const COPIES: bool>(
        (src, dst): (*const u8, *mut u8),
        len: usize,
    ) -> u16 {
        let (mut total, mut at) = (0i64, 0usize);
        loop {
            let mut sums = [_mm256_setzero_si256(); 4];
            let end = at.wrapping_add(len.wrapping_sub(at).min(STEPS.wrapping_mul(STEP)));
            while end.wrapping_sub(at) >= STEP {
                for sum in &mut sums {
                    let (from, to) = (src.wrapping_add(at), dst.wrapping_add(at));
                    // SAFETY: a vector is left of the caller's ranges.
                    *sum = _mm256_add_epi32(*sum, unsafe { one::<COPIES>(from, to) });
                    at = at.wrapping_add(VECTOR);
                }
            }
            while end.wrapping_sub(at) >= VECTOR {
                let (from, to) = (src.wrapping_add(at), dst.wrapping_add(at));
                let [sum, ..] = &mut sums;
                // SAFETY: as above.
                *sum = _mm256_add_epi32(*sum, unsafe { one::<COPIES>(from, to) });
                at = at.wrapping_add(VECTOR);
            }
            let [a, b, c, d] = sums;
            let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            total = total.wrapping_add(i64::from(lanes(sum)));
            if len.wrapping_sub(at) < VECTOR {
                break;
            }
        }
        // Each word was 2^15 less.
        let words = i64::try_from(at / 2).unwrap_or(0);
        let sum = total.wrapping_add(words.wrapping_mul(1 << 15)).cast_unsigned();
        let (src, dst) = (src.wrapping_add(at), dst.wrapping_add(at));
        // SAFETY: what is left of the caller's ranges.
        let rest = unsafe { rest::<COPIES>((src, dst), len.wrapping_sub(at)) };
        fold(sum.wrapping_add(rest))
    }

    /// The sums of pairs of words, each 2^15 less: as numbers with a sign they fit into 16 bits.
    ///
    /// # Safety
    ///
    /// As [`super::pass`], of 32 bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn one<const COPIES: bool>(src: *const u8, dst: *mut u8) -> __m256i {
        // SAFETY: the caller's range, at any place.
        let words = unsafe { _mm256_loadu_si256(src.cast()) };
        if COPIES {
            // SAFETY: as above, of the other range.
            unsafe { _mm256_storeu_si256(dst.cast(), words) };
        }
        let less = _mm256_xor_si256(words, _mm256_set1_epi16(i16::MIN));
        _mm256_madd_epi16(less, _mm256_set1_epi16(1))
    }

    /// The sum of all lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn lanes(sum: __m256i) -> i32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b_00_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b_01>(two)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![expect(clippy::arithmetic_side_effects, reason = "tests")]

    use super::{copy, look, portable};

    /// As RFC 1071 says it: bytes in pairs, folded at every step.
    pub(in crate::mem) fn plain(bytes: &[u8]) -> u16 {
        bytes.chunks(2).fold(0u16, |sum, pair| {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            let (sum, carry) = sum.overflowing_add(word);
            sum + u16::from(carry)
        })
    }

    /// Checks all ways of summing `bytes`, and what they copy.
    fn check(bytes: &[u8]) {
        let (len, from) = (bytes.len(), bytes.as_ptr());
        let wanted = plain(bytes);
        let (mut one, mut other) = (vec![9; len + 1], vec![9; len + 1]);
        // SAFETY: `bytes` has `len` bytes.
        assert_eq!(unsafe { look(from, len) }, wanted, "{len} bytes, seen");
        // SAFETY: as above, and so has where they go.
        assert_eq!(unsafe { copy(from, one.as_mut_ptr(), len) }, wanted, "{len} bytes, copied");
        // SAFETY: as above.
        let portable = unsafe { portable::<true>((from, other.as_mut_ptr()), len) };
        assert_eq!(portable, wanted, "{len} bytes, on any CPU");
        assert!(one == other && one[..len] == *bytes && one[len] == 9);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2; `bytes` has `len` bytes.
            let wide = unsafe { super::wide::pass::<false>((from, std::ptr::null_mut()), len) };
            assert_eq!(wide, wanted, "{len} bytes, seen with AVX2");
        }
    }

    #[test]
    fn all_ways_give_the_sum_of_all_lengths_at_all_places() {
        let bytes: Vec<u8> = (0..2500).map(|i: u32| (i * i * 7 + i / 3).to_le_bytes()[0]).collect();
        for len in (0..400).chain([1448, 1999, 2000, 2400]) {
            for start in [0, 1, 2, 7, 31, 63] {
                check(&bytes[start..start + len]);
            }
        }
    }

    /// The largest and the smallest sums of lanes, over more than one emptying of them.
    #[test]
    fn lanes_do_not_overflow() {
        for byte in [0xff, 0x80, 0x7f, 0] {
            check(&vec![byte; (5 << 20) + 77]);
        }
    }

    #[test]
    fn any_bytes_have_one_sum() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..400 {
            let words = next() % 600;
            let mut bytes: Vec<u8> = (0..words).flat_map(|_| next().to_ne_bytes()).collect();
            bytes.truncate(bytes.len().saturating_sub((next() % 8) as usize));
            check(&bytes);
        }
    }
}
