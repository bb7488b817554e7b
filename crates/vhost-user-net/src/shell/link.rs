//! What a connection says, handled and answered.

use std::fmt::Display;
use std::time::Instant;

use port::StatusCell;

use super::connection::Disconnect;
use super::{FabricRings, LOGGED_REFUSALS, Link, TURN_MESSAGES, TURN_TIME};
use crate::session::Rings;

impl Link {
    pub(super) fn turn(
        &mut self,
        rings: &mut FabricRings,
        name: &str,
        status: &StatusCell,
    ) -> Result<(), Disconnect> {
        self.connection.flush()?;
        let began = Instant::now();
        for _ in 0..TURN_MESSAGES {
            // A front end that does not read its replies is not listened to, nor one that is to
            // be answered first.
            let waits = self.connection.has_output() || rings.transfers.is_asked();
            if waits || began.elapsed() >= TURN_TIME {
                break;
            }
            let Some(message) = self.connection.receive()? else { break };
            let request = message.header.request;
            tracing::trace!(port = name, request, payload = ?message.payload, "message");
            let outcome = self.session.handle(message, rings)?;
            if let Some(error) = outcome.refused {
                self.complain("refused", &error, (name, status));
            }
            self.complain_of_rings(name, status);
            if let Some(ask) = outcome.ask {
                self.ask_state(ask, rings, (name, status))?;
            }
            if let Some(reply) = outcome.reply {
                self.connection.send(&reply, outcome.fd)?;
            }
            if let Some(ring) = outcome.handed {
                rings.forget(ring);
            }
        }
        Ok(())
    }

    pub(super) fn complain_of_rings(&mut self, name: &str, status: &StatusCell) {
        for error in self.session.take_complaints() {
            self.complain("not started", &error, (name, status));
        }
    }

    pub(super) fn complain(&mut self, what: &str, error: &dyn Display, to: (&str, &StatusCell)) {
        let (name, status) = to;
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= LOGGED_REFUSALS {
            tracing::warn!(port = name, "{what}: {error}");
        }
        status.error(error.to_string());
    }
}
