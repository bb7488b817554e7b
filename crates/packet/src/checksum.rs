//! The Internet checksum (RFC 1071).

/// A sum in progress, over pieces of any length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checksum {
    sum: u64,
    /// Whether an odd number of bytes was added.
    odd: bool,
}

impl Checksum {
    /// Adds `bytes`.
    #[inline]
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if let (true, [first, rest @ ..]) = (self.odd, bytes) {
            self.sum = self.sum.wrapping_add(u64::from(*first));
            self.odd = false;
            bytes = rest;
        }
        let (blocks, rest) = bytes.as_chunks::<64>();
        if !blocks.is_empty() {
            self.add_blocks(blocks);
        }
        let (words, tail) = rest.as_chunks::<8>();
        // In the machine's order, as in blocks: the folded sum is turned once.
        let mut native = 0u64;
        for word in words {
            let word = u64::from_ne_bytes(*word);
            native = native.wrapping_add((word >> 32).wrapping_add(word & 0xffff_ffff));
        }
        self.sum = self.sum.wrapping_add(u64::from(u16::from_be(fold(native))));
        for (index, byte) in tail.iter().enumerate() {
            let shift = if index & 1 == 0 { 8 } else { 0 };
            self.sum = self.sum.wrapping_add(u64::from(*byte) << shift);
        }
        self.odd ^= tail.len() & 1 == 1;
    }

    fn add_blocks(&mut self, blocks: &[[u8; 64]]) {
        self.sum = self.sum.wrapping_add(u64::from(sum_blocks(blocks)));
    }

    /// Adds the sum of `len` bytes that somebody else took, as if the first were at an even place.
    #[inline]
    pub fn add_part(&mut self, sum: u16, len: u32) {
        // At an odd place every byte counts for the other half.
        let sum = if self.odd { sum.swap_bytes() } else { sum };
        self.sum = self.sum.wrapping_add(u64::from(sum));
        self.odd ^= len & 1 == 1;
    }

    /// Adds a number of 16 bits as it stands in a header, after an even number of bytes.
    #[inline]
    pub fn add_u16(&mut self, value: u16) {
        self.sum = self.sum.wrapping_add(u64::from(value));
    }

    /// Adds a number of 32 bits as it stands in a header, after an even number of bytes.
    #[inline]
    pub fn add_u32(&mut self, value: u32) {
        self.sum = self.sum.wrapping_add(u64::from(value));
    }

    /// The folded sum of what was added: what the field of a partial checksum holds.
    #[inline]
    pub fn sum(self) -> u16 {
        fold(self.sum)
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

/// Sums blocks, in lanes that the compiler makes vectors of. Of its own: in a larger function it
/// makes them single words (3 times as slow).
#[inline(never)]
fn sum_blocks(blocks: &[[u8; 64]]) -> u16 {
    // 2^32 blocks fit.
    let mut lanes = [0u64; 16];
    for block in blocks {
        // Words that become wider are what the compiler knows to do in vectors.
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane = lane.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
        }
    }
    // Each lane once to 33 bits, so that the sum of all cannot wrap.
    let fold_lane =
        |sum: u64, lane: &u64| sum.wrapping_add(lane & 0xffff_ffff).wrapping_add(lane >> 32);
    let sum = lanes.iter().fold(0, fold_lane);
    // Sums are the same in either order of bytes, but for the order of their own.
    u16::from_be(fold(sum))
}

/// Folds a sum to 16 bits.
#[inline]
fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    for _ in 0..3 {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
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
