//! Waiting for an interface that is not there.

use std::os::fd::BorrowedFd;

use crate::sys::InterfaceSocket;

use super::watch::Watch;
use super::{InterfaceError, Namespace};

/// Waits for an interface of a namespace. It keeps the namespace alive: drop it when the
/// namespace is no more [`Self::is_current`].
#[derive(Debug)]
pub struct Finder {
    namespace: Namespace,
    ifname: String,
    socket: InterfaceSocket,
    watch: Watch,
}

impl Finder {
    /// Waits for interface `ifname` of the namespace `netns` (a name or a path; none is ours).
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered, or there is no room for a socket.
    pub fn new(ifname: &str, netns: Option<&str>) -> Result<Self, InterfaceError> {
        let namespace = Namespace::open(netns)?;
        let open = || -> std::io::Result<_> { Ok((InterfaceSocket::new()?, Watch::open()?)) };
        let (socket, watch) =
            namespace.run(open)?.map_err(|e| InterfaceError::system("watch interfaces", e))?;
        Ok(Self { namespace, ifname: ifname.to_owned(), socket, watch })
    }

    /// Becomes readable when something happens to an interface of the namespace: call
    /// [`Self::found`].
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.watch.fd()
    }

    /// Reads what happened; whether the interface exists now.
    pub fn found(&self) -> bool {
        let _ = self.watch.read(0);
        matches!(self.socket.index(&self.ifname), Ok(Some(_)))
    }

    /// Whether the name of the namespace still names the one that is waited in.
    pub fn is_current(&self) -> bool {
        self.namespace.is_current()
    }
}
