//! How much of the control thread a port may take, and of the log.
//!
//! One thread serves all front ends, on CPUs that workers and guests want too. So what it does for
//! a port is counted, in CPU time: [`AT_ONCE`] is free, and a [`SHARE`]th of the time that passes.
//! To stop a ring it waits for a worker's turn, which takes hardly any: a tenth of the time may
//! pass with that for one port.
//!
//! ```text
//!  event ─► handled ─► charged ─► used up? ─► neither its connection nor its listener is watched
//!                                                └─ timer: ENOUGH has come back ─► both are again
//! ```
//!
//! Meanwhile messages and connections wait in their sockets, and the port's rings run on.
//!
//! A guest behind a vIOMMU lives on messages: one or two for each mapping. What it needs is known,
//! because it is what we asked for. So [`FOR_A_QUESTION`] messages about translations are paid
//! from a share of their own, whose rests are short; any more are messages like others. While
//! workers have little to do it is large, since hardly anybody could miss the time ([`QUIET`]), and
//! else a [`BUSY`]th.
//!
//! **Trust.** A front end that floods, or comes and goes without end, slows itself down. One that
//! is honest does not come near it: to set up 128 queue pairs and to leave took 46 ms. A driver
//! and a front end that both lie can have us ask as often as a busy guest does, and get
//! the share of one; several of them, half of this thread.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::time::{ClockId, clock_gettime};

use super::{VhostUserPort, Way};

