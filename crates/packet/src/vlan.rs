//! 802.1Q tags.

/// A VLAN, 0 to 4094; 0 stands for frames without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct VlanId(u16);

impl VlanId {
    /// No VLAN: untagged frames of a port without a VLAN rule.
    pub const NONE: Self = Self(0);
    /// The highest one; 4095 is reserved by 802.1Q.
    pub const MAX: u16 = 4094;

    /// The VLAN `number`, if there is one.
    #[inline]
    pub fn new(number: u16) -> Option<Self> {
        (number <= Self::MAX).then_some(Self(number))
    }

    /// The number.
    #[inline(always)]
    pub fn get(self) -> u16 {
        self.0
    }
}

/// What follows an Ethernet header of type [`crate::ethertype::VLAN`].
#[derive(Debug, Clone, Copy)]
pub struct VlanTag<'a> {
    header: &'a [u8; 4],
    payload: &'a [u8],
}

impl<'a> VlanTag<'a> {
    /// The tag at the start of `bytes`, an Ethernet payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, payload) = bytes.split_first_chunk()?;
        Some(Self { header, payload })
    }

    /// Tag control information: priority (3 bits), drop eligible (1 bit), VLAN (12 bits).
    #[inline]
    pub fn tci(&self) -> u16 {
        u16::from_be_bytes([self.header[0], self.header[1]])
    }

    /// The VLAN; `None` for the reserved 4095.
    #[inline]
    pub fn vlan(&self) -> Option<VlanId> {
        VlanId::new(self.tci() & 0x0fff)
    }

    /// Priority, 0 to 7.
    #[inline]
    pub fn priority(&self) -> u8 {
        self.header[0] >> 5
    }

    /// Type of what follows.
    #[inline]
    pub fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// The bytes after the tag.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::{VlanId, VlanTag};

    #[test]
    fn known_bytes() {
        let tag = VlanTag::parse(&[0xa0, 0x64, 0x08, 0x00, 0x45]).unwrap();
        assert_eq!((tag.priority(), tag.tci(), tag.ethertype()), (5, 0xa064, 0x0800));
        assert_eq!(tag.vlan(), VlanId::new(100));
        assert_eq!(tag.payload(), [0x45]);
        assert!(VlanTag::parse(&[0; 3]).is_none());
    }

    #[test]
    fn the_reserved_vlan_does_not_exist() {
        assert_eq!(VlanId::new(4095), None);
        assert_eq!(VlanTag::parse(&[0x0f, 0xff, 8, 0]).unwrap().vlan(), None);
        assert_eq!(VlanId::new(4094).map(VlanId::get), Some(4094));
    }
}
