//! The old side of a hand-over: offers everything, stops, and leaves, or goes on.
//!
//! ```text
//!  Serving ── take-over ──► Offered ── Ready ──► Stopped ── Leave, Running ──► Left
//!     ▲                        │                    │
//!     └── gone, late, aborted ─┴────────────────────┘
//! ```
//!
//! A thread speaks to the new process until that is ready, so that nobody waits for it. Then
//! the control thread takes over, stops all queues, and waits: [`SWITCH_TIME`] at most.
//!
//! **Until `Leave` was sent** the new process touches nothing but the offloads of taps, which are
//! set again, so whatever goes wrong this one goes on where it stopped. **After that** it goes on
//! only if the new process is gone: its end of the connection is closed by its end.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use control::Reply;
use control::handover::{Agreed, Channel, HandoverError, Kind, Nothing, TakeOver, VERSION};
use control::server::ClientId;
use event_manager::{Events, SubscriberId, SubscriberOps};
use port::PortId;
use rustix::event::{EventfdFlags, eventfd};
use switch::Switch;
use vhost_user_net::VhostUserPort;
use vhost_user_net::handover::Outgoing;

use super::ports::{Origin, Port, Side};
use super::uplink::UplinkSide;
use super::{App, Subscriber};
use crate::handover::{
    ControlOffer, Debt, MetricsOffer, Offer, PortOffer, PortStop, Prepared, QueueCount, Rest,
    State, Station, Status, SwitchCount, UplinkStop,
};
use crate::service::ServiceManager;

/// How long the new process may prepare.
const PREPARE_TIME: Duration = Duration::from_secs(60);
/// How long this process waits, when another one serves, for the kernel to send what ports had
/// that end: that one waits for it too.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long nobody serves at most, before this process goes on.
const SWITCH_TIME: Duration = Duration::from_secs(3);

/// The hand-over that is under way, if one is.
#[derive(Debug)]
pub(super) struct Handing {
    /// Readable when there is news.
    wake: Arc<OwnedFd>,
    news: Receiver<News>,
    /// For the threads.
    sender: Sender<News>,
    under_way: Option<UnderWay>,
}

type News = Result<(Channel, Prepared), HandoverError>;

#[derive(Debug)]
struct UnderWay {
    pid: i32,
    /// What is known of each guest's port: see [`vhost_user_net::VhostUserPort::changes`].
    changes: BTreeMap<String, u64>,
    /// The stations that were offered: VLAN, address, port.
    stations: BTreeSet<(u16, String, String)>,
}

impl Handing {
    pub(super) fn new() -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, news) = channel();
        Ok(Self { wake, news, sender, under_way: None })
    }

    /// Readable when there is news.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Why nothing may change at present, if that is so.
    pub(super) fn refuses(&self) -> Option<Reply> {
        let pid = self.under_way.as_ref()?.pid;
        Some(Reply::Failed(format!("process {pid} is taking over just now: ask again in a moment")))
    }
}

