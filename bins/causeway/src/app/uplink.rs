//! An uplink behind a port: opened, followed, lost and found again.
//!
//! ```text
//!            open                     deleted, fault, namespace removed
//!  Absent ─────────► Open(Device) ──────────────────────────────────► Lost(Finder)
//!                        ▲      check(): up, no carrier, set down        │
//!                        └───────────────────────────────────────────────┘
//!                              an interface of that name appeared
//! ```

mod handover;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use control::{InterfaceSpec, PortKind, PortSpec, umem_rooms};
use port::{Fabric, PortId, PortState, QueueId};
use rustix::event::epoll;
use switch::{PortHandle, Switch};
use uplink::af_xdp::Umems;
use uplink::interface::{Finder, LinkState};

use super::device::{self, Device};
use crate::handover::Rest;
use handover::Paused;

/// What all uplinks have together.
#[derive(Debug)]
pub(super) struct Common {
    /// The events of all interfaces as one fd. What is closed leaves it by itself.
    events: OwnedFd,
    /// The memory that some of them share.
    umems: Umems,
}

impl Common {
    pub(super) fn new() -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { events, umems: Umems::default() })
    }

    /// Says which ports there will be, for memory that they share and that is made from now on.
    pub(super) fn plan<'a>(&self, ports: impl IntoIterator<Item = &'a PortSpec>) {
        self.umems.plan(umem_rooms(ports));
    }

    /// A process that handed over has let go of everything but `rest`.
    pub(super) fn settle(&self, rest: &Rest) {
        self.umems.settle(&rest.umems);
    }

    /// Waits until the kernel is done with queues that were closed, for `patience`; what it may be
    /// not done with then, by UMEM.
    pub(super) fn drain(&self, patience: Duration) -> BTreeMap<String, Vec<u32>> {
        self.umems.drain(patience)
    }

    /// To be called now and then.
    pub(super) fn look_after(&self) {
        self.umems.look();
    }

    fn add(&self, fd: BorrowedFd<'_>) {
        let data = epoll::EventData::new_u64(0);
        if let Err(error) = epoll::add(&self.events, fd, data, epoll::EventFlags::IN) {
            // The interface is looked at once a second all the same.
            tracing::warn!(%error, "cannot follow an interface");
        }
    }
}

impl AsFd for Common {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// An uplink that is, or was, open.
#[derive(Debug)]
pub(super) struct UplinkSide {
    common: Arc<Common>,
    kind: PortKind,
    interface: InterfaceSpec,
    state: State,
    /// Opening it made the interface, and may do so again.
    made: bool,
    /// Queues that no worker has while the uplink is handed over.
    paused: Paused,
}

#[derive(Debug)]
enum State {
    Open(Device),
    /// The queues are closed; without a finder the namespace is gone too.
    Lost(Option<Finder>),
}

impl UplinkSide {
    /// Opens the interface and hands its queues to the switch; `kind` is one of uplinks. Waits for
    /// a queue that is in use for `patience`.
    pub(super) fn open(
        common: Arc<Common>,
        switch: &Switch,
        handle: &PortHandle,
        (kind, patience): (&PortKind, Duration),
    ) -> Result<Self, String> {
        let interface = kind.interface().cloned().unwrap_or_default();
        let device = attach(switch, handle, &common.umems, (kind, patience))?;
        let made = device.link().was_made();
        common.add(device.event_fd());
        Ok(Self {
            common,
            kind: kind.clone(),
            interface,
            state: State::Open(device),
            made,
            paused: Paused::default(),
        })
    }

    /// Takes the queues back and closes them.
    pub(super) fn close(self, switch: &Switch, id: PortId) {
        drop(self.state);
        detach(switch, id, self.interface.queues);
    }

    /// What is open now.
    pub(super) fn device(&self) -> Option<&Device> {
        match &self.state {
            State::Open(device) => Some(device),
            State::Lost(_) => None,
        }
    }

    /// What is open now.
    pub(super) fn device_mut(&mut self) -> Option<&mut Device> {
        match &mut self.state {
            State::Open(device) => Some(device),
            State::Lost(_) => None,
        }
    }

    /// Follows what happened to the interface.
    pub(super) fn look_after(&mut self, switch: &Switch, handle: &PortHandle) {
        let State::Open(device) = &mut self.state else {
            return self.find(switch, handle);
        };
        device.follow();
        let link = device.link();
        let name = link.name();
        match link.check() {
            LinkState::Up => handle.status.set(PortState::Up, ""),
            LinkState::Down => {
                handle.status.set(PortState::Down, format!("interface {name} is set down"));
            }
            LinkState::NoCarrier => {
                handle.status.set(PortState::Down, format!("interface {name} has no carrier"));
            }
            LinkState::Gone => return self.lost(switch, handle, "it was deleted"),
            LinkState::NamespaceGone => {
                return self.lost(switch, handle, "its network namespace was removed");
            }
        }
        device.count_kernel_drops(handle);
    }

    /// Closes the queues until the interface is back.
    pub(super) fn lost(&mut self, switch: &Switch, handle: &PortHandle, reason: &str) {
        let State::Open(device) = &mut self.state else { return };
        let reason = format!("interface {} is lost: {reason}", device.link().name());
        device.count_kernel_drops(handle);
        let finder = Finder::new(&self.interface.ifname, self.interface.netns.as_deref()).ok();
        finder.iter().for_each(|finder| self.common.add(finder.event_fd()));
        drop(std::mem::replace(&mut self.state, State::Lost(finder)));
        detach(switch, handle.id, self.interface.queues);
        tracing::warn!(reason);
        handle.status.error(reason.as_str());
        handle.status.set(PortState::Down, reason);
    }

    /// Opens the interface again. One that somebody else made is waited for.
    fn find(&mut self, switch: &Switch, handle: &PortHandle) {
        let State::Lost(finder) = &mut self.state else { return };
        // What waits in a namespace that was removed would keep it alive.
        let _ = finder.take_if(|finder| !finder.is_current());
        if finder.is_none() {
            let found = Finder::new(&self.interface.ifname, self.interface.netns.as_deref());
            *finder = found.ok();
            finder.iter().for_each(|finder| self.common.add(finder.event_fd()));
        }
        let found = finder.as_ref().map(Finder::found);
        let Some(found) = found else { return };
        if !found && !self.made {
            return;
        }
        match attach(switch, handle, &self.common.umems, (&self.kind, Duration::ZERO)) {
            Ok(device) => {
                tracing::info!(interface = self.interface.ifname, "is back");
                self.common.add(device.event_fd());
                self.state = State::Open(device);
            }
            Err(error) => handle.status.set(PortState::Down, error),
        }
    }
}

fn attach(
    switch: &Switch,
    handle: &PortHandle,
    umems: &Umems,
    (kind, patience): (&PortKind, Duration),
) -> Result<Device, String> {
    let counters: Vec<_> = (0..kind.pairs()).filter_map(|pair| handle.counters(pair)).collect();
    let (device, queues) = device::open(kind, umems, &counters, patience)?;
    for (pair, (ingress, egress)) in (0..kind.pairs()).zip(queues) {
        let at = QueueId { port: handle.id, pair };
        switch.attach_egress(at, egress);
        switch.attach_ingress(at, ingress);
    }
    handle.status.set(PortState::Up, "");
    Ok(device)
}

fn detach(switch: &Switch, port: PortId, queues: u16) {
    for pair in 0..queues {
        let at = QueueId { port, pair };
        drop(switch.detach_ingress(at));
        drop(switch.detach_egress(at));
    }
}
