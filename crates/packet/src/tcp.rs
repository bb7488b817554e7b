//! TCP segments: the fixed header.

/// A segment whose header is complete.
#[derive(Debug, Clone, Copy)]
pub struct Tcp<'a> {
    header: &'a [u8; 20],
    payload: &'a [u8],
}

impl<'a> Tcp<'a> {
    /// The segment in `bytes`, an IP payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = bytes.first_chunk()?;
        let header_len = usize::from(header[12] >> 4).wrapping_mul(4);
        let payload = bytes.get(header_len..)?;
        (header_len >= 20).then_some(Self { header, payload })
    }

    /// Source port.
    #[inline]
    pub fn source(&self) -> u16 {
        u16::from_be_bytes([self.header[0], self.header[1]])
    }

    /// Destination port.
    #[inline]
    pub fn destination(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Sequence number.
    pub fn sequence(&self) -> u32 {
        u32::from_be_bytes([self.header[4], self.header[5], self.header[6], self.header[7]])
    }

    /// Flags: FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128.
    pub fn flags(&self) -> u8 {
        self.header[13]
    }

    /// The bytes after the options.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::Tcp;

    #[test]
    fn known_bytes() {
        let mut bytes = [0u8; 26];
        bytes[..8].copy_from_slice(&[0x1f, 0x90, 0, 80, 1, 2, 3, 4]);
        bytes[12] = 0x60;
        bytes[13] = 0x12;
        bytes[24] = 9;
        let segment = Tcp::parse(&bytes).unwrap();
        assert_eq!((segment.source(), segment.destination()), (8080, 80));
        assert_eq!((segment.sequence(), segment.flags()), (0x0102_0304, 0x12));
        assert_eq!(segment.payload(), [9, 0]);
        for offset in [0x40, 0x70] {
            bytes[12] = offset;
            assert!(Tcp::parse(&bytes).is_none());
        }
    }
}
