//! Addresses of our ports.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

pub(crate) use packet::MacAddr;

/// A locally administered address that belongs to `path`.
pub(crate) fn derived(path: &Path) -> MacAddr {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    let [a, b, c, d, e, ..] = hasher.finish().to_be_bytes();
    MacAddr([0x02, a, b, c, d, e])
}

/// The address `by` further on, in the last three bytes.
pub(crate) fn plus(mac: MacAddr, by: usize) -> MacAddr {
    let [a, b, c, d, e, f] = mac.0;
    let low = u32::from_be_bytes([0, d, e, f]);
    let [_, d, e, f] = low.wrapping_add(u32::try_from(by).unwrap_or(0)).to_be_bytes();
    MacAddr([a, b, c, d, e, f])
}

/// The most stations behind a port.
pub(crate) const STATIONS_MAX: u32 = 1 << 16;

/// The address of station `number` behind a port: the port's own is number 0. Ports whose
/// addresses count on from each other in the last byte share none.
pub(crate) fn station(mac: MacAddr, number: u32) -> MacAddr {
    let [a, b, c, d, e, f] = mac.0;
    let [_, _, high, low] = number.to_be_bytes();
    let middle = u16::from_be_bytes([d, e]).wrapping_add(u16::from_be_bytes([high, low]));
    let [d, e] = middle.to_be_bytes();
    MacAddr([a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{MacAddr, STATIONS_MAX, derived, plus, station};

    #[test]
    fn ports_have_addresses_of_their_own() {
        let mac = MacAddr([2, 0x0a, 0, 0, 0xff, 0xff]);
        assert_eq!(plus(mac, 1), MacAddr([2, 0x0a, 0, 1, 0, 0]));
        let [a, b] = ["/run/a", "/run/b"].map(|p| derived(Path::new(p)));
        assert_ne!(a, b);
        assert!(!a.is_group());
        assert_eq!(a, derived(Path::new("/run/a")));
    }

    #[test]
    fn stations_have_addresses_of_their_own() {
        let first = MacAddr([2, 0, 0, 0, 0xff, 0xfe]);
        assert_eq!(station(first, 0), first);
        let ports = (0..2).map(|port| plus(first, port));
        let all: std::collections::HashSet<_> =
            ports.flat_map(|mac| (0..STATIONS_MAX).map(move |n| station(mac, n))).collect();
        assert_eq!(all.len(), 2 * STATIONS_MAX as usize);
        assert!(all.iter().all(|mac| !mac.is_group()));
    }
}
