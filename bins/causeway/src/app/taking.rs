//! The new side of a hand-over: adopts what it is offered, and goes on with it.
//!
//! ```text
//!  Taken::ask ──► Offer ──► take_or_open every port ──► Ready ──► State: adopt it
//!                             adopted: as it is                      Confirm ──► Leave
//!                             later:   what the old one still uses   resume, Running
//!                             open:    what is new
//! ```
//!
//! **Until `Leave` came** nothing of the old process is touched: no ring, no file, no interface,
//! but for the offloads of taps, which it sets again. So whatever goes wrong before, this process
//! gives up and the old one goes on.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use control::handover::{Agreed, Channel, Kind, Nothing, TakeOver, VERSION, ask};
use control::scrape::Scrape;
use control::server::Server;
use control::{PortKind, PortSpec, StaticEntry};
use event_manager::SubscriberOps;
use packet::{MacAddr, VlanId};
use port::{PortId, PortState, PortTotals};
use switch::FdbEntry;
use uplink::Parts;
use vhost_user_net::VhostUserPort;
use vhost_user_net::handover::Incoming;

use super::App;
use super::ports::{Origin, Port, Side};
use super::uplink::UplinkSide;
use crate::handover::{Offer, PortOffer, PortStop, Prepared, Rest, State, Station};

/// How long the old process may take to offer, and to stop.
const OFFER_TIME: Duration = Duration::from_secs(30);
/// How long the old process may take to end.
const END_TIME: Duration = Duration::from_secs(5);
/// How often it is asked whether it has.
const END_PAUSE: Duration = Duration::from_millis(2);

/// What another process offers.
#[derive(Debug)]
pub(crate) struct Taken {
    channel: Channel,
    agreed: Agreed,
    offer: Offer,
    fds: Incoming,
    /// The ports that are adopted.
    adopted: BTreeMap<String, PortId>,
    /// Ports that are opened when the old process is gone.
    later: bool,
}

/// What becomes of a port.
enum Plan {
    Adopt(Box<PortOffer>),
    Later,
    Open,
}

impl Taken {
    /// Asks the process whose control socket is `path`.
    pub(crate) fn ask(path: &Path) -> Result<Self, String> {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        let (agreed, mut channel) = ask(path, &TakeOver { version: VERSION, program })?;
        let offered = |error: &dyn std::fmt::Display| {
            format!("process {} does not hand over: {error}", agreed.pid)
        };
        if agreed.version != VERSION {
            return Err(offered(&format!(
                "causeway {} speaks hand-over version {}, this one version {VERSION}",
                agreed.program, agreed.version
            )));
        }
        channel.patience(OFFER_TIME).map_err(|error| offered(&error))?;
        let (offer, fds) = channel.receive(Kind::Offer).map_err(|error| offered(&error))?;
        let fds = Incoming::from(fds);
        Ok(Self { channel, agreed, offer, fds, adopted: BTreeMap::new(), later: false })
    }

    /// The ports as they are, or those that clients added.
    pub(crate) fn ports(
        &self,
        of_clients: bool,
    ) -> Result<Vec<(PortSpec, Vec<StaticEntry>, Origin)>, String> {
        let ports = self.offer.ports.iter().map(|port| {
            let origin = match port.origin.as_str() {
                "client" => Origin::Client,
                "file" => Origin::File,
                _ => Origin::CommandLine,
            };
            Ok((port.spec()?, port.entries()?, origin))
        });
        let ports: Result<Vec<_>, String> = ports.collect();
        let wanted = |origin| !of_clients || origin == Origin::Client;
        Ok(ports?.into_iter().filter(|(_, _, origin)| wanted(*origin)).collect())
    }

    /// The control socket, if the old process serves the same one.
    pub(crate) fn server(&mut self, path: &Path) -> Result<Option<Server>, String> {
        let control = &self.offer.control;
        let failed = |error: &dyn std::fmt::Display| format!("cannot take the socket: {error}");
        if std::path::absolute(path).map_err(|error| failed(&error))? != control.path {
            return Ok(None);
        }
        let file = (control.device, control.inode);
        let listener = self.fds.take(control.fd).map_err(|error| failed(&error))?;
        Server::adopt(listener, path, file).map(Some).map_err(|error| failed(&error))
    }

    /// The scrapers' socket, if the old process was asked for the same one.
    pub(crate) fn scrape(&mut self, address: std::net::SocketAddr) -> Option<Scrape> {
        let metrics = self.offer.metrics.as_ref()?;
        let same = metrics.asked == address.to_string();
        let listener = self.fds.take(metrics.fd).ok().filter(|_| same)?;
        Scrape::adopt(listener).ok()
    }

    /// Tells the old process that it goes on.
    pub(crate) fn abort(&mut self, reason: &str) {
        self.channel.abort(reason);
    }

