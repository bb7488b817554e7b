//! Ports come and go, fault and are reset.

use std::sync::Arc;
use std::time::Duration;

use control::config::{check_stations, check_unique, stations};
use control::{PortKind, PortSpec, Reply, SocketRole, StaticEntry, VhostUserSpec};
use event_manager::{SubscriberId, SubscriberOps};
use packet::{MacAddr, VlanId};
use port::{Fabric, PortState, QueueFault, QueueId};
use switch::{PortConfig, PortHandle, VlanRule, Way};
use vhost_user_net::record::remove_record;
use vhost_user_net::{CountersOf, PortLinks, PortSettings, RingIndex, SocketMode, VhostUserPort};

use super::device::Device;
use super::limits::limits;
use super::uplink::UplinkSide;
use super::{App, Subscriber};
use crate::open_files::{guests, warn_if_short};

/// A port of the switch and what is behind it.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) spec: PortSpec,
    /// Its static entries.
    pub(super) statics: Vec<StaticEntry>,
    pub(super) origin: Origin,
    pub(super) handle: PortHandle,
    pub(super) side: Side,
}

/// Who asked for a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The configuration file: a reload may remove it.
    File,
    /// An option `--port`: a reload may change its static entries.
    CommandLine,
    /// A client of the control socket.
    Client,
}

/// What is behind a port.
#[derive(Debug)]
pub(super) enum Side {
    /// Nothing yet, or nothing any more: tried again at every tick.
    Absent,
    /// A subscriber of the event manager.
    Guest(SubscriberId),
    /// An interface of the host.
    Uplink(Box<UplinkSide>),
}

impl Port {
    /// Whether it is an open macvtap.
    pub(super) fn is_macvtap(&self) -> bool {
        match &self.side {
            Side::Uplink(uplink) => uplink.device().is_some_and(Device::is_macvtap),
            Side::Absent | Side::Guest(_) => false,
        }
    }
}

