//! What the control thread and all workers share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use port::capture::IngressTap;
use port::{BURST_MAX, CallCounters, Counter, Ingress, PortId, PortState, QueueId};

use crate::doze::Doze;
use crate::event::{EventSender, SwitchEvent, Way, signal};
use crate::fdb::{Fdb, Key, STATIC_MAX};
use crate::lane::Spread;
use crate::pipeline::Trouble;
use crate::table::{Port, Tables, record, record_mut};
use crate::{AtStart, PollMode, SwitchConfig};

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) fdb: Fdb,
    pub(crate) tables: Tables,
    pub(crate) events: EventSender,
    pub(crate) began: Instant,
    pub(crate) poll: PollMode,
    pub(crate) poll_ns: u64,
    pub(crate) forward_reserved: bool,
    pub(crate) at_start: AtStart,
    /// All workers that run.
    mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    /// For how long those were busy that have ended, in nanoseconds.
    ended_busy_ns: AtomicU64,
    /// Notified when a worker acknowledges a generation, or ends. How many wait for that.
    acknowledged: (Mutex<usize>, Condvar),
}

impl Shared {
    pub(crate) fn new(config: &SwitchConfig, seed: u64, events: EventSender) -> Self {
        Self {
            fdb: Fdb::new(config.fdb, STATIC_MAX, seed),
            tables: Tables::default(),
            events,
            began: Instant::now(),
            poll: config.poll,
            poll_ns: u64::from(config.poll_us).saturating_mul(1000),
            forward_reserved: config.forward_reserved,
            at_start: config.at_start.clone(),
            mailboxes: Mutex::default(),
            ended_busy_ns: AtomicU64::new(0),
            acknowledged: Default::default(),
        }
    }

    /// Nanoseconds since the switch began.
    #[inline]
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The time as the forwarding database counts it, now.
    pub(crate) fn now_secs(&self) -> u32 {
        self.secs(self.now_ns())
    }

    /// The time as the forwarding database counts it, so many nanoseconds after the switch began.
    /// It begins as late as a learned entry may be old, so that one which is taken over from
    /// another process has a time at which it was seen.
    #[inline]
    pub(crate) fn secs(&self, since_began_ns: u64) -> u32 {
        let secs = u32::try_from(since_began_ns / 1_000_000_000).unwrap_or(u32::MAX);
        secs.saturating_add(self.fdb.age_secs())
    }

    /// Fixes the stations of a port to it, which may be elsewhere: if it has no queues, those that
    /// are behind no other port in its place.
    pub(crate) fn fix_stations(&self, port: &Port, has_queues: bool) {
        for (vlan, mac) in &port.stations {
            if has_queues || !self.fdb.is_fixed(*vlan, *mac) {
                let _ = self.fdb.add_static(*vlan, *mac, port.id);
            }
        }
    }

    /// Fixes those stations of a port to it that are behind `other` in its place.
    pub(crate) fn take_back(&self, port: &Port, other: PortId) {
        for (vlan, mac) in &port.stations {
            let key = Key::new(vlan.get(), mac.to_u64());
            while !self.fdb.lend(key, other, port.id) {
                std::thread::yield_now();
            }
        }
    }

