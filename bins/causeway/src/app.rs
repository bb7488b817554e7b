//! The control thread: one event loop that owns everything but the workers.
//!
//! ```text
//!  event manager ─┬─ VhostUserPort (one per guest): handled where they arrive
//!                 └─ Hub: control socket and scrapers, their clients, signals, switch events,
//!                      │  a timer, events of interfaces
//!                      └─► noted, and handled between two rounds, when ports can come and go
//! ```

mod capture;
mod device;
mod handing;
mod limits;
mod metrics;
mod ports;
mod reload;
mod steering;
mod taking;
mod uplink;
pub(crate) mod view;

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use control::scrape::Scrape;
use control::server::{ClientId, Server};
use control::{Reply, Request};
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use switch::{Switch, SwitchEvent};
use vhost_user_net::VhostUserPort;
use vhost_user_net::fds::FdPool;

use crate::sandbox::Sandbox;
use crate::service::ServiceManager;
use crate::signals::Signals;
use capture::Captures;
use handing::Handing;
use ports::Port;
pub(crate) use ports::{Origin, pinned};
pub(crate) use reload::Source;
use steering::Steering;
pub(crate) use taking::Taken;
use uplink::Common;

/// How often ports are looked after and addresses age.
const TICK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The running program.
#[derive(Debug)]
pub(crate) struct App {
    switch: Arc<Switch>,
    manager: EventManager<Subscriber>,
    hub: SubscriberId,
    server: Server,
    scrape: Option<Scrape>,
    /// Where scrapers were asked to be served.
    metrics_at: Option<SocketAddr>,
    signals: Signals,
    timer: OwnedFd,
    /// Readable when something happened to an interface.
    uplinks: Arc<Common>,
    steering: Steering,
    ports: Vec<Port>,
    captures: Captures,
    handing: Handing,
    source: Option<Source>,
    /// What the process may still do.
    sandbox: Sandbox,
    service: ServiceManager,
    /// How often a full receiveq is tried again.
    retries: u32,
    /// Where ring positions are kept for a successor.
    state_dir: Option<PathBuf>,
    /// How many files the process may have open, and what of them ports may keep.
    open_files: usize,
    fds: FdPool,
    /// Seconds between two looks whether a pair should move to another worker; 0: never.
    rebalance_s: u32,
    /// Ticks since the last one.
    ticks: u32,
    began: Instant,
    /// Clients could not be taken: the control socket is left alone until the next tick.
    deaf: bool,
    stopping: bool,
    /// Events are handled.
    serving: bool,
}

/// What waits for events.
#[derive(Debug)]
enum Subscriber {
    Guest(Box<VhostUserPort>),
    Hub(Hub),
}

/// Notes which of our own fds are ready.
#[derive(Debug, Default)]
struct Hub {
    woken: Vec<RawFd>,
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Self::Guest(port) = self {
            port.init(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Guest(port) => port.process(events, ops),
            Self::Hub(hub) => hub.woken.push(events.fd()),
        }
    }
}

impl App {
    /// An app without ports.
    pub(crate) fn new(switch: Switch, server: Server, signals: Signals) -> Result<Self, String> {
        let failed = |error: event_manager::Error| format!("cannot make an event loop: {error}");
        let mut manager = EventManager::new().map_err(failed)?;
        let hub = manager.add_subscriber(Subscriber::Hub(Hub::default()));
        let timer = ticking().map_err(|error| format!("cannot make a timer: {error}"))?;
        let uplinks =
            Common::new().map_err(|error| format!("cannot make a set of events: {error}"))?;
        let steering = Steering::new().map_err(|error| format!("cannot make a timer: {error}"))?;
        let changes = switch.fdb_changes().map_err(|e| format!("cannot make an eventfd: {e}"))?;
        let handing = Handing::new().map_err(|e| format!("cannot make an eventfd: {e}"))?;
        let mut ops = manager.event_ops(hub).map_err(failed)?;
        let fds = [
            changes,
            handing.wake(),
            steering.timer().as_fd(),
            server.listener(),
            signals.as_fd(),
            timer.as_fd(),
            uplinks.as_fd(),
            switch.events().as_fd(),
        ];
        for fd in fds {
            ops.add(Events::new(&fd, EventSet::IN)).map_err(failed)?;
        }
        Ok(Self {
            switch: Arc::new(switch),
            manager,
            hub,
            server,
            scrape: None,
            metrics_at: None,
            signals,
            timer,
            uplinks: Arc::new(uplinks),
            steering,
            ports: Vec::new(),
            captures: Captures::default(),
            handing,
            source: None,
            sandbox: Sandbox::default(),
            service: ServiceManager::default(),
            retries: virtio_net::DEFAULT_RETRIES,
            state_dir: None,
            open_files: usize::MAX,
            fds: FdPool::default(),
            rebalance_s: 0,
            ticks: 0,
            began: Instant::now(),
            deaf: false,
            stopping: false,
            serving: false,
        })
    }

