//! A port's state, out of one process and into another.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;
use virtq::mem::guard;

use super::closer::Closer;
use super::connection::Connection;
use super::listener::Listener;
use super::misses;
use super::reconnect::Reconnect;
use super::share::Share;
use super::timer::Timer;
use super::{FabricRings, Link, PortLinks, PortSettings, SocketMode, VhostUserPort, Way};
use crate::codec::FrontendReq;
use crate::handover::{
    AdoptError, Incoming, LinkHandover, ListenerHandover, Outgoing, PortHandover, RingBase,
};
use crate::record::Records;
use crate::session::{Session, StateAsk};

impl VhostUserPort {
    /// A port that goes on from `state`. Nothing runs before [`Self::resume`], nobody is listened
    /// to before it is added to an event manager, and its socket's file belongs to the other
    /// process until [`Self::hold`].
    ///
    /// # Errors
    ///
    /// [`AdoptError`] if this program or `settings` do not allow what is in use.
    pub fn adopt(
        settings: PortSettings,
        links: PortLinks,
        state: PortHandover,
        fds: &mut Incoming,
    ) -> Result<Self, AdoptError> {
        let no_timer = |error| AdoptError::Io { what: "cannot make a timer", error };
        let timer = Timer::new().map_err(no_timer)?;
        let way = match (settings.mode, state.listener) {
            (SocketMode::Server, Some(listener)) => {
                let file = (listener.device, listener.inode);
                Way::Listen(Listener::adopt(fds.take(listener.fd)?, &settings.socket, file))
            }
            (SocketMode::Client, None) => Way::Connect(Reconnect::new().map_err(no_timer)?),
            (SocketMode::Server, None) => return Err(AdoptError::Role("server")),
            (SocketMode::Client, Some(_)) => return Err(AdoptError::Role("client")),
        };
        let missed = Arc::new(misses::eventfd().map_err(no_timer)?);
        let closer = Closer::new(&missed);
        let mut link =
            state.link.map(|link| Link::adopt(&settings, link, fds, &closer)).transpose()?;
        let status = links.status.clone();
        let without = PortSettings { state_dir: None, ..settings.clone() };
        let mut rings = FabricRings::new(links, &without, &missed);
        let record = state.record.map(|fd| fds.take(fd)).transpose()?;
        let (socket, queues) = (&settings.socket, settings.queues);
        let stale = match (record, &settings.state_dir) {
            (Some(fd), Some(dir)) => {
                rings.records.take_over(fd, dir, socket, queues);
                None
            }
            (None, Some(dir)) => {
                rings.records = Records::new(Some(dir), socket, queues);
                None
            }
            (stale, None) => stale,
        };
        let losses = guard::notice().map_err(no_timer)?;
        if let Some(link) = &mut link {
            link.session.set_waker(Arc::clone(&missed));
        }
        Ok(Self {
            settings,
            status,
            rings,
            way,
            link,
            timer,
            armed: None,
            accept_again: None,
            losses,
            closer,
            strangers: Closer::default(),
            changes: 0,
            stale,
            missed,
            ask_again: None,
            share: Share::new(Instant::now()),
        })
    }

    /// The state, with ring positions that are right if the rings are paused.
    ///
    /// # Errors
    ///
    /// The process has no fd left, or the guest's memory is still arriving: what serves its pages
    /// knows this process.
    pub fn export(&self, fds: &mut Outgoing) -> io::Result<PortHandover> {
        if self.is_late() {
            let port = &self.settings.name;
            let why = format!("port {port}: the guest's memory is still arriving (postcopy)");
            return Err(io::Error::other(why));
        }
        let listener = match &self.way {
            Way::Listen(listener) => {
                let (device, inode) = listener.file();
                Some(ListenerHandover { fd: fds.add(listener)?, device, inode })
            }
            Way::Connect(_) => None,
        };
        let mut link = self.link.as_ref().map(|link| link.export(fds)).transpose()?;
        // A transfer of state stays behind, and with it who waits to hear of it.
        if let Some(link) = link.as_mut().filter(|_| self.rings.transfers.is_asked()) {
            let check = FrontendReq::CHECK_DEVICE_STATE.into();
            link.output.extend(StateAsk::reply(check, false));
        }
        let record = self.rings.records.fd().map(|fd| fds.add(fd)).transpose()?;
        Ok(PortHandover { listener, link, record })
    }

