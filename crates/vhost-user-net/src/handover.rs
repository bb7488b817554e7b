//! A port's state on its way to another process, which goes on with it.
//!
//! ```text
//!  old: export ──► PortHandover + fds ──► new: adopt          both: prepared, the old one runs
//!       pause (transmitqs, then receiveqs)
//!       positions, or export again if it changed ──► set_positions, or adopt again
//!       leave                                        resume (receiveqs, then transmitqs)
//! ```
//!
//! **Trust.** Both processes are ours; what comes is checked as far as the session of a front end
//! is: an older or newer program may mean something that this one does not know.
//! **Compatibility.** Fields may be added: what is missing has its default, and what is unknown is
//! ignored. The meaning of a field never changes. Fds are named by their number beside the state.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::MemoryError;

/// Fds that go along with a state, in the order of their numbers.
#[derive(Debug, Default)]
pub struct Outgoing(Vec<OwnedFd>);

impl Outgoing {
    /// Takes a duplicate along and tells its number.
    ///
    /// # Errors
    ///
    /// The process has no fd left.
    pub fn add(&mut self, fd: impl AsFd) -> io::Result<u32> {
        let number = u32::try_from(self.0.len()).map_err(io::Error::other)?;
        self.0.push(fd.as_fd().try_clone_to_owned()?);
        Ok(number)
    }

    /// As [`Self::add`] for what may be missing.
    ///
    /// # Errors
    ///
    /// See there.
    pub fn add_some(&mut self, fd: Option<&Arc<OwnedFd>>) -> io::Result<Option<u32>> {
        fd.map(|fd| self.add(fd)).transpose()
    }

    /// The fds.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.0
    }
}

/// Fds that came with a state. Those that nobody takes are closed with it.
#[derive(Debug, Default)]
pub struct Incoming(Vec<Option<OwnedFd>>);

impl From<Vec<OwnedFd>> for Incoming {
    fn from(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }
}

impl Incoming {
    /// The fd of a number, which is given once.
    ///
    /// # Errors
    ///
    /// [`AdoptError::NoFd`] if it did not come, or was taken already.
    pub fn take(&mut self, number: u32) -> Result<OwnedFd, AdoptError> {
        let place = usize::try_from(number).ok().and_then(|number| self.0.get_mut(number));
        place.and_then(Option::take).ok_or(AdoptError::NoFd(number))
    }

    /// As [`Self::take`] for what may be missing.
    ///
    /// # Errors
    ///
    /// See there.
    pub fn take_some(&mut self, number: Option<u32>) -> Result<Option<Arc<OwnedFd>>, AdoptError> {
        number.map(|number| self.take(number).map(Arc::new)).transpose()
    }
}

/// The state of a port.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PortHandover {
    /// The listening socket, of a server.
    pub listener: Option<ListenerHandover>,
    /// The front end, if one is connected.
    pub link: Option<LinkHandover>,
    /// The record of ring positions, locked by whoever has this fd.
    pub record: Option<u32>,
}

/// A listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerHandover {
    /// The socket.
    pub fd: u32,
    /// Device of its file.
    pub device: u64,
    /// Inode of its file.
    pub inode: u64,
}

/// A connection and what was agreed on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkHandover {
    /// The connected socket.
    pub stream: u32,
    /// The bytes of a message that has not arrived whole.
    pub input: Vec<u8>,
    /// The fds that came with them.
    pub input_fds: Vec<u32>,
    /// Bytes that the front end has still to take.
    pub output: Vec<u8>,
    /// Refusals so far.
    pub refusals: u32,
    /// Others that came meanwhile.
    pub sent_away: u32,
    /// The session.
    pub session: SessionHandover,
}

