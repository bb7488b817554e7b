//! The thread that moves frames: it owns ingress queues and serves them in turns.
//!
//! ```text
//!  turn: messages? table changed? ─► every hot queue: receive, forward, release
//!        ─► one full fence ─► notify the ingresses and egresses that had work
//!  a queue without work for poll_us is armed and becomes cold: only epoll looks at it
//!  no hot queue left ─► sleep in epoll
//! ```
//!
//! So idle queues cost a busy worker nothing but one `epoll_wait` now and then, and sleeping is
//! no state of its own. A worker that is busy by rule keeps its queues hot while none has work,
//! so that the first frame is seen at once.
//!
//! **Ownership.** An ingress belongs to one worker, and comes and goes by message. Between turns
//! the worker holds no frames: so after `Detach` was answered nobody touches that memory.

mod by_hand;
mod cold;
mod queue;
mod share;
mod turn;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use port::capture::IngressTap;
use port::{FrameBuf, QueueId};

use crate::pipeline::Pipeline;
use crate::room;
use crate::shared::{Arrival, Mailbox, Message, Shared};
use crate::table::Table;
pub(crate) use by_hand::ByHand;
pub use by_hand::Turn;
use cold::Waiter;
use queue::{Queue, State};
use share::Shares;

/// A worker as control holds it.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    pub(crate) mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    /// Instead of a thread: whoever calls [`crate::Switch::turn`].
    pub(crate) by_hand: Option<Arc<ByHand>>,
}

impl WorkerHandle {
    /// Starts a thread, on one CPU if one is given.
    pub(crate) fn start(
        shared: &Arc<Shared>,
        number: usize,
        cpu: Option<usize>,
    ) -> std::io::Result<Self> {
        let (mailbox, receiver) = Mailbox::new(number, cpu, true)?;
        let waiter = Waiter::new(mailbox.wake_fd())?;
        let (pinned, was_pinned) = std::sync::mpsc::sync_channel(1);
        shared.add_mailbox(Arc::clone(&mailbox));
        let worker = Worker::new(Arc::clone(shared), Arc::clone(&mailbox), receiver, waiter);
        let name = format!("worker-{number}");
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let result = cpu.map_or(Ok(()), pin);
            let go_on = result.is_ok();
            let _ = pinned.send(result);
            if go_on {
                worker.shared.at_start.run();
                worker.run();
            }
        });
        let result = spawned.and_then(|thread| {
            was_pinned.recv().unwrap_or(Ok(()))?;
            Ok(thread)
        });
        match result {
            Ok(thread) => Ok(Self { mailbox, thread: Some(thread), by_hand: None }),
            Err(error) => {
                shared.remove_mailbox(&mailbox);
                Err(error)
            }
        }
    }

    /// A worker without a thread.
    pub(crate) fn start_by_hand(shared: &Arc<Shared>, number: usize) -> std::io::Result<Self> {
        let (mailbox, receiver) = Mailbox::new(number, None, false)?;
        let waiter = Waiter::new(mailbox.wake_fd())?;
        shared.add_mailbox(Arc::clone(&mailbox));
        let worker = Worker::new(Arc::clone(shared), Arc::clone(&mailbox), receiver, waiter);
        let by_hand = ByHand::new(worker).inspect_err(|_| shared.remove_mailbox(&mailbox))?;
        Ok(Self { mailbox, thread: None, by_hand: Some(Arc::new(by_hand)) })
    }

    /// Makes sure that what was sent is seen: a worker without a thread reads its mail here.
    pub(crate) fn see_to_mail(&self) {
        if let Some(by_hand) = &self.by_hand {
            by_hand.attend();
        }
    }

    /// Ends the thread and waits for that. Its ingresses are dropped.
    pub(crate) fn stop(&mut self, shared: &Shared) {
        let _ = self.mailbox.send(Message::Stop);
        self.see_to_mail();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        shared.remove_mailbox(&self.mailbox);
    }
}

fn pin(cpu: usize) -> std::io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(std::io::Error::other(format!("there is no CPU {cpu}")));
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|error| std::io::Error::other(format!("cannot run on CPU {cpu}: {error}")))
}

