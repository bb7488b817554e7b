//! Which frames are captured: the part of pcap's filter language that people type.
//!
//! ```text
//!  filter    := part { ("and" | "&&" | "or" | "||") part }    equal rank, from left to right
//!  part      := ("not" | "!") part | "(" filter ")" | primitive
//!  primitive := protocol | [protocol] [src | dst] [host] ADDRESS | [protocol] [src | dst] port N
//!             | [protocol] [src | dst] net ADDRESS/BITS | ether [src | dst | host] MAC
//!             | ether (broadcast | multicast | proto N) | vlan [N] | less N | greater N
//!  protocol  := arp | ip | ip6 | tcp | udp | sctp | icmp | icmp6
//! ```
//!
//! As in pcap, `and` and `or` have equal rank and bind from left to right: use parentheses. Other
//! than in pcap, everything looks behind VLAN tags, with and without `vlan`.
//!
//! **Trust.** Frames are hostile: what is not there does not match. Only a frame's private head is
//! read, so what stands after its first 128 bytes (ports after many extension headers) does not
//! match either.
//!
//! **Limits.** [`WORDS_MAX`] words.

mod fields;
mod parse;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::str::FromStr;

use fields::Fields;

/// The most words of a filter.
pub const WORDS_MAX: usize = 256;

/// A filter; the default lets everything through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter(Option<Node>);

/// Which word of a filter is wrong, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}{}: expected {expected}", place(.at))]
pub struct FilterError {
    what: String,
    /// Number of the word, from 1 on, and of its first character, from 1 on.
    at: Option<(usize, usize)>,
    expected: &'static str,
}

fn place(at: &Option<(usize, usize)>) -> String {
    match at {
        Some((word, column)) => format!(" (word {word}, at character {column})"),
        None => String::new(),
    }
}

/// One condition, or several.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    And(Box<Self>, Box<Self>),
    Or(Box<Self>, Box<Self>),
    Not(Box<Self>),
    Protocol(Protocol),
    Net(Side, IpAddr, u8),
    Port(Side, u16),
    Ether(Side, [u8; 6]),
    Broadcast,
    Multicast,
    EtherType(u16),
    Vlan(Option<u16>),
    /// At most so many bytes.
    Less(u32),
    /// At least so many bytes.
    Greater(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Arp,
    Ip,
    Ip6,
    /// By number, over either.
    Over(u8),
    /// ICMP belongs to IPv4, that of IPv6 to IPv6.
    OverIp(u8),
    OverIp6(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Any,
}

impl Side {
    fn matches<T>(self, (source, destination): (T, T), test: impl Fn(T) -> bool) -> bool {
        match self {
            Self::Source => test(source),
            Self::Destination => test(destination),
            Self::Any => test(source) || test(destination),
        }
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        parse::parse(text).map(Self)
    }
}

impl Filter {
    /// Whether a frame with this head and of this length is wanted.
    pub fn matches(&self, head: &[u8], frame_bytes: u32) -> bool {
        match &self.0 {
            None => true,
            Some(node) => node.matches(&Fields::of(head), head, frame_bytes),
        }
    }
}

impl Node {
    fn matches(&self, fields: &Fields, head: &[u8], frame_bytes: u32) -> bool {
        let both = |node: &Self| node.matches(fields, head, frame_bytes);
        let stations = || Some((head.get(6..12)?, head.get(..6)?));
        match self {
            Self::And(left, right) => both(left) && both(right),
            Self::Or(left, right) => both(left) || both(right),
            Self::Not(node) => !both(node),
            Self::Protocol(protocol) => fields.is(*protocol),
            Self::Net(side, address, bits) => fields
                .addresses
                .is_some_and(|pair| side.matches(pair, |one| is_in(one, *address, *bits))),
            Self::Port(side, port) => {
                fields.ports.is_some_and(|pair| side.matches(pair, |one| one == *port))
            }
            Self::Ether(side, mac) => {
                stations().is_some_and(|pair| side.matches(pair, |one| one == mac))
            }
            Self::Broadcast => head.get(..6) == Some(&[0xff; 6]),
            Self::Multicast => head.first().is_some_and(|first| first & 1 == 1),
            Self::EtherType(number) => fields.ether_type == Some(*number),
            Self::Vlan(None) => fields.vlan.is_some(),
            Self::Vlan(Some(vlan)) => fields.vlan == Some(*vlan),
            Self::Less(bytes) => frame_bytes <= *bytes,
            Self::Greater(bytes) => frame_bytes >= *bytes,
        }
    }
}

/// Whether the first `bits` of both addresses are the same.
fn is_in(one: IpAddr, net: IpAddr, bits: u8) -> bool {
    let same =
        |one: u128, net: u128, unused: u32| (one ^ net).checked_shr(unused).unwrap_or(0) == 0;
    match (one, net) {
        (IpAddr::V4(one), IpAddr::V4(net)) => {
            let unused = 32u32.saturating_sub(bits.into());
            same(one.to_bits().into(), net.to_bits().into(), unused)
        }
        (IpAddr::V6(one), IpAddr::V6(net)) => {
            same(one.to_bits(), net.to_bits(), 128u32.saturating_sub(bits.into()))
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}
