//! How much of the control thread a port may take, and of the log.
//!
//! One thread serves all front ends, on CPUs that workers and guests want too. So what it does for
//! a port is counted, in CPU time: [`AT_ONCE`] is free, and a [`SHARE`]th of the time that passes.
//!
//! ```text
//!  event ─► handled ─► charged ─► used up? ─► neither its connection nor its listener is watched
//!                                                └─ timer: ENOUGH has come back ─► both are again
//! ```
//!
//! Meanwhile messages and connections wait in their sockets, and the port's rings run on.
//!
//! **Trust.** A front end that floods, or comes and goes without end, slows itself down. One that
//! is honest does not come near it: to set up 128 queue pairs and to leave took 46 ms.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::time::{ClockId, clock_gettime};
use virtio_net::features::ACCESS_PLATFORM;

use super::{VhostUserPort, Way};
use crate::session::Session;

/// What a port that was quiet may take.
const AT_ONCE: Duration = Duration::from_millis(150);
/// The part of a CPU that it may take for good: a twentieth.
const SHARE: u32 = 20;
/// Of what a guest behind a vIOMMU has done for it, the part that is charged: its front end sends a
/// message for each mapping, thousands a second. So it may take half a CPU.
const OF_TRANSLATIONS: u32 = 10;
/// The most that it owes: one message can take long by no fault of the front end (a terabyte of
/// memory goes, and its pages with it), and a rest is a second at most.
const DEBT: Duration = Duration::from_millis(48);
/// What it has again when its rest ends: a turn's worth.
const ENOUGH: Duration = Duration::from_millis(2);
/// Lines that a port may write into the log at once, and seconds until it may write another one.
const LINES: u32 = 30;
const SECONDS_A_LINE: u32 = 1;

/// Time that is used up and comes back.
#[derive(Debug)]
pub(super) struct Credit {
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

    /// A port's part of the control thread.
    pub(super) fn of_control() -> Self {
        let least_ns = nanos(DEBT).saturating_neg();
        Self { least_ns, ..Self::new(AT_ONCE, SHARE, Instant::now()) }
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
        let mut spent = cpu_time().saturating_sub(before);
        let features = self.session().and_then(Session::features);
        if features.is_some_and(|bits| bits & ACCESS_PLATFORM != 0) {
            spent = spent.checked_div(OF_TRANSLATIONS).unwrap_or_default();
        }
        self.share.spend(spent, now);
        if self.rests() || !self.share.is_used_up() {
            return;
        }
        self.rest_until = now.checked_add(self.share.time_to(ENOUGH));
        say!(self.rings, warn, "its front end keeps the control thread busy: it is made to wait");
        self.watch(ops);
        self.arm_timer();
    }

    /// Whether the front end is left alone.
    pub(super) fn rests(&self) -> bool {
        self.rest_until.is_some()
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
        let mut credit = Credit::of_control();
        let start = credit.at;
        credit.spend(3600 * 1000 * MS, start);
        assert_eq!(credit.time_to(ENOUGH), 1000 * MS);
        credit.spend(Duration::ZERO, start + 961 * MS);
        assert!(!credit.is_used_up());
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