impl App {
    /// Somebody wants the switch. The reply is one that the client has still to be given; if there
    /// is none, the connection belongs to the hand-over.
    pub(super) fn take_over(&mut self, client: ClientId, request: &TakeOver) -> Option<Reply> {
        if let Some(refused) = self.handing.refuses() {
            return Some(refused);
        }
        let program = env!("CARGO_PKG_VERSION").to_owned();
        if request.version != VERSION {
            return Some(Reply::Failed(format!(
                "causeway {} speaks hand-over version {}, the running causeway {program} speaks \
                 version {VERSION}: they cannot follow each other without a stop",
                request.program, request.version
            )));
        }
        let mut fds = Outgoing::default();
        let offer = match self.offer(&mut fds) {
            Ok(offer) => offer,
            Err(error) => {
                return Some(Reply::Failed(format!("cannot duplicate everything: {error}")));
            }
        };
        let agreed = Agreed { version: VERSION, program, pid: std::process::id() };
        let answered = self.server.reply(client, &Reply::of(&agreed));
        if let (Ok(mut ops), Some(fd)) =
            (self.manager.event_ops(self.hub), self.server.client(client))
        {
            let _ = ops.remove(Events::empty(&fd));
        }
        let stream = self.server.release(client).filter(|_| answered)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream);
        let pid = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get());
        let sender = self.handing.sender.clone();
        let wake = Arc::clone(&self.handing.wake);
        let under_way = UnderWay {
            pid,
            changes: self.changes(),
            stations: offer.stations.iter().map(key).collect(),
        };
        let talk = move || {
            let _ = sender.send(prepare(stream, &offer, &fds.into_fds()));
            let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
        };
        match std::thread::Builder::new().name("hand-over".to_owned()).spawn(talk) {
            Ok(_) => {
                tracing::info!(pid, program = request.program, "a process prepares to take over");
                self.handing.under_way = Some(under_way);
            }
            Err(error) => tracing::error!(%error, "cannot start a thread for a hand-over"),
        }
        None
    }

    /// Takes care of `fd` if it is about a hand-over.
    pub(super) fn successor_woke(&mut self, fd: std::os::fd::RawFd) -> bool {
        use std::os::fd::AsRawFd;
        if fd != self.handing.wake.as_raw_fd() {
            return false;
        }
        let _ = rustix::io::read(&*self.handing.wake, &mut [0; 8]);
        while let Ok(news) = self.handing.news.try_recv() {
            let Some(under_way) = self.handing.under_way.take() else { continue };
            let pid = under_way.pid;
            let handed = news.and_then(|(mut channel, prepared)| {
                let outage = self.hand_over(&mut channel, &under_way)?;
                Ok((outage, prepared, channel))
            });
            match handed {
                Ok((outage, prepared, mut channel)) => {
                    let outage_us = u64::try_from(outage.as_micros()).unwrap_or(u64::MAX);
                    tracing::info!(pid, outage_us, "handed over, leaving");
                    self.leave(pid, &prepared, &mut channel);
                    // The other process waits for this with what ports had that it did not take.
                    drop(channel);
                }
                Err(error) => {
                    tracing::warn!(pid, %error, "not taken over: this process goes on");
                }
            }
        }
        true
    }

    /// Stops everything and gives it to the new process; on failure everything goes on here.
    /// Returns how long nobody served, as far as that is known here.
    fn hand_over(
        &mut self,
        channel: &mut Channel,
        under_way: &UnderWay,
    ) -> Result<Duration, HandoverError> {
        channel.patience(SWITCH_TIME)?;
        let began = Instant::now();
        self.pause();
        let mut fds = Outgoing::default();
        let result = match self.state(under_way, &mut fds) {
            Ok(state) => conclude(channel, &state, &fds.into_fds()),
            Err(error) => {
                channel.abort(&error);
                Err(Failed { error: HandoverError::Aborted(error), doubt: false })
            }
        };
        match result {
            Ok(()) => Ok(began.elapsed()),
            Err(Failed { error, doubt }) => {
                if doubt {
                    self.each_side(VhostUserPort::doubt, |_, _, _| ());
                }
                self.each_side(|_| (), |uplink, _, _| uplink.take_back());
                self.resume();
                Err(error)
            }
        }
    }

    /// Everything is another process's now, or ends.
    fn leave(&mut self, pid: i32, prepared: &Prepared, channel: &mut Channel) {
        let (taken, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.ports)
            .into_iter()
            .partition(|port| prepared.ports.contains(&port.spec.name));
        for port in rest {
            drop(self.remove(port));
        }
        // Memory that ports share is there as long as those are that were taken.
        let rest = Rest { umems: self.uplinks.drain(DRAIN_TIME) };
        if !rest.umems.is_empty() {
            tracing::warn!(umems = ?rest.umems, "the kernel still sends frames of closed queues");
            if let Err(error) = channel.send(Kind::Rest, &rest) {
                tracing::warn!(%error, "the new process was not told of them");
            }
        }
        for mut port in taken {
            match std::mem::replace(&mut port.side, Side::Absent) {
                Side::Absent => {}
                Side::Guest(id) => {
                    if let Some(guest) = self.guest_mut(id) {
                        guest.leave();
                    }
                }
                Side::Uplink(uplink) => uplink.leave(),
            }
        }
        // Before this process ends: a service manager takes the end of another one for no failure.
        self.service.succeeded_by(pid);
        self.service = ServiceManager::default();
        self.server.leave();
        self.switch.end_captures(&format!("process {pid} took over"));
        self.stopping = true;
    }

    /// What can be prepared while this process serves.
    fn offer(&mut self, fds: &mut Outgoing) -> io::Result<Offer> {
        let ports = std::mem::take(&mut self.ports);
        let offers = ports.iter().map(|port| self.offer_port(port, fds));
        let offers = offers.collect::<io::Result<_>>();
        self.ports = ports;
        let (device, inode) = self.server.file();
        Ok(Offer {
            ports: offers?,
            control: ControlOffer {
                fd: fds.add(self.server.listener())?,
                path: std::path::absolute(self.server.path())?,
                device,
                inode,
            },
            metrics: match (&self.scrape, self.metrics_at) {
                (Some(scrape), Some(asked)) => {
                    let asked = asked.to_string();
                    Some(MetricsOffer { fd: fds.add(scrape.listener())?, asked })
                }
                _ => None,
            },
            service: self.service.socket().map(|socket| fds.add(socket)).transpose()?,
            stations: self.stations(),
        })
    }

    fn offer_port(&mut self, port: &Port, fds: &mut Outgoing) -> io::Result<PortOffer> {
        // The new process may have another current folder.
        let spec = port.spec.clone().absolute()?;
        let mut offer = PortOffer::of(&spec, &port.statics, port.origin.name());
        match &port.side {
            Side::Absent => {}
            Side::Guest(id) => {
                if let Some(guest) = self.guest_mut(*id) {
                    offer.guest = Some(guest.export(fds)?);
                }
            }
            Side::Uplink(uplink) => offer.uplink = uplink.device().is_some(),
        }
        Ok(offer)
    }

    fn stations(&self) -> Vec<Station> {
        let names: BTreeMap<_, _> =
            self.ports.iter().map(|port| (port.handle.id, &port.spec.name)).collect();
        let station = |entry: switch::FdbEntry| {
            Some(Station {
                mac: entry.mac.to_string(),
                vlan: entry.vlan.get(),
                port: (*names.get(&entry.port)?).clone(),
                age_s: entry.age_secs,
                fixed: entry.fixed,
            })
        };
        self.switch.fdb().into_iter().filter_map(station).collect()
    }

    fn changes(&mut self) -> BTreeMap<String, u64> {
        let ports = std::mem::take(&mut self.ports);
        let of_port = |port: &Port| {
            let Side::Guest(id) = port.side else { return None };
            Some((port.spec.name.clone(), self.guest_mut(id)?.changes()))
        };
        let changes = ports.iter().filter_map(of_port).collect();
        self.ports = ports;
        changes
    }

    /// Where everything stopped.
    fn state(&mut self, under_way: &UnderWay, fds: &mut Outgoing) -> Result<State, String> {
        let mut ports = std::mem::take(&mut self.ports);
        let stops = ports.iter_mut().map(|port| {
            let stop = self.stop_of(port, under_way, fds);
            stop.map_err(|error| format!("port {}: {error}", port.spec.name))
        });
        let stops = stops.collect::<Result<_, String>>();
        self.ports = ports;
        let stations = self.stations().into_iter();
        Ok(State {
            ports: stops?,
            stations: stations.filter(|one| !under_way.stations.contains(&key(one))).collect(),
            switch: SwitchCount::of(&self.switch.record()),
        })
    }

    fn stop_of(
        &mut self,
        port: &mut Port,
        under_way: &UnderWay,
        fds: &mut Outgoing,
    ) -> Result<PortStop, String> {
        let mut stop = PortStop {
            name: port.spec.name.clone(),
            status: Status::of(port.handle.status.read()),
            elsewhere: self.switch.elsewhere(port.handle.id).to_array(),
            debt: Debt::of(self.switch.port_debt(port.handle.id)),
            ..PortStop::default()
        };
        match &mut port.side {
            Side::Absent => {}
            Side::Guest(id) => {
                if let Some(guest) = self.guest_mut(*id) {
                    if under_way.changes.get(&port.spec.name) == Some(&guest.changes()) {
                        stop.rings = guest.positions();
                    } else {
                        stop.guest = Some(guest.export(fds).map_err(|e| e.to_string())?);
                    }
                }
            }
            Side::Uplink(uplink) => {
                if let Some(parts) = uplink.parts()? {
                    let add = parts.fds.iter().map(|fd| fds.add(fd));
                    let numbers = add.collect::<io::Result<_>>().map_err(|e| e.to_string())?;
                    stop.uplink = Some(UplinkStop { state: parts.state, fds: numbers });
                }
            }
        }
        // An uplink that is taken apart settles what the kernel did not send.
        let counts = self.switch.record_port(port.handle.id);
        stop.counts = counts.iter().map(QueueCount::of).collect();
        Ok(stop)
    }
}