impl App {
    /// Says which ports there will be, before they are added.
    pub(crate) fn plan<'a>(&self, ports: impl IntoIterator<Item = &'a PortSpec>) {
        let ports: Vec<&PortSpec> = ports.into_iter().collect();
        self.fds.set_ports(guests(ports.iter().copied()));
        self.uplinks.plan(ports);
    }

    /// Adds a port with its static entries.
    pub(crate) fn add(
        &mut self,
        spec: &PortSpec,
        statics: Vec<StaticEntry>,
        origin: Origin,
    ) -> Result<(), String> {
        match self.place(spec, statics, origin)? {
            Some(error) if !spec.wait => {
                if let Some(port) = self.ports.pop() {
                    let _ = self.switch.remove_port(port.handle.id);
                }
                Err(format!("port {}: {error}", spec.name))
            }
            _ => {
                tracing::info!(port = spec.name, "added {spec}");
                Ok(())
            }
        }
    }

    /// Adds a port; if what is behind it cannot be opened, the port waits, and the reason returns.
    pub(super) fn place(
        &mut self,
        spec: &PortSpec,
        statics: Vec<StaticEntry>,
        origin: Origin,
    ) -> Result<Option<String>, String> {
        let in_port = |error: String| format!("port {}: {error}", spec.name);
        let config = self.port_config(spec, &statics).map_err(in_port)?;
        let handle = self.switch.add_port(&config).map_err(|e| in_port(e.to_string()))?;
        let side = Side::Absent;
        let mut port = Port { spec: spec.clone(), statics, origin, handle, side };
        let mut reason = None;
        match self.open(&port, self.patience()) {
            Ok(side) => port.side = side,
            Err(error) => {
                if spec.wait {
                    tracing::warn!(port = spec.name, error, "waiting");
                }
                port.handle.status.error(error.as_str());
                port.handle.status.set(PortState::Waiting, error.as_str());
                reason = Some(error);
            }
        }
        self.ports.push(port);
        self.steer();
        Ok(reason)
    }

    /// The switch's side of a port, with its workers.
    pub(super) fn port_config(
        &self,
        spec: &PortSpec,
        statics: &[StaticEntry],
    ) -> Result<PortConfig, String> {
        let workers = pinned(&spec.cpus, &self.switch.worker_cpus())?;
        let config = config(spec, statics)?;
        let spread = spec.kind.interface().is_some_and(|interface| interface.spread);
        if spread && self.switch.worker_cpus().len() == 1 {
            tracing::warn!(port = spec.name, "spread=on, but there is one worker only");
        }
        let outward = spec.kind.interface().is_some();
        Ok(PortConfig { workers, spread, outward, ..config })
    }

    /// Takes a port that is no more in the list apart, and returns what it was.
    pub(super) fn remove(&mut self, mut port: Port) -> Port {
        self.close(&mut port);
        let _ = self.switch.remove_port(port.handle.id);
        tracing::info!(port = port.spec.name, "removed");
        port
    }

    /// What is kept for a successor of a port that will not come back goes.
    pub(super) fn forget_state(&self, spec: &PortSpec) {
        let socket = |spec: &PortSpec| match &spec.kind {
            PortKind::VhostUser(guest) => Some(guest.socket.clone()),
            PortKind::Tap(_) | PortKind::AfXdp(_) | PortKind::PacketMmap(_) => None,
        };
        if let (Some(dir), Some(gone)) = (&self.state_dir, socket(spec)) {
            // Another port may have the socket now; then it has the file, too.
            if !self.specs().any(|other| socket(other).as_ref() == Some(&gone)) {
                remove_record(dir, &gone);
            }
        }
    }

    /// How long something may be waited for that somebody asked for: when nobody is served yet,
    /// longer than between two events.
    fn patience(&self) -> Duration {
        Duration::from_millis(if self.serving { 50 } else { 500 })
    }

    /// Opens what is behind a port.
    fn open(&mut self, port: &Port, patience: Duration) -> Result<Side, String> {
        self.sandbox.permits(&port.spec)?;
        match &port.spec.kind {
            PortKind::VhostUser(spec) => self.open_guest(port, spec).map(Side::Guest),
            PortKind::Tap(_) | PortKind::AfXdp(_) | PortKind::PacketMmap(_) => {
                let common = Arc::clone(&self.uplinks);
                UplinkSide::open(common, &self.switch, &port.handle, (&port.spec.kind, patience))
                    .map(|uplink| Side::Uplink(Box::new(uplink)))
            }
        }
    }

    fn open_guest(&mut self, port: &Port, spec: &VhostUserSpec) -> Result<SubscriberId, String> {
        let (settings, links) = self.guest_parts(port, spec);
        let guest = VhostUserPort::new(settings, links)
            .map_err(|error| self.sandbox.explain(&port.spec, error.to_string()))?;
        Ok(self.subscribe(guest))
    }

    /// Adds a guest's port to the event loop.
    pub(super) fn subscribe(&mut self, guest: VhostUserPort) -> SubscriberId {
        self.manager.add_subscriber(Subscriber::Guest(Box::new(guest)))
    }

    /// What a guest's port is made of.
    pub(super) fn guest_parts(
        &self,
        port: &Port,
        spec: &VhostUserSpec,
    ) -> (PortSettings, PortLinks) {
        let settings = PortSettings {
            mode: match spec.mode {
                SocketRole::Server => SocketMode::Server,
                SocketRole::Client => SocketMode::Client,
            },
            socket_mode: spec.socket_mode.0,
            socket_group: spec.socket_group.clone(),
            queues: spec.queues,
            queue_size: spec.queue_size,
            mtu: spec.mtu.unwrap_or(u16::MAX),
            ring_reset: spec.ring_reset,
            postcopy: spec.postcopy,
            offloads: spec.offloads.set,
            coalesce: spec.offloads.gro,
            retries: self.retries,
            fds: self.fds.clone(),
            state_dir: self.state_dir.clone(),
            ..PortSettings::server(port.spec.name.as_str(), &spec.socket)
        };
        let handle = port.handle.clone();
        // The session never names a pair beyond `queues`, which the switch port has.
        let counters: CountersOf = Box::new(move |pair| handle.counters(pair).unwrap_or_default());
        let links = PortLinks {
            id: port.handle.id,
            fabric: Arc::clone(&self.switch) as Arc<dyn Fabric>,
            status: port.handle.status.clone(),
            counters,
        };
        (settings, links)
    }

    /// Closes what is behind a port; the port stays in the switch.
    pub(super) fn close(&mut self, port: &mut Port) {
        match std::mem::replace(&mut port.side, Side::Absent) {
            Side::Absent => {}
            Side::Guest(id) => drop(self.manager.remove_subscriber(id)),
            Side::Uplink(uplink) => uplink.close(&self.switch, port.handle.id),
        }
    }

    /// Tries again what is absent, and looks at interfaces.
    pub(super) fn look_after_ports(&mut self) {
        self.uplinks.look_after();
        let mut ports = std::mem::take(&mut self.ports);
        for port in &mut ports {
            match &mut port.side {
                Side::Guest(_) => {}
                Side::Absent => match self.open(port, Duration::ZERO) {
                    Ok(side) => {
                        tracing::info!(port = port.spec.name, "is there now");
                        port.side = side;
                    }
                    Err(error) => port.handle.status.set(PortState::Waiting, error),
                },
                Side::Uplink(uplink) => uplink.look_after(&self.switch, &port.handle),
            }
        }
        self.ports = ports;
        self.steer();
    }

    /// Something happened to an interface.
    pub(super) fn follow_uplinks(&mut self) {
        for port in &mut self.ports {
            if let Side::Uplink(uplink) = &mut port.side {
                uplink.look_after(&self.switch, &port.handle);
            }
        }
        self.steer();
    }

    /// A worker took a queue out of service.
    pub(super) fn fault(&mut self, queue: QueueId, way: Way, fault: &QueueFault) {
        let found = self.ports.iter_mut().find(|port| port.handle.id == queue.port);
        let Some(port) = found else { return };
        match &mut port.side {
            Side::Absent => {}
            Side::Guest(id) => {
                let ring = match way {
                    Way::Egress => queue.pair.saturating_mul(2),
                    Way::Ingress => queue.pair.saturating_mul(2).saturating_add(1),
                };
                if let Ok(Subscriber::Guest(guest)) = self.manager.subscriber_mut(*id) {
                    guest.ring_fault(RingIndex(ring), fault);
                }
            }
            Side::Uplink(uplink) => uplink.lost(&self.switch, &port.handle, &fault.to_string()),
        }
    }

    pub(super) fn port_add(&mut self, text: &str) -> Reply {
        let spec = match text.parse::<PortSpec>() {
            Ok(spec) => spec,
            Err(error) => return Reply::Usage(error.to_string()),
        };
        if let Err(error) = check_unique(self.specs().chain([&spec])) {
            return Reply::Failed(error);
        }
        let statics: Vec<_> = self.ports.iter().flat_map(|port| port.statics.clone()).collect();
        if let Err(clash) = check_stations(self.specs().chain([&spec]), &statics) {
            return Reply::Failed(clash.message);
        }
        self.plan(self.specs().chain([&spec]));
        let name = spec.name.clone();
        match self.add(&spec, Vec::new(), Origin::Client) {
            Ok(()) => {
                warn_if_short(self.open_files, self.specs());
                Reply::done(format!("added port {name}"))
            }
            Err(error) => {
                self.plan(self.specs());
                Reply::Failed(error)
            }
        }
    }

    pub(super) fn port_del(&mut self, name: &str) -> Reply {
        match self.take_port(name) {
            Some(port) => {
                let port = self.remove(port);
                self.forget_state(&port.spec);
                self.plan(self.specs());
                Reply::done(format!("removed port {name}"))
            }
            None => self.no_port(name),
        }
    }

    pub(super) fn port_reset(&mut self, name: &str) -> Reply {
        let Some(mut port) = self.take_port(name) else { return self.no_port(name) };
        let state = port.handle.status.read().state;
        let reply = if matches!(state, PortState::Broken | PortState::Quarantined) {
            self.close(&mut port);
            let _ = self.switch.reset_port(port.handle.id);
            match self.open(&port, self.patience()) {
                Ok(side) => {
                    port.side = side;
                    Reply::done(format!("port {name} is in service again"))
                }
                Err(error) => {
                    port.handle.status.set(PortState::Waiting, error.as_str());
                    Reply::Failed(format!("port {name}: {error}"))
                }
            }
        } else {
            Reply::Failed(format!("port {name} is {}: there is nothing to reset", state.name()))
        };
        self.ports.push(port);
        self.steer();
        reply
    }

    pub(super) fn take_port(&mut self, name: &str) -> Option<Port> {
        let index = self.ports.iter().position(|port| port.spec.name == name)?;
        Some(self.ports.remove(index))
    }

    pub(super) fn specs(&self) -> impl Iterator<Item = &PortSpec> {
        self.ports.iter().map(|port| &port.spec)
    }

    pub(super) fn no_port(&self, name: &str) -> Reply {
        let names: Vec<&str> = self.specs().map(|spec| spec.name.as_str()).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Reply::Failed(format!("there is no port {name:?}; ports are: {known}"))
    }
}