    pub(crate) fn add_mailbox(&self, mailbox: Arc<Mailbox>) {
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).push(mailbox);
    }

    pub(crate) fn remove_mailbox(&self, mailbox: &Arc<Mailbox>) {
        let mut all = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| !Arc::ptr_eq(one, mailbox));
        let busy_ns = mailbox.counters.busy_ns.get();
        let _ = self.ended_busy_ns.fetch_add(busy_ns, Ordering::Relaxed);
    }

    /// Makes every worker look at its mailbox and at the table.
    pub(crate) fn wake_all(&self) {
        for mailbox in self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            mailbox.wake();
        }
    }

    /// For how long workers have moved frames, all together.
    pub(crate) fn busy(&self) -> Duration {
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner);
        let ended_ns = self.ended_busy_ns.load(Ordering::Relaxed);
        let of = |mailbox: &Arc<Mailbox>| mailbox.counters.busy_ns.get();
        Duration::from_nanos(mailboxes.iter().map(of).fold(ended_ns, u64::wrapping_add))
    }

    /// Waits until every worker uses the table of `generation` or a later one.
    pub(crate) fn wait_for_table(&self, generation: u64) {
        self.wake_all();
        self.wait_while(|mailbox| mailbox.is_behind(generation));
    }

    /// Waits until no worker is in a turn that it began before `generation`. Wakes nobody: who
    /// sleeps is in no turn.
    pub(crate) fn wait_for_turns(&self, generation: u64) {
        self.wait_while(|mailbox| mailbox.is_behind(generation) && !mailbox.doze.is_asleep());
    }

    fn wait_while(&self, behind: impl Fn(&Mailbox) -> bool) {
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let any = || mailboxes.iter().any(|mailbox| behind(mailbox));
        if !any() {
            return;
        }
        let mut waiting = self.acknowledged.0.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting = waiting.wrapping_add(1);
        while any() {
            waiting = self.acknowledged.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting = waiting.wrapping_sub(1);
    }

    /// A worker's answer to a new generation.
    pub(crate) fn acknowledge(&self, mailbox: &Mailbox, generation: u64) {
        let waiting = self.acknowledged.0.lock().unwrap_or_else(PoisonError::into_inner);
        // ORDERING: Release pairs with the Acquire in `is_behind`: what the worker did before
        // happened before.
        mailbox.seen.store(generation, Ordering::Release);
        let any = *waiting > 0;
        drop(waiting);
        if any {
            self.acknowledged.1.notify_all();
        }
    }

    /// Deals with what took a queue out of service: status, table, event. A fault is its owner's to
    /// say in the log: a driver can cause one after the other, and who owns the port knows how much
    /// may be said of it. A bug is said here, once: its port is in quarantine then.
    #[cold]
    pub(crate) fn report(&self, queue: QueueId, way: Way, what: Trouble) {
        match what {
            Trouble::Fault(fault) => {
                let QueueId { port, pair } = queue;
                tracing::debug!(port = port.0, pair, ?way, %fault, "queue fault");
                self.set_status(queue.port, PortState::Broken, &fault.to_string());
                if way == Way::Egress {
                    self.close_egress(queue);
                }
                self.events.send(SwitchEvent::Faulted { queue, way, fault });
            }
            Trouble::Panic(text) => {
                tracing::error!(port = queue.port.0, pair = queue.pair, ?way, text, "panic");
                self.set_status(queue.port, PortState::Quarantined, &format!("a bug: {text}"));
                let _ = self.tables.edit(|records| {
                    if let Some(record) = record_mut(records, queue.port) {
                        record.quarantined = true;
                    }
                });
                self.wake_all();
                self.events.send(SwitchEvent::Panicked { queue, way, text });
            }
        }
    }

    fn set_status(&self, port: PortId, state: PortState, reason: &str) {
        let status =
            self.tables.read(|records| record(records, port).map(|r| r.port.status.clone()));
        if let Some(status) = status {
            status.error(reason);
            status.set(state, reason);
        }
    }

    /// No more frames to a broken egress; unless its owner has put a new one in its place.
    fn close_egress(&self, queue: QueueId) {
        let _ = self.tables.edit(|records| {
            let Some(record) = record_mut(records, queue.port) else { return };
            if record.port.lock(queue.pair).is_some_and(|slot| slot.broken) {
                let _ = record.attached.remove(&queue.pair);
            }
        });
        self.wake_all();
    }
}

/// What control asks of a worker.
#[derive(Debug)]
pub(crate) enum Message {
    /// Serve this.
    Attach(QueueId, Box<Arrival>),
    /// Put this tap around it, instead of another if there is one, and say so.
    Tap(QueueId, Option<IngressTap>, SyncSender<()>),
    /// Give it back, and touch it no more.
    Detach(QueueId, SyncSender<Option<Box<dyn Ingress>>>),
    /// Serve what is left in the lane from this pair, whose giver is gone, and say so.
    EndLane(QueueId, SyncSender<()>),
    /// End.
    Stop,
}

/// A queue that comes to a worker.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) ingress: Box<dyn Ingress>,
    /// A tap to be put around it.
    pub(crate) tap: Option<IngressTap>,
    /// Its frames are spread over the workers.
    pub(crate) spread: Option<Spread>,
}