    /// Says how often guests' full receiveqs are tried again, from now on.
    pub(crate) fn set_retries(&mut self, retries: u32) {
        self.retries = retries;
    }

    /// Says where ring positions are kept for a successor, for ports that are added from now on.
    pub(crate) fn set_state_dir(&mut self, dir: Option<PathBuf>) {
        self.state_dir = dir;
    }

    /// Says how many files the process may have open, for ports that are added from now on.
    pub(crate) fn set_open_files(&mut self, limit: usize) {
        self.open_files = limit;
        self.fds = FdPool::of_limit(limit);
    }

    /// Says how often pairs may move to other workers, in seconds; 0: never.
    pub(crate) fn set_rebalance(&mut self, seconds: u32) {
        self.rebalance_s = seconds;
    }

    /// Says who is told that this process serves.
    pub(crate) fn set_service(&mut self, service: ServiceManager) {
        self.service = service;
    }

    /// Looks at loads, and moves a pair if its time has come.
    fn look_at_loads(&mut self) {
        self.switch.measure();
        self.ticks = self.ticks.saturating_add(1);
        if self.rebalance_s > 0 && self.ticks >= self.rebalance_s {
            self.ticks = 0;
            let _ = self.switch.rebalance();
        }
    }

    /// What the next reload has to know.
    pub(crate) fn remember(&mut self, source: Source) {
        self.source = Some(source);
    }

    /// Gives up what the ports that are there do not need.
    pub(crate) fn enter(&mut self, mut sandbox: Sandbox) {
        let macvtap = self.ports.iter().any(Port::is_macvtap);
        if sandbox.keeps_af_xdp() {
            let spares = ::uplink::af_xdp::keep_spares();
            tracing::debug!(spares, "programs for af-xdp ports that come later");
        }
        sandbox.enter(macvtap);
        self.sandbox = sandbox;
    }

    /// Serves until a signal ends it.
    pub(crate) fn serve(&mut self) -> Result<(), String> {
        self.serving = true;
        self.service.ready();
        while !self.stopping {
            let ran = self.manager.run();
            let _ = ran.map_err(|error| format!("the event loop failed: {error}"))?;
            for fd in self.woken() {
                self.handle(fd);
            }
        }
        tracing::info!("stopping");
        self.service.stopping();
        while let Some(port) = self.ports.pop() {
            drop(self.remove(port));
        }
        self.captures.join();
        Ok(())
    }

    fn woken(&mut self) -> Vec<RawFd> {
        match self.manager.subscriber_mut(self.hub) {
            Ok(Subscriber::Hub(hub)) => std::mem::take(&mut hub.woken),
            Ok(Subscriber::Guest(_)) | Err(_) => Vec::new(),
        }
    }

    fn handle(&mut self, fd: RawFd) {
        if fd == self.server.listener().as_raw_fd() {
            self.accept();
        } else if fd == self.signals.as_fd().as_raw_fd() {
            self.signal();
        } else if fd == self.timer.as_raw_fd() {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            let _ = self.switch.age();
            self.look_at_loads();
            if self.deaf {
                self.accept();
            }
            self.look_after_ports();
            self.look_after_scrapers();
        } else if fd == self.uplinks.as_fd().as_raw_fd() {
            self.follow_uplinks();
        } else if fd == self.switch.events().as_fd().as_raw_fd() {
            self.switch_events();
        } else if !self.scraper_woke(fd) && !self.stations_woke(fd) && !self.successor_woke(fd) {
            self.client(fd);
        }
    }

