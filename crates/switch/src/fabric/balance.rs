//! Which worker serves which pair, how loaded they are, and pairs that move to another worker.

use port::capture::IngressTap;
use port::{Ingress, QueueId, QueueTotals};

use super::Switch;
use crate::PortStats;
use crate::load::{Movable, Sample};
use crate::placement::{Admin, Placed};
use crate::shared::{Arrival, Message};
use crate::stats::add_totals;
use crate::table::{Port, record};
use crate::worker::WorkerHandle;

/// Where a pair's ingress is served, and how much work that is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// The pair.
    pub queue: QueueId,
    /// The worker, as an index into the statistics; none if it is the pair's own.
    pub worker: Option<usize>,
    /// The CPU that the worker is pinned to.
    pub cpu: Option<usize>,
    /// Whether it stays there because its port says so ([`crate::PortConfig::workers`]).
    pub pinned: bool,
    /// Its part of what the worker did between the last two looks ([`Switch::measure`]), 0 to 1.
    pub share: f64,
    /// The part of a CPU that this was, 0 to 1.
    pub busy: f64,
}

/// A pair that went to another worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// The pair.
    pub queue: QueueId,
    /// The worker that it had, as an index.
    pub from: usize,
    /// The worker that it has now.
    pub to: usize,
}

impl Switch {
    /// Which worker serves which pair, by port and pair.
    pub fn placement(&self) -> Vec<Placement> {
        let admin = self.admin();
        let place = |(queue, placed): (&QueueId, &Placed)| {
            let mailbox = admin.worker_of(*queue).map(|worker| &worker.mailbox);
            let worker = match placed {
                Placed::Shared(number) => Some(*number),
                Placed::Own(_) => None,
            };
            let load = admin.meter.loads.pairs.get(&(*queue, None)).copied().unwrap_or_default();
            Placement {
                queue: *queue,
                worker,
                cpu: mailbox.and_then(|mailbox| mailbox.cpu),
                pinned: self.home(*queue).is_some(),
                share: load.share,
                busy: load.busy,
            }
        };
        let mut places: Vec<_> = admin.placed.iter().map(place).collect();
        places.sort_by_key(|place| place.queue);
        places
    }

    /// The CPUs of the workers that serve the queues of all ports, by index; none of one that is
    /// not pinned.
    pub fn worker_cpus(&self) -> Vec<Option<usize>> {
        self.admin().workers.iter().map(|worker| worker.mailbox.cpu).collect()
    }

    /// Looks at what workers and pairs did since the last look, for [`Self::placement`].
    pub fn measure(&self) {
        let mut admin = self.admin();
        let sample = self.sample(&admin);
        admin.meter.look(sample);
    }

    /// Ends an interval of balancing: moves one pair from the busiest worker to the idlest one, if
    /// that was worth it in the last intervals and still is. Loads are those between two calls.
    ///
    /// The pair's frames wait in its queue while it moves: none is lost or overtaken.
    pub fn rebalance(&self) -> Option<Moved> {
        let mut admin = self.admin();
        let sample = self.sample(&admin);
        admin.balance_meter.look(sample);
        let loads = &admin.balance_meter.loads;
        let load = |number: &usize| loads.workers.get(number).copied().unwrap_or(0.0);
        let workers: Vec<f64> = admin.workers.iter().map(|w| load(&w.mailbox.number)).collect();
        let mut pairs = Vec::new();
        for (queue, placed) in &admin.placed {
            if let Placed::Shared(worker) = placed
                && self.home(*queue).is_none()
            {
                let busy = loads.pairs.get(&(*queue, None)).map_or(0.0, |load| load.busy);
                pairs.push(Movable { queue: *queue, worker: *worker, busy });
            }
        }
        // Of equals the first one, whatever the order of the map.
        pairs.sort_by_key(|pair| pair.queue);
        let (queue, to) = admin.balancer.plan(&workers, &pairs)?;
        self.relocate(&mut admin, queue, to)
    }

    /// Moves a pair to another of the workers that always run, by index, as [`Self::rebalance`]
    /// does. None if there is no such pair or worker, or it is there already.
    pub fn move_pair(&self, queue: QueueId, to: usize) -> Option<Moved> {
        self.relocate(&mut self.admin(), queue, to)
    }

