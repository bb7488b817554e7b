//! Rings on the switch: a session's rings become the two halves of queue pairs and come back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use port::backlog::Backlog;
use port::{DropReason, Fabric, Ingress, PortId, PortSnapshot, QueueCounters, QueueId, Restored};
use virtio_net::features::queue_options;
use virtio_net::notify::CallWatch;
use virtio_net::{QueueOptions, ReceiveqParts, Transmitq, TransmitqParts};
use virtq::mem::RecordPage;
use virtq::{Inflight, QueueConfig, QueueError, Recovery, RingPosition};

use super::late::{Late, Rest};
use super::share::{TURN_MAX, Talk, say};
use super::{CountersOf, PortLinks, PortSettings, Transfers};
use crate::rarp;
use crate::record::{Identity, Records};
use crate::session::{RingIndex, RingStart, Rings, SetUpError, Stopped};

/// The switch, as a session uses it.
pub(super) struct FabricRings {
    id: PortId,
    pub(super) fabric: Arc<dyn Fabric>,
    pub(super) counters: CountersOf,
    /// How often a delivery looks again at a receiveq without room.
    retries: u32,
    coalesce: bool,
    /// Where rings are, for who comes after this session or this process.
    pub(super) records: Records,
    /// The port's name in the log.
    pub(super) name: String,
    /// Rings whose memory is still arriving.
    pub(super) late: Late,
    /// What waits for translations in receiveqs that do not run.
    pub(super) waiting: BTreeMap<RingIndex, Backlog>,
    /// Room that was made for frames to wait in, and not needed.
    pub(super) spare: Option<Backlog>,
    /// Receiveqs in whose place frames wait.
    pub(super) parked: BTreeSet<RingIndex>,
    /// The device's state on its way.
    pub(super) transfers: Transfers,
    /// What the port says in the log.
    pub(super) talk: Talk,
    /// How long this thread waited for workers since that was charged.
    pub(super) waited: Duration,
    /// How long calls of the front end's rings take.
    pub(super) watch: Arc<CallWatch>,
}

impl FabricRings {
    pub(super) fn new(links: PortLinks, settings: &PortSettings, notice: &Arc<OwnedFd>) -> Self {
        let dir = settings.state_dir.as_deref();
        Self {
            id: links.id,
            fabric: links.fabric,
            counters: links.counters,
            retries: settings.retries,
            coalesce: settings.coalesce,
            records: Records::new(dir, &settings.socket, settings.queues),
            name: settings.name.clone(),
            transfers: Transfers::new(notice),
            late: Late::new(Arc::clone(notice)),
            talk: Talk::default(),
            waited: Duration::ZERO,
            watch: Arc::new(CallWatch::new(Arc::clone(notice))),
            waiting: BTreeMap::new(),
            spare: None,
            parked: BTreeSet::new(),
        }
    }

    /// The front end's region of the ring, if it is one that serves.
    fn inflight(&mut self, ring: RingIndex, start: &RingStart<'_>) -> Option<Inflight> {
        let inflight = Inflight::new(start.inflight.clone()?, &start.config);
        if inflight.is_none() {
            say!(self, warn, ring = ring.0, "the in-flight region is of another ring");
        }
        inflight
    }

    /// Where the ring goes on, as its in-flight region says.
    fn resubmit(
        &mut self,
        ring: RingIndex,
        start: &RingStart<'_>,
        inflight: Option<&mut Inflight>,
    ) -> Result<Option<RingPosition>, QueueError> {
        let Some(inflight) = inflight.filter(|_| !start.known) else { return Ok(None) };
        let ring = ring.0;
        match inflight.recover(&start.config, start.memory)? {
            Recovery::At(position) => {
                say!(self, info, ring, ?position, "goes on as its in-flight region says");
                Ok(Some(position))
            }
            Recovery::Unlikely(why) => {
                say!(self, warn, ring, why, "the in-flight region does not fit");
                Ok(None)
            }
            Recovery::Unknown => Ok(None),
        }
    }

