//! Questions to the front end about addresses behind its vIOMMU, on the channel of the back end.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::VhostUserPort;
use crate::session::Session;

/// How long the back channel is left alone when it was full.
const ASK_PAUSE: Duration = Duration::from_millis(2);
/// The most messages that wait for room; rings ask again for what is dropped.
const WAITING_MAX: usize = 2048;
/// Bytes of each.
const MESSAGE: usize = 44;

/// Written by workers when there is something to ask for.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Forgets that it was written.
pub(super) fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

impl VhostUserPort {
    /// Asks the front end for the addresses that rings have met.
    pub(super) fn ask(&mut self) {
        let Some(link) = &mut self.link else { return };
        let (left, new) = link.questions.ask(&link.session);
        link.handled.questions = link.handled.questions.saturating_add(new);
        self.ask_again = left.then(|| Instant::now().checked_add(ASK_PAUSE)).flatten();
    }
}

/// What is still to be asked.
#[derive(Debug, Default)]
pub(super) struct Questions {
    /// Messages, one after the other.
    waiting: Vec<u8>,
    /// Bytes of the first one that the channel took already.
    sent: usize,
}

impl Questions {
    /// Sends what the channel takes, and never waits. Returns whether something is left, and how
    /// many questions were new.
    pub(super) fn ask(&mut self, session: &Session) -> (bool, u32) {
        let misses = session.misses();
        let new = u32::try_from(misses.len()).unwrap_or(u32::MAX);
        self.waiting.extend(misses.into_iter().flatten());
        self.waiting.truncate(MESSAGE.saturating_mul(WAITING_MAX));
        let Some(channel) = session.backend_channel() else {
            (self.waiting, self.sent) = (Vec::new(), 0);
            return (false, 0);
        };
        (self.send(channel), new)
    }

    /// Returns whether something is left.
    fn send(&mut self, channel: &OwnedFd) -> bool {
        while let Some(rest) = self.waiting.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match send(channel, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // Nobody reads there any more: who asks waits, and the session will end.
                Err(_) => self.sent = self.waiting.len(),
            }
        }
        let whole = self.sent.saturating_sub(self.sent % MESSAGE).min(self.waiting.len());
        drop(self.waiting.drain(..whole));
        self.sent = self.sent.saturating_sub(whole);
        !self.waiting.is_empty()
    }
}
