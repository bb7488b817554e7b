//! The smallest fabric there is: what one port receives, the other one sends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use port::{
    DropReason, Egress, Fabric, FrameBuf, Ingress, PortId, PortSnapshot, QueueFault, QueueId,
    Restored,
};
use virtq::mem::SegStore;

/// What the worker polls when there is nothing to do, in microseconds.
const IDLE_US: u64 = 50;

/// The ring of a pair, in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Receiveq,
    Transmitq,
}

type Slots<T, K = QueueId> = Mutex<BTreeMap<K, T>>;

/// Queues of two ports, 0 and 1.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    ingress: Slots<Box<dyn Ingress>>,
    egress: Slots<Box<dyn Egress>>,
    faults: Mutex<BTreeMap<(QueueId, Side), QueueFault>>,
    /// What was restored of a port's guest.
    snapshots: Slots<PortSnapshot, PortId>,
    stop: AtomicBool,
}

fn lock<T, K>(slots: &Slots<T, K>) -> MutexGuard<'_, BTreeMap<K, T>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// Starts the thread that moves frames until [`Self::stop`].
    pub(crate) fn start(self: &Arc<Self>) -> JoinHandle<()> {
        let wire = Arc::clone(self);
        thread::spawn(move || {
            let mut frames = FrameBuf::default();
            // ORDERING: Relaxed: the flag guards nothing but itself.
            while !wire.stop.load(Ordering::Relaxed) {
                if !wire.turn(&mut frames) {
                    thread::sleep(Duration::from_micros(IDLE_US));
                }
            }
        })
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        // ORDERING: Relaxed: see `start`.
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The rings that their drivers broke since the last time.
    pub(crate) fn faults(&self) -> BTreeMap<(QueueId, Side), QueueFault> {
        std::mem::take(&mut *self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers a fault for [`Self::faults`].
    pub(crate) fn fault(&self, at: QueueId, side: Side, fault: QueueFault) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        drop(faults.insert((at, side), fault));
    }

    /// Moves one burst of every queue; tells whether there was any.
    fn turn(&self, frames: &mut FrameBuf) -> bool {
        let mut busy = false;
        for (at, ingress) in lock(&self.ingress).iter_mut() {
            let counters = Arc::clone(ingress.counters());
            let batch = ingress.receive(frames);
            if let Some(fault) = batch.fault() {
                self.fault(*at, Side::Transmitq, fault.clone());
            }
            let picked: Vec<u16> = (0..).zip(batch.frames()).map(|(index, _)| index).collect();
            if picked.is_empty() {
                continue;
            }
            busy = true;
            let to = QueueId { port: other(at.port), pair: at.pair };
            let mut egresses = lock(&self.egress);
            match egresses.get_mut(&to).map(|egress| egress.send(&batch, &picked)) {
                None => counters.ingress.dropped(DropReason::NoDestination, count(&picked)),
                Some(Ok(())) => {}
                Some(Err(fault)) => self.fault(to, Side::Receiveq, fault),
            }
            drop(batch);
            ingress.release();
            // ORDERING: what was published stands before the look at whether it is wanted.
            fence(Ordering::SeqCst);
            let _ = ingress.notify();
            if let Some(egress) = egresses.get_mut(&to) {
                let _ = egress.notify();
            }
        }
        busy
    }
}

fn other(port: PortId) -> PortId {
    PortId(1u16.saturating_sub(port.0))
}

fn count(picked: &[u16]) -> u64 {
    u64::try_from(picked.len()).unwrap_or(u64::MAX)
}

impl Fabric for Wire {
    fn attach_ingress(&self, at: QueueId, ingress: Box<dyn Ingress>) {
        drop(lock(&self.ingress).insert(at, ingress));
    }

    fn detach_ingress(&self, at: QueueId) -> Option<Box<dyn Ingress>> {
        lock(&self.ingress).remove(&at)
    }

    fn attach_egress(&self, at: QueueId, egress: Box<dyn Egress>) {
        drop(lock(&self.egress).insert(at, egress));
    }

    fn exchange_egress(
        &self,
        at: QueueId,
        change: &mut dyn FnMut(Box<dyn Egress>) -> Box<dyn Egress>,
    ) -> bool {
        let mut egresses = lock(&self.egress);
        let Some(old) = egresses.remove(&at) else { return false };
        let _ = egresses.insert(at, change(old));
        true
    }

    fn detach_egress(&self, at: QueueId) -> Option<Box<dyn Egress>> {
        lock(&self.egress).remove(&at)
    }

    fn resume_egress(&self, at: QueueId) {
        if let Some(egress) = lock(&self.egress).get_mut(&at) {
            let _ = egress.resume();
            // ORDERING: SeqCst: what was published before the look at what the driver wants.
            fence(Ordering::SeqCst);
            let _ = egress.notify();
        }
    }

    fn busy(&self) -> Duration {
        Duration::ZERO
    }

    fn quiesce(&self) {
        // Held for a turn.
        drop(lock(&self.ingress));
    }

    fn snapshot(&self, port: PortId) -> PortSnapshot {
        lock(&self.snapshots).get(&port).cloned().unwrap_or_default()
    }

    fn restore(&self, port: PortId, snapshot: &PortSnapshot) -> Restored {
        let _ = lock(&self.snapshots).insert(port, snapshot.clone());
        Restored { stations: snapshot.stations.len(), ..Restored::default() }
    }

    fn originate(&self, from: PortId, frame: &[u8]) {
        let to = QueueId { port: other(from), pair: 0 };
        let mut frames = FrameBuf::default();
        if let Some(slot) = frames.slot() {
            slot.fill_private(frame);
            frames.keep();
        }
        let batch = frames.batch(SegStore::empty(), None);
        if let Some(egress) = lock(&self.egress).get_mut(&to) {
            if let Err(fault) = egress.send(&batch, &[0]) {
                self.fault(to, Side::Receiveq, fault);
            }
            // ORDERING: as in `turn`.
            fence(Ordering::SeqCst);
            let _ = egress.notify();
        }
    }
}
