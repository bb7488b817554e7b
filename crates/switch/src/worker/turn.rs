//! One turn of a worker, and what it does when the turn found no work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{Ordering, fence};

use port::QueueFault;

use super::queue::{Idle, Queue, State};
use super::{Clock, Worker};
use crate::PollMode;
use crate::event::Way;
use crate::panics::panic_text;
use crate::pipeline::{Env, Trouble};
use crate::room;
use crate::steering::ticks;

/// Bursts between two looks at the clock: by one of the largest frames each they take 100 us.
const BUSY_BURSTS: usize = 8;
/// Nanoseconds between two looks at the cold queues while others are hot.
const LOOK_NS: u64 = 20_000;
/// A busy worker lets a queue grow cold only if it was idle for so long, and others were not.
const BUSY_COOL_NS: u64 = 1_000_000;

impl Worker {
    /// Serves every hot queue once. Returns whether one had work.
    #[inline]
    pub(super) fn turn(&mut self) -> bool {
        let mut at = 0;
        while let Some(number) = self.hot.get(at).copied() {
            // A queue that leaves the list is replaced by its successor.
            if self.serve(number) {
                at = at.wrapping_add(1);
            }
            if !self.all_alike() {
                self.serve_light(number);
            }
        }
        let worked = !self.worked.is_empty();
        if worked {
            self.notify();
        }
        if !self.pipeline.failures().is_empty() {
            self.report_failures();
        }
        worked
    }

