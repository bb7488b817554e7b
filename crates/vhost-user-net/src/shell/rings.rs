//! Rings on the switch: a session's rings become the two halves of queue pairs and come back.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use port::{Fabric, PortId, QueueCounters, QueueId};
use virtio_net::features::queue_options;
use virtio_net::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts, notify};
use virtq::QueueError;

use super::{CountersOf, PortLinks};
use crate::rarp;
use crate::session::{RingIndex, RingStart, Rings, Stopped};

/// The switch, as a session uses it.
pub(super) struct FabricRings {
    id: PortId,
    fabric: Arc<dyn Fabric>,
    counters: CountersOf,
    /// How often a delivery looks again at a receiveq without room.
    retries: u32,
}

impl FabricRings {
    pub(super) fn new(links: PortLinks, retries: u32) -> Self {
        Self { id: links.id, fabric: links.fabric, counters: links.counters, retries }
    }

    fn at(&self, ring: RingIndex) -> QueueId {
        QueueId { port: self.id, pair: ring.pair() }
    }
}

impl Rings for FabricRings {
    fn start(&mut self, ring: RingIndex, start: RingStart<'_>) -> Result<(), QueueError> {
        let mut queue = start.config.activate(start.memory)?;
        queue.set_log(start.log);
        let options = QueueOptions {
            enabled: start.enabled,
            retries: self.retries,
            ..queue_options(start.features, start.mtu)
        };
        let counters: Arc<QueueCounters> = (self.counters)(ring.pair());
        let (kick, call) = (start.kick, start.call);
        let lost = call.clone().filter(|_| start.resumed);
        if ring.is_transmitq() {
            let parts = TransmitqParts { queue, kick, call, counters, options };
            self.fabric.attach_ingress(self.at(ring), Box::new(Transmitq::new(parts)));
        } else {
            let parts = ReceiveqParts { queue, kick, call, counters, options };
            self.fabric.attach_egress(self.at(ring), Box::new(Receiveq::new(parts)));
        }
        // A call to the previous eventfd may have come after the driver looked at that one last:
        // one call too many is harmless, one too few is not.
        if let Some(call) = lost {
            notify::signal(&call);
        }
        Ok(())
    }

    fn stop(&mut self, ring: RingIndex) -> Option<Stopped> {
        let queue = if ring.is_transmitq() {
            let ingress = self.fabric.detach_ingress(self.at(ring))?;
            downcast::<Transmitq>(ingress.into_any())?.into_parts().queue
        } else {
            let egress = self.fabric.detach_egress(self.at(ring))?;
            downcast::<Receiveq>(egress.into_any())?.into_parts().queue
        };
        Some(queue.into())
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.fabric.originate(self.id, &rarp::announcement(mac));
    }
}

fn downcast<T: 'static>(any: Box<dyn Any + Send>) -> Option<T> {
    any.downcast().ok().map(|concrete| *concrete)
}

impl fmt::Debug for FabricRings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FabricRings").field("id", &self.id).finish_non_exhaustive()
    }
}