/// The thread's state.
#[derive(Debug)]
struct Worker {
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    receiver: Receiver<Message>,
    table: Arc<Table>,
    /// What it acknowledged last.
    generation: u64,
    waiter: Waiter,
    pipeline: Pipeline,
    frames: FrameBuf,
    /// By number; empty places are used again.
    queues: Vec<Option<Queue>>,
    /// Numbers of the queues that are looked at in every turn.
    hot: Vec<usize>,
    /// Numbers of the queues that rest, and until when.
    resting: Vec<(u64, usize)>,
    /// When the first of them is to be looked at again.
    rest_until_ns: u64,
    /// Number of cold queues.
    cold: usize,
    /// Numbers of the queues that had work in this turn.
    worked: Vec<usize>,
    clock: Clock,
    shares: Shares,
    /// Whether it waits for work when there is none.
    sleeps: bool,
    stopping: bool,
}

/// What a worker knows of the time: it reads the clock rarely.
#[derive(Debug, Default)]
struct Clock {
    now_ns: u64,
    now_secs: u32,
    /// How often it was read.
    looks: u64,
    /// Bursts since it was read.
    bursts: usize,
    /// When a queue had work last.
    worked_ns: u64,
    /// When cold queues were asked after last.
    looked_ns: u64,
}

impl Worker {
    fn new(
        shared: Arc<Shared>,
        mailbox: Arc<Mailbox>,
        receiver: Receiver<Message>,
        waiter: Waiter,
    ) -> Self {
        let (table, generation) = shared.tables.current();
        let mut pipeline = Pipeline::default();
        pipeline.fit(&table);
        Self {
            shared,
            mailbox,
            receiver,
            table,
            generation,
            waiter,
            pipeline,
            frames: FrameBuf::default(),
            queues: Vec::new(),
            hot: Vec::new(),
            resting: Vec::new(),
            rest_until_ns: u64::MAX,
            cold: 0,
            worked: Vec::new(),
            clock: Clock::default(),
            shares: Shares::default(),
            sleeps: true,
            stopping: false,
        }
    }

    fn run(mut self) {
        self.begin();
        while self.attend() {
            let worked = self.turn();
            self.rest(worked);
        }
    }

    fn begin(&mut self) {
        self.shared.acknowledge(&self.mailbox, self.generation);
        self.read_clock();
    }

    /// Takes over what control asks for. Returns whether there is to be another turn.
    #[inline]
    fn attend(&mut self) -> bool {
        if self.mailbox.take_pending() {
            self.read_mail();
        }
        if self.stopping {
            return false;
        }
        if self.shared.tables.generation() != self.generation {
            self.catch_up();
        }
        true
    }

    /// Takes over the present generation, and its table if that is another one.
    #[cold]
    fn catch_up(&mut self) {
        let (table, generation) = self.shared.tables.current();
        self.generation = generation;
        if !Arc::ptr_eq(&table, &self.table) {
            self.take_table(table);
        }
        self.shared.acknowledge(&self.mailbox, generation);
    }

    fn read_mail(&mut self) {
        while let Ok(message) = self.receiver.try_recv() {
            match message {
                Message::Attach(id, arrival) => {
                    let Arrival { ingress, tap, spread } = *arrival;
                    self.attach(Queue::new(id, ingress).tapped(tap).spread(spread));
                }
                Message::Tap(id, tap, reply) => {
                    self.tap(id, tap);
                    let _ = reply.send(());
                }
                Message::Detach(id, reply) => {
                    let _ = reply.send(self.detach(id).and_then(Queue::into_ingress));
                }
                Message::EndLane(id, reply) => {
                    self.end_lane(id);
                    let _ = reply.send(());
                }
                Message::Stop => self.stopping = true,
            }
        }
    }

    fn take_table(&mut self, table: Arc<Table>) {
        self.table = table;
        self.pipeline.fit(&self.table);
        for number in 0..self.queues.len() {
            self.take_guard(number);
            self.park_or_unpark(number);
        }
        self.end_rests();
    }

