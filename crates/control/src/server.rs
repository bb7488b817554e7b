//! The control socket, server side: never blocks, whatever its clients do.
//!
//! ```text
//!  accept ─► peer credentials ─► lines ─► Request (taken by the owner) ─► Reply ─► line
//! ```
//!
//! **Limits.** [`CLIENTS_MAX`] clients, lines of [`LINE_MAX`] bytes, [`OUTPUT_MAX`] bytes waiting
//! for a slow client: what goes beyond is disconnected.

mod bind;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::protocol::{Reply, Request};

pub use bind::{BindError, default_path, default_state_dir};

/// The most clients at a time.
pub const CLIENTS_MAX: usize = 64;
/// The longest request.
pub const LINE_MAX: usize = 64 * 1024;
/// The most bytes that wait for a slow client.
pub const OUTPUT_MAX: usize = 16 * 1024 * 1024;

/// Clients that may wait until they are taken, as the standard library has it.
const BACKLOG: i32 = 128;

/// A client, as long as it is connected.
pub type ClientId = RawFd;

/// The control socket and its clients.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file, so that only ours is removed.
    file: (u64, u64),
    /// Whether the file is removed with this: not as long as another process listens too.
    held: bool,
    clients: BTreeMap<ClientId, Client>,
    requests: Vec<(ClientId, Result<Request, String>)>,
}

/// One client.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Requests without a reply yet.
    pending: usize,
    /// It says nothing more: it goes when everything is answered.
    done: bool,
}

impl Server {
    /// Listens at `path`: makes its folder, replaces a stale socket, refuses a live one.
    ///
    /// # Errors
    ///
    /// [`BindError`] names who holds the socket, or what failed.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = bind::bind(path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file,
            held: true,
            clients: BTreeMap::new(),
            requests: Vec::new(),
        })
    }

    /// Goes on with the socket of another process, which listens at `path`; `file` is the device
    /// and inode of its file. It belongs to the other process until [`Self::hold`].
    ///
    /// # Errors
    ///
    /// It is no listening socket.
    pub fn adopt(listener: OwnedFd, path: &Path, file: (u64, u64)) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file,
            held: false,
            clients: BTreeMap::new(),
            requests: Vec::new(),
        })
    }

    /// Makes this process the one that holds the socket, and is said to.
    ///
    /// # Errors
    ///
    /// It is no listening socket.
    pub fn hold(&mut self) -> io::Result<()> {
        self.held = true;
        Ok(rustix::net::listen(&self.listener, BACKLOG)?)
    }

    /// Device and inode of the socket's file.
    pub fn file(&self) -> (u64, u64) {
        self.file
    }

    /// The socket is another process's now: its file stays.
    pub fn leave(&mut self) {
        self.held = false;
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket: readable when a client comes.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes the next client: its socket is to be watched for both directions, by edges.
    ///
    /// # Errors
    ///
    /// The process has no fd left, or the like: the client stays in the queue, so the listener is
    /// to be left alone for a while.
    pub fn accept(&mut self) -> io::Result<Option<ClientId>> {
        loop {
            let stream = match self.listener.accept().map_err(|error| (error.kind(), error)) {
                Ok((stream, _)) => stream,
                Err((ErrorKind::WouldBlock, _)) => return Ok(None),
                Err((ErrorKind::Interrupted | ErrorKind::ConnectionAborted, _)) => continue,
                Err((_, error)) => return Err(error),
            };
            if let Err(reason) = self.admit(&stream) {
                tracing::warn!(reason, "refused a client on the control socket");
                continue;
            }
            let id = stream.as_raw_fd();
            let client =
                Client { stream, input: Vec::new(), output: Vec::new(), pending: 0, done: false };
            let _ = self.clients.insert(id, client);
            return Ok(Some(id));
        }
    }

    fn admit(&self, stream: &UnixStream) -> Result<(), String> {
        stream.set_nonblocking(true).map_err(|e| e.to_string())?;
        let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|e| e.to_string())?;
        let user = peer.uid;
        if user != rustix::process::geteuid() && !user.is_root() {
            return Err(format!("process {} has user id {}", peer.pid, user.as_raw()));
        }
        if self.clients.len() >= CLIENTS_MAX {
            return Err(format!("{CLIENTS_MAX} clients are connected"));
        }
        Ok(())
    }

    /// A client's socket, to watch.
    pub fn client(&self, id: ClientId) -> Option<BorrowedFd<'_>> {
        Some(self.clients.get(&id)?.stream.as_fd())
    }

    /// Reads and writes what a client's socket has and takes. False if the client is gone: its
    /// socket is no longer to be watched, and then to be forgotten.
    pub fn ready(&mut self, id: ClientId) -> bool {
        let Some(client) = self.clients.get_mut(&id) else { return false };
        let kept = client.receive(|line| {
            let request = serde_json::from_slice(line).map_err(|e| e.to_string());
            self.requests.push((id, request));
        });
        kept && client.flush()
    }

    /// The requests that arrived since the last look.
    pub fn take_requests(&mut self) -> Vec<(ClientId, Result<Request, String>)> {
        std::mem::take(&mut self.requests)
    }

    /// Answers a client. False if it is gone or does not read: see [`Self::ready`].
    pub fn reply(&mut self, id: ClientId, reply: &Reply) -> bool {
        let Some(client) = self.clients.get_mut(&id) else { return false };
        let mut line = serde_json::to_vec(reply).unwrap_or_default();
        line.push(b'\n');
        client.output.append(&mut line);
        client.pending = client.pending.saturating_sub(1);
        client.flush() && client.output.len() <= OUTPUT_MAX
    }

    /// Disconnects a client.
    pub fn forget(&mut self, id: ClientId) {
        let _ = self.clients.remove(&id);
        self.requests.retain(|(from, _)| *from != id);
    }

    /// Gives a client's connection away. None if it is gone, or has answers to take still.
    pub fn release(&mut self, id: ClientId) -> Option<UnixStream> {
        let client = self.clients.remove(&id)?;
        self.requests.retain(|(from, _)| *from != id);
        client.output.is_empty().then_some(client.stream)
    }

    /// Number of connected clients.
    pub fn client_count(&self) -> usize {
        self.clients.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.held {
            bind::remove(&self.path, self.file);
        }
    }
}

impl Client {
    /// Reads all there is and gives out whole lines. False if the client is gone.
    fn receive(&mut self, mut line: impl FnMut(&[u8])) -> bool {
        let mut chunk = [0; 4096];
        while !self.done {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.done = true,
                Ok(count) => self.input.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
            while let Some(end) = self.input.iter().position(|b| *b == b'\n') {
                let rest = self.input.split_off(end.saturating_add(1));
                let whole = std::mem::replace(&mut self.input, rest);
                self.pending = self.pending.saturating_add(1);
                line(whole.trim_ascii());
            }
            if self.input.len() > LINE_MAX {
                return false;
            }
        }
        true
    }

    /// Writes as much as the socket takes. False if the client is gone.
    fn flush(&mut self) -> bool {
        let mut written = 0;
        let result = loop {
            let Some(rest) = self.output.get(written..).filter(|r| !r.is_empty()) else {
                break Ok(());
            };
            match self.stream.write(rest) {
                Ok(count) => written = written.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err::<(), io::Error>(error),
            }
        };
        let _ = self.output.drain(..written);
        result.is_ok() && !(self.done && self.output.is_empty() && self.pending == 0)
    }
}