    /// Waits until the old process has let go of everything; what of its is not to be touched.
    fn await_end(&mut self) -> Rest {
        let end = Instant::now().checked_add(END_TIME);
        let said = match self.channel.patience(END_TIME) {
            Ok(()) => self.channel.receive(Kind::Rest),
            Err(error) => Err(error.into()),
        };
        while !self.channel.is_closed() && end.is_some_and(|end| Instant::now() < end) {
            std::thread::sleep(END_PAUSE);
        }
        // Who goes without a word has let go of everything.
        said.map(|(rest, _)| rest).unwrap_or_default()
    }

    /// The old process's way to the service manager.
    pub(crate) fn service(&mut self) -> Option<OwnedFd> {
        self.fds.take(self.offer.service?).ok()
    }

    /// Whether another port of the old process has the UMEM that `spec` names.
    fn has_umem_of(&self, spec: &PortSpec) -> bool {
        let umem = spec.keys().into_iter().find(|(key, _)| *key == "umem");
        let has = |port: &PortOffer, umem: &str| {
            port.keys.iter().any(|(key, value)| key == "umem" && value == umem)
        };
        umem.is_some_and(|(_, umem)| self.offer.ports.iter().any(|port| has(port, &umem)))
    }

    fn plan(&self, spec: &PortSpec) -> Plan {
        let resource = spec.resource();
        let mut ports = self.offer.ports.iter();
        match ports.find(|port| port.resource == resource) {
            // Memory that it is to share is still the old process's.
            None if self.has_umem_of(spec) => Plan::Later,
            None => Plan::Open,
            Some(port) if port.goes_on_as(spec) && (port.guest.is_some() || port.uplink) => {
                Plan::Adopt(Box::new(port.clone()))
            }
            Some(_) => Plan::Later,
        }
    }
}

impl App {
    /// Adds a port: with what the old process offers, or with something of its own.
    pub(crate) fn take_or_open(
        &mut self,
        taken: &mut Taken,
        spec: &PortSpec,
        statics: Vec<StaticEntry>,
        origin: Origin,
    ) -> Result<(), String> {
        let in_port = |error: String| format!("port {}: {error}", spec.name);
        let whole = spec.clone().absolute().map_err(|error| in_port(error.to_string()))?;
        let offer = match taken.plan(&whole) {
            Plan::Open => return self.add(spec, statics, origin),
            Plan::Later => None,
            Plan::Adopt(offer) => Some(offer),
        };
        let config = self.port_config(spec, &statics).map_err(in_port)?;
        let handle = self.switch.add_port(&config).map_err(|e| in_port(e.to_string()))?;
        let (id, side) = (handle.id, Side::Absent);
        let mut port = Port { spec: spec.clone(), statics, origin, handle, side };
        match offer {
            None => {
                taken.later = true;
                let text = format!("for process {} to let go of it", taken.agreed.pid);
                port.handle.status.set(PortState::Waiting, text);
            }
            Some(offer) => {
                let guest = match (offer.guest, &port.spec.kind) {
                    (Some(state), PortKind::VhostUser(spec)) => {
                        let (settings, links) = self.guest_parts(&port, spec);
                        Some(VhostUserPort::adopt(settings, links, state, &mut taken.fds))
                    }
                    _ => None,
                };
                if let Some(guest) = guest.transpose().map_err(|e| in_port(e.to_string()))? {
                    port.side = Side::Guest(self.subscribe(guest));
                }
                let _ = taken.adopted.insert(spec.name.clone(), id);
            }
        }
        self.ports.push(port);
        Ok(())
    }

    /// Takes over, when all ports are prepared. On failure nothing of the old process was touched.
    pub(crate) fn go_on(&mut self, taken: &mut Taken) -> Result<(), String> {
        let taking = self.adopt_and_confirm(taken);
        if taking.is_err() {
            self.abandon();
        }
        let stopped = taking?;
        self.hold();
        self.resume();
        let ran = taken.channel.send(Kind::Running, &Nothing {});
        let outage_us = u64::try_from(stopped.elapsed().as_micros()).unwrap_or(u64::MAX);
        let Agreed { pid, program, .. } = taken.agreed.clone();
        let ports = taken.adopted.len();
        tracing::info!(pid, program, ports, outage_us, "took over");
        if let Err(error) = ran {
            tracing::warn!(%error, "the old process was not told that this one runs");
        }
        let rest = taken.await_end();
        // What nobody took would keep sockets of ports that ended alive.
        taken.fds = Incoming::default();
        if taken.channel.is_closed() {
            self.uplinks.settle(&rest);
        } else {
            tracing::warn!(pid, "the old process does not end: nobody gets its room in UMEMs");
        }
        if taken.later {
            self.look_after_ports();
        }
        self.steer();
        Ok(())
    }