/// What a port that was quiet may take.
const AT_ONCE: Duration = Duration::from_millis(150);
/// The part of a CPU that it may take for good: a twentieth.
const SHARE: u32 = 20;
/// The most that it owes: one message can take long by no fault of the front end (a terabyte of
/// memory goes, and its pages with it), and a rest is a second at most.
const DEBT: Duration = Duration::from_millis(48);
/// What it has again when its rest ends: a turn's worth.
const ENOUGH: Duration = Duration::from_millis(2);
/// The same for what its vIOMMU needs: rests are of milliseconds, and between them a front end that
/// waits for each answer sends a dozen messages.
const OF_TRANSLATIONS: Terms = Terms {
    at_once: Duration::from_millis(50),
    share: BUSY,
    debt: Duration::from_millis(8),
    enough: Duration::from_micros(125),
};
/// The part of a CPU that a vIOMMU may take while others need it: with a sixteenth, a good guest
/// beside an endless flood of questions keeps 0.91 of its throughput here, with an eighth 0.84.
const BUSY: u32 = 16;
/// And the part that it may take while workers have little to do: a guest whose every buffer is
/// mapped and unmapped takes a fifth here, and is emulated.
const QUIET: u32 = 4;
/// Workers have little to do if they are busy for this part of one CPU, all together; and this
/// thread for less than half of the time, whoever it works for.
const LITTLE: u32 = 16;
/// How often workers are looked at, while there is something to charge.
const LOOK: Duration = Duration::from_millis(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The same for waiting for workers. To stop and start all rings of 128 pairs a few times is free.
const OF_WAITS: Terms = Terms { at_once: Duration::from_millis(500), share: 10, ..OF_ALL };
/// A worker's turn is shorter: one that takes longer is the host's doing.
pub(super) const TURN_MAX: Duration = Duration::from_millis(1);
const OF_ALL: Terms = Terms { at_once: AT_ONCE, share: SHARE, debt: DEBT, enough: ENOUGH };
/// Messages about translations for each that we ask for: it is told, taken back, and one more.
const FOR_A_QUESTION: u32 = 3;
/// As many such messages may be to come: each translation that is known can be taken back.
const NEEDED_MAX: u32 = 8192;
/// What it takes to be woken for an event, before and after it is handled.
const WAKING: Duration = Duration::from_micros(3);
/// How long nothing more is said about a port that has to wait again and again.
const SAID_FOR: Duration = Duration::from_secs(60);
/// Lines that a port may write into the log at once, and seconds until it may write another one.
const LINES: u32 = 30;
const SECONDS_A_LINE: u32 = 1;

/// How time comes back.
#[derive(Debug, Clone, Copy)]
struct Terms {
    at_once: Duration,
    share: u32,
    debt: Duration,
    enough: Duration,
}

/// Time that is used up and comes back.
#[derive(Debug)]
struct Credit {
    left_ns: i64,
    least_ns: i64,
    most_ns: i64,
    /// As many times longer than what comes back is what passes meanwhile.
    share: u32,
    at: Instant,
}

impl Credit {
    fn new(most: Duration, share: u32, now: Instant) -> Self {
        let most_ns = nanos(most);
        Self { left_ns: most_ns, least_ns: i64::MIN, most_ns, share: share.max(1), at: now }
    }

    fn on(terms: &Terms, now: Instant) -> Self {
        let least_ns = nanos(terms.debt).saturating_neg();
        Self { least_ns, ..Self::new(terms.at_once, terms.share, now) }
    }

    fn spend(&mut self, spent: Duration, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.at = now;
        let back = nanos(passed.checked_div(self.share).unwrap_or_default());
        self.left_ns = self.left_ns.saturating_add(back).min(self.most_ns);
        self.left_ns = self.left_ns.saturating_sub(nanos(spent)).max(self.least_ns);
    }

    fn is_used_up(&self) -> bool {
        self.left_ns < 0
    }

    /// How long it takes until so much is left.
    fn time_to(&self, left: Duration) -> Duration {
        let missing = nanos(left).saturating_sub(self.left_ns);
        Duration::from_nanos(u64::try_from(missing).unwrap_or(0)).saturating_mul(self.share)
    }
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// What an event was about.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Handled {
    /// Messages about translations, and others.
    pub(super) translations: u32,
    pub(super) others: u32,
    /// Translations that we asked for.
    pub(super) questions: u32,
}

/// A port's part of the control thread.
#[derive(Debug)]
pub(super) struct Share {
    all: Credit,
    translations: Credit,
    waits: Credit,
    /// Messages about translations that are still to come because we asked.
    needed: u32,
    rest_until: Option<Instant>,
    /// For how long workers, and this thread, were busy when they were looked at last, and when
    /// that was.
    busy: (Duration, Duration),
    looked: Instant,
    /// Rests that the log does not know of, and when it heard of one last.
    rests: u64,
    said: Option<Instant>,
}

impl Share {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            all: Credit::on(&OF_ALL, now),
            translations: Credit::on(&OF_TRANSLATIONS, now),
            waits: Credit::on(&OF_WAITS, now),
            needed: 0,
            rest_until: None,
            busy: Default::default(),
            looked: now,
            rests: 0,
            said: None,
        }
    }

    /// Looks now and then at how long workers, and this thread, were busy so far: so much is left
    /// for vIOMMUs.
    fn look(&mut self, busy: impl FnOnce() -> (Duration, Duration), now: Instant) {
        let passed = now.saturating_duration_since(self.looked);
        if passed < LOOK {
            return;
        }
        let busy = busy();
        let workers = busy.0.saturating_sub(self.busy.0);
        let thread = busy.1.saturating_sub(self.busy.1);
        // What came back until now came back as it was.
        self.translations.spend(Duration::ZERO, now);
        // What was long ago says nothing about now.
        let quiet = passed < LOOK_AGAIN
            && workers.saturating_mul(LITTLE) < passed
            && thread.saturating_mul(2) < passed;
        self.translations.share = if quiet { QUIET } else { BUSY };
        (self.busy, self.looked) = (busy, now);
    }

    /// Charges an event, and how long workers were waited for. Returns whether a rest begins.
    fn charge(
        &mut self,
        (spent, waited): (Duration, Duration),
        handled: Handled,
        now: Instant,
    ) -> bool {
        let (spent, none) = (spent.saturating_add(WAKING), Duration::ZERO);
        let (of_all, of_translations) = match self.is_needed(handled) {
            true => (none, spent),
            false => (spent, none),
        };
        self.all.spend(of_all, now);
        self.translations.spend(of_translations, now);
        self.waits.spend(waited, now);
        if self.rest_until.is_some() {
            return false;
        }
        let mut rest = Duration::ZERO;
        let credits =
            [(&self.all, OF_ALL), (&self.translations, OF_TRANSLATIONS), (&self.waits, OF_WAITS)];
        for (credit, terms) in credits {
            if credit.is_used_up() {
                rest = rest.max(credit.time_to(terms.enough));
            }
        }
        self.rest_until = now.checked_add(rest).filter(|_| !rest.is_zero());
        self.rest_until.is_some()
    }

    /// Whether an event was about translations that a ring waits for, and nothing else.
    fn is_needed(&mut self, handled: Handled) -> bool {
        let Handled { translations, others, questions } = handled;
        let more = questions.saturating_mul(FOR_A_QUESTION);
        self.needed = self.needed.saturating_add(more).min(NEEDED_MAX);
        let Some(left) = self.needed.checked_sub(translations) else { return false };
        if others > 0 || (translations, questions) == (0, 0) {
            return false;
        }
        self.needed = left;
        true
    }

    /// When the rest ends, if there is one.
    pub(super) fn rest_until(&self) -> Option<Instant> {
        self.rest_until
    }

    /// Ends a rest that is over. Returns whether there was one.
    pub(super) fn end_rest(&mut self, now: Instant) -> bool {
        self.rest_until.take_if(|until| *until <= now).is_some()
    }

    /// A rest has begun: how many did since the log was told, if it is to be told again.
    fn count_rest(&mut self, now: Instant) -> Option<u64> {
        self.rests = self.rests.saturating_add(1);
        let is_quiet = |said: Instant| now.saturating_duration_since(said) < SAID_FOR;
        if self.said.is_some_and(is_quiet) {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.rests))
    }
}

