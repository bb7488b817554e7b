//! A port as it is asked for: `KIND:key=value,key=value`, or a `[[port]]` table.
//!
//! **Limits.** Names have at most 64 characters, socket paths 107 bytes (the kernel's limit).

mod kinds;
mod limits;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::keys::{self, KeyError};
use crate::suggest::did_you_mean;
use crate::values::{Offloads, VlanId};

pub use crate::keys::KeyError as SpecKeyError;
pub use kinds::{
    AfXdpSpec, InterfaceSpec, PacketMmapSpec, UMEM_QUEUES_MAX, VhostUserSpec, umem_rooms,
};
pub use limits::LimitsSpec;
pub(crate) use table::is_name;

/// The kinds of ports.
pub const KINDS: [&str; 4] = ["tap", "vhost-user", "af-xdp", "packet-mmap"];

/// Why `af-xdp` has no `offloads`.
const NO_HEADER: &str = "the kernel and the driver say what is left undone there";

/// A port as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Its name, unique in a switch.
    pub name: String,
    /// The access VLAN, or the native one beside a trunk.
    pub vlan: Option<VlanId>,
    /// The VLANs that pass with a tag.
    pub trunk: BTreeSet<VlanId>,
    /// Whether the port may come into being later, when what it needs is missing at start.
    pub wait: bool,
    /// The CPUs whose workers serve its pairs in turn; any if there are none.
    pub cpus: Vec<u16>,
    /// What it may send.
    pub limits: LimitsSpec,
    /// What it is made of.
    pub kind: PortKind,
}

/// What a port is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortKind {
    /// A guest behind a vhost-user socket.
    VhostUser(VhostUserSpec),
    /// A tap or macvtap interface of the host.
    Tap(InterfaceSpec),
    /// An interface of the host by `AF_XDP`.
    AfXdp(AfXdpSpec),
    /// An interface of the host by `packet_mmap`.
    PacketMmap(PacketMmapSpec),
}

impl PortSpec {
    /// A port made from keys and values, wherever they were written.
    pub(crate) fn build<'a>(
        kind: &str,
        settings: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SpecError> {
        let kind = PortKind::named(kind).ok_or_else(|| SpecError::unknown_kind(kind))?;
        let mut spec = Self {
            name: String::new(),
            vlan: None,
            trunk: BTreeSet::new(),
            wait: false,
            cpus: Vec::new(),
            limits: LimitsSpec::default(),
            kind,
        };
        let mut seen = BTreeSet::new();
        for (key, value) in settings {
            spec.set(key, value)?;
            if !seen.insert(key) {
                return Err(KeyError::Twice(key.to_owned()).into());
            }
        }
        spec.complete()?;
        Ok(spec)
    }

    /// The keys that do not have their defaults, with their values.
    pub fn keys(&self) -> Vec<(&'static str, String)> {
        self.shown().collect()
    }

    /// The port of a kind with these keys: the way back from [`Self::keys`], which knows no comma.
    ///
    /// # Errors
    ///
    /// [`SpecError`] as for a port that was written.
    pub fn from_keys<'a>(
        kind: &str,
        keys: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SpecError> {
        Self::build(kind, keys)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), KeyError> {
        let common = keys::set(table::COMMON, self, key, value)
            .or_else(|| keys::set(limits::LIMITS, self, key, value));
        if let Some(done) = common {
            return done;
        }
        let done = match &mut self.kind {
            PortKind::VhostUser(port) => keys::set(table::VHOST_USER, port, key, value)
                .or_else(|| keys::set(limits::SOURCES, port, key, value)),
            PortKind::Tap(port) => keys::set(table::INTERFACE, port, key, value)
                .or_else(|| keys::set(table::WITH_HEADER, port, key, value)),
            PortKind::AfXdp(port) => keys::set(table::INTERFACE, &mut port.interface, key, value)
                .or_else(|| keys::set(table::AF_XDP, port, key, value)),
            PortKind::PacketMmap(port) => {
                keys::set(table::INTERFACE, &mut port.interface, key, value)
                    .or_else(|| keys::set(table::WITH_HEADER, &mut port.interface, key, value))
                    .or_else(|| keys::set(table::PACKET_MMAP, port, key, value))
            }
        };
        done.unwrap_or_else(|| {
            let of = self.kind.name();
            if matches!((&self.kind, key), (PortKind::AfXdp(_), "offloads")) {
                return Err(KeyError::NotOf { key: "offloads", of, why: NO_HEADER });
            }
            Err(KeyError::unknown(key, of, &self.kind.known_keys()))
        })
    }

    fn complete(&self) -> Result<(), KeyError> {
        let of = self.kind.name();
        let missing = |key, allowed| Err(KeyError::Missing { of, key, allowed });
        if self.name.is_empty() {
            return missing("name", "NAME");
        }
        match (&self.kind, self.kind.interface()) {
            (PortKind::VhostUser(port), _) if port.socket.as_os_str().is_empty() => {
                missing("socket", "PATH")
            }
            (_, Some(interface)) if interface.ifname.is_empty() => missing("ifname", "INTERFACE"),
            (PortKind::AfXdp(port), _) => port.check_umem().and_then(|()| self.check_limits()),
            _ => self.check_limits(),
        }
    }

    /// What no other port may use too: a socket or an interface.
    pub fn resource(&self) -> String {
        match &self.kind {
            PortKind::VhostUser(port) => format!("socket {}", port.socket.display()),
            PortKind::Tap(interface)
            | PortKind::AfXdp(AfXdpSpec { interface, .. })
            | PortKind::PacketMmap(PacketMmapSpec { interface, .. }) => interface.to_string(),
        }
    }

