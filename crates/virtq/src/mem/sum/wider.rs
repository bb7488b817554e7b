//! With AVX-512: 64 bytes in three steps, and what is left in the same three. Only for bytes that
//! are looked at: a copy of them is not faster than with AVX2, since the stores take the time.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m512i, _mm512_add_epi32, _mm512_loadu_si512, _mm512_madd_epi16, _mm512_maskz_loadu_epi8,
    _mm512_reduce_add_epi32, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_xor_si512,
};

use super::fold;

/// Bytes of a vector, and of the vectors of a step: each has a sum, so that none waits.
const VECTOR: usize = 64;
const STEP: usize = 4 * VECTOR;
/// Steps after which lanes of 32 bits are emptied: each adds at most 2^16 to the size of each, and
/// so do four vectors more. All lanes together fit into 32 bits, too.
const STEPS: usize = 500;
const _: () = assert!((STEPS * 4 + 4) * 16 * (1 << 16) < 1 << 31);
/// Words of a vector.
const WORDS: i64 = 32;

/// Whether this CPU has AVX-512 of the kind that does not make its neighbours slow: those that
/// have only the first of its parts lower their clock for it.
#[inline(always)]
pub(super) fn can() -> bool {
    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi2")
}

/// See [`super::look`].
///
/// # Safety
///
/// As [`super::look`]; the CPU has AVX-512 ([`can`]).
#[target_feature(enable = "avx512bw")]
pub(super) unsafe fn look(src: *const u8, len: usize) -> u16 {
    let (mut total, mut at) = (0i64, 0usize);
    loop {
        let mut sums = [_mm512_setzero_si512(); 4];
        let end = at.wrapping_add(len.wrapping_sub(at).min(STEPS.wrapping_mul(STEP)));
        while end.wrapping_sub(at) >= STEP {
            for sum in &mut sums {
                // SAFETY: a vector is left of the caller's range, at any place.
                let words = unsafe { _mm512_loadu_si512(src.wrapping_add(at).cast()) };
                *sum = _mm512_add_epi32(*sum, pairs(words));
                at = at.wrapping_add(VECTOR);
            }
        }
        let [mut sum, b, c, d] = sums;
        while end.wrapping_sub(at) >= VECTOR {
            // SAFETY: as above.
            let words = unsafe { _mm512_loadu_si512(src.wrapping_add(at).cast()) };
            sum = _mm512_add_epi32(sum, pairs(words));
            at = at.wrapping_add(VECTOR);
        }
        if at < end {
            let mask = !(u64::MAX << (end.wrapping_sub(at) & 63));
            // SAFETY: so much is left of the caller's range; what the mask leaves out is not read.
            let words = unsafe { _mm512_maskz_loadu_epi8(mask, src.wrapping_add(at).cast()) };
            sum = _mm512_add_epi32(sum, pairs(words));
            at = end;
        }
        sum = _mm512_add_epi32(_mm512_add_epi32(sum, b), _mm512_add_epi32(c, d));
        total = total.wrapping_add(i64::from(_mm512_reduce_add_epi32(sum)));
        if at == len {
            break;
        }
    }
    // Each word was 2^15 less, and so were those that the last vector did not have.
    let vectors = i64::try_from(len.div_ceil(VECTOR)).unwrap_or(0);
    fold(total.wrapping_add(vectors.wrapping_mul(WORDS << 15)).cast_unsigned())
}

/// The sums of pairs of words, each 2^15 less: as numbers with a sign they fit into 16 bits.
#[inline]
#[target_feature(enable = "avx512bw")]
fn pairs(words: __m512i) -> __m512i {
    let less = _mm512_xor_si512(words, _mm512_set1_epi16(i16::MIN));
    _mm512_madd_epi16(less, _mm512_set1_epi16(1))
}
