//! The Internet checksum (RFC 1071).

/// Shorter pieces are summed word by word: that costs less than to begin and end with vectors.
const VECTORS_FROM: usize = 2 * BLOCK;
/// Bytes of a block of vectors.
const BLOCK: usize = 64;
const BLOCK_MASK: usize = BLOCK - 1;
/// Blocks whose halves of words have a sum of 32 bits, over all lanes.
const BLOCKS: usize = 4096;
const _: () = assert!(BLOCKS * (BLOCK / 4) * 0xffff <= 0xffff_ffff);

/// A sum in progress, over pieces of any length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checksum {
    /// Of words in the machine's order, turned once at the end: sums are the same in either order
    /// of bytes, but for the order of their own. What it cannot hold comes in again below.
    sum: u64,
    /// Whether an odd number of bytes was added.
    odd: bool,
}

impl Checksum {
    /// The sum of an even number of bytes that somebody else took.
    #[inline]
    pub fn of_part(sum: u16) -> Self {
        Self { sum: u64::from(sum.to_be()), odd: false }
    }

    /// Adds `bytes`.
    #[inline]
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if let (true, [first, rest @ ..]) = (self.odd, bytes) {
            self.sum = plus(self.sum, u64::from(u16::from_ne_bytes([0, *first])));
            self.odd = false;
            bytes = rest;
        }
        // Vectors and the rest do not wait for each other.
        let vectors = if bytes.len() >= VECTORS_FROM { bytes.len() & !BLOCK_MASK } else { 0 };
        let (blocks, rest) = bytes.split_at_checked(vectors).unwrap_or_default();
        let sum = plus(self.sum, sum_words(rest));
        self.sum = if vectors > 0 { plus(sum, sum_blocks(blocks.as_chunks().0)) } else { sum };
        self.odd = rest.len() & 1 == 1;
    }

    /// As [`Self::add`], best of no more than some dozen bytes, after an even number of bytes. A
    /// TCP header with a timestamp is one block.
    #[inline(always)]
    pub fn add_header(&mut self, header: &[u8]) {
        let (blocks, rest) = header.as_chunks::<32>();
        for block in blocks {
            for word in block.as_chunks().0 {
                self.sum = plus(self.sum, u64::from_ne_bytes(*word));
            }
        }
        self.sum = plus(self.sum, sum_words(rest));
        self.odd = rest.len() & 1 == 1;
    }

    /// Adds the sum of `len` bytes that somebody else took, as if the first were at an even place.
    #[inline]
    pub fn add_part(&mut self, sum: u16, len: u32) {
        // At an odd place every byte counts for the other half.
        let sum = if self.odd { sum.swap_bytes() } else { sum };
        self.add_u16(sum);
        self.odd ^= len & 1 == 1;
    }

    /// Adds a number of 16 bits as it stands in a header, after an even number of bytes.
    #[inline]
    pub fn add_u16(&mut self, value: u16) {
        self.sum = plus(self.sum, u64::from(value.to_be()));
    }

    /// Adds a number of 32 bits as it stands in a header, after an even number of bytes.
    #[inline]
    pub fn add_u32(&mut self, value: u32) {
        self.sum = plus(self.sum, u64::from(value.to_be()));
    }

    /// The folded sum of what was added: what the field of a partial checksum holds.
    #[inline]
    pub fn sum(self) -> u16 {
        u16::from_be(fold(self.sum))
    }

    /// The checksum of what was added: 0 if that contains its own right checksum.
    #[inline]
    pub fn finish(self) -> u16 {
        !self.sum()
    }

    /// As [`Self::finish`], but never 0, which means "no checksum" in UDP; for the sum, all ones is
    /// the same number. Not for TCP: there 0 is what others compute, and compare with.
    #[inline]
    pub fn finish_transport(self) -> u16 {
        match self.finish() {
            0 => u16::MAX,
            value => value,
        }
    }
}

/// Sums bytes word by word.
#[inline(always)]
fn sum_words(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<8>();
    let sum = words.iter().fold(0, |sum, word| plus(sum, u64::from_ne_bytes(*word)));
    let (words, tail) = tail.as_chunks::<4>();
    let word = words.first().map_or(0, |word| u64::from(u32::from_ne_bytes(*word)));
    let (pairs, tail) = tail.as_chunks::<2>();
    let pair = pairs.first().map_or(0, |pair| u64::from(u16::from_ne_bytes(*pair)));
    let last = tail.first().map_or(0, |last| u64::from(u16::from_ne_bytes([*last, 0])));
    plus(sum, word.wrapping_add(pair).wrapping_add(last))
}