    fn signal(&mut self) {
        let asked = self.signals.take();
        self.stopping |= asked.stop;
        if asked.reload {
            match self.reload() {
                Reply::Ok(done) => tracing::info!("reload: {done}"),
                Reply::Usage(text) | Reply::Failed(text) => tracing::error!("reload: {text}"),
            }
        }
    }

    fn switch_events(&mut self) {
        while let Some(event) = self.switch.events().next() {
            match event {
                SwitchEvent::Faulted { queue, way, fault } => self.fault(queue, way, &fault),
                // The switch has set the port's state; a reset brings it back.
                SwitchEvent::Panicked { queue, text, .. } => {
                    tracing::error!(port = queue.port.0, pair = queue.pair, text, "quarantined");
                }
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.server.accept() {
                Ok(Some(id)) => self.welcome(id),
                Ok(None) => return self.listen(true),
                Err(error) => {
                    if !self.deaf {
                        tracing::warn!(%error, "cannot accept clients on the control socket");
                    }
                    return self.listen(false);
                }
            }
        }
    }

    fn welcome(&mut self, id: ClientId) {
        let set = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let added = match (self.manager.event_ops(self.hub), self.server.client(id)) {
            (Ok(mut ops), Some(fd)) => ops.add(Events::new(&fd, set)).is_ok(),
            _ => false,
        };
        if added { self.client(id) } else { self.server.forget(id) }
    }

    /// Watches the control socket for clients, or leaves it alone: a client that cannot be taken
    /// would wake us again and again.
    fn listen(&mut self, on: bool) {
        if self.deaf != on {
            return;
        }
        let set = if on { EventSet::IN } else { EventSet::empty() };
        let events = Events::new(&self.server.listener(), set);
        match self.manager.event_ops(self.hub).and_then(|ops| ops.modify(events)) {
            Ok(()) => self.deaf = !on,
            Err(error) => tracing::warn!(%error, "cannot watch the control socket"),
        }
    }

    /// Reads and writes what a client's socket has and takes, and answers.
    fn client(&mut self, id: ClientId) {
        let mut kept = self.server.ready(id);
        for (from, request) in self.server.take_requests() {
            let reply = match request {
                Ok(Request::Capture(request)) => match self.capture(from, request) {
                    Some(refused) => refused,
                    // The client is the capture's now.
                    None => return,
                },
                Ok(Request::TakeOver(request)) => match self.take_over(from, &request) {
                    Some(refused) => refused,
                    // The client is the hand-over's now.
                    None => return,
                },
                Ok(request) => self.answer(request),
                Err(text) => Reply::Usage(format!("not a request: {text}")),
            };
            let sent = self.server.reply(from, &reply);
            kept = if from == id { sent } else { kept };
        }
        if !kept {
            if let (Ok(mut ops), Some(fd)) =
                (self.manager.event_ops(self.hub), self.server.client(id))
                && let Err(error) = ops.remove(Events::empty(&fd))
            {
                tracing::warn!(%error, "cannot forget a client of the control socket");
            }
            self.server.forget(id);
        }
    }

    fn answer(&mut self, request: Request) -> Reply {
        if request.changes()
            && let Some(refused) = self.handing.refuses()
        {
            return refused;
        }
        match request {
            Request::Ports => Reply::of(&self.ports_view()),
            Request::Stats => Reply::of(&self.stats_view()),
            Request::Fdb => Reply::of(&self.fdb_view()),
            Request::Version => Reply::of(&self.version_view()),
            Request::Metrics => Reply::of(&self.metrics_view()),
            Request::FdbFlush => {
                let count = self.switch.fdb_flush(None);
                Reply::done(format!("forgot {count} addresses"))
            }
            Request::PortAdd { spec } => self.port_add(&spec),
            Request::PortDel { name } => self.port_del(&name),
            Request::PortReset { name } => self.port_reset(&name),
            Request::Reload => self.reload(),
            // It was dealt with before: it has no single answer.
            Request::Capture(_) | Request::TakeOver(_) => {
                Reply::Usage("that is no question".to_owned())
            }
        }
    }
}

/// A timer that is readable once a second.
fn ticking() -> std::io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let time = Itimerspec { it_interval: TICK, it_value: TICK };
    let _ = timerfd_settime(&timer, TimerfdTimerFlags::empty(), &time)?;
    Ok(timer)
}

#[cfg(test)]
mod tests;
