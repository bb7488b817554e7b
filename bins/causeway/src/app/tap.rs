//! A tap behind a port: opened, watched, lost and found again.

use control::TapSpec;
use port::{Fabric, PortId, PortState, QueueId};
use switch::{PortHandle, Switch};
use uplink::interface::{Link, LinkState};
use uplink::tap::{TapSettings, open};

/// An interface that is, or was, open.
#[derive(Debug)]
pub(super) struct TapSide {
    settings: TapSettings,
    link: Link,
    /// The queues are closed: the interface went away.
    lost: bool,
}

impl TapSide {
    /// Opens the interface and hands its queues to the switch.
    pub(super) fn open(
        switch: &Switch,
        handle: &PortHandle,
        spec: &TapSpec,
    ) -> Result<Self, String> {
        let settings = TapSettings {
            ifname: spec.ifname.clone(),
            queues: spec.queues,
            netns: spec.netns.clone(),
        };
        let link = attach(switch, handle, &settings)?;
        Ok(Self { settings, link, lost: false })
    }

    /// Takes the queues back and closes them.
    pub(super) fn close(self, switch: &Switch, id: PortId) {
        let Self { settings, link, .. } = self;
        drop(link);
        detach(switch, id, settings.queues);
    }

    /// Follows what happened to the interface.
    pub(super) fn look_after(&mut self, switch: &Switch, handle: &PortHandle) {
        if self.lost {
            self.find(switch, handle);
            return;
        }
        let name = &self.settings.ifname;
        match self.link.check() {
            LinkState::Up => handle.status.set(PortState::Up, ""),
            LinkState::Down => {
                handle.status.set(PortState::Down, format!("interface {name} is set down"));
            }
            LinkState::NoCarrier => {
                handle.status.set(PortState::Down, format!("interface {name} has no carrier"));
            }
            LinkState::Gone => self.lost(switch, handle, "it was deleted"),
            LinkState::NamespaceGone => {
                self.lost(switch, handle, "its network namespace was removed");
            }
        }
    }

    /// Closes the queues until the interface is back.
    pub(super) fn lost(&mut self, switch: &Switch, handle: &PortHandle, reason: &str) {
        if !self.lost {
            self.lost = true;
            detach(switch, handle.id, self.settings.queues);
            let name = &self.settings.ifname;
            let reason = format!("interface {name} is lost: {reason}");
            tracing::warn!(reason);
            handle.status.error(reason.as_str());
            handle.status.set(PortState::Down, reason);
        }
    }

    /// Opens the interface again. One that somebody else made is waited for.
    fn find(&mut self, switch: &Switch, handle: &PortHandle) {
        if !self.link.was_made() && !self.link.exists() {
            return;
        }
        match attach(switch, handle, &self.settings) {
            Ok(link) => {
                tracing::info!(interface = self.settings.ifname, "is back");
                self.link = link;
                self.lost = false;
            }
            Err(error) => handle.status.set(PortState::Down, error),
        }
    }
}

fn attach(switch: &Switch, handle: &PortHandle, settings: &TapSettings) -> Result<Link, String> {
    let counters: Vec<_> = (0..settings.queues).filter_map(|pair| handle.counters(pair)).collect();
    let tap = open(settings, &counters).map_err(|error| error.to_string())?;
    for (pair, (ingress, egress)) in (0..settings.queues).zip(tap.queues) {
        let at = QueueId { port: handle.id, pair };
        switch.attach_egress(at, Box::new(egress));
        switch.attach_ingress(at, Box::new(ingress));
    }
    handle.status.set(PortState::Up, "");
    Ok(tap.link)
}

fn detach(switch: &Switch, port: PortId, queues: u16) {
    for pair in 0..queues {
        let at = QueueId { port, pair };
        drop(switch.detach_ingress(at));
        drop(switch.detach_egress(at));
    }
}
