//! The three kinds of uplinks, as one.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use control::{InterfaceSpec, PortKind};
use port::{DropReason, Egress, Ingress, QueueCounters};
use switch::PortHandle;
use uplink::interface::Link;
use uplink::tap::{self, TapSettings};

/// Both halves of a queue pair, for the switch.
pub(super) type Pair = (Box<dyn Ingress>, Box<dyn Egress>);

/// What is left of an open uplink when the workers have its queues.
#[derive(Debug)]
pub(super) enum Device {
    Tap {
        link: Link,
        /// What the interface had lost when that was counted last.
        tx_dropped: u64,
    },
}

/// Opens what `kind` asks for. Each queue pair counts in its own `counters`.
pub(super) fn open(
    kind: &PortKind,
    counters: &[Arc<QueueCounters>],
) -> Result<(Device, Vec<Pair>), String> {
    match kind {
        PortKind::VhostUser(_) => Err("a guest is no uplink".to_owned()),
        PortKind::Tap(spec) => open_tap(spec, counters),
        PortKind::AfXdp(_) | PortKind::PacketMmap(_) => Err("TODO".to_owned()),
    }
}

fn open_tap(
    spec: &InterfaceSpec,
    counters: &[Arc<QueueCounters>],
) -> Result<(Device, Vec<Pair>), String> {
    let settings =
        TapSettings { ifname: spec.ifname.clone(), queues: spec.queues, netns: spec.netns.clone() };
    let tap = tap::open(&settings, counters).map_err(|error| error.to_string())?;
    let tx_dropped = tap.link.tx_dropped().unwrap_or(0);
    let queues = tap.queues.into_iter().map(boxed).collect();
    Ok((Device::Tap { link: tap.link, tx_dropped }, queues))
}

fn boxed<I: Ingress + 'static, E: Egress + 'static>((ingress, egress): (I, E)) -> Pair {
    (Box::new(ingress), Box::new(egress))
}

impl Device {
    /// The interface.
    pub(super) fn link(&self) -> &Link {
        match self {
            Self::Tap { link, .. } => link,
        }
    }

    /// Reads what happened to interfaces.
    pub(super) fn follow(&mut self) {
        let _ = match self {
            Self::Tap { link, .. } => link.follow(),
        };
    }

    /// How the interface is used, as far as there was a choice; else empty.
    pub(super) fn mode(&self) -> String {
        match self {
            Self::Tap { .. } => String::new(),
        }
    }

    /// Becomes readable when something happens to interfaces.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.link().event_fd()
    }

    /// Asks the kernel what it dropped since the last time, and counts it.
    pub(super) fn count_kernel_drops(&mut self, handle: &PortHandle) {
        match self {
            Self::Tap { link, tx_dropped } => {
                let Some(now) = link.tx_dropped() else { return };
                // The kernel counts a tap as a whole.
                if let Some(counters) = handle.counters(0) {
                    let more = now.saturating_sub(*tx_dropped);
                    counters.kernel.dropped(DropReason::KernelRingFull, more);
                }
                *tx_dropped = now;
            }
        }
    }

    /// Undoes what was changed on the interface.
    pub(super) fn close(self) {
        match self {
            Self::Tap { link, .. } => drop(link),
        }
    }
}
