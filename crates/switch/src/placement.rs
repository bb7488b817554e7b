//! Which worker serves which ingress.

use std::collections::HashMap;
use std::sync::Arc;

use port::{QueueCounters, QueueId, QueueTotals};

use crate::Workers;
use crate::lane::{Track, lanes};
use crate::load::{Balancer, Meter};
use crate::shared::{Arrival, Message, Shared};
use crate::worker::WorkerHandle;

/// What the control thread keeps.
#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) workers: Vec<WorkerHandle>,
    /// Whether each pair gets a worker of its own.
    per_queue: bool,
    /// Which worker serves a pair's ingress.
    pub(crate) placed: HashMap<QueueId, Placed>,
    /// Lanes from pairs whose flows are spread.
    pub(crate) lanes: HashMap<QueueId, Vec<Track>>,
    pub(crate) removed_ports: QueueTotals,
    /// Flood copies of workers that have ended.
    pub(crate) ended_copies: u64,
    /// Number of the next worker.
    next_worker: usize,
    /// What pairs and workers did lately.
    pub(crate) meter: Meter,
    /// The same in the intervals of balancing.
    pub(crate) balance_meter: Meter,
    pub(crate) balancer: Balancer,
    /// Where the search for the next port's id begins.
    pub(crate) next_id: u16,
}

/// Where an ingress is.
#[derive(Debug)]
pub(crate) enum Placed {
    /// At one of the workers that always run.
    Shared(usize),
    /// At a worker of its own.
    Own(WorkerHandle),
}

impl Admin {
    /// Starts the workers that always run.
    pub(crate) fn start(shared: &Arc<Shared>, workers: &Workers) -> std::io::Result<Self> {
        let mut admin = Self {
            workers: Vec::new(),
            per_queue: *workers == Workers::PerQueue,
            placed: HashMap::new(),
            lanes: HashMap::new(),
            removed_ports: QueueTotals::default(),
            ended_copies: 0,
            next_worker: 0,
            meter: Meter::default(),
            balance_meter: Meter::default(),
            balancer: Balancer::default(),
            next_id: 0,
        };
        let cpus: Vec<Option<usize>> = match workers {
            Workers::Cpus(cpus) => cpus.iter().copied().map(Some).collect(),
            Workers::Unpinned(count) | Workers::Manual(count) => vec![None; (*count).max(1)],
            Workers::PerQueue => Vec::new(),
        };
        for cpu in cpus {
            let started = if matches!(workers, Workers::Manual(_)) {
                WorkerHandle::start_by_hand(shared, admin.number())
            } else {
                admin.start_worker(shared, cpu)
            };
            match started {
                Ok(worker) => admin.workers.push(worker),
                Err(error) => {
                    admin.stop(shared);
                    return Err(error);
                }
            }
        }
        Ok(admin)
    }

    fn start_worker(
        &mut self,
        shared: &Arc<Shared>,
        cpu: Option<usize>,
    ) -> std::io::Result<WorkerHandle> {
        let number = self.number();
        WorkerHandle::start(shared, number, cpu)
    }

    fn number(&mut self) -> usize {
        let number = self.next_worker;
        self.next_worker = self.next_worker.wrapping_add(1);
        number
    }

    pub(crate) fn all_workers(&self) -> impl Iterator<Item = &WorkerHandle> {
        let own = self.placed.values().filter_map(|placed| match placed {
            Placed::Own(worker) => Some(worker),
            Placed::Shared(_) => None,
        });
        self.workers.iter().chain(own)
    }

    /// The worker with the fewest queues.
    fn least_loaded(&self) -> usize {
        let load = |number: usize| {
            let here = |placed: &&Placed| matches!(placed, Placed::Shared(at) if *at == number);
            self.placed.values().filter(here).count()
        };
        (0..self.workers.len()).min_by_key(|number| load(*number)).unwrap_or(0)
    }

    /// Hands an ingress to a worker: its home, if it has one.
    pub(crate) fn place(
        &mut self,
        shared: &Arc<Shared>,
        at: QueueId,
        arrival: Arrival,
        (home, spread): (Option<usize>, bool),
    ) -> std::io::Result<()> {
        if !self.per_queue {
            let number = home.unwrap_or_else(|| self.least_loaded());
            return self.attach(at, arrival, number, spread);
        }
        let worker = self.start_worker(shared, None)?;
        send(&worker, at, arrival)?;
        let _ = self.placed.insert(at, Placed::Own(worker));
        Ok(())
    }

    /// Hands an ingress to one of the workers that always run, with lanes to all others if its
    /// flows are to be spread.
    pub(crate) fn attach(
        &mut self,
        at: QueueId,
        mut arrival: Arrival,
        number: usize,
        spread: bool,
    ) -> std::io::Result<()> {
        let Some(worker) = self.workers.get(number) else {
            return Err(std::io::Error::other("there is no such worker"));
        };
        if spread && self.workers.len() > 1 {
            let (spread, takers) = lanes(number, self.workers.len())?;
            let mut tracks = Vec::new();
            for (track, lane) in takers {
                if let Some(worker) = self.workers.get(track.worker) {
                    send(worker, at, Arrival { ingress: lane, tap: None, spread: None })?;
                }
                tracks.push(track);
            }
            let _ = self.lanes.insert(at, tracks);
            arrival.spread = Some(spread);
        }
        send(worker, at, arrival)?;
        let _ = self.placed.insert(at, Placed::Shared(number));
        Ok(())
    }

    /// Ends the lanes from a pair that no worker has any more: all that was in them is forwarded.
    pub(crate) fn end_lanes(&mut self, at: QueueId, counters: Option<&QueueCounters>) {
        for track in self.lanes.remove(&at).unwrap_or_default() {
            let (reply, answer) = std::sync::mpsc::sync_channel(1);
            if let Some(worker) = self.workers.get(track.worker)
                && worker.mailbox.send(Message::EndLane(at, reply)).is_ok()
            {
                worker.see_to_mail();
                let _ = answer.recv();
            }
            if let Some(counters) = counters {
                track.settle(counters);
            }
        }
    }

    /// The worker that serves a pair.
    pub(crate) fn worker_of(&self, at: QueueId) -> Option<&WorkerHandle> {
        match self.placed.get(&at)? {
            Placed::Own(worker) => Some(worker),
            Placed::Shared(number) => self.workers.get(*number),
        }
    }

    pub(crate) fn stop(&mut self, shared: &Shared) {
        for worker in &mut self.workers {
            worker.stop(shared);
        }
        for placed in self.placed.values_mut() {
            if let Placed::Own(worker) = placed {
                worker.stop(shared);
            }
        }
    }
}

fn send(worker: &WorkerHandle, at: QueueId, arrival: Arrival) -> std::io::Result<()> {
    let sent = worker.mailbox.send(Message::Attach(at, Box::new(arrival)));
    sent.map_err(|_| std::io::Error::other("the worker has ended"))
}
