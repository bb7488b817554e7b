//! From the rings of a capture to the client's socket, on a thread of its own: what a slow client
//! holds up is its own capture.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use port::capture::{Capture, Direction, Tap};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{CaptureCounts, CaptureEnd, CaptureRequest, FINISH, Outgoing, PIECE, left, pcapng};

/// Bytes that wait for a slow client before frames are left in the rings.
const WAITING_MAX: usize = 1024 * 1024;
/// How long a client may take for the rest after the switch ended the capture.
const PATIENCE: Duration = Duration::from_secs(2);

/// A capture and its client.
#[derive(Debug)]
pub struct Pump {
    request: CaptureRequest,
    capture: Capture,
    out: Outgoing,
    /// Frames that may still be written.
    left: u64,
    /// Written: in, out.
    captured: [u64; 2],
}

/// Why frames stop.
enum Stop {
    /// The client had enough, or its count is reached.
    Asked,
    /// The switch ended it.
    Ended(String),
    /// The client is gone.
    Gone,
}

impl Pump {
    /// Sends frames until the capture ends. `detach` takes the tap off, so that nothing more comes.
    pub fn run(mut self, detach: impl FnOnce()) {
        let stop = self.frames();
        detach();
        let reason = match stop {
            Stop::Gone => return,
            Stop::Asked => None,
            Stop::Ended(reason) => Some(reason),
        };
        // A client that wants the end reads until it comes; the switch waits for nobody.
        let patience = reason.as_ref().and_then(|_| Instant::now().checked_add(PATIENCE));
        self.rest();
        self.finish(reason);
        while self.out.flush() && !self.out.is_empty() {
            if patience.is_some_and(|end| left(end).is_zero()) {
                return;
            }
            let _ = wait(&mut [PollFd::new(&self.out.stream, PollFlags::OUT)], patience);
        }
    }

    fn frames(&mut self) -> Stop {
        loop {
            let room = self.out.len() < WAITING_MAX;
            if room {
                let _ = self.drain();
            }
            if !self.out.flush() {
                return Stop::Gone;
            }
            if self.left == 0 || self.out.asks_for_end() {
                return Stop::Asked;
            }
            let full = self.out.len() >= WAITING_MAX;
            if full {
                self.capture.ignores_frames();
            }
            if let Some(reason) = self.capture.ended() {
                return Stop::Ended(reason);
            }
            if !full && !self.capture.falls_asleep() {
                continue;
            }
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, !self.out.is_empty());
            let socket = PollFd::new(&self.out.stream, wanted);
            let wake = self.capture.wake_fd();
            let wake = PollFd::new(&wake, PollFlags::IN);
            let _ = wait(&mut [socket, wake], None);
        }
    }

    /// What is left after the tap was taken off.
    fn rest(&mut self) {
        while self.drain() > 0 {}
    }

    fn drain(&mut self) -> u64 {
        let Self { capture, out, left, captured, .. } = self;
        let mut count = 0;
        out.part(PIECE, |out| {
            count = capture.drain(|frame| {
                if *left > 0 {
                    *left = left.saturating_sub(1);
                    pcapng::frame(out, frame);
                    if let Some(captured) = captured.get_mut(frame.direction as usize) {
                        *captured = captured.saturating_add(1);
                    }
                }
            });
        });
        count
    }

    fn finish(&mut self, reason: Option<String>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let [inward, outward] = [Direction::In, Direction::Out].map(|direction| {
            let totals = self.capture.totals(direction);
            let captured = self.captured.get(direction as usize).copied().unwrap_or(0);
            self.out.part(PIECE, |out| {
                pcapng::statistics(out, direction, now, &totals, captured);
            });
            CaptureCounts::new(&totals, captured)
        });
        let end = CaptureEnd {
            port: self.request.port.clone(),
            captured: inward.captured.saturating_add(outward.captured),
            skipped: inward.skipped.saturating_add(outward.skipped),
            inward,
            outward,
            reason,
        };
        let json = serde_json::to_vec(&end).unwrap_or_default();
        self.out.part(FINISH, |out| out.extend(json));
    }
}

/// A capture whose client is not told yet.
#[derive(Debug)]
pub struct Prepared {
    request: CaptureRequest,
    capture: Capture,
    head: Vec<u8>,
}

impl Prepared {
    /// Makes a capture ready, and what the switch needs for it.
    ///
    /// # Errors
    ///
    /// The request is wrong: a sentence. (Or the kernel has no fd left.)
    pub fn new(request: CaptureRequest) -> Result<(Self, Tap), String> {
        let settings = request.settings()?;
        let mut head = Vec::new();
        pcapng::begin(&mut head, &request.port, &request.filter, &settings);
        let (capture, tap) =
            Capture::new(settings).map_err(|error| format!("cannot begin a capture: {error}"))?;
        Ok((Self { request, capture, head }, tap))
    }

    /// A pump to `stream`, which was answered.
    ///
    /// # Errors
    ///
    /// The socket refuses to be without blocking.
    pub fn to(self, stream: UnixStream) -> io::Result<Pump> {
        stream.set_nonblocking(true)?;
        let Self { request, capture, head } = self;
        let mut out = Outgoing { stream, waiting: Vec::new(), written: 0 };
        out.part(PIECE, |out| out.extend(head));
        let left = request.count.unwrap_or(u64::MAX);
        Ok(Pump { request, capture, out, left, captured: [0; 2] })
    }
}

/// Waits until something is ready, at most until `end`.
fn wait(fds: &mut [PollFd<'_>], end: Option<Instant>) -> rustix::io::Result<usize> {
    let timeout = end.map(|end| Timespec {
        tv_sec: i64::try_from(left(end).as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left(end).subsec_nanos().into(),
    });
    poll(fds, timeout.as_ref())
}
