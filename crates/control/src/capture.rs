//! A capture as it goes over the control socket, and as a file.
//!
//! ```text
//!  request ─► reply: a line, as always ─► from then on the connection belongs to the capture:
//!    switch ─► client   parts: kind (1), length (4, big endian), bytes
//!                       P: more of a pcapng file         E: the end, a CaptureEnd as JSON
//!    client ─► switch   nothing; its end of file asks for the end
//! ```

pub mod client;
pub mod pcapng;
mod pump;
mod shown;

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use port::capture::{CaptureSettings, CaptureTotals, Filter, SNAPLEN_MAX};
use serde::{Deserialize, Serialize};

pub use pump::{Prepared, Pump};
pub use shown::lines;

/// The most captures at a time.
pub const CAPTURES_MAX: usize = 16;
/// The part is a piece of a pcapng file.
pub const PIECE: u8 = b'P';
/// The part is a [`CaptureEnd`].
pub const FINISH: u8 = b'E';

/// What is to be captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// The port.
    pub port: String,
    /// Which frames: see [`port::capture::filter`]. Empty is all.
    #[serde(default)]
    pub filter: String,
    /// At most so many bytes of each frame.
    #[serde(default)]
    pub snaplen: Option<u32>,
    /// End after so many frames.
    #[serde(default)]
    pub count: Option<u64>,
    /// Dropped frames too.
    #[serde(default)]
    pub drops: bool,
}

impl CaptureRequest {
    /// What a capture of the switch needs.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong and what would be right.
    pub fn settings(&self) -> Result<CaptureSettings, String> {
        let filter: Filter =
            self.filter.parse().map_err(|error| format!("filter {:?}: {error}", self.filter))?;
        let snaplen = self.snaplen.unwrap_or(SNAPLEN_MAX);
        if snaplen == 0 || snaplen > SNAPLEN_MAX {
            return Err(format!("snaplen is 1 to {SNAPLEN_MAX} bytes, not {snaplen}"));
        }
        if self.count == Some(0) {
            return Err("count is 1 or more".to_owned());
        }
        let defaults = CaptureSettings::default();
        Ok(CaptureSettings { filter, snaplen, drops: self.drops, ..defaults })
    }
}

/// How a capture ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureEnd {
    /// The port.
    pub port: String,
    /// Frames that were written.
    pub captured: u64,
    /// Frames that were skipped because nobody took them fast enough.
    pub skipped: u64,
    /// Into the switch.
    #[serde(rename = "in")]
    pub inward: CaptureCounts,
    /// Out of the switch.
    #[serde(rename = "out")]
    pub outward: CaptureCounts,
    /// Why the switch ended the capture; null if the client did, or its count was reached.
    pub reason: Option<String>,
}

/// One direction of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CaptureCounts {
    /// Frames that passed.
    pub seen: u64,
    /// Frames that the filter let through: captured, skipped, or beyond the count.
    pub accepted: u64,
    /// Frames that were written.
    pub captured: u64,
    /// Frames that found no room.
    pub skipped: u64,
}

impl CaptureCounts {
    fn new(totals: &CaptureTotals, captured: u64) -> Self {
        let CaptureTotals { seen, accepted, skipped } = *totals;
        Self { seen, accepted, captured, skipped }
    }
}

/// A connection on which a capture goes out, without ever waiting for the client.
#[derive(Debug)]
struct Outgoing {
    stream: UnixStream,
    waiting: Vec<u8>,
    written: usize,
}

impl Outgoing {
    /// Writes what the socket takes. False if the client is gone.
    fn flush(&mut self) -> bool {
        use std::io::Write;
        while let Some(rest) = self.waiting.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return false,
                Ok(count) => self.written = self.written.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        self.waiting.clear();
        self.written = 0;
        true
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn len(&self) -> usize {
        self.waiting.len().saturating_sub(self.written)
    }

    /// Adds a part that `fill` writes.
    fn part(&mut self, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        let begin = self.waiting.len();
        self.waiting.extend([kind, 0, 0, 0, 0]);
        let from = self.waiting.len();
        fill(&mut self.waiting);
        let len = u32::try_from(self.waiting.len().saturating_sub(from)).unwrap_or(u32::MAX);
        if len == 0 {
            self.waiting.truncate(begin);
        } else if let Some(place) = self.waiting.get_mut(begin.saturating_add(1)..from) {
            place.copy_from_slice(&len.to_be_bytes());
        }
    }

    /// What the client said: whether it wants the end, or is gone.
    fn asks_for_end(&mut self) -> bool {
        use std::io::Read;
        let mut ignored = [0; 256];
        loop {
            match self.stream.read(&mut ignored) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
    }
}

/// Time that is left until `end`.
fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}