    /// The keys that do not have their default.
    fn shown(&self) -> impl Iterator<Item = (&'static str, String)> + '_ {
        let common = keys::shown(table::COMMON, self);
        common.chain(self.kind.shown()).chain(keys::shown(limits::LIMITS, self))
    }

    /// The same port with a socket path that does not depend on the current folder.
    ///
    /// # Errors
    ///
    /// The current folder cannot be found.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        if let PortKind::VhostUser(port) = &mut self.kind {
            port.socket = std::path::absolute(&port.socket)?;
        }
        Ok(self)
    }
}

impl PortKind {
    /// A kind with its defaults.
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "vhost-user" => Self::VhostUser(VhostUserSpec::default()),
            "tap" => Self::Tap(InterfaceSpec::default()),
            "af-xdp" => Self::AfXdp(AfXdpSpec::default()),
            "packet-mmap" => Self::PacketMmap(PacketMmapSpec::default()),
            _ => return None,
        })
    }

    /// The kind's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::VhostUser(_) => "vhost-user",
            Self::Tap(_) => "tap",
            Self::AfXdp(_) => "af-xdp",
            Self::PacketMmap(_) => "packet-mmap",
        }
    }

    /// The interface that it is made of, if it is an uplink.
    pub fn interface(&self) -> Option<&InterfaceSpec> {
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(interface) => Some(interface),
            Self::AfXdp(port) => Some(&port.interface),
            Self::PacketMmap(port) => Some(&port.interface),
        }
    }

    /// Queue pairs: of a guest the most that it may have.
    pub fn pairs(&self) -> u16 {
        match self {
            Self::VhostUser(guest) => guest.queues,
            Self::Tap(interface)
            | Self::AfXdp(AfXdpSpec { interface, .. })
            | Self::PacketMmap(PacketMmapSpec { interface, .. }) => interface.queues,
        }
    }

    /// What may be left undone there, as it is written; empty where nobody is asked.
    pub fn offloads(&self) -> String {
        match self {
            Self::VhostUser(guest) => guest.offloads.to_string(),
            Self::AfXdp(_) => String::new(),
            Self::Tap(interface) | Self::PacketMmap(PacketMmapSpec { interface, .. }) => {
                Offloads::uplink_text(interface.offloads)
            }
        }
    }

    fn known_keys(&self) -> Vec<&'static str> {
        let common = keys::names(table::COMMON).chain(keys::names(limits::LIMITS));
        let interface = keys::names(table::INTERFACE);
        match self {
            Self::VhostUser(_) => {
                let guest = keys::names(table::VHOST_USER).chain(keys::names(limits::SOURCES));
                common.chain(guest).collect()
            }
            Self::Tap(_) => {
                common.chain(interface).chain(keys::names(table::WITH_HEADER)).collect()
            }
            Self::AfXdp(_) => common.chain(interface).chain(keys::names(table::AF_XDP)).collect(),
            Self::PacketMmap(_) => {
                let own = keys::names(table::WITH_HEADER).chain(keys::names(table::PACKET_MMAP));
                common.chain(interface).chain(own).collect()
            }
        }
    }

    /// The keys of the kind that do not have their default.
    fn shown(&self) -> Vec<(&'static str, String)> {
        let interface = self.interface().map(|port| keys::shown(table::INTERFACE, port));
        let interface = interface.into_iter().flatten();
        match self {
            Self::VhostUser(port) => keys::shown(table::VHOST_USER, port)
                .chain(keys::shown(limits::SOURCES, port))
                .collect(),
            Self::Tap(port) => interface.chain(keys::shown(table::WITH_HEADER, port)).collect(),
            Self::AfXdp(port) => interface.chain(keys::shown(table::AF_XDP, port)).collect(),
            Self::PacketMmap(port) => interface
                .chain(keys::shown(table::WITH_HEADER, &port.interface))
                .chain(keys::shown(table::PACKET_MMAP, port))
                .collect(),
        }
    }
}

impl FromStr for PortSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        if kind.is_empty() || kind.contains(['=', ',']) {
            return Err(SpecError::Form);
        }
        let mut settings = Vec::new();
        for part in rest.split(',').filter(|_| !rest.is_empty()) {
            settings.push(part.split_once('=').ok_or(SpecError::Form)?);
        }
        Self::build(kind, settings)
    }
}

impl fmt::Display for PortSpec {
    /// The SPEC that gives this port again, without defaults.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.kind.name())?;
        let mut comma = "";
        for (key, value) in self.keys() {
            write!(f, "{comma}{key}={value}")?;
            comma = ",";
        }
        Ok(())
    }
}

/// A message without line breaks and other control characters of what somebody wrote.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// What is wrong with a port that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// It has no known shape.
    #[error("a port is KIND:key=value,key=value; KIND is {}", KINDS.join(" or "))]
    Form,
    /// There is no such kind.
    #[error("unknown kind {kind:?}{hint}; known kinds are {}", KINDS.join(", "))]
    UnknownKind {
        /// What was written.
        kind: String,
        /// A suggestion, or nothing.
        hint: String,
    },
    /// A key or its value.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl SpecError {
    /// The key that is wrong or missing, if it is one.
    pub(crate) fn key(&self) -> Option<&str> {
        match self {
            Self::Key(KeyError::Unknown { key, .. } | KeyError::Type { key, .. }) => Some(key),
            Self::Key(KeyError::Twice(key)) => Some(key),
            Self::Key(
                KeyError::Value { key, .. }
                | KeyError::Missing { key, .. }
                | KeyError::NotOf { key, .. },
            ) => Some(key),
            Self::Form | Self::UnknownKind { .. } => None,
        }
    }

    fn unknown_kind(kind: &str) -> Self {
        Self::UnknownKind { kind: kind.to_owned(), hint: did_you_mean(kind, KINDS.into_iter()) }
    }
}
