//! What each kind of port is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use port::OffloadSet;

use super::{PortKind, PortSpec};
use crate::keys::KeyError;
use crate::values::{MacAddress, Offloads, SocketMode, SocketRole, Steer, XdpMode};

/// The most queues of one UMEM.
pub const UMEM_QUEUES_MAX: u16 = 64;

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

/// The keys that all uplinks have; `tap` has no others.
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
    /// What is left to the kernel there, and it to us; of `AF_XDP` always all.
    pub offloads: OffloadSet,
}

impl Default for InterfaceSpec {
    fn default() -> Self {
        Self {
            ifname: String::new(),
            queues: 1,
            spread: false,
            netns: None,
            offloads: OffloadSet::ALL,
        }
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
    /// The memory for frames, by the name under which other ports share it.
    pub umem: Option<String>,
    /// For how many queues there is room in it, if this port comes first.
    pub umem_queues: Option<u16>,
}

impl AfXdpSpec {
    /// What is said of the memory must fit together.
    pub(super) fn check_umem(&self) -> Result<(), KeyError> {
        if self.umem_queues.is_some() && self.umem.is_none() {
            return Err(KeyError::Missing { of: "umem-queues", key: "umem", allowed: "NAME" });
        }
        if self.umem.is_some() && self.mode == XdpMode::ZeroCopy {
            let why = "nobody can see when a device is done with memory that others share";
            return Err(KeyError::NotOf { key: "umem", of: "mode=zero-copy", why });
        }
        Ok(())
    }
}

/// For how many queues there must be room in each UMEM that these ports name: what one of them
/// asks for, or all of their queues. None has room for more than [`UMEM_QUEUES_MAX`].
pub fn umem_rooms<'a>(ports: impl IntoIterator<Item = &'a PortSpec>) -> BTreeMap<String, u16> {
    let mut rooms: BTreeMap<&str, (u16, Option<u16>)> = BTreeMap::new();
    for port in ports {
        let PortKind::AfXdp(port) = &port.kind else { continue };
        let Some(name) = &port.umem else { continue };
        let (all, asked) = rooms.entry(name).or_default();
        *all = all.saturating_add(port.interface.queues);
        *asked = port.umem_queues.max(*asked);
    }
    let room = |(all, asked): (u16, Option<u16>)| asked.unwrap_or(all).min(UMEM_QUEUES_MAX);
    rooms.into_iter().map(|(name, of)| (name.to_owned(), room(of))).collect()
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
