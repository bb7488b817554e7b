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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{MacAddr, derived, plus};

    #[test]
    fn ports_have_addresses_of_their_own() {
        let mac = MacAddr([2, 0x0a, 0, 0, 0xff, 0xff]);
        assert_eq!(plus(mac, 1), MacAddr([2, 0x0a, 0, 1, 0, 0]));
        let [a, b] = ["/run/a", "/run/b"].map(|p| derived(Path::new(p)));
        assert_ne!(a, b);
        assert!(!a.is_group());
        assert_eq!(a, derived(Path::new("/run/a")));
    }
}