    /// Takes over what the table lets a queue's port send.
    fn take_guard(&mut self, number: usize) {
        if let Some(queue) = self.queues.get_mut(number).and_then(Option::as_mut) {
            let entry = self.table.entry(queue.id.port);
            // What comes over a lane was guarded where it came in.
            let own = entry.filter(|entry| entry.port.counts(&queue.origin.counters));
            queue.guard = own.and_then(|entry| entry.guard.clone());
        }
    }

    /// Queues of a port in quarantine rest until that ends.
    fn park_or_unpark(&mut self, number: usize) {
        let Some(queue) = self.queues.get_mut(number).and_then(Option::as_mut) else { return };
        let quarantined = self.table.entry(queue.id.port).is_some_and(|entry| entry.quarantined);
        match (queue.state, quarantined) {
            (State::Hot | State::Cold | State::Resting, true) => {
                queue.state = State::Parked;
                self.unlist(number);
                self.count_cold();
            }
            (State::Parked, false) => self.make_hot(number),
            _ => {}
        }
    }

    fn attach(&mut self, mut queue: Queue) {
        let number = match self.queues.iter().position(Option::is_none) {
            Some(number) => number,
            None => {
                room::reserve(&mut self.queues, 1);
                self.queues.push(None);
                room::reserve(&mut self.hot, self.queues.len());
                room::reserve(&mut self.resting, self.queues.len());
                room::reserve(&mut self.worked, self.queues.len());
                self.queues.len().saturating_sub(1)
            }
        };
        queue.wakes = self.waiter.add(queue.ingress.wake_fd(), number);
        if let Some(place) = self.queues.get_mut(number) {
            *place = Some(queue);
        }
        self.make_hot(number);
        self.take_guard(number);
        self.park_or_unpark(number);
    }

    fn detach(&mut self, id: QueueId) -> Option<Queue> {
        let number = self.number_of(id)?;
        self.remove(number)
    }

    /// Forwards all that is left in a lane, and forgets it.
    fn end_lane(&mut self, id: QueueId) {
        let arrived = |queue: &Queue| queue.origin.counters.ingress.arrived();
        while let Some(number) = self.number_of(id) {
            let count = |worker: &Self| worker.queues.get(number)?.as_ref().map(arrived);
            let before = count(self);
            let _ = self.serve(number);
            if count(self) == before {
                drop(self.remove(number));
            }
        }
    }

    fn number_of(&self, id: QueueId) -> Option<usize> {
        let found = |queue: &Option<Queue>| queue.as_ref().is_some_and(|queue| queue.id == id);
        self.queues.iter().position(found)
    }

    /// The wake-up is not touched: a tap has the fd of what it is around.
    fn tap(&mut self, id: QueueId, tap: Option<IngressTap>) {
        let place = self.number_of(id).and_then(|number| self.queues.get_mut(number));
        if let Some(place) = place {
            *place = place.take().map(|queue| queue.tapped(tap));
        }
    }

    fn remove(&mut self, number: usize) -> Option<Queue> {
        let queue = self.queues.get_mut(number)?.take()?;
        self.unlist(number);
        self.count_cold();
        if queue.wakes {
            self.waiter.remove(queue.ingress.wake_fd());
        }
        Some(queue)
    }

    /// Nobody looks at it any more, unless it is woken.
    fn unlist(&mut self, number: usize) {
        self.hot.retain(|hot| *hot != number);
        self.resting.retain(|(_, resting)| *resting != number);
    }

    fn count_cold(&mut self) {
        let cold = |queue: &&Queue| queue.state == State::Cold;
        self.cold = self.queues.iter().flatten().filter(cold).count();
    }

    fn make_hot(&mut self, number: usize) {
        if let Some(queue) = self.queues.get_mut(number).and_then(Option::as_mut) {
            queue.state = State::Hot;
            queue.idle = None;
            self.hot.push(number);
        }
    }

    fn read_clock(&mut self) {
        self.clock.now_ns = self.shared.now_ns();
        self.clock.now_secs = self.shared.secs(self.clock.now_ns);
        self.clock.looks = self.clock.looks.wrapping_add(1);
        self.clock.bursts = 0;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // However the thread ends: nobody waits for it.
        self.shared.acknowledge(&self.mailbox, u64::MAX);
    }
}
