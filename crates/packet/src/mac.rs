//! Ethernet addresses.

use core::fmt;
use core::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// ff:ff:ff:ff:ff:ff.
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// 00:00:00:00:00:00, which no station has.
    pub const ZERO: Self = Self([0; 6]);

    /// Whether this is a multicast or the broadcast address.
    #[inline(always)]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether this is 01:80:c2:00:00:00 to 0f, which bridges keep (802.1Q, table 8-1).
    #[inline(always)]
    pub fn is_reserved(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0x00, 0x00, 0x00..=0x0f])
    }

    /// The address as a number, the first byte highest.
    #[inline(always)]
    pub fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The address in the low 48 bits of `number`.
    #[inline(always)]
    pub fn from_u64(number: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromStr for MacAddr {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, MacParseError> {
        let mut parts = text.split(':');
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacParseError)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(MacParseError);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacParseError)?;
        }
        if parts.next().is_some() { Err(MacParseError) } else { Ok(Self(bytes)) }
    }
}

/// The text is not six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacParseError;

impl fmt::Display for MacParseError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(
            "an Ethernet address is six pairs of hexadecimal digits, as 52:54:00:12:34:56",
        )
    }
}

impl core::error::Error for MacParseError {}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::{MacAddr, MacParseError};

    #[test]
    fn text_and_number_round_trip() {
        let mac: MacAddr = "52:54:00:aB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        assert_eq!(mac.to_u64(), 0x5254_00ab_cd0f);
        assert_eq!(MacAddr::from_u64(mac.to_u64()), mac);
    }

    #[test]
    fn wrong_texts_are_refused() {
        for text in ["", "52", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5g"] {
            assert_eq!(text.parse::<MacAddr>(), Err(MacParseError), "{text}");
        }
        assert_eq!("+1:54:00:12:34:56".parse::<MacAddr>(), Err(MacParseError));
    }

    #[test]
    fn kinds_of_addresses() {
        let reserved: MacAddr = "01:80:c2:00:00:0e".parse().unwrap();
        assert!(reserved.is_reserved() && reserved.is_group());
        assert!(!MacAddr([1, 0x80, 0xc2, 0, 0, 0x10]).is_reserved());
        assert!(MacAddr::BROADCAST.is_group() && !MacAddr::ZERO.is_group());
    }
}
