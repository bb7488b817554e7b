//! What a port is made from.

use std::path::PathBuf;

use port::OffloadSet;

use super::late;
use crate::fds::FdPool;
use crate::session::SessionSettings;

/// Who makes the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SocketMode {
    /// We listen, front ends come.
    #[default]
    Server,
    /// The front end listens; we connect, for ever.
    Client,
}

/// What a port is made from.
#[derive(Debug, Clone)]
pub struct PortSettings {
    /// Name in the log.
    pub name: String,
    /// The socket's path.
    pub socket: PathBuf,
    /// Who listens.
    pub mode: SocketMode,
    /// Permissions of the socket that we make.
    pub socket_mode: u32,
    /// Group of the socket that we make: a name from /etc/group or a number.
    pub socket_group: Option<String>,
    /// The most queue pairs.
    pub queues: u16,
    /// The largest ring.
    pub queue_size: u16,
    /// The largest MTU, without Ethernet header.
    pub mtu: u16,
    /// How often a delivery looks again at a receiveq without room.
    pub retries: u32,
    /// Offer `VIRTIO_F_RING_RESET`: see [`SessionSettings::ring_reset`].
    pub ring_reset: bool,
    /// The offloads to offer, in both directions.
    pub offloads: OffloadSet,
    /// Make segments of one flow into large frames for guests that take these.
    pub coalesce: bool,
    /// Offer postcopy migration to here: see [`SessionSettings::postcopy`].
    pub postcopy: bool,
    /// What fds of front ends may be kept of.
    pub fds: FdPool,
    /// Where ring positions are kept for a successor of this process: see
    /// [`crate::record::prepare_state_dir`]. Without it they are kept for later connections only.
    pub state_dir: Option<PathBuf>,
}

impl PortSettings {
    /// A server on `socket` with the defaults of the command line.
    pub fn server(name: impl Into<String>, socket: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            socket: socket.into(),
            mode: SocketMode::Server,
            socket_mode: 0o660,
            socket_group: None,
            queues: 128,
            queue_size: 32768,
            mtu: u16::MAX,
            retries: virtio_net::DEFAULT_RETRIES,
            ring_reset: false,
            offloads: OffloadSet::ALL,
            coalesce: true,
            postcopy: false,
            fds: FdPool::default(),
            state_dir: None,
        }
    }

    /// What bounds a session of this port.
    pub(super) fn session(&self) -> SessionSettings {
        SessionSettings {
            queues: self.queues,
            queue_size: self.queue_size,
            mtu: self.mtu,
            ring_reset: self.ring_reset,
            offloads: self.offloads,
            postcopy: self.postcopy && late::is_possible(&self.name),
        }
    }
}
