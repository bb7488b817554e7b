//! What each kind of port is made of.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::values::{MacAddress, Offloads, SocketMode, SocketRole, Steer, XdpMode};

/// The keys of `vhost-user`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostUserSpec {
    /// The socket.
    pub socket: PathBuf,
    /// Who opens it.
    pub mode: SocketRole,
    /// The most queue pairs.
    pub queues: u16,
    /// The largest ring.
    pub queue_size: u16,
    /// The largest frame without its Ethernet header.
    pub mtu: Option<u16>,
    /// The guest's address, as a static entry.
    pub mac: Option<MacAddress>,
    /// Whether it may send under its own addresses only.
    pub antispoof: bool,
    /// Its IP addresses, with `antispoof`; any if there are none.
    pub ips: BTreeSet<IpAddr>,
    /// Permission bits of the socket file.
    pub socket_mode: SocketMode,
    /// Group of the socket file.
    pub socket_group: Option<String>,
    /// Offer `VIRTIO_F_RING_RESET`: for front ends that forward it, which QEMU does not.
    pub ring_reset: bool,
    /// Offer postcopy migration to here: only for front ends that are trusted with this process.
    pub postcopy: bool,
    /// Offloads to offer, in both directions.
    pub offloads: Offloads,
}

impl Default for VhostUserSpec {
    fn default() -> Self {
        Self {
            socket: PathBuf::new(),
            mode: SocketRole::default(),
            queues: 128,
            queue_size: 32768,
            mtu: None,
            mac: None,
            antispoof: false,
            ips: BTreeSet::new(),
            socket_mode: SocketMode::default(),
            socket_group: None,
            ring_reset: false,
            postcopy: false,
            offloads: Offloads::default(),
        }
    }
}

/// The keys that all uplinks have: those of `tap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceSpec {
    /// The interface.
    pub ifname: String,
    /// Queue pairs.
    pub queues: u16,
    /// Whether the flows of each queue are spread over the workers.
    pub spread: bool,
    /// The network namespace it is in.
    pub netns: Option<String>,
}

impl Default for InterfaceSpec {
    fn default() -> Self {
        Self { ifname: String::new(), queues: 1, spread: false, netns: None }
    }
}

impl fmt::Display for InterfaceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interface {}", self.ifname)?;
        match &self.netns {
            Some(netns) => write!(f, " in namespace {netns}"),
            None => Ok(()),
        }
    }
}

/// The keys of `af-xdp`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AfXdpSpec {
    /// The interface.
    pub interface: InterfaceSpec,
    /// How frames get from the driver to us.
    pub mode: XdpMode,
    /// Whether an XDP program of somebody else is replaced.
    pub replace: bool,
    /// Which frames are taken from the kernel.
    pub steer: Steer,
    /// Whether the kernel polls the device when we ask, and only then.
    pub busy_poll: bool,
}

/// The keys of `packet-mmap`; what is not given has the uplink's default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PacketMmapSpec {
    /// The interface.
    pub interface: InterfaceSpec,
    /// Bytes of a block of the receive ring.
    pub block_size: Option<u32>,
    /// Blocks of the receive ring.
    pub blocks: Option<u32>,
    /// Milliseconds until a block that is not full is handed over.
    pub retire_ms: Option<u32>,
}
