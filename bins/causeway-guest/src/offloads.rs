//! Offloads of the port: what `--offloads` asks for, and what of that can be negotiated.
//!
//! | bit | says |
//! |---|---|
//! | `csum`, `host-*` | what the tap's kernel may leave to the back end |
//! | `guest-*` | what the back end may leave to the tap's kernel |

use std::str::FromStr;

use anyhow::bail;
use port::OffloadSet;
use virtio_bindings::virtio_net as net;

/// An offload: its name, its feature bit, and of which other ones it needs one.
#[derive(Debug)]
struct Kind {
    name: &'static str,
    bit: u32,
    needs: &'static [u32],
}

const CSUM: u32 = net::VIRTIO_NET_F_CSUM;
const GUEST_CSUM: u32 = net::VIRTIO_NET_F_GUEST_CSUM;
const HOST_TSO4: u32 = net::VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u32 = net::VIRTIO_NET_F_HOST_TSO6;
const HOST_ECN: u32 = net::VIRTIO_NET_F_HOST_ECN;
const HOST_USO: u32 = net::VIRTIO_NET_F_HOST_USO;
const GUEST_TSO4: u32 = net::VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u32 = net::VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u32 = net::VIRTIO_NET_F_GUEST_ECN;
const GUEST_USO4: u32 = net::VIRTIO_NET_F_GUEST_USO4;
const GUEST_USO6: u32 = net::VIRTIO_NET_F_GUEST_USO6;

/// Ordered: each one stands behind what it needs (specification, section 5.1.3.1).
const KINDS: [Kind; 11] = [
    Kind { name: "csum", bit: CSUM, needs: &[] },
    Kind { name: "host-tso4", bit: HOST_TSO4, needs: &[CSUM] },
    Kind { name: "host-tso6", bit: HOST_TSO6, needs: &[CSUM] },
    Kind { name: "host-ecn", bit: HOST_ECN, needs: &[HOST_TSO4, HOST_TSO6] },
    Kind { name: "host-uso", bit: HOST_USO, needs: &[CSUM] },
    Kind { name: "guest-csum", bit: GUEST_CSUM, needs: &[] },
    Kind { name: "guest-tso4", bit: GUEST_TSO4, needs: &[GUEST_CSUM] },
    Kind { name: "guest-tso6", bit: GUEST_TSO6, needs: &[GUEST_CSUM] },
    Kind { name: "guest-ecn", bit: GUEST_ECN, needs: &[GUEST_TSO4, GUEST_TSO6] },
    Kind { name: "guest-uso4", bit: GUEST_USO4, needs: &[GUEST_CSUM] },
    Kind { name: "guest-uso6", bit: GUEST_USO6, needs: &[GUEST_CSUM] },
];

/// What `--offloads` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// As many as the back end offers and the tap's kernel knows.
    All,
    /// These, and no others.
    These(Offloads),
}

/// A set of offloads, as feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Offloads(u64);

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" => return Ok(Self::All),
            "off" => return Ok(Self::These(Offloads::default())),
            _ => {}
        }
        let mut set = Offloads::default();
        for word in text.split([',', '+']) {
            let known = KINDS.iter().find(|kind| kind.name == word);
            let kind = known.ok_or_else(|| format!("unknown offload {word:?}: {}", choices()))?;
            set.0 |= mask(kind.bit);
        }
        match set.lacking() {
            Some((kind, lacks)) => Err(format!("{} needs {lacks}", kind.name)),
            None => Ok(Self::These(set)),
        }
    }
}

fn choices() -> String {
    let names: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
    format!("on, off, or a list of {}", names.join(", "))
}

fn mask(bit: u32) -> u64 {
    1u64.checked_shl(bit).unwrap_or(0)
}

impl Wanted {
    /// What to negotiate of what is `offered`, with a tap whose kernel knows USO or not.
    pub(crate) fn choose(self, offered: u64, uso: bool) -> anyhow::Result<Offloads> {
        let set = match self {
            Self::All => return Ok(Offloads(offered).possible(uso)),
            Self::These(set) => set,
        };
        if let Some(kind) = set.kinds().find(|kind| offered & mask(kind.bit) == 0) {
            bail!("the back end does not offer {} (--offloads)", kind.name);
        }
        if let Some(kind) = set.kinds().find(|kind| !uso && kind.name.contains("uso")) {
            bail!("{}: the kernel's taps have no USO (Linux 6.2 has)", kind.name);
        }
        Ok(set)
    }
}

