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
/// Bytes that are sent at once: whole messages, of 44 each, and so few that the channel takes all
/// of them or none.
const AT_ONCE: usize = 44 * 40;

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
    /// Messages that the channel had no room for.
    waiting: Vec<u8>,
    /// Bytes of the first one that it took already, as one with little room may.
    sent: usize,
    /// [`Session::asks`] as it was last.
    asks: u64,
}

impl Questions {
    /// Sends what the channel takes, and never waits. Returns whether something is left, and how
    /// many questions were new.
    pub(super) fn ask(&mut self, session: &Session) -> (bool, u32) {
        let asks = session.asks();
        let new = u32::try_from(asks.saturating_sub(self.asks)).unwrap_or(u32::MAX);
        self.asks = asks;
        let Some(channel) = session.backend_channel() else {
            (self.waiting, self.sent) = (Vec::new(), 0);
            return (false, 0);
        };
        // What waits is sent first: until then nothing more is taken, so that it has a bound.
        if self.waiting.is_empty() || !self.send(channel) {
            self.waiting = session.misses().concat();
            let _ = self.send(channel);
        }
        (!self.waiting.is_empty(), new)
    }

    /// Returns whether something is left.
    fn send(&mut self, channel: &OwnedFd) -> bool {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        while let Some(rest) = self.waiting.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let rest = rest.get(..AT_ONCE).unwrap_or(rest);
            match send(channel, rest, flags) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return true,
                // Nobody reads there any more: who asks waits, and the session will end.
                Err(_) => break,
            }
        }
        (self.waiting, self.sent) = (Vec::new(), 0);
        false
    }
}
