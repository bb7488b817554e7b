//! ICMP messages of IPv4 and IPv6.

/// A message of at least 8 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Icmp<'a> {
    header: &'a [u8; 8],
    payload: &'a [u8],
}

impl<'a> Icmp<'a> {
    /// The message in `bytes`, an IP payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, payload) = bytes.split_first_chunk()?;
        Some(Self { header, payload })
    }

    /// Type: 8 and 0 are echo request and reply of IPv4, 128 and 129 of IPv6.
    pub fn kind(&self) -> u8 {
        self.header[0]
    }

    /// Code, by type.
    pub fn code(&self) -> u8 {
        self.header[1]
    }

    /// Identifier and sequence number of an echo.
    pub fn echo(&self) -> (u16, u16) {
        let [_, _, _, _, a, b, c, d] = *self.header;
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }

    /// The bytes after the header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::Icmp;

    #[test]
    fn known_bytes() {
        let bytes = [8, 0, 0xf7, 0xff, 0x12, 0x34, 0x00, 0x02, 0x61];
        let echo = Icmp::parse(&bytes).unwrap();
        assert_eq!((echo.kind(), echo.code(), echo.echo()), (8, 0, (0x1234, 2)));
        assert_eq!(echo.payload(), [0x61]);
        assert!(Icmp::parse(&bytes[..7]).is_none());
    }
}
