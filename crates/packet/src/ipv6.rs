//! IPv6 packets and their extension headers.
//!
//! **Limits.** At most [`EXTENSIONS_MAX`] extension headers are walked: real packets have one or
//! two, and a hostile one must not cost more.

/// The most extension headers that are walked.
pub const EXTENSIONS_MAX: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// What stands behind the extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upper<'a> {
    /// The protocol: [`crate::ip_protocol`].
    pub protocol: u8,
    /// Whether the packet is a piece of a larger one.
    pub fragment: bool,
    /// Its bytes; not from the start of the upper header if this is a later fragment.
    pub payload: &'a [u8],
}

/// A packet whose fixed header is complete.
#[derive(Debug, Clone, Copy)]
pub struct Ipv6<'a> {
    header: &'a [u8; 40],
    payload: &'a [u8],
}

impl<'a> Ipv6<'a> {
    /// The packet at the start of `bytes`, which may lack the end of the payload.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<40>()?;
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        // Length 0 is a jumbogram: its length is in an option, all bytes belong to it.
        let payload = if len == 0 { rest } else { rest.get(..len).unwrap_or(rest) };
        (header[0] >> 4 == 6).then_some(Self { header, payload })
    }

    /// Bytes after the fixed header, as it says.
    pub fn payload_len(&self) -> u16 {
        u16::from_be_bytes([self.header[4], self.header[5]])
    }

    /// Flow label, 20 bits.
    pub fn flow_label(&self) -> u32 {
        u32::from_be_bytes([0, self.header[1] & 0x0f, self.header[2], self.header[3]])
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> [u8; 16] {
        self.address(8)
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> [u8; 16] {
        self.address(24)
    }

    /// The header's bytes from `at`, 8 or 24.
    #[inline(always)]
    fn address(&self, at: usize) -> [u8; 16] {
        let field = self.header.get(at..).and_then(<[u8]>::first_chunk);
        field.copied().unwrap_or_default()
    }

    /// Walks the extension headers. `None` if they are cut off or more than [`EXTENSIONS_MAX`].
    #[inline]
    pub fn upper(&self) -> Option<Upper<'a>> {
        let (mut protocol, mut payload, mut fragment) = (self.header[6], self.payload, false);
        for _ in 0..=EXTENSIONS_MAX {
            let fixed: &[u8; 8] = match protocol {
                HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => {
                    payload.first_chunk()?
                }
                _ => return Some(Upper { protocol, fragment, payload }),
            };
            let words = usize::from(fixed[1]);
            let len = match protocol {
                FRAGMENT => 8,
                AUTHENTICATION => words.wrapping_add(2).wrapping_mul(4),
                _ => words.wrapping_add(1).wrapping_mul(8),
            };
            if protocol == FRAGMENT {
                let field = u16::from_be_bytes([fixed[2], fixed[3]]);
                fragment |= field & 0xfff9 != 0;
                if field & 0xfff8 != 0 {
                    let payload = payload.get(len..)?;
                    return Some(Upper { protocol: fixed[0], fragment, payload });
                }
            }
            protocol = fixed[0];
            payload = payload.get(len..)?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::{EXTENSIONS_MAX, Ipv6, Upper};

    fn packet(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60, 0x0a, 0xbc, 0xde, 0, 0, next, 64];
        bytes[5] = u8::try_from(payload.len()).unwrap();
        bytes.extend(1..=32);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn known_bytes() {
        let bytes = packet(17, &[7; 9]);
        let view = Ipv6::parse(&bytes).unwrap();
        assert_eq!((view.payload_len(), view.flow_label()), (9, 0xabcde));
        assert_eq!((view.source()[0], view.source()[15]), (1, 16));
        assert_eq!((view.destination()[0], view.destination()[15]), (17, 32));
        let upper = Upper { protocol: 17, fragment: false, payload: &[7; 9] };
        assert_eq!(view.upper(), Some(upper));
        assert!(Ipv6::parse(&bytes[..39]).is_none());
    }

    #[test]
    fn extensions_are_walked() {
        let mut chain = vec![60, 0, 0, 0, 0, 0, 0, 0]; // hop by hop
        chain.extend([51, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // destination, 16 B
        chain.extend([44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // authentication, 12 B
        chain.extend([6, 0, 0, 1, 0, 0, 0, 9]); // first fragment
        chain.extend([0xaa, 0xbb]);
        let bytes = packet(0, &chain);
        let upper = Ipv6::parse(&bytes).unwrap().upper().unwrap();
        assert_eq!((upper.protocol, upper.fragment, upper.payload), (6, true, &[0xaa, 0xbb][..]));
    }

    #[test]
    fn a_later_fragment_ends_the_walk() {
        let bytes = packet(44, &[60, 0, 0x00, 0x08, 0, 0, 0, 1, 0xff]);
        let upper = Ipv6::parse(&bytes).unwrap().upper().unwrap();
        assert_eq!((upper.protocol, upper.fragment, upper.payload), (60, true, &[0xff][..]));
    }

    #[test]
    fn the_walk_is_bounded() {
        let mut chain = Vec::new();
        for _ in 0..EXTENSIONS_MAX {
            chain.extend([60, 0, 0, 0, 0, 0, 0, 0]);
        }
        chain[8 * EXTENSIONS_MAX - 8] = 6;
        assert!(Ipv6::parse(&packet(60, &chain)).unwrap().upper().is_some());
        chain[8 * EXTENSIONS_MAX - 8] = 60;
        chain.extend([6, 0, 0, 0, 0, 0, 0, 0]);
        assert!(Ipv6::parse(&packet(60, &chain)).unwrap().upper().is_none());
    }

    #[test]
    fn a_cut_extension_is_refused() {
        assert!(Ipv6::parse(&packet(0, &[6, 1, 0, 0, 0, 0, 0, 0])).unwrap().upper().is_none());
    }
}
