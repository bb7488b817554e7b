//! Which kinds of ports can be opened, now and later, and so what is kept for them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use control::{PortKind, PortSpec, SocketRole};

use super::{Asked, folder_of};

/// The kinds of uplinks, as `--allow-kind` takes them, and what they need of root.
const KINDS: [(&str, &str); 3] = [
    ("tap", "CAP_NET_ADMIN"),
    ("af-xdp", "CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF"),
    ("packet-mmap", "CAP_NET_RAW and CAP_NET_ADMIN"),
];

/// What ports may need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Grants {
    pub(super) tap: bool,
    pub(super) af_xdp: bool,
    pub(super) packet_mmap: bool,
    /// Interfaces in other network namespaces.
    pub(super) netns: bool,
    pub(super) macvtap: bool,
    /// Sockets get another group.
    pub(super) foreign_group: bool,
    /// Sockets are in folders of other users, or made by them.
    pub(super) foreign_folder: bool,
}

impl Grants {
    /// What these ports and those that may come later need. A switch that starts without ports
    /// gets all of them later, and keeps what they need.
    pub(super) fn of(asked: &Asked<'_>, ports: &[&PortSpec]) -> Self {
        let unknown = ports.is_empty() && asked.allow_kinds.is_empty();
        let later = |name: &str| unknown || asked.allow_kinds.iter().any(|kind| kind == name);
        let has = |name: &str| later(name) || ports.iter().any(|port| port.kind.name() == name);
        let in_netns = |port: &&PortSpec| port.kind.interface().is_some_and(|i| i.netns.is_some());
        let guests = || {
            ports.iter().filter_map(|port| match &port.kind {
                PortKind::VhostUser(guest) => Some(guest),
                PortKind::Tap(_) | PortKind::AfXdp(_) | PortKind::PacketMmap(_) => None,
            })
        };
        let folders = asked.allow_dirs.iter().any(|folder| is_foreign(folder));
        Self {
            tap: has("tap"),
            af_xdp: has("af-xdp"),
            packet_mmap: has("packet-mmap"),
            netns: later("netns") || ports.iter().any(in_netns),
            macvtap: false,
            foreign_group: unknown || guests().any(|guest| guest.socket_group.is_some()),
            foreign_folder: unknown
                || folders
                || is_foreign(&folder_of(asked.control))
                || guests().any(|guest| {
                    guest.mode == SocketRole::Client || is_foreign(&folder_of(&guest.socket))
                }),
        }
    }

    /// Whether any kind of uplink may be opened.
    pub(super) fn uplinks(&self) -> bool {
        self.tap || self.af_xdp || self.packet_mmap
    }

    /// Whether such a port may be opened.
    pub(super) fn permit(&self, spec: &PortSpec) -> Result<(), String> {
        let granted = match &spec.kind {
            PortKind::VhostUser(_) => return Ok(()),
            PortKind::Tap(_) => self.tap,
            PortKind::AfXdp(_) => self.af_xdp,
            PortKind::PacketMmap(_) => self.packet_mmap,
        };
        let name = spec.kind.name();
        if !granted {
            let needs = KINDS.iter().find(|(kind, _)| *kind == name).map_or("", |(_, needs)| needs);
            return Err(format!(
                "the sandbox gave up {needs}, because no port needed it at start: start with a \
                 {name} port, with --allow-kind {name}, or with --sandbox off"
            ));
        }
        if spec.kind.interface().is_some_and(|i| i.netns.is_some()) && !self.netns {
            return Err("the sandbox gave up CAP_SYS_ADMIN, because no port was in another \
                        namespace at start: start with one that is, with --allow-kind netns, or \
                        with --sandbox off"
                .to_owned());
        }
        Ok(())
    }
}

pub(super) const NO_GROUP: &str = "the sandbox gave up CAP_CHOWN, because no port had a \
                                   socket-group at start: start with one that has, or with \
                                   --sandbox off";

/// Whether a folder is another user's: root may write there only by `CAP_DAC_OVERRIDE`.
fn is_foreign(folder: &Path) -> bool {
    let owner = std::fs::metadata(folder).map(|found| found.uid());
    owner.is_ok_and(|owner| owner != rustix::process::geteuid().as_raw())
}