    /// Where the ring goes on, if that is not certain and its record knows.
    fn recover(
        &mut self,
        ring: RingIndex,
        start: &RingStart<'_>,
        (page, identity): (&RecordPage, &Identity),
    ) -> Result<Option<RingPosition>, QueueError> {
        if start.known || !Records::knows(page, identity) {
            return Ok(None);
        }
        let (ring, told) = (ring.0, start.config.position);
        match start.config.recover(start.memory, page)? {
            Recovery::At(position) => {
                say!(self, info, ring, ?position, ?told, "goes on as recorded");
                Ok(Some(position))
            }
            Recovery::Unlikely(why) => {
                say!(self, info, ring, why, "the record does not fit: the driver began anew");
                Ok(None)
            }
            Recovery::Unknown => Ok(None),
        }
    }

    fn make_ingress(
        &mut self,
        ring: RingIndex,
        parts: TransmitqParts,
        late: bool,
    ) -> Result<Box<dyn Ingress>, SetUpError> {
        if late {
            return self.late.ingress(ring, &self.name, parts);
        }
        Ok(self.late.behind_ingress(ring, Transmitq::new(parts)))
    }

    pub(super) fn at(&self, ring: RingIndex) -> QueueId {
        QueueId { port: self.id, pair: ring.pair() }
    }
}

impl Rings for FabricRings {
    fn start(&mut self, ring: RingIndex, start: RingStart<'_>) -> Result<(), SetUpError> {
        let page = self.records.page(ring);
        let known = page.as_ref().zip(start.identity.as_ref());
        let mut inflight = self.inflight(ring, &start);
        let recorded = match known {
            _ if inflight.is_some() => self.resubmit(ring, &start, inflight.as_mut())?,
            Some(known) => self.recover(ring, &start, known)?,
            None => None,
        };
        let recorded = match recorded {
            None if !start.known => start.config.rescue(start.memory)?,
            recorded => recorded,
        };
        let position = recorded.unwrap_or(start.config.position);
        let mut queue = QueueConfig { position, ..start.config }.activate(start.memory)?;
        if let Some((page, identity)) = known {
            Records::claim(page, identity);
            if inflight.is_some() {
                page.forget();
            } else if self.records.outlive() {
                queue.set_record(page.clone());
            }
        }
        if let Some(inflight) = inflight {
            queue.set_inflight(inflight);
        }
        queue.set_log(start.log);
        let translated = start.iotlb.is_some();
        queue.set_iotlb(start.iotlb);
        let options = QueueOptions {
            enabled: start.enabled,
            retries: self.retries,
            coalesce: self.coalesce,
            ..queue_options(start.features, start.mtu)
        };
        let counters: Arc<QueueCounters> = (self.counters)(ring.pair());
        let (kick, call) = (start.kick, start.call);
        let watch = Arc::clone(&self.watch);
        let behind = (start.late, translated);
        let begins = position == RingPosition::start(start.config.layout);
        let lost = call.clone().filter(|_| start.resumed || recorded.is_some() || !begins);
        if ring.is_transmitq() {
            let parts = TransmitqParts { queue, kick, call, counters, watch, options };
            let ingress = self.make_ingress(ring, parts, start.late)?;
            self.fabric.attach_ingress(self.at(ring), ingress);
        } else {
            let parts = ReceiveqParts { queue, kick, call, counters, watch, options };
            self.start_egress(ring, parts, behind)?;
        }
        // A call to the previous eventfd, or of a predecessor, may have come after the driver
        // looked at that one last: one call too many is harmless, one too few is not.
        if let Some(call) = lost {
            self.watch.signal(&call);
        }
        Ok(())
    }

    fn stop(&mut self, ring: RingIndex) -> Option<Stopped> {
        let stopped = self.take(ring);
        self.leave(ring, stopped)
    }

    fn park(&mut self, ring: RingIndex) -> Option<Stopped> {
        if self.late.serves(ring) {
            return self.stop(ring);
        }
        let queue = self.put_parked(ring);
        self.leave(ring, queue.map(|queue| queue.into_parts().queue.into()))
    }

