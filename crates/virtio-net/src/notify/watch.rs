//! Whether a peer makes its calls take long.
//!
//! ```text
//!  call took 100 us? ─► three more, each beside one of ours ─► all as long: charged ─► too much:
//!                                                                                    no calls
//! ```
//!
//! The kernel signals an eventfd to all that wait for it. Its other owner can hang up a million of
//! them, and a call takes a third of a second then. So calls are timed. One that took long may
//! have been interrupted by something else, for which the peer is not to blame: whether it was is
//! told by [`ROUNDS`] more, in CPU time. Several, because a host that takes our CPU away for a
//! while shows in CPU time as well: that hits one of them now and then, and all hardly ever. Each
//! is compared with a call to an eventfd of our own, at which a thread sleeps: where it takes long
//! to wake anybody, no peer is to blame.
//!
//! **Trust.** Waiters that are gone after one call (of `io_uring`) escape the others; to hang them
//! up again takes their owner longer than the call, though it may have more CPUs for it. The first
//! call is not charged: time that the host took from us in it cannot be told from the peer's. Of
//! the others the quickest one counts, for all of them.
//! **Limits.** [`AT_ONCE`], and a [`SHARE`]th of the time: beyond that nothing is signalled.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::signal;

/// A call that takes so long is slow: hundreds of usual ones.
const SLOW: Duration = Duration::from_micros(100);
/// Calls that tell whether a peer is to blame for a slow one.
const ROUNDS: u32 = 3;
/// What slow calls of a peer may take.
const AT_ONCE: Duration = Duration::from_millis(40);
/// The part of the time in which it is forgotten.
const SHARE: u32 = 1000;

/// What all rings of a peer have in common.
#[derive(Debug, Default)]
pub struct CallWatch {
    over: AtomicBool,
    /// What slow calls took, and when the last one was.
    spent: Mutex<Option<(Duration, Instant)>>,
    /// Written when it was too much, and beside calls that are timed.
    notice: Option<Arc<OwnedFd>>,
}

impl CallWatch {
    /// Writes to an eventfd when calls have taken too much, and may do so when they have not.
    pub fn new(notice: Arc<OwnedFd>) -> Self {
        Self { notice: Some(notice), ..Self::default() }
    }

    /// Whether calls have taken too much: there are none any more.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// As [`signal`], as long as that does not take too much. Of its own, so that bursts without a
    /// call do not pay for it.
    #[inline(never)]
    pub fn signal(&self, fd: &OwnedFd) {
        if self.is_over() {
            return;
        }
        let began = Instant::now();
        signal(fd);
        if began.elapsed() >= SLOW {
            self.look_again(fd);
        }
    }

    #[cold]
    fn look_again(&self, fd: &OwnedFd) {
        let own = || self.notice.as_deref().map_or(Duration::ZERO, timed);
        let round = || Round { peer: timed(fd), own: own() };
        if let Some(took) = peers_time(round) {
            self.charge(took, Instant::now());
        }
    }

    fn charge(&self, took: Duration, now: Instant) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, at) = spent.unwrap_or((Duration::ZERO, now));
        let back = now.saturating_duration_since(at).checked_div(SHARE).unwrap_or_default();
        let all = before.saturating_sub(back).saturating_add(took);
        *spent = Some((all, now));
        if all > AT_ONCE && !self.over.swap(true, Ordering::Relaxed) {
            self.notice.as_deref().into_iter().for_each(signal);
        }
    }
}

/// What two calls took, one after the other.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// To the peer's eventfd.
    peer: Duration,
    /// To ours.
    own: Duration,
}

/// What slow calls take, of which the peer is the cause: none if one of them was quick. There are
/// no more of them then.
fn peers_time(mut round: impl FnMut() -> Round) -> Option<Duration> {
    let mut quickest = Duration::MAX;
    for _ in 0..ROUNDS {
        let Round { peer, own } = round();
        quickest = quickest.min(peer.saturating_sub(own));
        if quickest < SLOW {
            return None;
        }
    }
    Some(quickest.saturating_mul(ROUNDS))
}

/// CPU time of a call.
fn timed(fd: &OwnedFd) -> Duration {
    let before = cpu_time();
    signal(fd);
    cpu_time().saturating_sub(before)
}

/// CPU time of this thread so far.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, epoll, eventfd};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    /// Sets that all wait for each of these.
    fn crowd(fds: &[OwnedFd]) -> Vec<OwnedFd> {
        let sets = (0..100).map(|_| {
            let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            for fd in fds {
                let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).unwrap();
            }
            set
        });
        sets.collect()
    }

    /// Twenty thousand: milliseconds a call.
    #[test]
    fn an_eventfd_with_very_many_waiters_is_soon_left_alone() {
        let notice = Arc::new(event());
        let watch = CallWatch::new(Arc::clone(&notice));
        let fd = event();
        let fds: Vec<_> = (0..200).map(|_| fd.try_clone().unwrap()).collect();
        let sets = crowd(&fds);
        (0..1000).for_each(|_| watch.signal(&fd));
        assert!(watch.is_over() && count(&notice) > 0);
        let calls = count(&fd);
        assert!(calls < 1000, "{calls} calls, and no more");
        drop(sets);
        watch.signal(&fd);
        assert_eq!((count(&fd), count(&notice)), (0, 0));
    }

    /// What the kernel shows of a host that takes the CPU away, or is slow in all it does.
    #[test]
    fn a_slow_host_is_nobodys_call() {
        let found = |ms: &'static [(u64, u64)]| {
            let mut rounds = ms.iter().map(|(peer, own)| Round {
                peer: Duration::from_millis(*peer),
                own: Duration::from_millis(*own),
            });
            peers_time(move || rounds.next().unwrap())
        };
        assert_eq!(found(&[(0, 0)]), None, "the first was quick: there is no second");
        assert_eq!(found(&[(100, 0), (100, 0), (0, 0)]), None);
        assert_eq!(found(&[(100, 0), (3, 0), (4, 0)]), Some(Duration::from_millis(9)));
        assert_eq!(found(&[(5, 1), (5, 2), (5, 1)]), Some(Duration::from_millis(9)));
        assert_eq!(found(&[(5, 5)]), None, "ours take as long");
    }

    #[test]
    fn what_calls_took_is_forgotten_with_time() {
        let watch = CallWatch::default();
        let start = Instant::now();
        let later = |ms: u64| start + Duration::from_millis(ms);
        for second in 0..100 {
            watch.charge(Duration::from_micros(900), later(second * 1000));
        }
        assert!(!watch.is_over());
        for ms in 0..20 {
            watch.charge(Duration::from_millis(2), later(200_000 + ms));
        }
        assert!(!watch.is_over());
        watch.charge(Duration::from_millis(2), later(200_020));
        assert!(watch.is_over());
    }

    #[test]
    fn a_call_that_is_quick_costs_nothing() {
        let (notice, fd) = (Arc::new(event()), event());
        let watch = CallWatch::new(Arc::clone(&notice));
        (0..1000).for_each(|_| watch.signal(&fd));
        assert!(count(&fd) >= 1000 && !watch.is_over());
        let _ = count(&notice);
        watch.look_again(&fd);
        assert!(count(&notice) > 0, "ours is called beside it");
        assert!(watch.spent.lock().unwrap().is_none_or(|(spent, _)| spent < AT_ONCE));
    }
}
