//! The three kinds of uplinks, as one.

pub(super) mod handover;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use control::{AfXdpSpec, InterfaceSpec, PacketMmapSpec, PortKind, Steer, XdpMode};
use packet::MacAddr;
use port::{DropReason, Egress, Ingress, QueueCounters};
use switch::PortHandle;
use uplink::af_xdp::{self, AfXdpControl, AfXdpSettings, Umems};
use uplink::interface::Link;
use uplink::packet_mmap::{self, KernelWatch, PacketMmapSettings};
use uplink::tap::{self, TapOffloads, TapSettings};

/// Both halves of a queue pair, for the switch.
pub(super) type Pair = (Box<dyn Ingress>, Box<dyn Egress>);

/// What is left of an open uplink when the workers have its queues. The kind goes before the
/// link, and the link before the queues.
#[derive(Debug)]
pub(super) struct Device {
    kind: Kind,
    link: Link,
}

/// What the queues of a tap have lost, and the kernel's name for it.
type QueueDrops = (&'static str, u64);

#[derive(Debug)]
enum Kind {
    Tap {
        offloads: Option<TapOffloads>,
        /// What its queues had lost when that was counted last; none before the kernel told it.
        dropped: Option<QueueDrops>,
    },
    AfXdp {
        control: Box<AfXdpControl>,
        steer: Steer,
        /// What the kernel had dropped when that was counted last, by queue.
        counted: Vec<af_xdp::KernelDrops>,
        /// The stations that were set last.
        stations: Vec<MacAddr>,
    },
    PacketMmap(Vec<KernelWatch>),
}

/// What a SPEC may ask for is what an uplink can have.
const _: () = assert!(control::spec::UMEM_QUEUES_MAX == af_xdp::UMEM_QUEUES_MAX);

/// Opens what `kind` asks for. Each queue pair counts in its own `counters`. A queue that is in use
/// is asked for again, while the caller waits, for `patience`. `umems` are the memory that some
/// share.
pub(super) fn open(
    kind: &PortKind,
    umems: &Umems,
    counters: &[Arc<QueueCounters>],
    patience: Duration,
) -> Result<(Device, Vec<Pair>), String> {
    match kind {
        PortKind::VhostUser(_) => Err("a guest has no interface".to_owned()),
        PortKind::Tap(spec) => open_tap(spec, counters),
        PortKind::AfXdp(spec) => open_af_xdp((spec, umems), counters, patience),
        PortKind::PacketMmap(spec) => open_packet_mmap(spec, counters),
    }
}

fn open_tap(
    spec: &InterfaceSpec,
    counters: &[Arc<QueueCounters>],
) -> Result<(Device, Vec<Pair>), String> {
    let InterfaceSpec { ifname, queues, netns, offloads, .. } = spec.clone();
    let settings = TapSettings { ifname, queues, netns, offloads };
    let tap = tap::open(&settings, counters).map_err(|error| error.to_string())?;
    let dropped = tap.link.queue_drops();
    let offloads = tap.offloads();
    let queues = tap.queues.into_iter().map(boxed).collect();
    Ok((Device { kind: Kind::Tap { offloads, dropped }, link: tap.link }, queues))
}

fn open_af_xdp(
    (spec, umems): (&AfXdpSpec, &Umems),
    counters: &[Arc<QueueCounters>],
    patience: Duration,
) -> Result<(Device, Vec<Pair>), String> {
    let InterfaceSpec { ifname, queues, netns, .. } = spec.interface.clone();
    let settings = AfXdpSettings {
        ifname,
        queues,
        netns,
        mode: match spec.mode {
            XdpMode::Auto => af_xdp::Mode::Auto,
            XdpMode::ZeroCopy => af_xdp::Mode::ZeroCopy,
            XdpMode::Copy => af_xdp::Mode::Copy,
            XdpMode::Generic => af_xdp::Mode::Generic,
        },
        replace: spec.replace,
        steer: match spec.steer {
            Steer::All => af_xdp::Steer::All,
            Steer::Mac => af_xdp::Steer::Mac,
        },
        busy_poll: spec.busy_poll,
        umem: spec.umem.clone(),
        patience,
    };
    let xdp = af_xdp::open(&settings, umems, counters).map_err(|error| error.to_string())?;
    let counted = vec![af_xdp::KernelDrops::default(); counters.len()];
    let (control, steer, stations) = (Box::new(xdp.control), spec.steer, Vec::new());
    let kind = Kind::AfXdp { control, steer, counted, stations };
    Ok((Device { kind, link: xdp.link }, xdp.queues.into_iter().map(boxed).collect()))
}

fn open_packet_mmap(
    spec: &PacketMmapSpec,
    counters: &[Arc<QueueCounters>],
) -> Result<(Device, Vec<Pair>), String> {
    let InterfaceSpec { ifname, queues, netns, offloads, .. } = spec.interface.clone();
    let defaults = PacketMmapSettings::default();
    let settings = PacketMmapSettings {
        ifname,
        queues,
        netns,
        offloads,
        block_size: spec.block_size.unwrap_or(defaults.block_size),
        blocks: spec.blocks.unwrap_or(defaults.blocks),
        retire_ms: spec.retire_ms.unwrap_or(defaults.retire_ms),
        ..defaults
    };
    let ring = packet_mmap::open(&settings, counters).map_err(|error| error.to_string())?;
    let queues = ring.queues.into_iter().map(boxed).collect();
    Ok((Device { kind: Kind::PacketMmap(ring.kernel), link: ring.link }, queues))
}

fn boxed<I: Ingress + 'static, E: Egress + 'static>((ingress, egress): (I, E)) -> Pair {
    (Box::new(ingress), Box::new(egress))
}

impl Device {
    /// The interface.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Reads what happened to interfaces.
    pub(super) fn follow(&mut self) {
        let _ = self.link.follow();
    }

    /// Whether it is a macvtap, which is opened in mounts of its own.
    pub(super) fn is_macvtap(&self) -> bool {
        matches!(self.kind, Kind::Tap { .. }) && self.link.is_macvtap()
    }

    /// How the interface is used, as far as there was a choice; else empty.
    pub(super) fn mode(&self) -> &'static str {
        match &self.kind {
            Kind::Tap { .. } | Kind::PacketMmap(_) => "",
            Kind::AfXdp { control, .. } => control.mode().name(),
        }
    }

    /// The memory for frames that it shares with other interfaces; else empty.
    pub(super) fn umem(&self) -> &str {
        match &self.kind {
            Kind::Tap { .. } | Kind::PacketMmap(_) => "",
            Kind::AfXdp { control, .. } => control.umem_name().unwrap_or_default(),
        }
    }

    /// Becomes readable when something happens to interfaces.
    pub(super) fn event_fd(&self) -> BorrowedFd<'_> {
        self.link.event_fd()
    }

    /// Asks the kernel what it dropped since the last time, and counts it.
    pub(super) fn count_kernel_drops(&mut self, handle: &PortHandle) {
        match &mut self.kind {
            Kind::Tap { dropped, .. } => {
                let Some(now) = self.link.queue_drops() else { return };
                // The kernel counts a tap as a whole.
                count(handle, 0, DropReason::KernelRingFull, lost_since(dropped.replace(now), now));
            }
            Kind::AfXdp { control, counted, .. } => {
                control.nudge();
                let Ok(drops) = control.kernel_drops() else { return };
                for (pair, (now, then)) in (0..).zip(drops.into_iter().zip(counted)) {
                    for ((reason, now), (_, then)) in
                        now.by_reason().into_iter().zip(then.by_reason())
                    {
                        count(handle, pair, reason, now.saturating_sub(then));
                    }
                    *then = now;
                }
            }
            // It counts by itself: what it asks for is forgotten by the kernel.
            Kind::PacketMmap(queues) => {
                for queue in queues {
                    let _ = queue.kernel_drops();
                }
            }
        }
    }

    /// What the kernel counts of each queue; of a tap, of the interface.
    pub(super) fn kernel_counts(&self) -> Vec<BTreeMap<String, u64>> {
        let named = |counts: &[(&str, u64)]| {
            counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        match &self.kind {
            Kind::Tap { dropped, .. } => vec![named(dropped.as_slice())],
            Kind::AfXdp { control, .. } => {
                let counts = control.kernel_counts().unwrap_or_default();
                counts.iter().map(|queue| named(&queue.by_name())).collect()
            }
            Kind::PacketMmap(queues) => {
                let of = |queue: &KernelWatch| {
                    named(&[("packets", queue.packets()), ("freezes", queue.freezes())])
                };
                queues.iter().map(of).collect()
            }
        }
    }

    /// Whether it takes frames for known stations only.
    pub(super) fn wants_stations(&self) -> bool {
        matches!(&self.kind, Kind::AfXdp { steer: Steer::Mac, .. })
    }

    /// Says which stations are behind other ports.
    pub(super) fn set_stations(&mut self, new: Vec<MacAddr>) {
        let Kind::AfXdp { control, stations, .. } = &mut self.kind else { return };
        if *stations == new {
            return;
        }
        let most = new.len().min(usize::try_from(af_xdp::MACS_MAX).unwrap_or(usize::MAX));
        let fits = new.get(..most).unwrap_or_default();
        if fits.len() < new.len() {
            let (count, interface) = (new.len(), self.link.name());
            tracing::warn!(
                interface,
                count,
                most,
                "too many stations: frames for the last ones \
                 go to the kernel; use steer=all"
            );
        }
        match control.set_macs(fits) {
            Ok(()) => *stations = new,
            Err(error) => tracing::warn!(%error, "cannot say which stations are attached"),
        }
    }
}

/// Frames that were lost since `then`. Before we were told the first time the interface lost what
/// others sent, and another counter says nothing of this one.
fn lost_since(then: Option<QueueDrops>, (name, now): QueueDrops) -> u64 {
    then.filter(|(of, _)| *of == name).map_or(0, |(_, then)| now.saturating_sub(then))
}

fn count(handle: &PortHandle, pair: u16, reason: DropReason, frames: u64) {
    if let Some(counters) = handle.counters(pair)
        && frames > 0
    {
        counters.kernel.dropped(reason, frames);
    }
}

#[cfg(test)]
mod tests {
    use super::lost_since;

    #[test]
    fn what_an_interface_lost_before_is_not_ours() {
        assert_eq!(lost_since(None, ("tx_dropped", 1000)), 0);
        assert_eq!(lost_since(Some(("tx_dropped", 1000)), ("tx_dropped", 1003)), 3);
        // A process before this one counted another number of a macvtap.
        assert_eq!(lost_since(Some(("tx_dropped", 3)), ("rx_dropped", 1000)), 0);
        assert_eq!(lost_since(Some(("tx_dropped", 3)), ("tx_dropped", 1)), 0);
    }
}
