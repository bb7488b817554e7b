//! Ethernet II frames.

use crate::MacAddr;

/// Values of the type field.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// Reverse ARP: announcements of a migrated guest.
    pub const RARP: u16 = 0x8035;
    /// 802.1Q tag.
    pub const VLAN: u16 = 0x8100;
    /// 802.1ad service tag.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// A frame of at least 14 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Ethernet<'a> {
    header: &'a [u8; 14],
    payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// The frame in `bytes`, which are without preamble and check sequence.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, payload) = bytes.split_first_chunk()?;
        Some(Self { header, payload })
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> MacAddr {
        let [a, b, c, d, e, f, ..] = *self.header;
        MacAddr([a, b, c, d, e, f])
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> MacAddr {
        let [_, _, _, _, _, _, a, b, c, d, e, f, _, _] = *self.header;
        MacAddr([a, b, c, d, e, f])
    }

    /// What the payload is: [`ethertype`], or a length below 1536.
    #[inline]
    pub fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.header[12], self.header[13]])
    }

    /// The bytes after the header; padding included.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::Ethernet;

    #[test]
    fn known_bytes() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0x86, 0xdd, 0x60];
        let frame = Ethernet::parse(&bytes).unwrap();
        assert_eq!(frame.destination().0, [1, 2, 3, 4, 5, 6]);
        assert_eq!(frame.source().0, [7, 8, 9, 10, 11, 12]);
        assert_eq!(frame.ethertype(), 0x86dd);
        assert_eq!(frame.payload(), [0x60]);
        assert!(Ethernet::parse(&bytes[..13]).is_none());
    }
}
