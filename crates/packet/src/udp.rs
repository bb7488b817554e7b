//! UDP datagrams.

/// A datagram whose header is complete.
#[derive(Debug, Clone, Copy)]
pub struct Udp<'a> {
    header: &'a [u8; 8],
    rest: &'a [u8],
}

impl<'a> Udp<'a> {
    /// The datagram at the start of `bytes`, which may lack the end of the payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk()?;
        let datagram = Self { header, rest };
        (datagram.total_len() >= 8).then_some(datagram)
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

    /// Bytes of header and payload, as the header says.
    pub fn total_len(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    /// The payload, as far as `bytes` had it.
    pub fn payload(&self) -> &'a [u8] {
        let len = usize::from(self.total_len()).saturating_sub(8);
        self.rest.get(..len).unwrap_or(self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::Udp;

    #[test]
    fn known_bytes() {
        let mut bytes = [0x00, 0x35, 0xc0, 0x01, 0x00, 0x0a, 0, 0, 1, 2, 3];
        let datagram = Udp::parse(&bytes).unwrap();
        assert_eq!((datagram.source(), datagram.destination()), (53, 0xc001));
        assert_eq!(datagram.payload(), [1, 2]);
        bytes[5] = 7;
        assert!(Udp::parse(&bytes).is_none());
    }
}
