//! How many fds of their front ends the ports of a process keep, and may keep.
//!
//! Memory regions, kicks, calls: an fd that is kept is one that the process does not have for
//! others. Without a limit one front end could take them all, and whoever sends one next, or comes
//! next, would be sent away for it.
//!
//! ```text
//!   RLIMIT_NOFILE ──FdPool::of_limit──► what all ports may keep ──► a part for each port
//!                                                                   (and one for the next port)
//! ```
//!
//! A port may keep its part, or what a plain guest needs if that is more. Parts get smaller when
//! ports come; what is kept then stays, and [`FdPool`] sees to it that all ports together keep no
//! more than they may.
//!
//! **Trust.** Front ends are hostile. What is asked for is looked at before it is kept.
//! **Limits.** See [`FdPool::of_limit`]. What passes through (fds of a message that are not kept,
//! those that threads close) is not counted: it has room in the other half.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::memory::SLOTS_MAX;

/// Of a process's limit so many, and no more than a quarter, are for all that is not of a port.
const APART: usize = 1024;
/// Kick, call and err.
const EACH_RING: usize = 3;
/// The log twice (the file, and what is mapped) and its call, the in-flight file twice, the channel
/// of the back end, a userfaultfd.
const EACH_SESSION: usize = 7;

/// What a plain guest has a use for, with one queue pair and some regions: as much is kept of each
/// as long as there is room, however many ports there are.
const PLAIN: usize = 32;

/// What all ports of a process may keep. Clones are the same pool; the default has no limit.
#[derive(Debug, Clone, Default)]
pub struct FdPool(Option<Arc<Pool>>);

#[derive(Debug)]
struct Pool {
    most: usize,
    /// Ports that there are.
    ports: AtomicUsize,
    /// What all of them keep.
    kept: AtomicUsize,
}

impl FdPool {
    /// For a process that may have `limit` open files: half of them, less what is set apart for
    /// what is not of a port (a quarter, and 1024 at most). The other half is for the duplicates
    /// that go to another process when it takes over, and for what passes through.
    pub fn of_limit(limit: usize) -> Self {
        let apart = (limit / 4).min(APART);
        let most = limit.saturating_sub(apart) / 2;
        let (ports, kept) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self(Some(Arc::new(Pool { most, ports, kept })))
    }

    /// The limit with which each of `ports` may keep `each`: never so small that what one of them
    /// has pass through fills it.
    pub fn limit_for(ports: usize, each: usize) -> usize {
        let all = ports.saturating_add(1).saturating_mul(each);
        all.saturating_mul(2).saturating_add(APART).max(4 * APART)
    }

    /// Says how many ports there are.
    pub fn set_ports(&self, ports: usize) {
        if let Some(pool) = &self.0 {
            pool.ports.store(ports, Ordering::Relaxed);
        }
    }

    /// What a port may keep. A port that comes is to find as much.
    pub fn part(&self) -> usize {
        let Some(pool) = &self.0 else { return usize::MAX };
        let parts = pool.ports.load(Ordering::Relaxed).saturating_add(1);
        pool.most.checked_div(parts).unwrap_or(0)
    }
}

/// The most fds that a port with so many queue pairs has a use for.
pub fn most_fds(queues: u16) -> usize {
    let rings = usize::from(queues).saturating_mul(2);
    rings.saturating_mul(EACH_RING).saturating_add(SLOTS_MAX).saturating_add(EACH_SESSION)
}

/// What one session keeps.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pool: FdPool,
    count: usize,
}

impl Kept {
    pub(crate) fn of(pool: &FdPool) -> Self {
        Self { pool: pool.clone(), count: 0 }
    }

    /// Whether `more` can be kept, too.
    ///
    /// # Errors
    ///
    /// How many that would be, and how many can be.
    pub(crate) fn admit(&self, more: usize) -> Result<(), FdLimit> {
        let Some(pool) = self.pool.0.as_ref().filter(|_| more > 0) else { return Ok(()) };
        let left = pool.most.saturating_sub(pool.kept.load(Ordering::Relaxed));
        let most = self.pool.part().max(PLAIN).min(self.count.saturating_add(left));
        let wanted = self.count.saturating_add(more);
        if wanted <= most { Ok(()) } else { Err(FdLimit { wanted, most }) }
    }

    /// It keeps `count` now.
    pub(crate) fn set(&mut self, count: usize) {
        if let Some(pool) = self.pool.0.as_ref().filter(|_| count != self.count) {
            // What becomes less wraps around, to the sum that it should be.
            let _ = pool.kept.fetch_add(count.wrapping_sub(self.count), Ordering::Relaxed);
        }
        self.count = count;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// More fds than a front end may have kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdLimit {
    /// What would be kept.
    pub wanted: usize,
    /// What may be.
    pub most: usize,
}

impl fmt::Display for FdLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, most } = self;
        write!(
            f,
            "{wanted} fds of this front end to keep, at most {most} are allowed: a part of what \
             the process may have (RLIMIT_NOFILE)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{FdLimit, FdPool, Kept, most_fds};

    #[test]
    fn each_port_has_its_part_and_all_together_no_more_than_there_is() {
        let pool = FdPool::of_limit(1024);
        pool.set_ports(1);
        assert_eq!(pool.part(), 192);
        let mut first = Kept::of(&pool);
        assert_eq!(first.admit(192), Ok(()));
        assert_eq!(first.admit(193), Err(FdLimit { wanted: 193, most: 192 }));
        first.set(192);
        pool.set_ports(2);
        // What it has stays, and nothing comes beside it.
        assert_eq!(first.admit(0), Ok(()));
        assert_eq!(first.admit(1), Err(FdLimit { wanted: 193, most: 128 }));
        let mut second = Kept::of(&pool);
        assert_eq!((second.admit(128), second.admit(129).is_err()), (Ok(()), true));
        second.set(128);
        pool.set_ports(3);
        // There are 384; the third part is 96, and 64 are left.
        let mut third = Kept::of(&pool);
        assert_eq!(third.admit(65), Err(FdLimit { wanted: 65, most: 64 }));
        third.set(64);
        drop(first);
        assert_eq!(third.admit(32), Ok(()));
        assert_eq!(third.admit(33), Err(FdLimit { wanted: 97, most: 96 }));
        second.set(3);
        drop((second, third));
        pool.set_ports(0);
        assert_eq!(Kept::of(&pool).admit(384), Ok(()));
    }

    #[test]
    fn the_usual_limit_of_a_service_has_room_for_all_that_a_hundred_ports_can_use() {
        assert_eq!(most_fds(128), 1284);
        let pool = FdPool::of_limit(1 << 19);
        pool.set_ports(100);
        assert!(pool.part() >= most_fds(128), "{}", pool.part());
        for ports in [1, 3, 50] {
            let pool = FdPool::of_limit(FdPool::limit_for(ports, most_fds(128)));
            pool.set_ports(ports);
            assert!(pool.part() >= most_fds(128), "{}", pool.part());
        }
        assert_eq!(FdPool::default().part(), usize::MAX);
    }
}