/// The switch's side of a port.
fn config(spec: &PortSpec, statics: &[StaticEntry]) -> Result<PortConfig, String> {
    let trunk: Vec<u16> = spec.trunk.iter().map(|vlan| vlan.number()).collect();
    let access = spec.vlan.map(|vlan| vlan.number());
    let rule = VlanRule::from_keys(access, &trunk).map_err(|error| error.to_string())?;
    let known = stations(spec, statics).into_iter().map(|(vlan, mac)| {
        let vlan = vlan.and_then(|vlan| VlanId::new(vlan.number())).unwrap_or(VlanId::NONE);
        (vlan, MacAddr(mac.bytes()))
    });
    let pairs = spec.kind.pairs();
    Ok(PortConfig {
        vlan: rule,
        stations: known.collect(),
        pairs,
        limits: limits(spec),
        ..PortConfig::new(spec.name.as_str())
    })
}

/// The workers that run on these CPUs, as indexes.
pub(crate) fn pinned(cpus: &[u16], workers: &[Option<usize>]) -> Result<Vec<usize>, String> {
    let worker_of = |cpu: &u16| {
        let found = workers.iter().position(|worker| *worker == Some(usize::from(*cpu)));
        found.ok_or_else(|| {
            let known: Vec<_> = workers.iter().flatten().map(usize::to_string).collect();
            if known.is_empty() {
                return format!("cpus names CPU {cpu}, but no worker is shared: workers=per-queue");
            }
            format!("cpus names CPU {cpu}, where no worker runs: they run on {}", known.join(","))
        })
    };
    cpus.iter().map(worker_of).collect()
}
