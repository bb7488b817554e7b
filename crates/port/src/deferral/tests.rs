//! Halves that are made to wait by hand.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use virtq::mem::SegStore;

use super::{DeferredEgress, DeferredIngress, EgressRest, IngressRest, Plan};
use crate::{Batch, DropReason, Egress, FrameBuf, Ingress, Notified, QueueCounters, QueueFault};

fn wait_for(what: &str, mut test: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !test() {
        assert!(Instant::now() < end, "still waiting: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn plan(told: &Arc<AtomicUsize>) -> Plan {
    let told = Arc::clone(told);
    let notice = Arc::new(move || {
        // ORDERING: Relaxed: a count.
        let _ = told.fetch_add(1, Ordering::Relaxed);
    });
    Plan { name: "late".to_owned(), rests: false, notice }
}

/// Frames of which the last two bytes are a number.
fn batch_of(frames: &mut FrameBuf, numbers: std::ops::Range<u16>) -> Batch<'_> {
    frames.clear();
    for number in numbers {
        let mut bytes = [2u8; 60];
        bytes[58..].copy_from_slice(&number.to_be_bytes());
        frames.slot().unwrap().fill_private(&bytes);
        frames.keep();
    }
    frames.batch(SegStore::empty(), None)
}

fn numbers(batch: &Batch<'_>) -> Vec<u16> {
    let number = |head: &[u8]| u16::from_be_bytes([head[58], head[59]]);
    batch.frames().iter().map(|frame| number(frame.head())).collect()
}

/// Takes frames when it is let.
struct Slow {
    gate: Receiver<()>,
    /// How often it was asked to.
    asked: Arc<AtomicUsize>,
    got: Arc<Mutex<Vec<u16>>>,
    counters: Arc<QueueCounters>,
    breaks_at: Option<u16>,
}

impl Egress for Slow {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        // ORDERING: Relaxed: a count.
        let _ = self.asked.fetch_add(1, Ordering::Relaxed);
        self.gate.recv().unwrap();
        let numbers = numbers(batch);
        assert_eq!(numbers.len(), picked.len());
        if self.breaks_at.is_some_and(|number| numbers.contains(&number)) {
            self.counters.egress.dropped(DropReason::PortDown, picked.len() as u64);
            return Err(QueueFault::Host { what: "it".to_owned(), error: "broke".to_owned() });
        }
        self.counters.egress.sent(picked.len() as u64, 0);
        self.got.lock().unwrap().extend(numbers);
        Ok(())
    }

    fn notify(&mut self) -> Notified {
        Notified::Called
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

fn slow(breaks_at: Option<u16>) -> (Slow, SyncSender<()>, Arc<Mutex<Vec<u16>>>) {
    let (open, gate) = sync_channel(1000);
    let got: Arc<Mutex<Vec<u16>>> = Arc::default();
    let (asked, counters) = (Arc::default(), Arc::default());
    let slow = Slow { gate, asked, got: Arc::clone(&got), counters, breaks_at };
    (slow, open, got)
}

fn send(egress: &mut impl Egress, numbers: std::ops::Range<u16>) -> Result<(), QueueFault> {
    let mut frames = FrameBuf::default();
    let batch = batch_of(&mut frames, numbers);
    let picked: Vec<u16> = (0..u16::try_from(batch.len()).unwrap()).collect();
    egress.send(&batch, &picked)
}

#[test]
fn who_sends_does_not_wait_and_what_has_no_room_is_counted() {
    let (inner, open, got) = slow(None);
    let counters = Arc::clone(&inner.counters);
    let told = Arc::default();
    let rest = EgressRest::empty().unwrap();
    let mut late = DeferredEgress::start(plan(&told), inner, |_| (), rest).unwrap();
    for burst in 0..200u16 {
        send(&mut late, burst * 10..burst * 10 + 10).unwrap();
    }
    let full = DropReason::DeferralFull as usize;
    let lost = counters.read_ends().drops[full];
    assert!((600..800).contains(&lost), "{lost} of 2000: 128 bursts wait, one is under way");
    (0..200).for_each(|_| open.send(()).unwrap());
    wait_for("the others", || counters.egress.ended() == 2000);
    let got = got.lock().unwrap();
    assert_eq!(got.len() as u64 + lost, 2000);
    assert!(got.is_sorted());
}

#[test]
fn what_waits_goes_on_with_the_next_half_and_then_without_a_thread() {
    let (inner, open, got) = slow(None);
    let asked = Arc::clone(&inner.asked);
    let told: Arc<AtomicUsize> = Arc::default();
    let rest = EgressRest::empty().unwrap();
    let mut late = DeferredEgress::start(plan(&told), inner, |_| (), rest).unwrap();
    send(&mut late, 0..5).unwrap();
    send(&mut late, 5..10).unwrap();
    let pacer = late.pacer();
    // ORDERING: Relaxed: a count, here and below.
    wait_for("the thread to be under way", || asked.load(Ordering::Relaxed) == 1);
    assert!(!pacer.rest());
    assert_eq!(told.load(Ordering::Relaxed), 0, "it is in the middle of something");
    open.send(()).unwrap();
    wait_for("the notice", || told.load(Ordering::Relaxed) == 1);
    assert!(pacer.rest());
    let (inner, rest) = late.into_parts().unwrap();
    assert!(!rest.is_empty());
    assert_eq!(*got.lock().unwrap(), [0, 1, 2, 3, 4]);
    let resting = Plan { rests: true, ..plan(&told) };
    let mut late = DeferredEgress::start(resting, inner, |_| (), rest).unwrap();
    send(&mut late, 10..12).unwrap();
    assert!(late.pacer().rest(), "it has not begun");
    let (mut inner, rest) = late.into_parts().unwrap();
    (0..2).for_each(|_| open.send(()).unwrap());
    rest.send_to(&mut inner).unwrap();
    assert_eq!(*got.lock().unwrap(), (0..12).collect::<Vec<_>>());
}

#[test]
fn a_fault_is_told_to_the_next_who_sends_and_the_rest_is_counted() {
    let (inner, open, _) = slow(Some(3));
    let counters = Arc::clone(&inner.counters);
    let told = Arc::default();
    let rest = EgressRest::empty().unwrap();
    let mut late = DeferredEgress::start(plan(&told), inner, |_| (), rest).unwrap();
    send(&mut late, 0..5).unwrap();
    send(&mut late, 5..10).unwrap();
    open.send(()).unwrap();
    wait_for("the fault", || send(&mut late, 10..11).is_err());
    assert!(late.pacer().rest(), "it has ended");
    let (_, rest) = late.into_parts().unwrap();
    rest.discard(&counters);
    let totals = counters.read_ends();
    assert_eq!(totals.dropped(), totals.drops[DropReason::PortDown as usize]);
    assert!(totals.dropped() >= 11);
}

#[test]
fn a_bug_in_the_thread_is_a_fault_and_no_frame_is_forgotten() {
    let (inner, open, _) = slow(None);
    let told = Arc::default();
    let rest = EgressRest::empty().unwrap();
    let begin = |_: &mut Slow| panic!("a test's own bug");
    let mut late = DeferredEgress::start(plan(&told), inner, begin, rest).unwrap();
    let mut found = None;
    wait_for("the fault", || {
        found = send(&mut late, 0..1).err();
        found.is_some()
    });
    assert!(found.unwrap().to_string().contains("a test's own bug"));
    assert!(late.into_parts().is_none());
    drop(open);
}

/// Has frames as long as it is let, and one runt in each burst.
struct Source {
    frames: FrameBuf,
    next: u16,
    end: Arc<AtomicUsize>,
    wake: OwnedFd,
    /// How often it was disarmed.
    woken: Arc<AtomicUsize>,
    counters: Arc<QueueCounters>,
}

impl Source {
    /// Its frames and its kick are the caller's.
    fn new(end: &Arc<AtomicUsize>, wake: &OwnedFd, counters: &Arc<QueueCounters>) -> Self {
        Self {
            frames: FrameBuf::default(),
            next: 0,
            end: Arc::clone(end),
            wake: wake.try_clone().unwrap(),
            woken: Arc::default(),
            counters: Arc::clone(counters),
        }
    }
}

impl Ingress for Source {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        // ORDERING: Relaxed: a count.
        let end = u16::try_from(self.end.load(Ordering::Relaxed)).unwrap();
        let last = end.min(self.next + 8);
        let (first, _) = (self.next, std::mem::replace(&mut self.next, last));
        drop(batch_of(&mut self.frames, 0..0));
        let batch = batch_of(frames, first..last);
        if first < last {
            self.counters.ingress.received(u64::from(last - first) + 1, 0);
            self.counters.ingress.dropped(DropReason::Runt, 1);
        }
        batch
    }

    fn release(&mut self) {}

    fn notify(&mut self) -> Notified {
        self.counters.ingress.calls.count(Notified::Called);
        Notified::Called
    }

    fn arm(&mut self) -> bool {
        // ORDERING: Relaxed: a count.
        self.end.load(Ordering::Relaxed) > usize::from(self.next)
    }

    /// As of a guest: nobody reads the kick.
    fn disarm(&mut self) {
        // ORDERING: Relaxed: a count.
        let _ = self.woken.fetch_add(1, Ordering::Relaxed);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[test]
fn frames_of_a_late_ring_come_in_order_and_stay_in_order_without_the_thread() {
    let (counted, shown): (Arc<QueueCounters>, Arc<QueueCounters>) = Default::default();
    let (end, told): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
    let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let source = Source::new(&end, &wake, &counted);
    let rest = IngressRest::empty(Arc::clone(&shown)).unwrap();
    let mut late = DeferredIngress::start(plan(&told), source, counted, rest).unwrap();
    // More than the lane holds: the rest stays where it is.
    end.store(2000, Ordering::Relaxed);
    let _ = rustix::io::write(&wake, &1u64.to_ne_bytes()).unwrap();
    let (mut frames, mut got) = (FrameBuf::default(), Vec::new());
    wait_for("the first 500", || {
        got.extend(numbers(&late.receive(&mut frames)));
        late.release();
        got.len() >= 500
    });
    let pacer = late.pacer().unwrap();
    wait_for("it to rest", || pacer.rest());
    let (source, rest) = late.into_parts().unwrap();
    assert!(!rest.is_empty());
    // The ring itself goes on behind what waits.
    let source = Source { counters: Arc::clone(&shown), ..source };
    let mut late = DeferredIngress::behind(rest, source);
    wait_for("all", || {
        got.extend(numbers(&late.receive(&mut frames)));
        late.release();
        got.len() == 2000
    });
    assert_eq!(got, (0..2000).collect::<Vec<_>>());
    let mut totals = shown.read_ends();
    shown.read_rx(&mut totals);
    assert_eq!(totals.drops[DropReason::Runt as usize], 250, "one for each burst of 8");
    assert_eq!(totals.rx_frames, 2250);
}

/// A kick that nobody reads wakes the thread each time, and only then.
#[test]
fn kicks_of_a_late_ring_are_edges() {
    let (end, told): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
    let (counted, shown): (Arc<QueueCounters>, Arc<QueueCounters>) = Default::default();
    let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let source = Source::new(&end, &wake, &counted);
    let woken = Arc::clone(&source.woken);
    let rest = IngressRest::empty(shown).unwrap();
    let mut late = DeferredIngress::start(plan(&told), source, counted, rest).unwrap();
    let mut frames = FrameBuf::default();
    for number in 1..=1000 {
        // ORDERING: Relaxed: the kick comes after it.
        end.store(number, Ordering::Relaxed);
        let _ = rustix::io::write(&wake, &1u64.to_ne_bytes()).unwrap();
        wait_for("the frame", || {
            let came = !late.receive(&mut frames).is_empty();
            late.release();
            came
        });
    }
    // ORDERING: Relaxed: counts, here and below.
    wait_for("the thread to wait", || woken.load(Ordering::Relaxed) >= 1000);
    std::thread::sleep(Duration::from_millis(10));
    let before = woken.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(woken.load(Ordering::Relaxed), before, "it sleeps while the kick is readable");
}

/// Holds all frames until it was let go on.
struct Holding {
    held: u64,
    /// How often it was asked to go on.
    asked: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    counters: Arc<QueueCounters>,
}

impl Egress for Holding {
    fn send(&mut self, _: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        self.held += picked.len() as u64;
        Ok(())
    }

    fn held(&self) -> u64 {
        self.held
    }

    fn resume(&mut self) -> Result<(), QueueFault> {
        // ORDERING: Relaxed: the wake-up comes after it.
        if self.open.load(Ordering::Relaxed) > 0 {
            self.counters.egress.sent(std::mem::take(&mut self.held), 0);
        }
        // ORDERING: Relaxed: a count.
        let _ = self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn notify(&mut self) -> Notified {
        Notified::Called
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[test]
fn what_the_half_holds_is_sent_by_its_thread_when_it_may_go_on() {
    let (open, asked): (Arc<AtomicUsize>, Arc<AtomicUsize>) = Default::default();
    let counters: Arc<QueueCounters> = Arc::default();
    let inner = Holding {
        held: 3,
        asked: Arc::clone(&asked),
        open: Arc::clone(&open),
        counters: Arc::clone(&counters),
    };
    let rest = EgressRest::empty().unwrap();
    let mut late = DeferredEgress::start(plan(&Arc::default()), inner, |_| (), rest).unwrap();
    // ORDERING: Relaxed: a count. The thread has nothing to do then, until it is woken.
    wait_for("the thread's look", || asked.load(Ordering::Relaxed) == 1);
    assert_eq!(counters.egress.ended(), 0);
    // ORDERING: Relaxed: the wake-up comes after it.
    open.store(1, Ordering::Relaxed);
    late.resume().unwrap();
    wait_for("the thread", || counters.egress.ended() == 3);
}