impl App {
    /// Takes all queues from the workers. What comes in stops first, so that everything that is
    /// on its way arrives.
    fn pause(&mut self) {
        for inward in [true, false] {
            self.each_side(
                |guest| guest.pause(inward),
                |uplink, switch, id| {
                    uplink.pause(switch, id, inward);
                },
            );
        }
    }

    /// Gives all queues to the workers. The ways out open first.
    pub(super) fn resume(&mut self) {
        for inward in [false, true] {
            self.each_side(
                |guest| guest.resume(inward),
                |uplink, switch, id| {
                    uplink.resume(switch, id, inward);
                },
            );
        }
    }

    /// Does something to what is behind every port.
    pub(super) fn each_side(
        &mut self,
        to_guest: impl Fn(&mut VhostUserPort),
        to_uplink: impl Fn(&mut UplinkSide, &Switch, PortId),
    ) {
        let mut ports = std::mem::take(&mut self.ports);
        for port in &mut ports {
            match &mut port.side {
                Side::Absent => {}
                Side::Guest(id) => self.guest_mut(*id).into_iter().for_each(&to_guest),
                Side::Uplink(uplink) => to_uplink(uplink, &self.switch, port.handle.id),
            }
        }
        self.ports = ports;
    }

    /// A guest's port.
    pub(super) fn guest_mut(&mut self, id: SubscriberId) -> Option<&mut VhostUserPort> {
        match self.manager.subscriber_mut(id) {
            Ok(Subscriber::Guest(guest)) => Some(guest),
            Ok(Subscriber::Hub(_)) | Err(_) => None,
        }
    }
}

