//! A vhost-user session on a socket, as a port of the switch.
//!
//! ```text
//!  listener / connect timer ──► Connection ──Message──► Session ──► FabricRings ──► port::Fabric
//!            (event-manager)        ▲                      │
//!                                   └──────── reply ───────┘
//! ```
//!
//! A front end whose memory is lost (`virtq::mem::guard`) is put into quarantine: its connection
//! ends, and nobody is accepted before [`port::StatusCell::reset`].
//!
//! One front end at a time. Whatever goes wrong with it ends that connection only: its queues are
//! taken back, its memory unmapped, its fds closed, and the port waits for the next one.

mod accept;
mod channel;
mod closer;
mod connection;
mod handover;
mod late;
mod link;
mod listener;
mod misses;
mod parked;
mod reconnect;
mod rings;
mod settings;
mod share;
mod timer;
mod transfer;
#[cfg(test)]
#[path = "../examples/wire/fabric.rs"]
#[expect(dead_code, reason = "what only front ends on sockets use")]
mod wire;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use port::{Fabric, PortId, PortState, QueueCounters, QueueFault, StatusCell};
use virtq::mem::guard;

use crate::session::{RingIndex, Session, Unready};
use closer::Closer;
use connection::{Connection, Disconnect};
use link::Link;
use listener::Listener;
pub use listener::OpenError;
use reconnect::Reconnect;
use rings::FabricRings;
pub use settings::{PortSettings, SocketMode};
use share::{Share, say};
use timer::Timer;
use transfer::Transfers;

/// Messages handled before others get their turn; the socket stays readable meanwhile.
const TURN_MESSAGES: usize = 64;
/// And the time after which they get it, if the messages take long.
const TURN_TIME: Duration = Duration::from_millis(2);
/// Refusals that are logged for each connection; the port's status shows the last one anyway.
const LOGGED_REFUSALS: u32 = 10;
/// How long nobody is accepted after that failed: the process may be short of fds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// How long a front end may take from starting a transmitq to enabling it before what the guest
/// sends there is dropped.
const HOLD: Duration = Duration::from_millis(200);

/// Gives the counters of a queue pair.
pub type CountersOf = Box<dyn Fn(u16) -> Arc<QueueCounters> + Send>;

/// What connects a port to the switch.
pub struct PortLinks {
    /// The port's number in the switch.
    pub id: PortId,
    /// The switch.
    pub fabric: Arc<dyn Fabric>,
    /// Where the port says how it is.
    pub status: StatusCell,
    /// Where its queues are counted.
    pub counters: CountersOf,
}

impl std::fmt::Debug for PortLinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortLinks").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A port whose other side is a vhost-user front end.
#[derive(Debug)]
pub struct VhostUserPort {
    settings: PortSettings,
    status: StatusCell,
    rings: FabricRings,
    way: Way,
    link: Option<Link>,
    /// Ends the time that held rings have, and that of [`Self::accept_again`].
    timer: Timer,
    /// What the timer is armed for.
    armed: Option<Instant>,
    /// The listener is not watched until then.
    accept_again: Option<Instant>,
    /// Gives an edge when memory was lost, of whichever port.
    losses: OwnedFd,
    /// Closes what could make us wait.
    closer: Closer,
    /// The same for those that are not served.
    strangers: Closer,
    /// See [`Self::changes`].
    changes: u64,
    /// The record of another process that this port goes on without: it ends with that.
    stale: Option<OwnedFd>,
    /// Written by other threads: a ring met an address that the front end has to translate, a
    /// transfer of state has ended, nobody sleeps any more in memory that is late, or memory was
    /// freed.
    missed: Arc<OwnedFd>,
    /// What the back channel did not take is sent then.
    ask_again: Option<Instant>,
    /// What it may take of the control thread, and how long it has to wait for more.
    share: Share,
}

/// How connections come about.
#[derive(Debug)]
enum Way {
    Listen(Listener),
    Connect(Reconnect),
}