    fn hold(&mut self, ring: RingIndex) {
        if !self.parked.contains(&ring) {
            self.attach_parked(ring);
        }
    }

    fn give_up(&mut self, ring: RingIndex) {
        self.unpark(ring);
        if let Some(waiting) = self.waiting.remove(&ring) {
            self.lose(ring, waiting);
        }
    }

    fn resume(&mut self, ring: RingIndex) {
        self.fabric.resume_egress(self.at(ring));
    }

    fn wake(&mut self, kick: &OwnedFd) {
        self.watch.signal(kick);
    }

    fn quiesce(&mut self) {
        self.ask_workers(|fabric| fabric.quiesce());
    }

    fn forget(&mut self, ring: RingIndex) {
        self.records.forget(ring);
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.fabric.originate(self.id, &rarp::announcement(mac));
    }
}

impl FabricRings {
    /// Whether calls have taken too much. Those of the next front end are its own.
    pub(super) fn end_watch(&mut self, notice: &Arc<OwnedFd>) -> bool {
        let over = self.watch.is_over();
        if over {
            self.watch = Arc::new(CallWatch::new(Arc::clone(notice)));
        }
        over
    }

    /// What is known of the guest.
    pub(super) fn snapshot(&self) -> PortSnapshot {
        self.fabric.snapshot(self.id)
    }

    /// Goes on with what was known of the guest elsewhere.
    pub(super) fn restore(&self, snapshot: &PortSnapshot) -> Restored {
        self.fabric.restore(self.id, snapshot)
    }

    /// Notes where a ring is.
    fn leave(&mut self, ring: RingIndex, stopped: Option<Stopped>) -> Option<Stopped> {
        // A file has it from the queue itself.
        if !self.records.outlive()
            && let Some(page) = self.records.page(ring)
        {
            match &stopped {
                Some(stopped) => page.leave(stopped.position),
                None => page.forget(),
            }
        }
        stopped
    }

    /// Does what ends with a turn of a worker, and notes how long this thread waited for that.
    pub(super) fn ask_workers<T>(&mut self, ask: impl FnOnce(&dyn Fabric) -> T) -> T {
        let began = Instant::now();
        let answer = ask(&*self.fabric);
        let waited = began.elapsed().min(TURN_MAX);
        self.waited = self.waited.saturating_add(waited);
        answer
    }

    /// Takes a ring back from the switch.
    fn take(&mut self, ring: RingIndex) -> Option<Stopped> {
        let queue = if ring.is_transmitq() {
            let at = self.at(ring);
            let ingress = self.ask_workers(|fabric| fabric.detach_ingress(at))?;
            self.late.take_ingress(ring, ingress)?.into_parts().queue
        } else {
            let egress = self.fabric.detach_egress(self.at(ring))?;
            let mut queue = self.late.take_egress(ring, egress)?;
            let backlog = queue.take_backlog().filter(|backlog| !backlog.is_empty());
            self.waiting.extend(backlog.map(|backlog| (ring, backlog)));
            queue.into_parts().queue
        };
        Some(queue.into())
    }

    /// Counts what still waits for translations as dropped: nobody goes on with it.
    pub(super) fn end_waiting(&mut self) {
        for ring in self.parked.clone() {
            self.unpark(ring);
        }
        for (ring, waiting) in std::mem::take(&mut self.waiting) {
            self.lose(ring, waiting);
        }
    }

    fn lose(&self, ring: RingIndex, mut waiting: Backlog) {
        let counters = (self.counters)(ring.pair());
        counters.egress.dropped(DropReason::PortDown, waiting.clear());
    }

    /// Counts what still waits for rings whose memory was late: they do not start again.
    pub(super) fn end_late(&mut self) {
        self.end_waiting();
        for (ring, rest) in self.late.take_rests() {
            match rest {
                Rest::Ingress(rest) => rest.discard(),
                Rest::Egress(rest) => rest.discard(&(self.counters)(ring.pair())),
            }
        }
    }
}

impl fmt::Debug for FabricRings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FabricRings").field("id", &self.id).finish_non_exhaustive()
    }
}
