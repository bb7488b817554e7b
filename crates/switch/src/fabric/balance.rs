//! Which worker serves which pair, how loaded they are, and pairs that move to another worker.

use port::QueueId;
use port::QueueTotals;
use port::capture::IngressTap;

use super::Switch;
use crate::load::{Movable, Sample};
use crate::placement::{Admin, Placed};
use crate::shared::Message;
use crate::table::record;

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
            let load = admin.meter.loads.pairs.get(queue).copied().unwrap_or_default();
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
                let busy = loads.pairs.get(queue).map_or(0.0, |load| load.busy);
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
        let worker = admin.workers.get(to)?;
        worker.mailbox.send(Message::Attach(queue, ingress, tap)).ok()?;
        worker.see_to_mail();
        let _ = admin.placed.insert(queue, Placed::Shared(to));
        tracing::info!(port = queue.port.0, pair = queue.pair, from, to, "moved to another worker");
        Some(Moved { queue, from, to })
    }

    /// The worker that a pair is to be served by, if its port says so.
    pub(super) fn home(&self, at: QueueId) -> Option<usize> {
        self.shared.tables.read(|records| record(records, at.port)?.port.home(at.pair))
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
                let _ = sample.pairs.insert(*queue, seen);
            }
        });
        sample
    }
}