impl VhostUserPort {
    /// Opens the port: as a server it listens when this returns, as a client it will connect as
    /// soon as it is added to an event manager.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the socket cannot be made or somebody else serves it.
    pub fn new(settings: PortSettings, links: PortLinks) -> Result<Self, OpenError> {
        let no_timer = |e| OpenError::io("cannot make a timer for", &settings.socket, e);
        let timer = Timer::new().map_err(no_timer)?;
        let way = match settings.mode {
            SocketMode::Server => Way::Listen(Listener::open(&settings)?),
            SocketMode::Client => Way::Connect(Reconnect::new().map_err(no_timer)?),
        };
        let losses = guard::notice().map_err(no_timer)?;
        let missed = Arc::new(misses::eventfd().map_err(no_timer)?);
        let status = links.status.clone();
        let rings = FabricRings::new(links, &settings, &missed);
        let port = Self {
            settings,
            status,
            rings,
            way,
            link: None,
            timer,
            armed: None,
            accept_again: None,
            losses,
            closer: Closer::new(&missed),
            strangers: Closer::default(),
            changes: 0,
            stale: None,
            missed,
            ask_again: None,
            share: Share::new(Instant::now()),
        };
        port.show();
        Ok(port)
    }

    /// A worker met a ring that its driver broke: the ring is taken out of service until the
    /// driver resets it, and the front end is told by the ring's err eventfd. Nothing happens if
    /// the ring that runs now is sound.
    pub fn ring_fault(&mut self, ring: RingIndex, fault: &QueueFault) {
        self.changes = self.changes.wrapping_add(1);
        if !self.rings.late.rest() {
            return self.rings.late.remember(ring, fault);
        }
        self.take_fault(ring, fault);
        self.rings.late.go_on();
    }

    fn take_fault(&mut self, ring: RingIndex, fault: &QueueFault) {
        let Some(link) = &mut self.link else { return self.show() };
        if !link.session.ring_fault(ring, &mut self.rings) {
            // Late: the ring is another one now, or this is the same fault met by another worker.
            // The switch has shown the port as broken already.
            return self.show();
        }
        if let Some(err) = link.session.err_eventfd(ring) {
            self.rings.watch.signal(err);
        }
        say!(self.rings, warn, ring = ring.0, "{fault}");
        self.status.error(format!("ring {}: {fault}", ring.0));
        self.show();
    }

    /// Ends the present connection, if there is one; the front end may come again.
    pub fn disconnect(&mut self, reason: &str, ops: &mut EventOps<'_>) {
        self.changes = self.changes.wrapping_add(1);
        self.unlink(&Disconnect::Asked(reason.to_owned()), ops);
    }

    /// The locked file of ring positions, for a process that takes the port over while this one
    /// lives: give it a duplicate, see [`Self::adopt_record_file`].
    pub fn record_file(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.rings.records.fd()
    }

    /// Goes on with the file of ring positions of the process that had the port. Before any ring
    /// starts; without a state directory it is closed.
    pub fn adopt_record_file(&mut self, file: OwnedFd) {
        if let Some(dir) = &self.settings.state_dir {
            let (socket, queues) = (&self.settings.socket, self.settings.queues);
            self.rings.records.take_over(file, dir, socket, queues);
        }
    }

    /// Whether a front end is connected.
    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// What was agreed with the front end, if one is connected.
    pub fn session(&self) -> Option<&Session> {
        self.link.as_ref().map(|link| &link.session)
    }

    /// The settings.
    pub fn settings(&self) -> &PortSettings {
        &self.settings
    }

    fn is_quarantined(&self) -> bool {
        self.status.read().state == PortState::Quarantined
    }

    /// Puts the port into quarantine if the front end's memory was lost, or its fds cannot be
    /// closed. Returns whether it did.
    fn check_hostile(&mut self, ops: &mut EventOps<'_>) -> bool {
        let lost = self.link.as_ref().and_then(|link| link.session.memory_lost());
        let stuck = self.closer.stuck_at().filter(|at| *at <= Instant::now());
        let stuck = stuck.map(|_| Disconnect::SlowFds);
        let slow = self.link.is_some() && self.rings.watch.is_over();
        let slow = slow.then_some(Disconnect::SlowCalls);
        let Some(reason) = lost.map(Disconnect::MemoryLost).or(stuck).or(slow) else {
            return false;
        };
        self.status.set(PortState::Quarantined, reason.to_string());
        self.unlink(&reason, ops);
        true
    }

    fn connect(&mut self, ops: &mut EventOps<'_>) {
        let Way::Connect(reconnect) = &mut self.way else { return };
        reconnect.expired();
        if self.link.is_some() || self.status.read().state == PortState::Quarantined {
            return;
        }
        match reconnect::connect(&self.settings.socket) {
            Ok(stream) => {
                reconnect.succeeded();
                self.open_link(stream, ops);
            }
            Err(error) => {
                reconnect.failed();
                self.status.error(format!("cannot connect: {error}"));
            }
        }
    }

