//! What the service manager is told (`sd_notify`): that the switch serves, and which process goes
//! on with it after a take-over.
//!
//! ```text
//!   start       READY=1 MAINPID=self                    systemd unit: Type=notify
//!   take-over   old: MAINPID=new ─► ends                NotifyAccess=main: only this one is heard
//!               new: READY=1 MAINPID=self, by the old one's socket or its own
//! ```
//!
//! **Limits.** Messages are sent without waiting and are lost where nobody reads them: a service
//! manager that hangs stops no frame.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::{env, io};

const VARIABLE: &str = "NOTIFY_SOCKET";

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub(crate) struct ServiceManager(Option<UnixDatagram>);

impl ServiceManager {
    /// The one that the environment names.
    pub(crate) fn of_environment() -> Self {
        let Some(name) = env::var_os(VARIABLE).filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        Self::at(name.as_encoded_bytes())
            .inspect_err(|error| tracing::warn!(%error, ?name, "cannot reach {VARIABLE}"))
            .unwrap_or_default()
    }

    /// The one at that address: a path, or `@` and an abstract name.
    fn at(name: &[u8]) -> io::Result<Self> {
        use std::os::unix::ffi::OsStrExt;
        let address = match name.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect_addr(&address)?;
        Ok(Self(Some(socket)))
    }

    /// That of a predecessor, unless there is one of our own.
    pub(crate) fn or(&mut self, predecessors: impl FnOnce() -> Option<OwnedFd>) {
        if self.0.is_none() {
            self.0 = predecessors().map(UnixDatagram::from);
        }
    }

    /// The socket, for a successor.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// This process serves.
    pub(crate) fn ready(&self) {
        self.tell(&format!("READY=1\nMAINPID={}", std::process::id()));
    }

    /// The process `pid` goes on, this one ends.
    pub(crate) fn succeeded_by(&self, pid: i32) {
        // Zero: it is in another PID namespace.
        if pid > 0 {
            self.tell(&format!("MAINPID={pid}"));
        }
    }

    /// The switch ends.
    pub(crate) fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, message: &str) {
        let Some(socket) = &self.0 else { return };
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::warn!(%error, "the service manager does not hear");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_abstract_names_are_reached() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("causeway-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let abstracted = UnixDatagram::bind_addr(&address).unwrap();
        for (address, reader) in [
            (path.as_os_str().as_encoded_bytes().to_vec(), by_path),
            (format!("@{name}").into_bytes(), abstracted),
        ] {
            let manager = ServiceManager::at(&address).unwrap();
            manager.ready();
            manager.succeeded_by(0);
            manager.succeeded_by(7);
            // A successor without a way of its own has this one.
            let mut heir = ServiceManager::default();
            heir.or(|| manager.socket().and_then(|fd| fd.try_clone_to_owned().ok()));
            heir.stopping();
            let read = || {
                let mut bytes = [0; 64];
                let count = reader.recv(&mut bytes).unwrap();
                String::from_utf8_lossy(&bytes[..count]).into_owned()
            };
            assert_eq!(read(), format!("READY=1\nMAINPID={}", std::process::id()));
            assert_eq!((read(), read()), ("MAINPID=7".to_owned(), "STOPPING=1".to_owned()));
        }
        assert!(ServiceManager::at(b"/nowhere/at/all").is_err());
        // Without a service manager nothing happens.
        ServiceManager::default().ready();
    }

    #[test]
    fn one_that_does_not_read_stops_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager::at(path.as_os_str().as_encoded_bytes()).unwrap();
        (0..10_000).for_each(|_| manager.stopping());
    }
}
