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
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if let (true, [first, rest @ ..]) = (self.odd, bytes) {
            self.sum = self.sum.wrapping_add(u64::from(*first));
            self.odd = false;
            bytes = rest;
        }
        let (words, tail) = bytes.as_chunks::<4>();
        // 32 bits a step: the sum has room for 2^32 of them, and folding is modulo 2^16 - 1.
        for word in words {
            self.sum = self.sum.wrapping_add(u64::from(u32::from_be_bytes(*word)));
        }
        for (index, byte) in tail.iter().enumerate() {
            let shift = if index & 1 == 0 { 8 } else { 0 };
            self.sum = self.sum.wrapping_add(u64::from(*byte) << shift);
        }
        self.odd ^= tail.len() & 1 == 1;
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
        let mut sum = self.sum;
        for _ in 0..4 {
            sum = (sum & 0xffff).wrapping_add(sum >> 16);
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// The checksum of what was added: 0 if that contains its own right checksum.
    #[inline]
    pub fn finish(self) -> u16 {
        !self.sum()
    }

    /// As [`Self::finish`], but never 0, which means "no checksum" in UDP; for the sum, all ones is
    /// the same number.
    #[inline]
    pub fn finish_transport(self) -> u16 {
        match self.finish() {
            0 => u16::MAX,
            value => value,
        }
    }
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
        assert_eq!(checksum(&[0xff; 65535]), 0x00ff);
        assert_eq!(checksum(&[]), 0xffff);
    }

    #[test]
    fn pieces_give_the_same_sum() {
        let bytes: std::vec::Vec<u8> = (0..=255).collect();
        for cut in 0..bytes.len() {
            let mut sum = Checksum::default();
            sum.add(&bytes[..cut]);
            sum.add(&bytes[cut..]);
            assert_eq!(sum.finish(), checksum(&bytes), "cut at {cut}");
        }
    }
}
