//! A device goes on in another process: what it and its queues are made of.

use std::any::Any;
use std::sync::Arc;

use control::PortKind;
use port::{Egress, Ingress, QueueCounters};
use serde::{Deserialize, Serialize};
use uplink::af_xdp::{self, AfXdpEgress, AfXdpIngress, KernelDrops, Umems};
use uplink::packet_mmap::{self, PacketMmapEgress, PacketMmapIngress};
use uplink::tap::{self, TapEgress, TapIngress};
use uplink::{Parts, PartsError};

use super::{Device, Kind, Pair, QueueDrops, boxed};

/// What the uplink does not know of itself.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    uplink: String,
    /// What was counted of the kernel's drops of a tap; older builds knew one counter.
    #[serde(default)]
    tx_dropped: u64,
    /// The kernel's name of it; empty if nothing was counted.
    #[serde(default = "tx_dropped")]
    drop_counter: String,
    /// What was counted of the kernel's drops by queue.
    #[serde(default)]
    counted: Vec<KernelDrops>,
}

/// The counter of builds that do not say which one it is.
fn tx_dropped() -> String {
    TX_DROPPED.to_owned()
}

const TX_DROPPED: &str = "tx_dropped";
const RX_DROPPED: &str = "rx_dropped";

impl State {
    /// What was counted of the kernel's drops of a tap.
    fn dropped(&self) -> Option<QueueDrops> {
        let mut known = [TX_DROPPED, RX_DROPPED].into_iter();
        let name = known.find(|known| self.drop_counter == *known)?;
        Some((name, self.tx_dropped))
    }
}

type Boxes<I, E> = Vec<(Box<I>, Box<E>)>;

impl Device {
    /// What the device is made of. `pairs` are all of its queues, which no worker has now; they
    /// come back as they were, to be used again if nobody takes the parts over.
    pub(in crate::app) fn parts(&self, pairs: Vec<Pair>) -> (Result<Parts, String>, Vec<Pair>) {
        let link = &self.link;
        let (mut dropped, mut counted) = (None, Vec::new());
        let (parts, pairs) = match &self.kind {
            Kind::Tap { dropped: so_far, .. } => {
                dropped = *so_far;
                with::<TapIngress, TapEgress>(pairs, |queues| {
                    tap::parts(link, queues.iter_mut().map(|(i, e)| (&mut **i, &mut **e)))
                })
            }
            Kind::AfXdp { control, counted: so_far, .. } => {
                counted.clone_from(so_far);
                with::<AfXdpIngress, AfXdpEgress>(pairs, |queues| {
                    let queues = queues.iter_mut().map(|(i, e)| (&mut **i, &mut **e));
                    af_xdp::parts(control, link, queues)
                })
            }
            Kind::PacketMmap(kernel) => {
                with::<PacketMmapIngress, PacketMmapEgress>(pairs, |queues| {
                    let queues = queues.iter_mut().map(|(i, e)| (&mut **i, &mut **e));
                    packet_mmap::parts(link, kernel, queues)
                })
            }
        };
        let wrapped = parts.and_then(|Parts { state, fds }| {
            let (name, tx_dropped) = dropped.unwrap_or_default();
            let drop_counter = name.to_owned();
            let state = State { uplink: state, tx_dropped, drop_counter, counted };
            let state = serde_json::to_string(&state).map_err(|error| error.to_string())?;
            Ok(Parts { state, fds })
        });
        (wrapped, pairs)
    }

    /// Sets what a process may have changed that was to go on with [`Self::parts`], and did not.
    pub(in crate::app) fn take_back(&self) {
        let Kind::Tap { offloads: Some(offloads), .. } = &self.kind else { return };
        if let Err(error) = offloads.set_again() {
            tracing::warn!(interface = self.link.name(), %error, "cannot set offloads again");
        }
    }

    /// Lets go of the interface without undoing anything: another process goes on with it. The
    /// queues are dropped after this.
    pub(in crate::app) fn leave(self) {
        if let Kind::AfXdp { control, .. } = self.kind {
            control.leave();
        }
        self.link.leave();
    }
}

/// Puts together again what [`Device::parts`] took apart.
pub(in crate::app) fn from_parts(
    kind: &PortKind,
    Parts { state, fds }: Parts,
    umems: &Umems,
    counters: &[Arc<QueueCounters>],
) -> Result<(Device, Vec<Pair>), String> {
    let state: State = serde_json::from_str(&state).map_err(|error| error.to_string())?;
    let dropped = state.dropped();
    let parts = Parts { state: state.uplink, fds };
    match kind {
        PortKind::VhostUser(_) => Err("a guest has no interface".to_owned()),
        PortKind::Tap(spec) => {
            let tap = tap::from_parts(parts, spec.offloads, counters).map_err(text)?;
            let kind = Kind::Tap { offloads: tap.offloads(), dropped };
            Ok((Device { kind, link: tap.link }, tap.queues.into_iter().map(boxed).collect()))
        }
        PortKind::AfXdp(spec) => {
            let xdp = af_xdp::from_parts(parts, umems, counters).map_err(text)?;
            let mut counted = state.counted;
            counted.resize(counters.len(), KernelDrops::default());
            let (control, steer, stations) = (Box::new(xdp.control), spec.steer, Vec::new());
            let kind = Kind::AfXdp { control, steer, counted, stations };
            Ok((Device { kind, link: xdp.link }, xdp.queues.into_iter().map(boxed).collect()))
        }
        PortKind::PacketMmap(spec) => {
            let offloads = spec.interface.offloads;
            let ring = packet_mmap::from_parts(parts, offloads, counters).map_err(text)?;
            let queues = ring.queues.into_iter().map(boxed).collect();
            Ok((Device { kind: Kind::PacketMmap(ring.kernel), link: ring.link }, queues))
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` wants it")]
fn text(error: PartsError) -> String {
    error.to_string()
}

/// Lends the queues as what they are.
fn with<I: Ingress + 'static, E: Egress + 'static>(
    pairs: Vec<Pair>,
    work: impl FnOnce(&mut Boxes<I, E>) -> Result<Parts, PartsError>,
) -> (Result<Parts, String>, Vec<Pair>) {
    let mut queues: Boxes<I, E> = Vec::with_capacity(pairs.len());
    let count = pairs.len();
    for (ingress, egress) in pairs {
        let ingress: Box<dyn Any + Send> = ingress.into_any();
        let egress: Box<dyn Any + Send> = egress.into_any();
        if let (Ok(ingress), Ok(egress)) = (ingress.downcast(), egress.downcast()) {
            queues.push((ingress, egress));
        }
    }
    let parts = if queues.len() == count {
        work(&mut queues).map_err(text)
    } else {
        Err("the queues are of another uplink".to_owned())
    };
    let pairs = queues.into_iter().map(|(i, e)| -> Pair { (i, e) }).collect();
    (parts, pairs)
}

#[cfg(test)]
mod tests {
    use super::State;

    #[test]
    fn a_tap_goes_on_from_the_counter_that_was_counted() {
        let dropped = |text: &str| serde_json::from_str::<State>(text).unwrap().dropped();
        assert_eq!(dropped(r#"{"uplink": "", "tx_dropped": 7}"#), Some(("tx_dropped", 7)));
        let with = |name: &str| {
            dropped(&format!(r#"{{"uplink": "", "tx_dropped": 7, "drop_counter": "{name}"}}"#))
        };
        assert_eq!(with("rx_dropped"), Some(("rx_dropped", 7)));
        assert_eq!(with("tx_dropped"), Some(("tx_dropped", 7)));
        assert_eq!((with(""), with("rx_missed")), (None, None));
    }
}
