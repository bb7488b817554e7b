//! Questions to the front end about addresses behind its vIOMMU, on the channel of the back end.

use std::collections::VecDeque;
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
    waiting: VecDeque<Vec<u8>>,
    /// Bytes of the first one that the channel took already.
    sent: usize,
}

impl Questions {
    /// Sends what the channel takes, and never waits. Returns whether something is left, and how
    /// many questions were new.
    pub(super) fn ask(&mut self, session: &Session) -> (bool, u32) {
        let misses = session.misses();
        let new = u32::try_from(misses.len()).unwrap_or(u32::MAX);
        self.waiting.extend(misses);
        self.waiting.truncate(WAITING_MAX);
        let Some(channel) = session.backend_channel() else {
            self.waiting.clear();
            return (false, 0);
        };
        (self.send(channel), new)
    }

    /// Returns whether something is left.
    fn send(&mut self, channel: &OwnedFd) -> bool {
        while let Some(message) = self.waiting.front() {
            let rest = message.get(self.sent..).unwrap_or_default();
            match send(channel, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) if count < rest.len() => self.sent = self.sent.saturating_add(count),
                Ok(_) => self.pass(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                // Nobody reads there any more: who asks waits, and the session will end.
                Err(_) => self.pass(),
            }
        }
        false
    }

    fn pass(&mut self) {
        self.sent = 0;
        drop(self.waiting.pop_front());
    }
}
