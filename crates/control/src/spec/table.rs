//! The keys of ports: what they take, and how they are shown.

use std::collections::BTreeSet;
use std::path::PathBuf;

use port::OffloadSet;

use super::{AfXdpSpec, InterfaceSpec, PacketMmapSpec, PortSpec, UMEM_QUEUES_MAX, VhostUserSpec};
use crate::keys::Key;
use crate::values::{self, Offloads, VlanId, between};

/// The most queue pairs of a guest (virtio's limit is higher, QEMU's is this).
const GUEST_QUEUES_MAX: u16 = 128;
/// The kernel's limit for queues of a tap, and enough for every device.
const UPLINK_QUEUES_MAX: u16 = 256;
/// The longest path of a unix socket.
const SOCKET_PATH_MAX: usize = 107;
const NAME_MAX: usize = 64;
/// The longest interface name.
const IFNAME_MAX: usize = 15;
/// The most CPUs that a port is pinned to.
const CPUS_MAX: usize = 64;

pub(super) const COMMON: &[Key<PortSpec>] = &[
    Key {
        name: "name",
        allowed: "1 to 64 letters, digits, '.', '_' and '-'",
        set: |port, text| {
            port.name = Some(text).filter(|t| is_name(t))?.to_owned();
            Some(())
        },
        show: |port| Some(port.name.clone()),
    },
    Key {
        name: "vlan",
        allowed: "a VLAN from 1 to 4094",
        set: |port, text| {
            port.vlan = Some(text.parse().ok()?);
            Some(())
        },
        show: |port| port.vlan.map(|vlan| vlan.to_string()),
    },
    Key {
        name: "trunk",
        allowed: "VLANs from 1 to 4094 as A+B+C, each once",
        set: |port, text| {
            port.trunk = trunk(text)?;
            Some(())
        },
        show: |port| {
            let vlans: Vec<_> = port.trunk.iter().collect();
            (!vlans.is_empty()).then(|| values::joined(&vlans, "+"))
        },
    },
    Key {
        name: "wait",
        allowed: "on or off",
        set: |port, text| {
            port.wait = values::switch(text)?;
            Some(())
        },
        show: |port| port.wait.then(|| "on".to_owned()),
    },
    Key {
        name: "cpus",
        allowed: "up to 64 CPUs as A+B+C, each once",
        set: |port, text| {
            port.cpus = cpus(text)?;
            Some(())
        },
        show: |port| (!port.cpus.is_empty()).then(|| values::joined(&port.cpus, "+")),
    },
];

pub(super) const VHOST_USER: &[Key<VhostUserSpec>] = &[
    Key {
        name: "socket",
        allowed: "a path of 1 to 107 bytes",
        set: |port, text| {
            let fits = !text.is_empty() && text.len() <= SOCKET_PATH_MAX && !text.contains('\0');
            port.socket = Some(text).filter(|_| fits).map(PathBuf::from)?;
            Some(())
        },
        show: |port| Some(port.socket.display().to_string()),
    },
    Key {
        name: "mode",
        allowed: "server or client",
        set: |port, text| {
            port.mode = text.parse().ok()?;
            Some(())
        },
        show: |port| (port.mode != Default::default()).then(|| port.mode.to_string()),
    },
    Key {
        name: "queues",
        allowed: "a number of pairs from 1 to 128",
        set: |port, text| {
            port.queues = between(text, 1, GUEST_QUEUES_MAX)?;
            Some(())
        },
        show: |port| (port.queues != GUEST_QUEUES_MAX).then(|| port.queues.to_string()),
    },
    Key {
        name: "queue-size",
        allowed: "a number of descriptors from 1 to 32768",
        set: |port, text| {
            port.queue_size = between(text, 1, 32768)?;
            Some(())
        },
        show: |port| (port.queue_size != 32768).then(|| port.queue_size.to_string()),
    },
    Key {
        name: "mtu",
        allowed: "a number of bytes from 68 to 65535",
        set: |port, text| {
            port.mtu = Some(between(text, 68, u16::MAX)?);
            Some(())
        },
        show: |port| port.mtu.map(|mtu| mtu.to_string()),
    },
    Key {
        name: "mac",
        allowed: "the address of one station as 02:00:00:00:00:01",
        set: |port, text| {
            port.mac = Some(text.parse().ok()?);
            Some(())
        },
        show: |port| port.mac.map(|mac| mac.to_string()),
    },
    Key {
        name: "socket-mode",
        allowed: "permission bits in octal, 0 to 0777",
        set: |port, text| {
            port.socket_mode = text.parse().ok()?;
            Some(())
        },
        show: |port| (port.socket_mode != Default::default()).then(|| port.socket_mode.to_string()),
    },
    Key {
        name: "socket-group",
        allowed: "the name or number of a group",
        set: |port, text| {
            port.socket_group = Some(Some(text).filter(|t| is_name(t))?.to_owned());
            Some(())
        },
        show: |port| port.socket_group.clone(),
    },
    Key {
        name: "ring-reset",
        allowed: "on or off",
        set: |port, text| {
            port.ring_reset = values::switch(text)?;
            Some(())
        },
        show: |port| port.ring_reset.then(|| "on".to_owned()),
    },
    Key {
        name: "postcopy",
        allowed: "on or off",
        set: |port, text| {
            port.postcopy = values::switch(text)?;
            Some(())
        },
        show: |port| port.postcopy.then(|| "on".to_owned()),
    },
    Key {
        name: "offloads",
        allowed: Offloads::ALLOWED,
        set: |port, text| {
            port.offloads = text.parse().ok()?;
            Some(())
        },
        show: |port| (port.offloads != Offloads::default()).then(|| port.offloads.to_string()),
    },
];

