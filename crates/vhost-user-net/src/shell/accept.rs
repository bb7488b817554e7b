//! Who comes in by the listening socket, and who is sent away.

use std::os::fd::OwnedFd;
use std::time::Instant;

use event_manager::EventOps;

use super::share::say;
use super::{ACCEPT_PAUSE, LOGGED_REFUSALS, VhostUserPort, Way};

impl VhostUserPort {
    pub(super) fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Way::Listen(listener) = &self.way else { return };
        match listener.accept() {
            Ok(Some(stream)) => {
                let Some(link) = &mut self.link else {
                    // In quarantine nobody is served: the stream closes.
                    if self.is_quarantined() {
                        return self.send_away(stream, ops);
                    }
                    return self.open_link(stream, ops);
                };
                link.sent_away = link.sent_away.saturating_add(1);
                if link.sent_away <= LOGGED_REFUSALS {
                    say!(self.rings, warn, "a second front end was sent away");
                }
                self.status.error("a second front end tried to connect and was sent away");
                self.send_away(stream, ops);
            }
            Ok(None) => {}
            Err(error) => {
                say!(self.rings, warn, %error, "cannot accept");
                self.status.error(format!("cannot accept a connection: {error}"));
                // The listener stays readable: without a pause this would spin.
                self.pause_accepting(ops);
            }
        }
    }

    /// Closes the connection of somebody who is not served. Who is does not answer for what is in
    /// it, but nobody else is let in while much of that waits to be closed.
    fn send_away(&mut self, stream: OwnedFd, ops: &mut EventOps<'_>) {
        self.strangers.close_stream(stream);
        if self.strangers.is_full() {
            self.pause_accepting(ops);
        }
    }

    /// Sends those away who wait to be accepted: what they sent is not for this thread to close.
    pub(super) fn dismiss(&self) {
        let Way::Listen(listener) = &self.way else { return };
        if listener.shut() {
            while let Ok(Some(stream)) = listener.accept() {
                self.strangers.close_stream(stream);
            }
        }
    }

    fn pause_accepting(&mut self, ops: &mut EventOps<'_>) {
        self.accept_again = Instant::now().checked_add(ACCEPT_PAUSE);
        self.watch(ops);
        self.arm_timer();
    }
}
