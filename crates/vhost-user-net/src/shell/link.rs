//! A connection to a front end, and what was agreed on it.

use std::fmt::Display;
use std::time::Instant;

use event_manager::EventSet;
use port::StatusCell;
use vhost::vhost_user::message::FrontendReq;

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
    /// A message waits until nobody sleeps in the guest's memory, or until memory was freed.
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
        self.session.end_turn(rings);
        self.connection.end_turn();
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
            // Nor one of which much is to be freed.
            self.waits = self.connection.is_full();
            if waits || self.waits || began.elapsed() >= TURN_TIME {
                break;
            }
            let Some(message) = self.connection.receive()? else { break };
            let request = message.header.request;
            match request == u32::from(FrontendReq::IOTLB_MSG) {
                true => self.handled.translations = self.handled.translations.saturating_add(1),
                false => self.handled.others = self.handled.others.saturating_add(1),
            }
            tracing::trace!(port = rings.name, request, payload = ?message.payload, "message");
            let outcome = self.session.handle(message, rings);
            self.connection.settle(self.session.take_gone());
            let outcome = outcome?;
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    use port::PortId;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::session::Gone;
    use crate::shell::closer::Closer;
    use crate::shell::{PortLinks, PortSettings, wire::Wire};

    /// Takes as long as its lock is held.
    struct Held(Arc<Mutex<()>>);

    impl Drop for Held {
        fn drop(&mut self) {
            drop(self.0.lock().unwrap());
        }
    }

    #[test]
    fn nobody_is_listened_to_of_whom_much_is_to_be_freed() {
        let notice = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let settings = PortSettings::server("g", "unused");
        let status = StatusCell::waiting("");
        let links = PortLinks {
            id: PortId(0),
            fabric: Arc::new(Wire::default()),
            status: status.clone(),
            counters: Box::new(|_| Arc::default()),
        };
        let mut rings = FabricRings::new(links, &settings, &notice);
        let (stream, mut front) = UnixStream::pair().unwrap();
        let closer = Closer::new(&notice);
        let connection = Connection::new(stream.into(), closer.clone());
        let session = Session::new(settings.session());
        let mut link = Link::new(connection, session, EventSet::IN);
        let owners = [3u32, 1, 0].map(u32::to_ne_bytes).concat().repeat(2);

        let gate = Arc::new(Mutex::new(()));
        let shut = gate.lock().unwrap();
        while !closer.is_full() {
            closer.release(vec![Gone::Large(Box::new(Held(Arc::clone(&gate))))]);
        }
        front.write_all(&owners).unwrap();
        link.turn(&mut rings, &status).unwrap();
        assert!(link.handled.others == 0 && link.waits(&rings));
        assert_eq!(link.wanted(&rings), EventSet::empty());
        drop(shut);
        // It is told.
        while closer.is_full() {
            let _ = rustix::io::read(&notice, &mut [0; 8]).unwrap();
        }
        link.turn(&mut rings, &status).unwrap();
        assert!(link.handled.others == 2 && !link.waits(&rings));
    }
}