pub(super) const INTERFACE: &[Key<InterfaceSpec>] = &[
    Key {
        name: "ifname",
        allowed: "1 to 15 bytes without '/', ':' and white space",
        set: |port, text| {
            port.ifname = Some(text).filter(|t| is_ifname(t))?.to_owned();
            Some(())
        },
        show: |port| Some(port.ifname.clone()),
    },
    Key {
        name: "queues",
        allowed: "a number of pairs from 1 to 256",
        set: |port, text| {
            port.queues = between(text, 1, UPLINK_QUEUES_MAX)?;
            Some(())
        },
        show: |port| (port.queues != 1).then(|| port.queues.to_string()),
    },
    Key {
        name: "spread",
        allowed: "on or off",
        set: |port, text| {
            port.spread = values::switch(text)?;
            Some(())
        },
        show: |port| port.spread.then(|| "on".to_owned()),
    },
    Key {
        name: "netns",
        allowed: "a network namespace: a name or a path",
        set: |port, text| {
            let fits = !text.is_empty() && !text.contains('\0');
            port.netns = Some(Some(text).filter(|_| fits)?.to_owned());
            Some(())
        },
        show: |port| port.netns.clone(),
    },
];

/// Of the uplinks that have a header in which intent is carried.
pub(super) const WITH_HEADER: &[Key<InterfaceSpec>] = &[Key {
    name: "offloads",
    allowed: Offloads::ALLOWED_OF_UPLINK,
    set: |port, text| {
        port.offloads = Offloads::of_uplink(text)?;
        Some(())
    },
    show: |port| (port.offloads != OffloadSet::ALL).then(|| Offloads::uplink_text(port.offloads)),
}];

pub(super) const AF_XDP: &[Key<AfXdpSpec>] = &[
    Key {
        name: "mode",
        allowed: "auto, zero-copy, copy or generic",
        set: |port, text| {
            port.mode = text.parse().ok()?;
            Some(())
        },
        show: |port| (port.mode != Default::default()).then(|| port.mode.to_string()),
    },
    Key {
        name: "xdp",
        allowed: "refuse or replace, when another XDP program is there",
        set: |port, text| {
            port.replace = values::either(text, "refuse", "replace")?;
            Some(())
        },
        show: |port| port.replace.then(|| "replace".to_owned()),
    },
    Key {
        name: "steer",
        allowed: "all, or mac to leave frames for other stations to the kernel",
        set: |port, text| {
            port.steer = text.parse().ok()?;
            Some(())
        },
        show: |port| (port.steer != Default::default()).then(|| port.steer.to_string()),
    },
    Key {
        name: "busy-poll",
        allowed: "on or off",
        set: |port, text| {
            port.busy_poll = values::switch(text)?;
            Some(())
        },
        show: |port| port.busy_poll.then(|| "on".to_owned()),
    },
    Key {
        name: "umem",
        allowed: "1 to 64 letters, digits, '.', '_' and '-'",
        set: |port, text| {
            port.umem = Some(Some(text).filter(|text| is_name(text))?.to_owned());
            Some(())
        },
        show: |port| port.umem.clone(),
    },
    Key {
        name: "umem-queues",
        allowed: "a number of queues from 1 to 64",
        set: |port, text| {
            port.umem_queues = Some(between(text, 1, UMEM_QUEUES_MAX)?);
            Some(())
        },
        show: |port| port.umem_queues.map(|queues| queues.to_string()),
    },
];

pub(super) const PACKET_MMAP: &[Key<PacketMmapSpec>] = &[
    Key {
        name: "block-size",
        allowed: "a number of bytes from 4096 to 16777216, a multiple of the page size",
        set: |port, text| {
            port.block_size = Some(between(text, 4096, 16 << 20)?).filter(|n| n % 4096 == 0);
            port.block_size.map(drop)
        },
        show: |port| port.block_size.map(|bytes| bytes.to_string()),
    },
    Key {
        name: "blocks",
        allowed: "a number of blocks from 2 to 4096",
        set: |port, text| {
            port.blocks = Some(between(text, 2, 4096)?);
            Some(())
        },
        show: |port| port.blocks.map(|blocks| blocks.to_string()),
    },
    Key {
        name: "retire-ms",
        allowed: "a number of milliseconds from 1 to 10000",
        set: |port, text| {
            port.retire_ms = Some(between(text, 1, 10_000)?);
            Some(())
        },
        show: |port| port.retire_ms.map(|ms| ms.to_string()),
    },
];

/// Whether `text` can name a port or a group.
pub(crate) fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

fn is_ifname(text: &str) -> bool {
    let bad = |b: u8| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace();
    let special = matches!(text, "." | "..");
    (1..=IFNAME_MAX).contains(&text.len()) && !special && !text.bytes().any(bad)
}

fn cpus(text: &str) -> Option<Vec<u16>> {
    let mut cpus = Vec::new();
    for part in text.split('+') {
        let cpu = between(part, 0, u16::MAX)?;
        if cpus.contains(&cpu) || cpus.len() == CPUS_MAX {
            return None;
        }
        cpus.push(cpu);
    }
    Some(cpus)
}

fn trunk(text: &str) -> Option<BTreeSet<VlanId>> {
    let mut vlans = BTreeSet::new();
    for part in text.split('+') {
        if !vlans.insert(part.parse().ok()?) {
            return None;
        }
    }
    Some(vlans)
}