/// The state of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionHandover {
    /// The device features, if they were negotiated.
    pub features: Option<u64>,
    /// The offloads that were offered, as feature bits; an older program does not say.
    pub offloads: Option<u64>,
    /// The protocol features, if they were negotiated.
    pub protocol_features: Option<u64>,
    /// The MTU in force.
    pub mtu: u16,
    /// The device status as the front end set it.
    pub status: u8,
    /// The memory.
    pub regions: Vec<RegionHandover>,
    /// The rings.
    pub rings: Vec<RingHandover>,
    /// Where requests of the back end will go.
    pub backend_channel: Option<u32>,
    /// The log of written pages, if there is one.
    pub log: Option<LogHandover>,
    /// The in-flight file, if there is one.
    pub inflight: Option<InflightHandover>,
}

/// The in-flight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct InflightHandover {
    /// The file.
    pub fd: u32,
    /// Bytes of all regions.
    pub bytes: u64,
    /// Where they start in the file.
    pub offset: u64,
    /// Rings.
    pub queues: u16,
    /// Entries of each ring.
    pub queue_size: u16,
}

/// The log of written pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LogHandover {
    /// The bitmap's file.
    pub fd: Option<u32>,
    /// Bytes of the bitmap.
    pub bytes: u64,
    /// Where it starts in its file.
    pub offset: u64,
    /// What is signalled after pages were noted.
    pub call: Option<u32>,
}

/// One memory region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RegionHandover {
    /// Its file.
    pub fd: u32,
    /// Where the guest sees it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front end sees it.
    pub user: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// How often the front end added it.
    pub uses: u16,
}

/// The state of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RingHandover {
    /// The ring.
    pub index: u16,
    /// Its size.
    pub size: Option<u16>,
    /// Front-end addresses: descriptors, used ring, available ring.
    pub addr: Option<[u64; 3]>,
    /// Flags of the addresses.
    pub addr_flags: u32,
    /// Guest address of the log of the used ring.
    pub log: u64,
    /// The position, as messages encode it.
    pub base: Option<u32>,
    /// What the front end said about enabling.
    pub enabled: Option<bool>,
    /// The kick eventfd.
    pub kick: Option<u32>,
    /// The call eventfd.
    pub call: Option<u32>,
    /// The err eventfd.
    pub err: Option<u32>,
    /// Whether it is started.
    pub started: bool,
    /// Whether the driver broke it.
    pub broken: bool,
    /// Whether it ran since it was started.
    pub resumed: bool,
    /// Whether the session knows better than any record where it is.
    pub known: bool,
    /// Milliseconds that the front end still has to say whether it is enabled.
    pub held_ms: Option<u64>,
    /// The front end took too long for that.
    pub impatient: bool,
}

/// Where a ring stopped, as messages encode it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RingBase {
    /// The ring.
    pub index: u16,
    /// The position.
    pub base: Option<u32>,
}

/// Why a state cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A number without an fd.
    #[error("fd {0} did not come along")]
    NoFd(u32),
    /// Features that are not offered here.
    #[error("feature bits {0:#x} are in use, which this program does not offer")]
    Features(u64),
    /// Protocol features that are not offered here.
    #[error("protocol feature bits {0:#x} are in use, which this program does not offer")]
    ProtocolFeatures(u64),
    /// A ring beyond the port's queues.
    #[error("ring {ring} is in use, {limit} rings are possible")]
    Ring {
        /// The ring.
        ring: u16,
        /// How many are possible.
        limit: u32,
    },
    /// A ring of another size than is allowed.
    #[error("ring {ring} has {size} entries, at most {limit} are allowed")]
    Size {
        /// The ring.
        ring: u16,
        /// Its entries.
        size: u16,
        /// The limit.
        limit: u16,
    },
    /// The log of written pages.
    #[error("the log of written pages: {0}")]
    Log(String),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A half message that is none.
    #[error("the unfinished message is not one")]
    Input,
    /// Who listens is not the one who should.
    #[error("a {0} port takes over from one of the other kind")]
    Role(&'static str),
    /// The kernel's answer.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        error: io::Error,
    },
}