    /// Changes whenever anything but the positions of running rings may have changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Stops the rings of one direction; the session goes on with [`Self::resume`], here or in
    /// another process. Stop the transmitqs of all ports first: nothing is on its way then.
    pub fn pause(&mut self, transmitqs: bool) {
        // Rings of one whose memory is late are not stopped: see [`Self::export`].
        if let Some(link) = self.link.as_mut().filter(|link| !link.session.is_late()) {
            link.session.pause(transmitqs, &mut self.rings);
        }
        if !transmitqs {
            // What waits here has been counted as received: it does not go along.
            self.rings.end_waiting();
        }
    }

    /// Starts the rings of one direction. Start the receiveqs of all ports first.
    pub fn resume(&mut self, transmitqs: bool) {
        if let Some(link) = &mut self.link {
            link.session.resume(transmitqs, &mut self.rings);
        }
        self.arm_timer();
        if transmitqs {
            self.show();
        }
    }

    /// Where the rings stopped.
    pub fn positions(&self) -> Vec<RingBase> {
        self.link.as_ref().map(|link| link.session.positions()).unwrap_or_default()
    }

    /// Where the rings go on.
    pub fn set_positions(&mut self, positions: &[RingBase]) {
        if let Some(link) = &mut self.link {
            link.session.set_positions(positions);
        }
    }

    /// The other process, which was told to go on, is gone before it said that it does: rings are
    /// where their records say, if there are any.
    pub fn doubt(&mut self) {
        if let Some(link) = &mut self.link {
            link.session.doubt_positions();
        }
    }

    /// The other process has let go: the socket's file goes with this port.
    pub fn hold(&mut self) {
        self.stale.take().into_iter().for_each(Records::end);
        if let Way::Listen(listener) = &mut self.way {
            listener.hold(true);
        }
    }

    /// Another process has the port now: its socket's file stays.
    pub fn leave(&mut self) {
        if let Way::Listen(listener) = &mut self.way {
            listener.hold(false);
        }
    }
}

impl Link {
    fn export(&self, fds: &mut Outgoing) -> io::Result<LinkHandover> {
        let (input, input_fds) = self.connection.unfinished();
        Ok(LinkHandover {
            stream: fds.add(&self.connection)?,
            input,
            input_fds: input_fds.iter().map(|fd| fds.add(fd)).collect::<io::Result<_>>()?,
            output: self.connection.output().to_vec(),
            refusals: self.refusals,
            sent_away: self.sent_away,
            session: self.session.export(fds, Instant::now())?,
        })
    }

    fn adopt(
        settings: &PortSettings,
        state: LinkHandover,
        fds: &mut Incoming,
        closer: &Closer,
    ) -> Result<Self, AdoptError> {
        let stream = fds.take(state.stream)?;
        let beside = state.input_fds.iter().map(|fd| fds.take(*fd));
        let beside = beside.collect::<Result<Vec<OwnedFd>, _>>()?;
        let connection =
            Connection::adopt(stream, &state.input, beside, state.output, closer.clone())
                .ok_or(AdoptError::Input)?;
        let mut session = Session::adopt(settings.session(), &state.session, fds, Instant::now())?;
        session.set_fd_pool(&settings.fds);
        let interest = if connection.has_output() { EventSet::OUT } else { EventSet::IN };
        let (refusals, sent_away) = (state.refusals, state.sent_away);
        Ok(Self { refusals, sent_away, ..Self::new(connection, session, interest) })
    }
}