    fn open_link(&mut self, stream: OwnedFd, ops: &mut EventOps<'_>) {
        let interest = EventSet::IN;
        if let Err(error) = ops.add(Events::new(&stream, interest)) {
            self.status.error(format!("cannot watch the connection: {error}"));
            self.retry();
            return;
        }
        let mut session = Session::new(self.settings.session());
        session.set_waker(Arc::clone(&self.missed));
        session.set_fd_pool(&self.settings.fds);
        let connection = Connection::new(stream, self.closer.clone());
        self.link = Some(Link::new(connection, session, interest));
        say!(self.rings, info, "front end connected");
        self.show();
    }

    /// Reads, handles and answers as much as is there, within a turn, and asks for what it lacks.
    fn serve(&mut self, ops: &mut EventOps<'_>) {
        let Some(link) = &mut self.link else { return };
        let result = link.turn(&mut self.rings, &self.status);
        // What was lost meanwhile, perhaps on this very thread, explains what went wrong.
        if self.check_hostile(ops) {
            return;
        }
        if let Err(reason) = result.and_then(|()| self.watch_link(ops)) {
            self.unlink(&reason, ops);
            return;
        }
        self.ask();
        self.arm_timer();
        self.show();
    }

    /// Asks for what the connection waits for.
    fn watch_link(&mut self, ops: &mut EventOps<'_>) -> Result<(), Disconnect> {
        let Some(link) = &mut self.link else { return Ok(()) };
        // Its end is told all the same.
        let interest = if self.share.rest_until().is_some() {
            EventSet::empty()
        } else {
            link.wanted(&self.rings)
        };
        if interest != link.interest {
            link.interest = interest;
            let events = Events::new(&link.connection.as_fd(), interest);
            ops.modify(events).map_err(|error| io::Error::other(error.to_string()))?;
        }
        Ok(())
    }

    /// Gives transmitqs that are not enabled yet some time, and sets the timer to what is next.
    fn arm_timer(&mut self) {
        let now = Instant::now();
        let until = now.checked_add(HOLD).unwrap_or(now);
        let held = self.link.as_mut().and_then(|link| link.session.hold_rings(until));
        let (asked, stalls) = (self.rings.transfers.asked_until(), self.stalls_at(now));
        let stuck = self.closer.stuck_at().filter(|_| !self.is_quarantined());
        let own = [self.accept_again, self.ask_again, self.share.rest_until(), stuck];
        let next = own.into_iter().chain([held, asked, stalls]).flatten().min();
        if let Some(next) = next.filter(|_| next != self.armed) {
            self.timer.arm(whole_ms(next.saturating_duration_since(now)));
        }
        self.armed = next;
    }

    /// When the front end is sent away that stopped in the middle of something.
    fn stalls_at(&mut self, now: Instant) -> Option<Instant> {
        let rests = self.rests();
        let link = self.link.as_mut()?;
        let listened = !rests && !link.waits(&self.rings);
        link.connection.stalls_at(now, listened)
    }

    /// The timer went off.
    fn timer_expired(&mut self, ops: &mut EventOps<'_>) {
        self.timer.clear();
        self.armed = None;
        if self.check_hostile(ops) {
            return self.arm_timer();
        }
        let now = Instant::now();
        if self.stalls_at(now).is_some_and(|at| at <= now) {
            self.unlink(&Disconnect::Stalled, ops);
            return self.arm_timer();
        }
        if let Some(link) = &mut self.link {
            link.session.release_held_rings(now, &mut self.rings);
            link.complain_of_rings(&mut self.rings, &self.status);
        }
        self.answer_state(ops);
        if self.ask_again.take_if(|again| *again <= now).is_some() {
            self.ask();
        }
        let rested = self.share.end_rest(now);
        let again = self.accept_again.take_if(|again| *again <= now).is_some();
        if again && self.strangers.is_full() {
            self.accept_again = now.checked_add(ACCEPT_PAUSE);
        }
        if again || rested {
            self.watch(ops);
        }
        if rested {
            self.look_again(ops);
        }
        self.arm_timer();
        self.show();
    }