/// Sums blocks, in lanes that the compiler makes vectors of. Of its own: in a larger function it
/// makes them single words (3 times as slow).
///
/// ```text
///  word of 32 bits ─┬──────────────────► sum of words: its lower 32 bits
///                   └─ upper half ─────► sum of upper halves: all of it
///  sum of lower halves = sum of words - 2^16 * sum of upper halves, which has 32 bits too
/// ```
#[inline(never)]
fn sum_blocks(blocks: &[[u8; BLOCK]]) -> u64 {
    let mut sum = 0u64;
    for blocks in blocks.chunks(BLOCKS) {
        let (mut words, mut uppers) = ([0u32; BLOCK / 4], [0u32; BLOCK / 4]);
        for block in blocks {
            let lanes = words.iter_mut().zip(&mut uppers);
            for ((word, upper), bytes) in lanes.zip(block.as_chunks::<4>().0) {
                let value = u32::from_ne_bytes(*bytes);
                *word = word.wrapping_add(value);
                *upper = upper.wrapping_add(value >> 16);
            }
        }
        let all =
            |lanes: [u32; BLOCK / 4]| lanes.iter().fold(0, |sum: u32, l| sum.wrapping_add(*l));
        let upper = all(uppers);
        let lower = all(words).wrapping_sub(upper << 16);
        sum = sum.wrapping_add(u64::from(upper)).wrapping_add(u64::from(lower));
    }
    sum
}

/// The sum of two words; what does not fit comes in again below.
#[inline(always)]
fn plus(one: u64, other: u64) -> u64 {
    let (sum, carry) = one.overflowing_add(other);
    sum.wrapping_add(u64::from(carry))
}

/// Folds a sum to 16 bits: the upper half of a word and its turned self is the sum of both halves,
/// with what came in from below.
#[inline]
fn fold(sum: u64) -> u16 {
    let half = u32::try_from(sum.wrapping_add(sum.rotate_left(32)) >> 32).unwrap_or(u32::MAX);
    u16::try_from(half.wrapping_add(half.rotate_left(16)) >> 16).unwrap_or(u16::MAX)
}

/// The checksum of `bytes`.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = Checksum::default();
    sum.add(bytes);
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::{Checksum, checksum};

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&bytes), !0xddf2);
    }

    #[test]
    fn all_ones_do_not_overflow() {
        let mut sum = Checksum::default();
        sum.add(&std::vec![0xff; 6_400_000]);
        assert_eq!(sum.sum(), 0xffff);
        assert_eq!(checksum(&[0xff; 65535]), 0x00ff);
        assert_eq!(checksum(&[]), 0xffff);
    }

    proptest::proptest! {
        #[test]
        fn an_independent_implementation_gives_the_same(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000),
            cut in 0..3000_usize,
        ) {
            let reference = etherparse::checksum::Sum16BitWords::new().add_slice(&bytes);
            let reference = reference.ones_complement().to_be();
            proptest::prop_assert_eq!(checksum(&bytes), reference);
            let (front, back) = bytes.split_at(cut.min(bytes.len()));
            let mut sum = Checksum::default();
            sum.add(front);
            sum.add_part(!checksum(back), u32::try_from(back.len()).unwrap());
            proptest::prop_assert_eq!(sum.finish(), reference);
        }
    }

    /// As RFC 1071 says it: bytes in pairs, folded at every step.
    fn plain(bytes: &[u8]) -> u16 {
        bytes.chunks(2).fold(0u16, |sum, pair| {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            let (sum, carry) = sum.overflowing_add(word);
            sum.wrapping_add(u16::from(carry))
        })
    }

    #[test]
    fn all_lengths_at_all_places_have_the_plain_sum() {
        let bytes: std::vec::Vec<u8> =
            (0..9300u32).map(|i| (i * i * 7 + i / 3).to_le_bytes()[1]).collect();
        for len in (0..=300).chain([511, 512, 1448, 1460, 1500, 8999, 9000]) {
            for start in 0..64 {
                let bytes = &bytes[start..start + len];
                assert_eq!(checksum(bytes), !plain(bytes), "{len} bytes from {start} on");
            }
        }
    }

    /// More than lanes of 32 bits hold, of the largest words and of others.
    #[test]
    fn lanes_do_not_overflow() {
        for (byte, other) in [(0xff, 0xff), (0xff, 0xfe), (0, 0xff), (0xff, 0), (0, 1), (0, 0)] {
            for len in [262_144, 262_143, 262_208, 1_000_001] {
                let mut bytes = std::vec![byte; len];
                bytes.iter_mut().step_by(3).for_each(|place| *place = other);
                assert_eq!(checksum(&bytes), !plain(&bytes), "{len} of {byte} and {other}");
            }
        }
    }

    #[test]
    fn headers_are_summed_as_other_bytes_are() {
        let bytes: std::vec::Vec<u8> = (0..=255).collect();
        for len in 0..bytes.len() {
            let mut sum = Checksum::default();
            sum.add_u16(0x1234);
            sum.add_header(&bytes[..len]);
            sum.add(&bytes[len..]);
            let whole = [&[0x12, 0x34], &bytes[..]].concat();
            assert_eq!(sum.finish(), checksum(&whole), "{len} bytes of header");
        }
    }

    #[test]
    fn pieces_give_the_same_sum() {
        let bytes: std::vec::Vec<u8> = (0..=255).collect();
        for cut in 0..bytes.len() {
            let mut sum = Checksum::default();
            sum.add(&bytes[..cut]);
            sum.add(&bytes[cut..]);
            assert_eq!(sum.finish(), checksum(&bytes), "cut at {cut}");
            let mut sum = Checksum::default();
            for part in [&bytes[..cut], &bytes[cut..]] {
                sum.add_part(!checksum(part), u32::try_from(part.len()).unwrap());
            }
            assert_eq!(sum.finish(), checksum(&bytes), "parts cut at {cut}");
        }
    }
}
