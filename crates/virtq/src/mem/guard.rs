//! Memory whose file its owner can shorten: a page that is gone costs the guest its port, not the
//! process its life.
//!
//! ```text
//!  access to a page that the file does not have any more ──► SIGBUS ──► handler
//!     in a watched mapping?  yes: private zero pages from there to the mapping's end, `lost` is
//!                                 set, the notice becomes readable, the access is repeated
//!                            no:  whatever SIGBUS did before
//! ```
//!
//! **Opt in.** Nothing happens before [`install`]. A program with a handler of its own for SIGBUS
//! calls [`rescue`] from it instead.
//! **Trust.** A guest decides when this happens, and on which thread: the handler takes no lock and
//! allocates nothing, and one mapping is replaced at most as often as it has pages.
//! **Limits.** A search of all watched mappings for each SIGBUS; accesses pay nothing.
//! **Not supported.** What the kernel does with such memory for us (a tap's `writev`) gives no
//! signal but `EFAULT`, for that call only.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

use super::{GuestMap, SharedMap};

mod signal;

pub use signal::install;

/// Places that one allocation makes.
const CHUNK: usize = 128;
/// Sizes of pages, the smallest first: the kernel splits a mapping at pages of its own size only.
const PAGES: [usize; 4] = [1 << 12, 1 << 16, 1 << 21, 1 << 30];

/// A watched range, as the handler sees it.
#[derive(Debug)]
struct Place {
    /// Odd while the range changes. A range that somebody accesses does not change.
    turn: AtomicU64,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

impl Place {
    const fn empty() -> Self {
        Self {
            turn: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
        }
    }

    /// Sets the range; only who holds the lock of [`FREE`] or owns the place.
    fn set(&self, start: usize, end: usize) {
        let turn = self.turn.load(Ordering::Relaxed);
        self.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: the odd turn is seen before the new range; pairs with the fence in `range`.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.lost.store(false, Ordering::Relaxed);
        // ORDERING: Release, pairs with the Acquire in `range`: the range is seen with its turn.
        self.turn.store(turn.wrapping_add(2), Ordering::Release);
    }

    /// The range, if it does not change at this moment.
    fn range(&self) -> Option<(usize, usize)> {
        // ORDERING: Acquire pairs with the Release at the end of `set`.
        let before = self.turn.load(Ordering::Acquire);
        let range = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        // ORDERING: the range was read before the turn is read again; pairs with `set`'s fence.
        fence(Ordering::Acquire);
        let after = self.turn.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2)).then_some(range)
    }
}

/// Places, and where more of them are. Never freed.
#[derive(Debug)]
struct Chunk {
    places: [Place; CHUNK],
    next: OnceLock<Box<Self>>,
}

impl Chunk {
    const fn new() -> Self {
        Self { places: [const { Place::empty() }; CHUNK], next: OnceLock::new() }
    }
}

static FIRST: Chunk = Chunk::new();
/// Places that are not used; the lock is never taken in the handler.
static FREE: Mutex<Option<Vec<&'static Place>>> = Mutex::new(None);
/// Mappings that were lost since the process began.
static LOSSES: AtomicU64 = AtomicU64::new(0);
/// Written by the handler.
static NOTICE: OnceLock<OwnedFd> = OnceLock::new();

fn chunks() -> impl Iterator<Item = &'static Chunk> {
    std::iter::successors(Some(&FIRST), |chunk| chunk.next.get().map(|next| &**next))
}

/// A place that nobody uses.
fn take_place() -> &'static Place {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let free = free.get_or_insert_with(|| FIRST.places.iter().collect());
    loop {
        if let Some(place) = free.pop() {
            return place;
        }
        if let Some(last) = chunks().last() {
            let more = last.next.get_or_init(|| Box::new(Chunk::new()));
            free.extend(more.places.iter());
        }
    }
}