/// What a port says in the log.
#[derive(Debug)]
pub(super) struct Talk {
    credit: Credit,
    left_out: u64,
}

impl Default for Talk {
    fn default() -> Self {
        let line = Duration::from_secs(SECONDS_A_LINE.into());
        let most = line.saturating_mul(LINES.saturating_sub(1));
        Self { credit: Credit::new(most, 1, Instant::now()), left_out: 0 }
    }
}

impl Talk {
    /// Whether another line may be written now; before it stands how many were left out.
    pub(super) fn may(&mut self, port: &str) -> bool {
        let left_out = self.may_at(Instant::now());
        if let Some(left_out) = left_out.filter(|count| *count > 0) {
            tracing::warn!(port, left_out, "it had more to say than may be logged");
        }
        left_out.is_some()
    }

    /// How many were left out since the last one, if one may be written.
    fn may_at(&mut self, now: Instant) -> Option<u64> {
        self.credit.spend(Duration::ZERO, now);
        if self.credit.is_used_up() {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.credit.spend(Duration::from_secs(SECONDS_A_LINE.into()), now);
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Logs a line about a port, given its [`super::FabricRings`], if it may write another one.
macro_rules! say {
    ($rings:expr, $level:ident, $($line:tt)+) => {
        if $rings.talk.may(&$rings.name) {
            tracing::$level!(port = %$rings.name, $($line)+);
        }
    };
}
pub(super) use say;

/// CPU time of this thread so far.
pub(super) fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

impl VhostUserPort {
    /// Charges what was done for the port since the thread's CPU time was `before`.
    pub(super) fn charge(&mut self, before: Duration, ops: &mut EventOps<'_>) {
        let now = Instant::now();
        let freed = self.closer.take_spent().saturating_add(self.strangers.take_spent());
        let spent = cpu_time().saturating_sub(before).saturating_add(freed);
        let handled = self.link.as_mut().map(|link| std::mem::take(&mut link.handled));
        let waited = std::mem::take(&mut self.rings.waited);
        self.share.look(|| (self.rings.fabric.busy(), cpu_time()), now);
        if !self.share.charge((spent, waited), handled.unwrap_or_default(), now) {
            return;
        }
        if let Some(times) = self.share.count_rest(now) {
            let text = "its front end keeps the control thread busy: it is made to wait";
            say!(self.rings, warn, times, "{text}");
        }
        self.watch(ops);
        self.arm_timer();
    }

    /// Whether the front end is left alone.
    pub(super) fn rests(&self) -> bool {
        self.share.rest_until().is_some()
    }

    /// Watches what is to be watched now.
    pub(super) fn watch(&mut self, ops: &mut EventOps<'_>) {
        if let Err(reason) = self.watch_link(ops) {
            self.unlink(&reason, ops);
        }
        let Way::Listen(listener) = &self.way else { return };
        let closed = self.rests() || self.accept_again.is_some();
        let interest = if closed { EventSet::empty() } else { EventSet::IN };
        if let Err(error) = ops.modify(Events::new(&listener.as_fd(), interest)) {
            self.status.set(port::PortState::Down, format!("cannot watch the socket: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_used_up_comes_back_with_time_and_no_more_than_that() {
        let start = Instant::now();
        let mut credit = Credit::new(10 * MS, 20, start);
        credit.spend(10 * MS, start);
        assert!(!credit.is_used_up());
        credit.spend(MS, start);
        assert!(credit.is_used_up());
        assert_eq!(credit.time_to(2 * MS), 60 * MS);
        credit.spend(Duration::ZERO, start + 19 * MS);
        assert!(credit.is_used_up());
        credit.spend(Duration::ZERO, start + 60 * MS);
        assert_eq!((credit.left_ns, credit.time_to(2 * MS)), (2_000_000, Duration::ZERO));
        // However long it is quiet.
        credit.spend(Duration::ZERO, start + 1_000_000 * MS);
        assert_eq!(credit.left_ns, 10_000_000);
    }

    #[test]
    fn no_front_end_waits_for_more_than_a_second() {
        let start = Instant::now();
        let mut credit = Credit::on(&OF_ALL, start);
        credit.spend(3600 * 1000 * MS, start);
        assert_eq!(credit.time_to(ENOUGH), 1000 * MS);
        credit.spend(Duration::ZERO, start + 961 * MS);
        assert!(!credit.is_used_up());
    }

    /// An event with so many messages about translations, others, and questions of ours.
    fn event(translations: u32, others: u32, questions: u32) -> Handled {
        Handled { translations, others, questions }
    }

    /// Events of a tenth of a millisecond each until there is a rest: how many, how long it is.
    fn until_rest(share: &mut Share, what: Handled, now: Instant) -> (u32, Duration) {
        let tenth = Duration::from_micros(100);
        let none = Duration::ZERO;
        let count = (1..100_000).find(|_| share.charge((tenth, none), what, now)).unwrap();
        (count, share.rest_until().unwrap().duration_since(now))
    }

    #[test]
    fn translations_that_nobody_asked_for_are_messages_like_others() {
        let start = Instant::now();
        let of = |what| until_rest(&mut Share::new(start), what, start).0;
        let others = of(event(0, 1, 0));
        assert_eq!(others, 150_000 / 103 + 1);
        for what in [event(1, 0, 0), event(64, 0, 0), event(3, 1, 1), event(0, 0, 0)] {
            assert_eq!(of(what), others, "{what:?}");
        }
    }

    #[test]
    fn translations_that_were_asked_for_have_a_share_of_their_own_and_short_rests() {
        let start = Instant::now();
        let mut share = Share::new(start);
        let (count, rest) = until_rest(&mut share, event(3, 0, 1), start);
        assert_eq!(count, 50_000 / 103 + 1);
        assert!(rest >= 2 * MS && rest < 4 * MS, "{rest:?}");
        assert_eq!(share.all.left_ns, nanos(AT_ONCE), "nothing of the other share is used");
        // While it rests more is charged, and no second rest begins.
        assert!(!share.charge((MS, MS), event(0, 1, 0), start));
        assert!(!share.end_rest(start) && share.end_rest(start + 4 * MS));
        assert_eq!(share.rest_until(), None);
    }

    #[test]
    fn a_viommu_has_more_while_workers_have_little_to_do() {
        let mut now = Instant::now();
        let (mut share, mut busy) = (Share::new(now), Duration::ZERO);
        let mut part = |share: &mut Share, passed: Duration, more: Duration| {
            (now, busy) = (now + passed, busy + more);
            share.look(|| (busy, Duration::ZERO), now);
            share.translations.share
        };
        assert_eq!(part(&mut share, 5 * MS, Duration::ZERO), BUSY, "not known yet");
        assert_eq!(part(&mut share, 5 * MS, Duration::ZERO), QUIET);
        assert_eq!(part(&mut share, 5 * MS, 5 * MS), QUIET, "it is looked at again later");
        assert_eq!(part(&mut share, 5 * MS, Duration::ZERO), BUSY);
        assert_eq!(part(&mut share, 16 * MS, MS), BUSY);
        assert_eq!(part(&mut share, 100 * MS, Duration::ZERO), BUSY, "that was long ago");
        assert_eq!(part(&mut share, 17 * MS, MS), QUIET);
        // As so much more comes back.
        let used_up = |share: &mut Share, now| until_rest(share, event(3, 0, 1), now).1;
        let quiet = used_up(&mut share, now);
        let mut other = Share::new(now);
        let busy = used_up(&mut other, now);
        assert_eq!(quiet * BUSY, busy * QUIET);
    }

    #[test]
    fn waits_have_a_share_of_their_own() {
        let start = Instant::now();
        let waits = |what| {
            let mut share = Share::new(start);
            let wait = (Duration::ZERO, MS);
            (1..600).find(|_| share.charge(wait, what, start)).map(|count| {
                let rest = share.rest_until().unwrap().duration_since(start);
                (count, rest)
            })
        };
        for what in [event(0, 1, 0), event(1, 0, 0), event(3, 0, 1)] {
            assert_eq!(waits(what), Some((501, 30 * MS)));
        }
    }

    #[test]
    fn what_is_needed_is_as_much_as_was_asked_for_and_bounded() {
        let now = Instant::now();
        let mut share = Share::new(now);
        assert!(share.is_needed(event(0, 0, 2)), "a question of ours is for its guest");
        assert!(!share.is_needed(event(0, 0, 0)) && !share.is_needed(event(1, 1, 0)));
        let taken = (0..10).filter(|_| share.is_needed(event(1, 0, 0))).count();
        assert_eq!(taken, 6);
        let _ = share.is_needed(event(0, 0, 1_000_000));
        assert_eq!(share.needed, NEEDED_MAX);
    }

    #[test]
    fn the_log_hears_of_a_rest_at_once_and_then_once_a_minute() {
        let start = Instant::now();
        let mut share = Share::new(start);
        assert_eq!(share.count_rest(start), Some(1));
        let quiet = (1..600).filter_map(|n| share.count_rest(start + n * 100 * MS)).count();
        assert_eq!(quiet, 0);
        assert_eq!(share.count_rest(start + SAID_FOR), Some(600));
    }

    #[test]
    fn a_port_that_has_much_to_say_writes_a_line_a_second() {
        let mut talk = Talk::default();
        let start = talk.credit.at;
        let said = |talk: &mut Talk, at: Duration, tries: u32| {
            let lines: Vec<u64> = (0..tries).filter_map(|_| talk.may_at(start + at)).collect();
            lines
        };
        assert_eq!(said(&mut talk, Duration::ZERO, 100), [0; LINES as usize]);
        assert!(said(&mut talk, 900 * MS, 10).is_empty());
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        assert_eq!(said(&mut talk, second, 10), [80]);
        assert_eq!(said(&mut talk, minute, 1000).len(), LINES as usize);
    }
}
