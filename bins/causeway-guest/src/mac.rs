//! Ethernet addresses on the command line.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MacAddr(pub(crate) [u8; 6]);

impl MacAddr {
    /// To everybody.
    pub(crate) const BROADCAST: Self = Self([0xff; 6]);

    /// A locally administered address that belongs to `path` and `salt`.
    pub(crate) fn derived(path: &Path, salt: u32) -> Self {
        let mut hasher = DefaultHasher::new();
        (path, salt).hash(&mut hasher);
        let [a, b, c, d, e, ..] = hasher.finish().to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// The address `by` further on, in the last three bytes.
    pub(crate) fn plus(self, by: usize) -> Self {
        let [a, b, c, d, e, f] = self.0;
        let low = u32::from_be_bytes([0, d, e, f]);
        let [_, d, e, f] = low.wrapping_add(u32::try_from(by).unwrap_or(0)).to_be_bytes();
        Self([a, b, c, d, e, f])
    }

    /// Four bytes that tell senders apart: the host part of their IPv4 address.
    pub(crate) fn tail(self) -> [u8; 3] {
        let [_, _, _, d, e, f] = self.0;
        [d, e, f]
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an address like 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len())).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or_else(wrong)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::MacAddr;

    #[test]
    fn text_and_back() {
        let mac: MacAddr = "02:0a:00:00:ff:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "02:0a:00:00:ff:ff");
        assert_eq!(mac.plus(1).to_string(), "02:0a:00:01:00:00");
        for wrong in ["", "02", "02:0a:00:00:ff", "02:0a:00:00:ff:ff:00", "02:0a:00:00:ff:fg"] {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong}");
        }
    }
}
