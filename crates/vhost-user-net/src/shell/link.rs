//! A connection to a front end, and what was agreed on it.

use std::fmt::Display;
use std::os::fd::AsFd;
use std::time::Instant;

use event_manager::EventSet;
use port::StatusCell;
use vhost::vhost_user::message::FrontendReq;

use super::channel::is_snare;
use super::connection::{Connection, Disconnect};
use super::misses::Questions;
use super::rings::FabricRings;
use super::share::{Handled, say};
use super::{LOGGED_REFUSALS, TURN_MESSAGES, TURN_TIME};
use crate::session::{Rings, Session};

/// A connection and what was agreed on it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) session: Session,
    /// What the event manager is asked for at present.
    pub(super) interest: EventSet,
    pub(super) refusals: u32,
    /// Others that came meanwhile.
    pub(super) sent_away: u32,
    /// What is still to be asked for on the back channel.
    pub(super) questions: Questions,
    /// A message waits until nobody sleeps in the guest's memory.
    pub(super) waits: bool,
    /// What was not charged yet.
    pub(super) handled: Handled,
}

impl Link {
    /// A connection that has just begun.
    pub(super) fn new(connection: Connection, session: Session, interest: EventSet) -> Self {
        Self {
            connection,
            session,
            interest,
            refusals: 0,
            sent_away: 0,
            questions: Questions::default(),
            waits: false,
            handled: Handled::default(),
        }
    }

    /// Handles what has arrived.
    pub(super) fn turn(
        &mut self,
        rings: &mut FabricRings,
        status: &StatusCell,
    ) -> Result<(), Disconnect> {
        self.connection.flush()?;
        // What changes a ring whose memory is late would wait for that memory.
        self.waits = !rings.late.rest();
        if self.waits {
            return Ok(());
        }
        let result = self.handle_messages(rings, status);
        rings.late.go_on();
        result
    }

    fn handle_messages(
        &mut self,
        rings: &mut FabricRings,
        status: &StatusCell,
    ) -> Result<(), Disconnect> {
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
            match request == u32::from(FrontendReq::IOTLB_MSG) {
                true => self.handled.translations = self.handled.translations.saturating_add(1),
                false => self.handled.others = self.handled.others.saturating_add(1),
            }
            tracing::trace!(port = rings.name, request, payload = ?message.payload, "message");
            if request == u32::from(FrontendReq::SET_BACKEND_REQ_FD)
                && message.fds.iter().any(|fd| is_snare(fd.as_fd(), self.connection.as_fd()))
            {
                return Err(Disconnect::Snare);
            }
            let outcome = self.session.handle(message, rings)?;
            if let Some(error) = outcome.refused {
                self.complain("refused", &error, (rings, status));
            }
            self.complain_of_rings(rings, status);
            if let Some(ask) = outcome.ask {
                self.ask_state(ask, rings, status)?;
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

    pub(super) fn complain_of_rings(&mut self, rings: &mut FabricRings, status: &StatusCell) {
        for error in self.session.take_complaints() {
            self.complain("not started", &error, (rings, status));
        }
    }

    /// Whether the front end is not listened to: a message waits, or it is to be answered first.
    pub(super) fn waits(&self, rings: &FabricRings) -> bool {
        self.waits || rings.transfers.is_asked()
    }

    /// What the connection waits for.
    pub(super) fn wanted(&self, rings: &FabricRings) -> EventSet {
        match (self.connection.has_output(), self.waits(rings)) {
            (true, _) => EventSet::OUT,
            // Its end is told all the same.
            (false, true) => EventSet::empty(),
            (false, false) => EventSet::IN,
        }
    }

    pub(super) fn complain(
        &mut self,
        what: &str,
        error: &dyn Display,
        (rings, status): (&mut FabricRings, &StatusCell),
    ) {
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= LOGGED_REFUSALS {
            say!(rings, warn, "{what}: {error}");
        }
        status.error(error.to_string());
    }
}