    /// Serves one queue. Returns whether it stays hot.
    #[inline]
    pub(super) fn serve(&mut self, number: usize) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(number) else { return true };
        let env = Env {
            fdb: &self.shared.fdb,
            table: &self.table,
            now: self.clock.now_secs,
            ticks: ticks(self.clock.now_ns),
            forward_reserved: self.shared.forward_reserved,
            now_ns: self.clock.now_ns,
            flood_copies: &self.mailbox.counters.flood_copies,
        };
        let admitted = match queue.admit((&self.shared, env.now_ns), &mut self.frames) {
            Ok(admitted) => admitted,
            Err(until_ns) => return self.let_rest(number, until_ns),
        };
        let copies = env.flood_copies.get();
        let arrived = queue.origin.counters.ingress.arrived();
        let mut fault = None;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            queue.disarm();
            let mut batch = queue.ingress.receive(&mut self.frames);
            if let Some(found) = batch.fault() {
                fault = Some(found.clone());
            }
            if let Some(guard) = &queue.guard {
                let origin = &queue.origin;
                guard.check_sources(&mut batch, &origin.counters, origin.fates.as_deref());
            }
            if let Some(spread) = &mut queue.spread {
                spread.hand_over(&mut queue.origin, &mut batch);
            }
            if !batch.is_empty() {
                self.pipeline.forward(&env, &mut queue.origin, &mut batch);
            }
            drop(batch);
            // Frames that the ingress itself dropped have to be given back too.
            let taken = queue.origin.counters.ingress.arrived().wrapping_sub(arrived);
            if taken > 0 {
                queue.ingress.release();
            }
            taken
        }));
        let copies = env.flood_copies.get().wrapping_sub(copies);
        queue.charge(admitted, *outcome.as_ref().unwrap_or(&0), copies);
        self.conclude(number, outcome, fault)
    }

    /// What follows from a burst. Returns whether the queue stays hot.
    #[inline(always)]
    fn conclude(
        &mut self,
        number: usize,
        outcome: Result<u64, Box<dyn std::any::Any + Send>>,
        fault: Option<QueueFault>,
    ) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(number) else { return true };
        match (outcome, fault) {
            (Ok(taken), None) => {
                if taken > 0 {
                    queue.idle = None;
                    // One that carries little may have been served in this turn already.
                    if !(queue.light && self.worked.contains(&number)) {
                        self.worked.push(number);
                    }
                    self.mailbox.counters.took(taken);
                    return true;
                }
                !cools(queue, &self.clock, self.shared.poll, self.shared.poll_ns)
                    || !self.cool(number)
            }
            (Ok(taken), Some(fault)) => {
                queue.state = State::Broken;
                let id = queue.id;
                self.hot.retain(|hot| *hot != number);
                if taken > 0 {
                    self.worked.push(number);
                    self.mailbox.counters.took(taken);
                }
                self.shared.report(id, Way::Ingress, Trouble::Fault(fault));
                false
            }
            (Err(panic), _) => {
                self.bury(number, &*panic);
                false
            }
        }
    }

    /// Leaves a queue alone whose port's rate is used up. Returns that it is not hot any more.
    #[cold]
    fn let_rest(&mut self, number: usize, until_ns: u64) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(number) else { return true };
        queue.state = State::Resting;
        queue.origin.counters.ingress.rested();
        self.hot.retain(|hot| *hot != number);
        self.resting.push((until_ns, number));
        self.rest_until_ns = self.rest_until_ns.min(until_ns);
        false
    }

    /// Looks again at the queues that have rested for long enough.
    #[cold]
    fn wake_rested(&mut self) {
        let now_ns = self.clock.now_ns;
        self.rest_until_ns = u64::MAX;
        let mut at = 0;
        while let Some((until_ns, number)) = self.resting.get(at).copied() {
            if until_ns <= now_ns {
                let _ = self.resting.swap_remove(at);
                self.make_hot(number);
            } else {
                self.rest_until_ns = self.rest_until_ns.min(until_ns);
                at = at.wrapping_add(1);
            }
        }
    }

    /// What ports may send has changed: looks at all queues that rest.
    pub(super) fn end_rests(&mut self) {
        for (_, number) in std::mem::take(&mut self.resting) {
            self.make_hot(number);
        }
        room::reserve(&mut self.resting, self.queues.len());
        self.rest_until_ns = u64::MAX;
    }

    /// Arms a queue that was idle for long enough. Returns whether it is cold now.
    fn cool(&mut self, number: usize) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(number) else { return false };
        let armed = catch_unwind(AssertUnwindSafe(|| {
            let frames_already = queue.arm();
            if frames_already {
                queue.disarm();
            }
            !frames_already
        }));
        match armed {
            Ok(true) => {
                queue.state = State::Cold;
                self.cold = self.cold.wrapping_add(1);
                self.hot.retain(|hot| *hot != number);
                true
            }
            Ok(false) => {
                queue.idle = None;
                false
            }
            Err(panic) => {
                self.bury(number, &*panic);
                true
            }
        }
    }

    /// A bug: the queue is dropped, its frames are counted, its port goes into quarantine.
    #[cold]
    fn bury(&mut self, number: usize, panic: &(dyn std::any::Any + Send)) {
        self.pipeline.reset(&self.table);
        self.worked.retain(|worked| *worked != number);
        if let Some(queue) = self.remove(number) {
            let id = queue.id;
            let lost = queue.bury();
            tracing::error!(port = id.port.0, pair = id.pair, lost, "an ingress panicked");
            self.shared.report(id, Way::Ingress, Trouble::Panic(panic_text(panic)));
        }
    }

    /// Notifies everybody who was given something in this turn.
    fn notify(&mut self) {
        // ORDERING: SeqCst orders the used entries published in this turn, of all queues, before
        // the reads of whether their drivers want to be notified; it pairs with the driver's
        // fence between writing that wish and looking at the used entries.
        fence(Ordering::SeqCst);
        let mut at = 0;
        while let Some(number) = self.worked.get(at).copied() {
            at = at.wrapping_add(1);
            let Some(Some(queue)) = self.queues.get_mut(number) else { continue };
            match catch_unwind(AssertUnwindSafe(|| queue.ingress.notify())) {
                Ok(notified) => self.mailbox.counters.calls.count(notified),
                Err(panic) => {
                    // It leaves the list.
                    at = at.wrapping_sub(1);
                    self.bury(number, &*panic);
                }
            }
        }
        self.clock.bursts = self.clock.bursts.wrapping_add(self.worked.len());
        self.worked.clear();
        let calls = &self.mailbox.counters.calls;
        self.pipeline.notify(&self.table, |notified| calls.count(notified));
        self.clock.worked_ns = self.clock.now_ns;
    }

    #[cold]
    fn report_failures(&mut self) {
        for failure in std::mem::take(self.pipeline.failures()) {
            self.shared.report(failure.at, Way::Egress, failure.what);
        }
    }

    /// Keeps the time, looks after the cold queues, and sleeps if nothing is hot.
    #[inline]
    pub(super) fn rest(&mut self, worked: bool) {
        if worked && self.clock.bursts < BUSY_BURSTS {
            return;
        }
        let before = self.clock.now_ns;
        let busy = self.clock.bursts > 0;
        // What is no work comes before a look at the clock, so that only the first idle turn
        // after a busy one counts as busy.
        if !busy {
            std::hint::spin_loop();
        }
        self.read_clock();
        if busy {
            let spent = self.clock.now_ns.wrapping_sub(before);
            self.mailbox.counters.busy_ns.add(spent);
        }
        self.look_at_shares();
        let quiet = self.is_quiet();
        let due = self.clock.now_ns.wrapping_sub(self.clock.looked_ns) >= LOOK_NS;
        if quiet || (self.cold > 0 && (due || self.hot.is_empty())) {
            self.look_at_cold(self.time_to_wait(quiet));
            if quiet || !worked {
                self.read_clock();
            }
            self.clock.looked_ns = self.clock.now_ns;
        }
        if self.clock.now_ns >= self.rest_until_ns {
            self.wake_rested();
        }
    }

    /// How long to wait for something that wakes: not at all, until a queue has rested for long
    /// enough, or (none) for ever.
    fn time_to_wait(&self, quiet: bool) -> Option<u64> {
        if !quiet || !self.sleeps {
            return Some(0);
        }
        let until_ns = Some(self.rest_until_ns).filter(|until_ns| *until_ns != u64::MAX)?;
        Some(until_ns.saturating_sub(self.clock.now_ns))
    }

    /// Whether nothing is left to look at before something wakes the worker.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        // A worker without queues has nothing to poll, even if it is busy by rule: it leaves the
        // CPU to others, such as those of the process that it is to take over from.
        let none_rests = self.resting.is_empty();
        let lazy = self.shared.poll != PollMode::Busy || (self.cold == 0 && none_rests);
        self.hot.is_empty() && (self.sleeps || none_rests) && lazy
    }

    /// Makes those cold queues hot that were woken; waits for one if it may sleep.
    fn look_at_cold(&mut self, time_ns: Option<u64>) {
        let Self { waiter, queues, hot, cold, mailbox, shared, generation, .. } = self;
        let news = || mailbox.is_pending() || shared.tables.generation() != *generation;
        let sleeps = time_ns != Some(0) && mailbox.doze.begin(news);
        waiter.wait(if sleeps { time_ns } else { Some(0) }, |number| {
            if let Some(Some(queue)) = queues.get_mut(number)
                && queue.state == State::Cold
            {
                queue.state = State::Hot;
                queue.idle = None;
                queue.origin.counters.ingress.kicked();
                mailbox.counters.kicks.add(1);
                *cold = cold.wrapping_sub(1);
                hot.push(number);
            }
        });
        if sleeps {
            self.mailbox.doze.end();
            self.mailbox.counters.sleeps.add(1);
        }
    }
}

/// Whether a queue without work was idle for long enough to be armed.
#[inline]
fn cools(queue: &mut Queue, clock: &Clock, poll: PollMode, poll_ns: u64) -> bool {
    let idle_ns = Idle::ns(&mut queue.idle, clock.looks, clock.now_ns);
    queue.wakes
        && match poll {
            PollMode::Interrupt => true,
            PollMode::Adaptive => idle_ns >= poll_ns,
            PollMode::Busy => {
                let others_work = clock.now_ns.wrapping_sub(clock.worked_ns) < BUSY_COOL_NS;
                others_work && idle_ns >= poll_ns.max(BUSY_COOL_NS)
            }
        }
}
