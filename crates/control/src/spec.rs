//! A port as it is asked for: `KIND:key=value,key=value`, or a `[[port]]` table.
//!
//! **Limits.** Names have at most 64 characters, socket paths 107 bytes (the kernel's limit).
//! **Not supported.** The kinds `af-xdp` and `packet-mmap`.

mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::keys::{self, KeyError};
use crate::suggest::did_you_mean;
use crate::values::{MacAddress, SocketMode, SocketRole, VlanId};

pub use crate::keys::KeyError as SpecKeyError;
pub(crate) use table::is_name;

/// The kinds of ports, and those that later versions will have.
const KINDS: [&str; 2] = ["tap", "vhost-user"];
const KINDS_TO_COME: [&str; 2] = ["af-xdp", "packet-mmap"];

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
    /// What it is made of.
    pub kind: PortKind,
}

/// What a port is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortKind {
    /// A guest behind a vhost-user socket.
    VhostUser(VhostUserSpec),
    /// A tap interface of the host.
    Tap(TapSpec),
}

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
    /// Permission bits of the socket file.
    pub socket_mode: SocketMode,
    /// Group of the socket file.
    pub socket_group: Option<String>,
    /// Offer `VIRTIO_F_RING_RESET`: for front ends that forward it, which QEMU does not.
    pub ring_reset: bool,
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
            socket_mode: SocketMode::default(),
            socket_group: None,
            ring_reset: false,
        }
    }
}

/// The keys of `tap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    /// The interface.
    pub ifname: String,
    /// Queue pairs.
    pub queues: u16,
    /// The network namespace it is in.
    pub netns: Option<String>,
}

impl Default for TapSpec {
    fn default() -> Self {
        Self { ifname: String::new(), queues: 1, netns: None }
    }
}

impl PortSpec {
    /// A port made from keys and values, wherever they were written.
    pub(crate) fn build<'a>(
        kind: &str,
        settings: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SpecError> {
        let kind = match kind {
            "vhost-user" => PortKind::VhostUser(VhostUserSpec::default()),
            "tap" => PortKind::Tap(TapSpec::default()),
            other => return Err(SpecError::unknown_kind(other)),
        };
        let mut spec =
            Self { name: String::new(), vlan: None, trunk: BTreeSet::new(), wait: false, kind };
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

    fn set(&mut self, key: &str, value: &str) -> Result<(), KeyError> {
        if let Some(done) = keys::set(table::COMMON, self, key, value) {
            return done;
        }
        let done = match &mut self.kind {
            PortKind::VhostUser(port) => keys::set(table::VHOST_USER, port, key, value),
            PortKind::Tap(port) => keys::set(table::TAP, port, key, value),
        };
        done.unwrap_or_else(|| {
            Err(KeyError::unknown(key, self.kind.name(), &self.kind.known_keys()))
        })
    }

    fn complete(&self) -> Result<(), KeyError> {
        let of = self.kind.name();
        let missing = |key, allowed| Err(KeyError::Missing { of, key, allowed });
        if self.name.is_empty() {
            return missing("name", "NAME");
        }
        match &self.kind {
            PortKind::VhostUser(port) if port.socket.as_os_str().is_empty() => {
                missing("socket", "PATH")
            }
            PortKind::Tap(port) if port.ifname.is_empty() => missing("ifname", "INTERFACE"),
            PortKind::VhostUser(_) | PortKind::Tap(_) => Ok(()),
        }
    }

    /// What no other port may use too: a socket or an interface.
    pub fn resource(&self) -> String {
        match &self.kind {
            PortKind::VhostUser(port) => format!("socket {}", port.socket.display()),
            PortKind::Tap(TapSpec { ifname, netns: None, .. }) => format!("interface {ifname}"),
            PortKind::Tap(TapSpec { ifname, netns: Some(netns), .. }) => {
                format!("interface {ifname} in namespace {netns}")
            }
        }
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
    /// The kind's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::VhostUser(_) => "vhost-user",
            Self::Tap(_) => "tap",
        }
    }

    fn known_keys(&self) -> Vec<&'static str> {
        let common = keys::names(table::COMMON);
        match self {
            Self::VhostUser(_) => common.chain(keys::names(table::VHOST_USER)).collect(),
            Self::Tap(_) => common.chain(keys::names(table::TAP)).collect(),
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
        let own: Vec<_> = match &self.kind {
            PortKind::VhostUser(port) => keys::shown(table::VHOST_USER, port).collect(),
            PortKind::Tap(port) => keys::shown(table::TAP, port).collect(),
        };
        let mut comma = "";
        for (key, value) in keys::shown(table::COMMON, self).chain(own) {
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
    /// A later version will have it.
    #[error("kind {kind} is not supported in this version; use {}", KINDS.join(" or "))]
    NotYet {
        /// The kind.
        kind: String,
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
            Self::Key(KeyError::Value { key, .. } | KeyError::Missing { key, .. }) => Some(key),
            Self::Form | Self::UnknownKind { .. } | Self::NotYet { .. } => None,
        }
    }

    fn unknown_kind(kind: &str) -> Self {
        if KINDS_TO_COME.contains(&kind) {
            return Self::NotYet { kind: kind.to_owned() };
        }
        Self::UnknownKind { kind: kind.to_owned(), hint: did_you_mean(kind, KINDS.into_iter()) }
    }
}