    fn relocate(&self, admin: &mut Admin, queue: QueueId, to: usize) -> Option<Moved> {
        let Placed::Shared(from) = *admin.placed.get(&queue)? else { return None };
        if from == to || to >= admin.workers.len() {
            return None;
        }
        let ingress = self.take_ingress(admin, queue)?;
        let tap = self
            .shared
            .tables
            .read(|records| IngressTap::new(&record(records, queue.port)?.taps, queue.pair));
        let (_, spread) = self.wishes(queue);
        let arrival = Arrival { ingress, tap, spread: None };
        admin.attach(queue, arrival, to, spread).ok()?;
        admin.workers.iter().for_each(WorkerHandle::see_to_mail);
        tracing::info!(port = queue.port.0, pair = queue.pair, from, to, "moved to another worker");
        Some(Moved { queue, from, to })
    }

    /// Takes an ingress from its worker: nobody touches it any more.
    pub(super) fn take_ingress(&self, admin: &mut Admin, at: QueueId) -> Option<Box<dyn Ingress>> {
        let placed = admin.placed.remove(&at)?;
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        let message = Message::Detach(at, reply);
        match placed {
            Placed::Shared(number) => {
                let worker = admin.workers.get(number)?;
                let sent = worker.mailbox.send(message);
                worker.see_to_mail();
                let ingress = sent.ok().and_then(|()| answer.recv().ok()).flatten();
                let pair = self.port_of(at);
                let counters = pair.as_ref().and_then(|p| p.counters.get(usize::from(at.pair)));
                admin.end_lanes(at, counters.map(|counters| &**counters));
                ingress
            }
            Placed::Own(mut worker) => {
                let sent = worker.mailbox.send(message);
                let ingress = sent.ok().and_then(|()| answer.recv().ok()).flatten();
                worker.stop(&self.shared);
                let copies = worker.mailbox.counters.flood_copies.get();
                admin.ended_copies = admin.ended_copies.wrapping_add(copies);
                ingress
            }
        }
    }

    /// The worker that a pair is to be served by, if its port says so.
    pub(super) fn home(&self, at: QueueId) -> Option<usize> {
        self.shared.tables.read(|records| record(records, at.port)?.port.home(at.pair))
    }

    /// That, and whether its flows are to be spread.
    pub(super) fn wishes(&self, at: QueueId) -> (Option<usize>, bool) {
        let wishes = |port: &Port| (port.home(at.pair), port.spread);
        self.port_of(at).map_or((None, false), |port| wishes(&port))
    }

    fn sample(&self, admin: &Admin) -> Sample {
        let mut sample = Sample { at_ns: self.shared.now_ns(), ..Sample::default() };
        for worker in admin.all_workers() {
            let busy_ns = worker.mailbox.counters.busy_ns.get();
            let _ = sample.busy_ns.insert(worker.mailbox.number, busy_ns);
        }
        self.shared.tables.read(|records| {
            for queue in admin.placed.keys() {
                let Some(worker) = admin.worker_of(*queue) else { continue };
                let Some(record) = record(records, queue.port) else { continue };
                let Some(counters) = record.port.counters.get(usize::from(queue.pair)) else {
                    continue;
                };
                let mut totals = QueueTotals::default();
                counters.read_rx(&mut totals);
                let seen = (worker.mailbox.number, totals.rx_frames, totals.rx_bytes);
                let _ = sample.pairs.insert((*queue, None), seen);
            }
        });
        // What workers do for the flows of other workers' pairs is nobody's share.
        for (queue, tracks) in &admin.lanes {
            for track in tracks {
                let Some(worker) = admin.workers.get(track.worker) else { continue };
                let mut totals = QueueTotals::default();
                track.counters.read_rx(&mut totals);
                let seen = (worker.mailbox.number, totals.rx_frames, totals.rx_bytes);
                let _ = sample.pairs.insert((*queue, Some(track.worker)), seen);
            }
        }
        sample
    }
}

/// Adds what was dropped in lanes to the pairs where the frames came from.
pub(super) fn add_lanes(admin: &Admin, ports: &mut [PortStats]) {
    for (at, tracks) in &admin.lanes {
        let port = ports.iter_mut().find(|port| port.id == at.port);
        let pair = port.and_then(|port| port.queues.get_mut(usize::from(at.pair)));
        let Some(totals) = pair else { continue };
        for track in tracks {
            let drops = track.counters.read_ends().drops;
            add_totals(totals, &QueueTotals { drops, ..QueueTotals::default() });
        }
    }
}