fn key(station: &Station) -> (u16, String, String) {
    (station.vlan, station.mac.clone(), station.port.clone())
}

/// Offers everything and waits until the new process is ready.
fn prepare(stream: UnixStream, offer: &Offer, fds: &[OwnedFd]) -> News {
    let mut channel = Channel::new(stream)?;
    channel.patience(PREPARE_TIME)?;
    channel.send_with(Kind::Offer, offer, fds)?;
    let (prepared, _) = channel.receive(Kind::Ready)?;
    Ok((channel, prepared))
}

/// The new process serves nothing, and never will.
struct Failed {
    error: HandoverError,
    /// Whether it may have served for a moment.
    doubt: bool,
}

impl From<HandoverError> for Failed {
    fn from(error: HandoverError) -> Self {
        Self { error, doubt: false }
    }
}

/// Gives the state away.
fn conclude(channel: &mut Channel, state: &State, fds: &[OwnedFd]) -> Result<(), Failed> {
    channel.send_with(Kind::State, state, fds)?;
    let (Nothing {}, _) = channel.receive(Kind::Confirm)?;
    channel.send(Kind::Leave, &Nothing {})?;
    match channel.receive(Kind::Running) {
        Ok((Nothing {}, _)) => Ok(()),
        Err(error @ HandoverError::Gone) => Err(Failed { error, doubt: true }),
        Err(error @ HandoverError::Aborted(_)) => Err(Failed { error, doubt: false }),
        // It lives and was told to go on.
        Err(error) => {
            tracing::warn!(%error, "the new process did not say that it runs");
            Ok(())
        }
    }
}

impl Origin {
    /// The name in a hand-over.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::CommandLine => "command-line",
            Self::Client => "client",
        }
    }
}