/// Watches a mapping as long as it lives, and keeps it mapped.
pub struct Watch {
    place: &'static Place,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl Watch {
    /// Watches a mapping of a guest's memory.
    pub fn new<B: Bitmap + Send + Sync + 'static>(mapping: &Arc<MmapRegion<B>>) -> Self {
        let start = mapping.as_ptr().addr();
        Self::over(start, mapping.size(), Arc::clone(mapping) as Arc<_>)
    }

    /// Watches memory that is shared with a peer.
    pub fn of(map: &SharedMap) -> Self {
        Self::over(map.as_ptr().addr(), map.len(), Arc::new(map.clone()))
    }

    /// Watches all regions of a guest's memory. Each must begin at a page.
    pub fn all(map: &GuestMap) -> Vec<Self> {
        let ranges = map.host_ranges();
        ranges.map(|(start, len)| Self::over(start, len, Arc::new(map.clone()))).collect()
    }

    /// `[start, start + len)` is a mapping that `keep` keeps, and that no reference points into.
    fn over(start: usize, len: usize, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let place = take_place();
        let end = start.saturating_add(len);
        place.set(start, end.checked_next_multiple_of(4096).unwrap_or(end));
        Self { place, _keep: keep }
    }

    /// The mapping: where it starts, and its bytes.
    pub fn range(&self) -> (usize, usize) {
        // The owner's own look: the range changes only when it is made and dropped.
        let start = self.place.start.load(Ordering::Relaxed);
        (start, self.place.end.load(Ordering::Relaxed).wrapping_sub(start))
    }

    /// Replaces the whole mapping by private zero pages. Returns whether that was possible.
    pub(super) fn blank(&self) -> bool {
        let (start, len) = self.range();
        map_zeros(start, len)
    }

    /// Whether a page of the mapping was gone when somebody needed it. Its contents are zeros from
    /// there on, and what is written there reaches nobody.
    pub fn is_lost(&self) -> bool {
        // ORDERING: Acquire pairs with the Release in `rescue`.
        self.place.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.place.set(0, 0);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = free.as_mut() {
            free.push(self.place);
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("lost", &self.is_lost()).finish()
    }
}

/// How many mappings were lost since the process began.
#[inline]
pub fn losses() -> u64 {
    // ORDERING: Acquire pairs with the Release in `rescue`: the flags are seen behind this.
    LOSSES.load(Ordering::Acquire)
}

/// What becomes readable, and gives an edge, whenever a mapping is lost. All callers share one
/// counter that nobody needs to read.
///
/// # Errors
///
/// The kernel has no fd left.
pub fn notice() -> io::Result<OwnedFd> {
    let fd = match NOTICE.get() {
        Some(fd) => fd,
        None => {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            NOTICE.get_or_init(|| fd)
        }
    };
    fd.try_clone()
}

/// Replaces the page at `addr`, and all behind it in its mapping, by private zero pages. False,
/// and nothing done, if `addr` is in no watched mapping. May be called in a signal handler.
///
/// The access that failed must be by somebody who keeps the mapping: it is not unmapped meanwhile.
pub fn rescue(addr: usize) -> bool {
    let all = chunks().flat_map(|chunk| &chunk.places);
    let mut rescued = false;
    for place in all {
        let Some((start, end)) = place.range() else { continue };
        if !(start..end).contains(&addr) {
            continue;
        }
        // A mapping that is watched twice is replaced once.
        if !rescued && !replace(start, end, addr) {
            return false;
        }
        rescued = true;
        // ORDERING: Release pairs with the Acquire in `is_lost`.
        place.lost.store(true, Ordering::Release);
    }
    if rescued {
        // ORDERING: Release pairs with the Acquire in `losses`; the notice comes after.
        let _ = LOSSES.fetch_add(1, Ordering::Release);
        if let Some(fd) = NOTICE.get() {
            // It fails only when it is full, and then it is readable.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }
    rescued
}

/// Maps zero pages from the page of `addr` to `end`; all of `[start, end)` if the kernel cannot
/// split the mapping.
fn replace(start: usize, end: usize, addr: usize) -> bool {
    let page_starts = PAGES.iter().map(|page| addr & !page.wrapping_sub(1));
    let mut starts = page_starts.filter(|from| *from >= start).chain([start]);
    starts.any(|from| map_zeros(from, end.wrapping_sub(from)))
}

fn map_zeros(start: usize, len: usize) -> bool {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let at = std::ptr::without_provenance_mut(start);
    // SAFETY: the range lies in one that a `Watch` was made for: a whole mapping that its owner
    // keeps, into which no reference points, whose contents may change at any time, and that who
    // made the failed access still holds. Zeros are contents like any other.
    unsafe { mmap_anonymous(at, len, prot, flags) }.is_ok()
}

#[cfg(test)]
mod tests;
