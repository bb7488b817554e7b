#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod arp;
mod checksum;
mod ethernet;
mod flow;
mod icmp;
mod ipv4;
mod ipv6;
mod mac;
mod merge;
mod segment;
mod tcp;
mod toeplitz;
mod udp;
mod vlan;

pub use arp::{Arp, RARP_FRAME_LEN, rarp_announce};
pub use checksum::{Checksum, checksum};
pub use ethernet::{Ethernet, ethertype};
pub use flow::{flow_hash, inner_flow_hash};
pub use icmp::Icmp;
pub use ipv4::{Ipv4, ip_protocol};
pub use ipv6::{EXTENSIONS_MAX, Ipv6, Upper};
pub use mac::{MacAddr, MacParseError};
pub use merge::{Fit, Merge, Segment};
pub use segment::{
    CUT_HEADER_MAX, Cut, CutError, CutKind, SEGMENTS_MAX, SegmentHeader, network_offset,
};
pub use tcp::Tcp;
pub use toeplitz::{HASH_KEY_MAX, HashKind, ReceiveHash};
pub use udp::Udp;
pub use vlan::{VlanId, VlanTag};