/// The way to a worker, and what it shows of itself.
#[derive(Debug)]
pub(crate) struct Mailbox {
    sender: Sender<Message>,
    /// Whether there may be messages.
    pending: AtomicBool,
    wake: std::os::fd::OwnedFd,
    /// Whether `wake` has to be written for it to look here.
    pub(crate) doze: Doze,
    /// The generation that the worker acknowledged; the highest number after its end.
    seen: AtomicU64,
    pub(crate) counters: CachePadded<WorkerCounters>,
    /// The number of the worker: it is not given to another one while the switch lives.
    pub(crate) number: usize,
    pub(crate) cpu: Option<usize>,
}

impl Mailbox {
    /// Of a worker that is awake, or, without a thread, asleep for ever: it takes its turns under a
    /// lock, which control takes to let it read its mail.
    pub(crate) fn new(
        number: usize,
        cpu: Option<usize>,
        has_thread: bool,
    ) -> std::io::Result<(Arc<Self>, Receiver<Message>)> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mailbox = Self {
            sender,
            pending: AtomicBool::new(false),
            wake: crate::event::wake_fd()?,
            doze: Doze::new(!has_thread),
            seen: AtomicU64::new(0),
            counters: CachePadded::default(),
            number,
            cpu,
        };
        Ok((Arc::new(mailbox), receiver))
    }

    /// Sends a message. Returns it if the worker has ended.
    pub(crate) fn send(&self, message: Message) -> Result<(), Message> {
        let sent = self.sender.send(message).map_err(|error| error.0);
        self.wake();
        sent
    }

    /// Whether there may be messages; forgets it.
    #[inline(always)]
    pub(crate) fn take_pending(&self) -> bool {
        // ORDERING: Acquire pairs with the Release in `wake`: the message is in the channel.
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::Acquire)
    }

    /// Whether there may be messages.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    pub(crate) fn wake_fd(&self) -> &std::os::fd::OwnedFd {
        &self.wake
    }

    fn wake(&self) {
        // ORDERING: Release pairs with the Acquire in `take_pending`.
        self.pending.store(true, Ordering::Release);
        if self.doze.is_asleep() {
            signal(&self.wake);
        }
    }

    /// Whether the worker has not acknowledged this generation yet.
    fn is_behind(&self, generation: u64) -> bool {
        // ORDERING: Acquire pairs with the Release in `acknowledge`.
        self.seen.load(Ordering::Acquire) < generation
    }
}

/// Sizes of bursts that are told apart: up to 1, 2, 4 frames, and so on up to [`BURST_MAX`].
pub const BATCH_SIZES: usize = 7;

// A build of a sweep may have others: the last size counts what is larger.
const _: () = assert!(1 << (BATCH_SIZES - 1) == BURST_MAX || cfg!(sweep));

/// What a worker counts; only it writes.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    pub(crate) frames: Counter,
    /// Bursts by size.
    pub(crate) batches: [Counter; BATCH_SIZES],
    /// Nanoseconds of turns that had work.
    pub(crate) busy_ns: Counter,
    pub(crate) sleeps: Counter,
    /// Queues that were woken.
    pub(crate) kicks: Counter,
    pub(crate) calls: CallCounters,
    pub(crate) flood_copies: Counter,
}

impl WorkerCounters {
    /// Counts a burst that an ingress gave.
    #[inline(always)]
    pub(crate) fn took(&self, frames: u64) {
        self.frames.add(frames);
        // The power of two that the burst fits in.
        let size = u64::BITS.wrapping_sub(frames.wrapping_sub(1).leading_zeros()) as usize;
        if let Some(bursts) = self.batches.get(size.min(BATCH_SIZES.wrapping_sub(1))) {
            bursts.add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BATCH_SIZES, WorkerCounters};

    #[test]
    fn bursts_are_counted_by_the_power_of_two_that_they_fit_in() {
        let counters = WorkerCounters::default();
        for frames in 1..=64 {
            counters.took(frames);
        }
        let batches: [u64; BATCH_SIZES] = std::array::from_fn(|at| counters.batches[at].get());
        assert_eq!(batches, [1, 1, 2, 4, 8, 16, 32]);
        assert_eq!(counters.frames.get(), 65 * 32);
    }
}
