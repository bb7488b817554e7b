//! An uplink between two processes: stopped, taken apart, put together, started.

use std::sync::Arc;

use control::PortKind;
use port::{Egress, Fabric, Ingress, PortId, QueueId};
use switch::{PortHandle, Switch};
use uplink::Parts;

use super::super::device::{Pair, handover};
use super::{Common, State, UplinkSide};

/// Queues that no worker has, by pair; none where a bug has lost one.
#[derive(Debug, Default)]
pub(super) struct Paused {
    ingresses: Vec<Option<Box<dyn Ingress>>>,
    egresses: Vec<Option<Box<dyn Egress>>>,
}

impl UplinkSide {
    /// Puts together what [`Self::parts`] took apart in another process. Nothing is served before
    /// [`Self::resume`].
    pub(in crate::app) fn adopt(
        common: Arc<Common>,
        handle: &PortHandle,
        kind: &PortKind,
        parts: Parts,
    ) -> Result<Self, String> {
        let counters: Vec<_> = (0..kind.pairs()).filter_map(|pair| handle.counters(pair)).collect();
        let (device, pairs) = handover::from_parts(kind, parts, &common.umems, &counters)?;
        let interface = kind.interface().cloned().unwrap_or_default();
        let made = device.link().was_made();
        common.add(device.event_fd());
        let paused = Paused::from(pairs);
        Ok(Self { common, kind: kind.clone(), interface, state: State::Open(device), made, paused })
    }

    /// Takes the queues from the workers: those of one direction.
    pub(in crate::app) fn pause(&mut self, switch: &Switch, port: PortId, inward: bool) {
        if let State::Lost(_) = self.state {
            return;
        }
        let pairs = (0..self.interface.queues).map(|pair| QueueId { port, pair });
        if inward {
            self.paused.ingresses = pairs.map(|at| switch.detach_ingress(at)).collect();
        } else {
            self.paused.egresses = pairs.map(|at| switch.detach_egress(at)).collect();
        }
    }

    /// Gives the queues to the workers: those of one direction.
    pub(in crate::app) fn resume(&mut self, switch: &Switch, port: PortId, inward: bool) {
        let at = |pair| QueueId { port, pair };
        if inward {
            let ingresses = std::mem::take(&mut self.paused.ingresses);
            for (pair, ingress) in (0..).zip(ingresses) {
                ingress.into_iter().for_each(|ingress| switch.attach_ingress(at(pair), ingress));
            }
        } else {
            let egresses = std::mem::take(&mut self.paused.egresses);
            for (pair, egress) in (0..).zip(egresses) {
                egress.into_iter().for_each(|egress| switch.attach_egress(at(pair), egress));
            }
        }
    }

    /// Whether no worker has the queues.
    pub(in crate::app) fn is_paused(&self) -> bool {
        !self.paused.ingresses.is_empty()
    }

    /// What the paused uplink is made of; none if it is lost, or a bug has lost a queue.
    pub(in crate::app) fn parts(&mut self) -> Result<Option<Parts>, String> {
        let State::Open(device) = &self.state else { return Ok(None) };
        let Paused { ingresses, egresses } = &self.paused;
        if ingresses.iter().any(Option::is_none) || egresses.iter().any(Option::is_none) {
            return Ok(None);
        }
        let paused = std::mem::take(&mut self.paused);
        let ingresses = paused.ingresses.into_iter().flatten();
        let pairs = ingresses.zip(paused.egresses.into_iter().flatten()).collect();
        let (parts, pairs) = device.parts(pairs);
        self.paused = Paused::from(pairs);
        parts.map(Some)
    }

    /// The process that was to have the parts does not go on.
    pub(in crate::app) fn take_back(&self) {
        if let State::Open(device) = &self.state {
            device.take_back();
        }
    }

    /// Lets go of the interface, which is another process's: nothing is undone.
    pub(in crate::app) fn leave(self) {
        if let State::Open(device) = self.state {
            device.leave();
        }
    }
}

impl From<Vec<Pair>> for Paused {
    fn from(pairs: Vec<Pair>) -> Self {
        let (ingresses, egresses) =
            pairs.into_iter().map(|(ingress, egress)| (Some(ingress), Some(egress))).unzip();
        Self { ingresses, egresses }
    }
}
