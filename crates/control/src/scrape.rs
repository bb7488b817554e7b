//! Metrics over HTTP, for a scraper: never blocks, whatever its clients do.
//!
//! ```text
//!  accept ─► request ─► Ready::Asked ─► answer (the owner's text) ─► closed after the answer
//! ```
//!
//! **Trust.** Whoever reaches the address: by default users of this host. They learn counters and
//! the names of ports, and change nothing.
//! **Limits.** [`CLIENTS_MAX`] clients: one more, and the oldest goes. A request has
//! [`REQUEST_MAX`] bytes at most, a client is read for [`RECEIVED_MAX`] bytes and served for
//! [`PATIENCE`] at most. One request per connection. While clients have taken more CPU time than
//! [`CPU_A_SECOND`], none is accepted: they wait in the kernel.
//! **Not supported**: TLS, compression, anything but `GET /metrics`.

mod http;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

pub use http::REQUEST_MAX;

use crate::metrics::CONTENT_TYPE;

/// The most clients at a time.
pub const CLIENTS_MAX: usize = 16;
/// The most bytes that a client may send.
pub const RECEIVED_MAX: usize = 64 * 1024;
/// How long a client may take from its first byte to its last.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// CPU time that clients may take in a second, all together.
pub const CPU_A_SECOND: Duration = Duration::from_millis(50);

/// A client, as long as it is connected.
pub type ClientId = RawFd;

/// What came of a client's readiness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Nothing to do.
    Waits,
    /// It wants the metrics: [`Scrape::answer`].
    Asked,
    /// It is no longer to be watched, and then to be forgotten.
    Gone,
}

/// The listening socket and its clients.
#[derive(Debug)]
pub struct Scrape {
    listener: TcpListener,
    clients: BTreeMap<ClientId, Client>,
    /// How many have come: tells the oldest.
    came: u64,
    /// CPU time that they took and were not allowed yet.
    spent: Duration,
}

/// How far a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Its request is not complete.
    Asking,
    /// The answer is on its way.
    Answered,
    /// It has the answer. What it still sends is read and ignored: closing at once would reset the
    /// connection and take the answer with it.
    Draining,
}

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    number: u64,
    since: Instant,
    step: Step,
    input: Vec<u8>,
    received: usize,
    output: Vec<u8>,
    /// It sends nothing more.
    ended: bool,
}

impl Scrape {
    /// Listens at `address`.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self::of(listener))
    }

    fn of(listener: TcpListener) -> Self {
        Self { listener, clients: BTreeMap::new(), came: 0, spent: Duration::ZERO }
    }

    /// Goes on with the listening socket of another process.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn adopt(listener: OwnedFd) -> io::Result<Self> {
        let listener = TcpListener::from(listener);
        let _ = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        Ok(Self::of(listener))
    }

    /// Where it listens: with the port that the kernel chose, if it was asked to.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// The listening socket: readable when a client comes.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Notes CPU time that was spent on clients.
    pub fn charge(&mut self, took: Duration) {
        self.spent = self.spent.saturating_add(took);
    }

    /// A second has passed: clients may take more CPU time.
    pub fn second(&mut self) {
        self.spent = self.spent.saturating_sub(CPU_A_SECOND);
    }

    /// Takes the next client: its socket is to be watched for both directions, by edges. None if
    /// there is none, no fd left for it, or all took too much CPU time: then it is to be tried
    /// again later.
    pub fn accept(&mut self) -> Option<ClientId> {
        if self.spent >= CPU_A_SECOND {
            return None;
        }
        let stream = loop {
            let accepted = self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            match accepted.map_err(|error| (error.kind(), error)) {
                Ok(stream) => break stream,
                Err((ErrorKind::WouldBlock, _)) => return None,
                Err((ErrorKind::Interrupted | ErrorKind::ConnectionAborted, _)) => {}
                Err((_, error)) => {
                    tracing::debug!(%error, "cannot accept a scraper");
                    return None;
                }
            }
        };
        self.came = self.came.wrapping_add(1);
        let id = stream.as_raw_fd();
        let client = Client {
            stream,
            number: self.came,
            since: Instant::now(),
            step: Step::Asking,
            input: Vec::new(),
            received: 0,
            output: Vec::new(),
            ended: false,
        };
        let _ = self.clients.insert(id, client);
        Some(id)
    }

    /// A client that has to go: the oldest of too many, or one that took too long.
    pub fn unwelcome(&self) -> Option<ClientId> {
        let (id, oldest) = self.clients.iter().min_by_key(|(_, client)| client.number)?;
        let crowded = self.clients.len() > CLIENTS_MAX;
        (crowded || oldest.since.elapsed() > PATIENCE).then_some(*id)
    }

    /// A client's socket, to watch.
    pub fn client(&self, id: ClientId) -> Option<BorrowedFd<'_>> {
        Some(self.clients.get(&id)?.stream.as_fd())
    }

    /// Reads and writes what a client's socket has and takes.
    pub fn ready(&mut self, id: ClientId) -> Ready {
        self.clients.get_mut(&id).map_or(Ready::Gone, Client::ready)
    }

    /// Gives a client what it asked for. False if it is gone: see [`Ready::Gone`].
    pub fn answer(&mut self, id: ClientId, metrics: &str) -> bool {
        let Some(client) = self.clients.get_mut(&id) else { return false };
        client.respond(http::response("200 OK", CONTENT_TYPE, metrics));
        client.flush()
    }

    /// Disconnects a client.
    pub fn forget(&mut self, id: ClientId) {
        let _ = self.clients.remove(&id);
    }

    /// Number of connected clients.
    pub fn client_count(&self) -> usize {
        self.clients.len()
    }
}

impl Client {
    fn ready(&mut self) -> Ready {
        if !self.receive() {
            return Ready::Gone;
        }
        if self.step == Step::Asking {
            match http::parse(&self.input) {
                None if self.ended => return Ready::Gone,
                None => return Ready::Waits,
                Some(Ok(())) => return Ready::Asked,
                Some(Err(refusal)) => self.respond(refusal.response()),
            }
        }
        if self.flush() { Ready::Waits } else { Ready::Gone }
    }

    /// Reads all there is. False if the client is gone or says too much.
    fn receive(&mut self) -> bool {
        let mut chunk = [0; 4096];
        while !self.ended {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    self.received = self.received.saturating_add(count);
                    if self.received > RECEIVED_MAX {
                        return false;
                    }
                    if self.step == Step::Asking {
                        self.input.extend_from_slice(chunk.get(..count).unwrap_or_default());
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        true
    }

    fn respond(&mut self, response: String) {
        self.input = Vec::new();
        self.output = response.into_bytes();
        self.step = Step::Answered;
    }

    /// Writes as much as the socket takes. False if the client is gone or has all.
    fn flush(&mut self) -> bool {
        let mut written = 0;
        while let Some(rest) = self.output.get(written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(count) => written = written.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        let _ = self.output.drain(..written);
        if self.step == Step::Answered && self.output.is_empty() {
            self.step = Step::Draining;
            if self.stream.shutdown(Shutdown::Write).is_err() {
                return false;
            }
        }
        !(self.step == Step::Draining && self.ended)
    }
}

#[cfg(test)]
mod tests;