    fn unlink(&mut self, reason: &Disconnect, ops: &mut EventOps<'_>) {
        let Some(mut link) = self.link.take() else { return };
        link.session.close(&mut self.rings);
        self.rings.transfers.end();
        self.rings.end_late();
        // It may go before that was heard of.
        if self.rings.end_watch(&self.missed) {
            self.status.set(PortState::Quarantined, Disconnect::SlowCalls.to_string());
        }
        if let Err(error) = ops.remove(Events::empty(&link.connection.as_fd())) {
            say!(self.rings, warn, %error, "cannot forget the connection");
        }
        let mut gone = link.connection.close();
        gone.extend(link.session.into_gone());
        self.strangers.release(gone);
        if matches!(reason, Disconnect::Left) {
            say!(self.rings, info, "front end disconnected");
        } else {
            say!(self.rings, warn, "front end sent away: {reason}");
            self.status.error(reason.to_string());
        }
        self.retry();
        self.show();
        self.arm_timer();
    }

    fn retry(&mut self) {
        if let Way::Connect(reconnect) = &mut self.way {
            reconnect.failed();
        }
    }

    /// Says how the port is.
    fn show(&self) {
        let path = self.settings.socket.display();
        let waiting = |text: String| self.status.set(PortState::Waiting, text);
        match &self.link {
            None => match self.settings.mode {
                SocketMode::Server => {
                    waiting(format!("waiting for the front end to connect to {path}"));
                }
                SocketMode::Client => {
                    waiting(format!("waiting for the front end to listen on {path}"));
                }
            },
            Some(link) => match link.session.ready() {
                Ok(()) => self.status.set(PortState::Up, ""),
                Err(broken @ Unready::Broken(_)) => {
                    self.status.set(PortState::Broken, broken.to_string());
                }
                Err(reason) => waiting(format!("connected, {reason}")),
            },
        }
    }
}

/// Milliseconds, rounded up.
fn whole_ms(time: Duration) -> u32 {
    u32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u32::MAX)
}

impl MutEventSubscriber for VhostUserPort {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = match &mut self.way {
            Way::Listen(listener) => ops.add(Events::new(&listener.as_fd(), EventSet::IN)),
            Way::Connect(reconnect) => {
                reconnect.now();
                ops.add(Events::new(&reconnect.as_fd(), EventSet::IN))
            }
        };
        let added = added.and_then(|()| ops.add(Events::new(&self.timer.as_fd(), EventSet::IN)));
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let added = added.and_then(|()| ops.add(Events::new(&self.losses, edge)));
        // Of a port that was taken over.
        let added = added.and_then(|()| match &self.link {
            Some(link) => ops.add(Events::new(&link.connection.as_fd(), link.interest)),
            None => Ok(()),
        });
        let added = added.and_then(|()| ops.add(Events::new(&self.missed, EventSet::IN)));
        if let Err(error) = added {
            self.status.set(PortState::Down, format!("cannot watch the socket: {error}"));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let before = share::cpu_time();
        self.handle(events, ops);
        self.charge(before, ops);
    }
}

impl VhostUserPort {
    fn handle(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.changes = self.changes.wrapping_add(1);
        let fd = events.fd();
        let of_link = |link: &Link| link.connection.as_fd().as_raw_fd() == fd;
        if self.link.as_ref().is_some_and(of_link) {
            let gone = events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
            let waits = self.link.as_ref().is_some_and(|link| link.waits(&self.rings));
            match gone && (waits || self.rests()) {
                true => self.unlink(&Disconnect::Left, ops),
                false => self.serve(ops),
            }
            return;
        }
        if self.missed.as_raw_fd() == fd {
            misses::drain(&self.missed);
            if self.check_hostile(ops) {
                return;
            }
            self.ask();
            self.answer_state(ops);
            self.arm_timer();
            self.look_again(ops);
            return;
        }
        if self.losses.as_raw_fd() == fd {
            let _ = self.check_hostile(ops);
            return;
        }
        if self.timer.as_fd().as_raw_fd() == fd {
            self.timer_expired(ops);
            return;
        }
        match &self.way {
            Way::Listen(listener) if listener.as_fd().as_raw_fd() == fd => self.accept(ops),
            Way::Connect(reconnect) if reconnect.as_fd().as_raw_fd() == fd => self.connect(ops),
            Way::Listen(_) | Way::Connect(_) => {}
        }
    }
}

impl Drop for VhostUserPort {
    fn drop(&mut self) {
        self.dismiss();
        if let Some(mut link) = self.link.take() {
            link.session.close(&mut self.rings);
            self.rings.end_late();
            let mut gone = link.connection.leave();
            gone.extend(link.session.into_gone());
            self.strangers.release(gone);
        }
    }
}
