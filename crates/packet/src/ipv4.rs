//! IPv4 packets.

/// Values of the protocol field, and of IPv6's next header.
pub mod ip_protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// A packet whose header is complete.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a> {
    header: &'a [u8; 20],
    header_len: usize,
    bytes: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// The packet at the start of `bytes`, which may lack the end of the payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = bytes.first_chunk()?;
        let header_len = usize::from(header[0] & 0x0f).wrapping_mul(4);
        let valid = header[0] >> 4 == 4 && header_len >= 20 && header_len <= bytes.len();
        let packet = Self { header, header_len, bytes };
        (valid && usize::from(packet.total_len()) >= header_len).then_some(packet)
    }

    /// Bytes of the header with its options.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Bytes of header and payload, as the header says.
    pub fn total_len(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Whether this is a piece of a larger packet (only the first one has ports).
    #[inline]
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes([self.header[6], self.header[7]]) & 0x3fff != 0
    }

    /// What the payload is: [`ip_protocol`].
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.header[9]
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> [u8; 4] {
        [self.header[12], self.header[13], self.header[14], self.header[15]]
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> [u8; 4] {
        [self.header[16], self.header[17], self.header[18], self.header[19]]
    }

    /// Whether the header's checksum is right.
    pub fn checksum_ok(&self) -> bool {
        self.bytes.get(..self.header_len).is_some_and(|header| crate::checksum(header) == 0)
    }

    /// The payload, without what follows the packet, as far as `bytes` had it.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        let end = usize::from(self.total_len()).min(self.bytes.len());
        self.bytes.get(self.header_len..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{Ipv4, ip_protocol};

    /// From RFC 1071's most quoted example.
    const KNOWN: [u8; 20] = [
        0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00,
        0x01, 0xc0, 0xa8, 0x00, 0xc7,
    ];

    #[test]
    fn known_bytes() {
        let packet = Ipv4::parse(&KNOWN).unwrap();
        assert_eq!((packet.header_len(), packet.total_len()), (20, 115));
        assert_eq!(packet.protocol(), ip_protocol::UDP);
        assert_eq!(packet.source(), [192, 168, 0, 1]);
        assert_eq!(packet.destination(), [192, 168, 0, 199]);
        assert!(packet.checksum_ok() && !packet.is_fragment());
        let mut wrong = KNOWN;
        wrong[8] = 63;
        assert!(!Ipv4::parse(&wrong).unwrap().checksum_ok());
    }

    #[test]
    fn contradictions_are_refused() {
        for (at, value) in [(0, 0x65), (0, 0x44), (0, 0x46), (3, 19)] {
            let mut bytes = KNOWN;
            bytes[2] = 0;
            bytes[at] = value;
            assert!(Ipv4::parse(&bytes).is_none(), "byte {at} = {value:#x}");
        }
    }

    #[test]
    fn padding_is_not_payload() {
        let mut bytes = [0u8; 46];
        bytes[..20].copy_from_slice(&KNOWN);
        bytes[3] = 28;
        assert_eq!(Ipv4::parse(&bytes).unwrap().payload().len(), 8);
        bytes[6] = 0x20;
        assert!(Ipv4::parse(&bytes).unwrap().is_fragment());
    }
}
