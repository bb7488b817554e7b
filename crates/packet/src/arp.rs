//! ARP over Ethernet and IPv4, and the RARP frame that announces where a guest is.

use crate::MacAddr;

/// Bytes of a RARP announcement: the least that Ethernet carries.
pub const RARP_FRAME_LEN: usize = 60;

/// An ARP or RARP packet for Ethernet and IPv4.
#[derive(Debug, Clone, Copy)]
pub struct Arp<'a> {
    bytes: &'a [u8; 28],
}

impl<'a> Arp<'a> {
    /// Operation: who has an address?
    pub const REQUEST: u16 = 1;
    /// Operation: I have it.
    pub const REPLY: u16 = 2;
    /// Operation of RARP: which address has this station?
    pub const REVERSE_REQUEST: u16 = 3;

    /// The packet at the start of `bytes`; `None` for other hardware or protocols.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let bytes: &[u8; 28] = bytes.first_chunk()?;
        matches!(bytes, [0, 1, 8, 0, 6, 4, ..]).then_some(Self { bytes })
    }

    /// [`Self::REQUEST`], [`Self::REPLY`], ...
    pub fn operation(&self) -> u16 {
        u16::from_be_bytes([self.bytes[6], self.bytes[7]])
    }

    /// Who sends this.
    pub fn sender_mac(&self) -> MacAddr {
        let [_, _, _, _, _, _, _, _, a, b, c, d, e, f, ..] = *self.bytes;
        MacAddr([a, b, c, d, e, f])
    }

    /// The sender's IPv4 address.
    pub fn sender_ip(&self) -> [u8; 4] {
        [self.bytes[14], self.bytes[15], self.bytes[16], self.bytes[17]]
    }

    /// Whom it is about.
    pub fn target_mac(&self) -> MacAddr {
        let [.., a, b, c, d, e, f, _, _, _, _] = *self.bytes;
        MacAddr([a, b, c, d, e, f])
    }

    /// The target's IPv4 address.
    pub fn target_ip(&self) -> [u8; 4] {
        [self.bytes[24], self.bytes[25], self.bytes[26], self.bytes[27]]
    }
}

/// The frame that QEMU and vhost-user back ends send after a migration, so that switches learn
/// where `mac` is now: a broadcast RARP request of the station about itself.
pub fn rarp_announce(mac: MacAddr) -> [u8; RARP_FRAME_LEN] {
    let mut frame = [0; RARP_FRAME_LEN];
    let [a, b, c, d, e, f] = mac.0;
    let head = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, a, b, c, d, e, f, 0x80, 0x35, // Ethernet
        0x00, 0x01, 0x08, 0x00, 6, 4, 0x00, 0x03, // for Ethernet and IPv4; reverse request
        a, b, c, d, e, f, 0, 0, 0, 0, // sender
        a, b, c, d, e, f, 0, 0, 0, 0, // target
    ];
    for (to, from) in frame.iter_mut().zip(head) {
        *to = from;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::{Arp, rarp_announce};
    use crate::{Ethernet, MacAddr, ethertype};

    #[test]
    fn an_announcement_is_a_reverse_request_about_its_sender() {
        let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
        let frame = rarp_announce(mac);
        let ethernet = Ethernet::parse(&frame).unwrap();
        assert_eq!(ethernet.destination(), MacAddr::BROADCAST);
        assert_eq!((ethernet.source(), ethernet.ethertype()), (mac, ethertype::RARP));
        let arp = Arp::parse(ethernet.payload()).unwrap();
        assert_eq!(arp.operation(), Arp::REVERSE_REQUEST);
        assert_eq!((arp.sender_mac(), arp.target_mac()), (mac, mac));
        assert_eq!((arp.sender_ip(), arp.target_ip()), ([0; 4], [0; 4]));
    }

    #[test]
    fn known_bytes() {
        let mut bytes = [0u8; 28];
        bytes[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        bytes[14..18].copy_from_slice(&[10, 0, 0, 1]);
        bytes[24..].copy_from_slice(&[10, 0, 0, 2]);
        let arp = Arp::parse(&bytes).unwrap();
        assert_eq!(arp.operation(), Arp::REQUEST);
        assert_eq!((arp.sender_ip(), arp.target_ip()), ([10, 0, 0, 1], [10, 0, 0, 2]));
        bytes[4] = 8;
        assert!(Arp::parse(&bytes).is_none());
        assert!(Arp::parse(&bytes[..27]).is_none());
    }
}