    /// Until the old process says that it lets go. Returns since when it does not serve.
    fn adopt_and_confirm(&mut self, taken: &mut Taken) -> Result<Instant, String> {
        let pid = taken.agreed.pid;
        let failed = |error: &dyn std::fmt::Display| {
            format!("process {pid} goes on, it did not hand over: {error}")
        };
        let stations = std::mem::take(&mut taken.offer.stations);
        self.restore_stations(taken, &stations);
        let prepared = Prepared { ports: taken.adopted.keys().cloned().collect() };
        taken.channel.send(Kind::Ready, &prepared).map_err(|error| failed(&error))?;
        let (state, fds): (State, _) =
            taken.channel.receive(Kind::State).map_err(|error| failed(&error))?;
        let stopped = Instant::now();
        let mut fds = Incoming::from(fds);
        for stop in state.ports {
            self.adopt_stop(taken, stop, &mut fds)?;
        }
        self.restore_stations(taken, &state.stations);
        let (record, removed) = state.switch.records();
        self.switch.carry(&record);
        self.switch.carry_removed(&removed);
        taken.channel.send(Kind::Confirm, &Nothing {}).map_err(|error| failed(&error))?;
        let (Nothing {}, _) = taken.channel.receive(Kind::Leave).map_err(|error| failed(&error))?;
        Ok(stopped)
    }

    fn restore_stations(&self, taken: &Taken, stations: &[Station]) {
        let entry = |station: &Station| {
            Some(FdbEntry {
                vlan: VlanId::new(station.vlan).unwrap_or(VlanId::NONE),
                mac: MacAddr(station.mac.parse::<control::MacAddress>().ok()?.bytes()),
                port: *taken.adopted.get(&station.port)?,
                age_secs: station.age_s,
                fixed: station.fixed,
            })
        };
        let refused = self.switch.restore_fdb(stations.iter().filter_map(entry));
        if refused > 0 {
            tracing::warn!(refused, "there was no room for some addresses: they are learned anew");
        }
    }

    /// Takes over where a port stopped.
    fn adopt_stop(
        &mut self,
        taken: &Taken,
        stop: PortStop,
        fds: &mut Incoming,
    ) -> Result<(), String> {
        let counts: Vec<_> = stop.counts.iter().map(|count| count.record()).collect();
        let id = taken.adopted.get(&stop.name);
        let at = self.ports.iter().position(|port| Some(&port.handle.id) == id);
        let Some(mut port) = at.map(|at| self.ports.remove(at)) else {
            counts.iter().for_each(|count| self.switch.carry_removed(count));
            return Ok(());
        };
        self.switch.carry_port(port.handle.id, &counts);
        self.switch.carry_elsewhere(port.handle.id, PortTotals::from_array(stop.elsewhere));
        self.switch.carry_debt(port.handle.id, &stop.debt.debt());
        let status = stop.status.clone().restore();
        port.handle.status.restore(status.clone());
        if status.state == PortState::Quarantined {
            self.switch.quarantine(port.handle.id, status);
        }
        let name = stop.name.clone();
        let adopted = self.adopt_side(&mut port, stop, fds);
        self.ports.push(port);
        adopted.map_err(|error| format!("port {name}: {error}"))
    }

    fn adopt_side(
        &mut self,
        port: &mut Port,
        stop: PortStop,
        fds: &mut Incoming,
    ) -> Result<(), String> {
        match (&port.spec.kind, &port.side) {
            (PortKind::VhostUser(spec), Side::Guest(id)) => {
                let id = *id;
                if let Some(state) = stop.guest {
                    // It is another one than was offered.
                    drop(self.manager.remove_subscriber(id));
                    let (settings, links) = self.guest_parts(port, spec);
                    let guest = VhostUserPort::adopt(settings, links, state, fds);
                    let guest = guest.map_err(|error| error.to_string())?;
                    port.side = Side::Guest(self.subscribe(guest));
                } else if let Some(guest) = self.guest_mut(id) {
                    guest.set_positions(&stop.rings);
                }
            }
            (kind, Side::Absent) => {
                // Without parts it was lost meanwhile: it is looked for as any that is absent.
                let Some(parts) = stop.uplink else { return Ok(()) };
                let all = parts.fds.iter().map(|fd| fds.take(*fd));
                let all = all.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
                let parts = Parts { state: parts.state, fds: all };
                let common = std::sync::Arc::clone(&self.uplinks);
                let uplink = UplinkSide::adopt(common, &port.handle, kind, parts)?;
                port.side = Side::Uplink(Box::new(uplink));
            }
            _ => {}
        }
        Ok(())
    }

    /// The files are ours from now on.
    fn hold(&mut self) {
        if let Err(error) = self.server.hold() {
            tracing::warn!(%error, "the control socket may still name the old process");
        }
        self.each_side(VhostUserPort::hold, |_, _, _| ());
    }

    /// Gives up: what was adopted is the old process's as before.
    fn abandon(&mut self) {
        for mut port in std::mem::take(&mut self.ports) {
            match std::mem::replace(&mut port.side, Side::Absent) {
                Side::Uplink(uplink) if uplink.is_paused() => uplink.leave(),
                Side::Uplink(uplink) => uplink.close(&self.switch, port.handle.id),
                Side::Guest(_) | Side::Absent => {}
            }
        }
    }
}