impl Offloads {
    /// What of the feature bits `bits` are offloads.
    pub(crate) fn from_bits(bits: u64) -> Self {
        let known = KINDS.iter().fold(0, |all, kind| all | mask(kind.bit));
        Self(bits & known)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// Those whose needs are there too.
    fn possible(self, uso: bool) -> Self {
        let mut set = Self::from_bits(self.0);
        if !uso {
            set.0 &= !(mask(HOST_USO) | mask(GUEST_USO4) | mask(GUEST_USO6));
        }
        while let Some((kind, _)) = set.lacking() {
            set.0 &= !mask(kind.bit);
        }
        set
    }

    fn has(self, bit: u32) -> bool {
        self.0 & mask(bit) != 0
    }

    fn kinds(self) -> impl Iterator<Item = &'static Kind> {
        KINDS.iter().filter(move |kind| self.has(kind.bit))
    }

    /// The first one that lacks what it needs, and that.
    fn lacking(self) -> Option<(&'static Kind, String)> {
        let lacks =
            |kind: &&Kind| !kind.needs.is_empty() && !kind.needs.iter().any(|need| self.has(*need));
        let kind = self.kinds().find(lacks)?;
        let needs = KINDS.iter().filter(|other| kind.needs.contains(&other.bit));
        let names: Vec<_> = needs.map(|other| other.name).collect();
        Some((kind, names.join(" or ")))
    }

    /// What the tap's kernel may leave to the back end.
    pub(crate) fn tap(self) -> OffloadSet {
        OffloadSet {
            csum: self.has(CSUM),
            tso4: self.has(HOST_TSO4),
            tso6: self.has(HOST_TSO6),
            ecn: self.has(HOST_ECN),
            uso: self.has(HOST_USO),
        }
    }

    /// Whether the back end may send frames that are larger than the MTU.
    pub(crate) fn receives_large(self) -> bool {
        [GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6].into_iter().any(|bit| self.has(bit))
    }
}

impl serde::Serialize for Offloads {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.kinds().map(|kind| kind.name))
    }
}

#[cfg(test)]
mod tests {
    use super::{KINDS, Offloads, Wanted, mask};

    fn parse(text: &str) -> Result<Wanted, String> {
        text.parse()
    }

    #[test]
    fn a_list_is_what_it_says_and_whole() {
        let Ok(Wanted::These(set)) = parse("csum,host-tso4+host-ecn") else { panic!("a list") };
        assert_eq!(set.bits(), 1 | 1 << 11 | 1 << 13);
        assert_eq!(serde_json::to_string(&set).unwrap(), r#"["csum","host-tso4","host-ecn"]"#);
        assert_eq!(parse("off"), Ok(Wanted::These(Offloads::default())));
        assert_eq!(parse("host-tso6").unwrap_err(), "host-tso6 needs csum");
        let error = parse("guest-csum,guest-ecn").unwrap_err();
        assert_eq!(error, "guest-ecn needs guest-tso4 or guest-tso6");
        let error = parse("tso").unwrap_err();
        assert!(
            error.starts_with("unknown offload \"tso\": on, off, or a list of csum"),
            "{error}"
        );
    }

    #[test]
    fn all_is_what_is_offered_and_possible() {
        let all = KINDS.iter().fold(0, |all, kind| all | mask(kind.bit));
        let choose = |offered, uso| Wanted::All.choose(offered, uso).unwrap().bits();
        assert_eq!(choose(u64::MAX, true), all);
        assert_eq!(choose(u64::MAX, false), all & !(1 << 54 | 1 << 55 | 1 << 56));
        assert_eq!(choose(!1, true) & 0b0011_1000_0000_0001, 0, "no TSO without CSUM");
        assert_eq!(choose(0, true), 0);
    }

    #[test]
    fn a_list_is_negotiated_whole_or_not_at_all() {
        let wanted = parse("csum,host-uso").unwrap();
        assert_eq!(wanted.choose(u64::MAX, true).unwrap().bits(), 1 | 1 << 56);
        let error = wanted.choose(1, true).unwrap_err().to_string();
        assert_eq!(error, "the back end does not offer host-uso (--offloads)");
        assert!(wanted.choose(u64::MAX, false).is_err());
    }
}
