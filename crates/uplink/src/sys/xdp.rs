//! The rings of `AF_XDP` sockets, and the socket options that rustix does not have.
//!
//! ```text
//!  fill       we ──► kernel   chunks for frames that arrive     u64
//!  rx         kernel ──► we   frames that arrived               Desc
//!  tx         we ──► kernel   frames to send                    Desc
//!  completion kernel ──► we   chunks of frames that were sent   u64
//! ```
//!
//! **Trust.** Indexes and entries are the kernel's: an index only says how many entries there are,
//! at most the ring's size, and every entry is copied out before it is checked by who reads it.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::xdp::XdpRingOffset;

use super::check;
use super::map::Mapping;

/// One frame, or a part of it, in a UMEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct Desc {
    /// Where, in bytes from the start of the UMEM.
    pub(crate) addr: u64,
    /// Bytes.
    pub(crate) len: u32,
    /// `XDP_PKT_CONTD`, `XDP_TX_METADATA`.
    pub(crate) options: u32,
}

const _: () = assert!(size_of::<Desc>() == size_of::<libc::xdp_desc>());

/// What stands in a ring: plain integers of which every bit pattern is valid.
pub(crate) trait Entry: Copy + private::Sealed {}
impl Entry for u64 {}
impl Entry for Desc {}

mod private {
    pub(crate) trait Sealed {}
    impl Sealed for u64 {}
    impl Sealed for super::Desc {}
}

/// A mapped ring.
#[derive(Debug)]
struct Ring<T> {
    producer: *mut u32,
    consumer: *mut u32,
    flags: *mut u32,
    entries: *mut T,
    /// Entries; a power of two.
    size: u32,
    map: Arc<Mapping>,
    _entries: PhantomData<T>,
}

// SAFETY: the pointers are to a mapping that the ring owns; one thread at a time has it.
unsafe impl<T: Entry> Send for Ring<T> {}

impl<T: Entry> Ring<T> {
    fn map(
        fd: BorrowedFd<'_>,
        page_offset: u64,
        at: &XdpRingOffset,
        size: u32,
    ) -> io::Result<Self> {
        let wrong = || io::Error::from_raw_os_error(libc::EINVAL);
        let offset = |at: u64| usize::try_from(at).map_err(|_| wrong());
        let page_offset = libc::off_t::try_from(page_offset).map_err(|_| wrong())?;
        let (producer, consumer) = (offset(at.producer)?, offset(at.consumer)?);
        let (flags, entries) = (offset(at.flags.ok_or_else(wrong)?)?, offset(at.desc)?);
        let bytes = size_of::<T>().saturating_mul(size as usize);
        let len = entries.saturating_add(bytes);
        let words = [producer, consumer, flags];
        let aligned = words.iter().all(|w| w.is_multiple_of(4) && w.saturating_add(4) <= len);
        if !aligned || !entries.is_multiple_of(8) || !size.is_power_of_two() {
            return Err(wrong());
        }
        let map = Arc::new(Mapping::new(fd, len, page_offset, true)?);
        let at = |offset: usize| map.ptr().wrapping_add(offset);
        #[expect(clippy::cast_ptr_alignment, reason = "the offsets are aligned: checked above")]
        let [producer, consumer, flags] = words.map(|word| at(word).cast::<u32>());
        let entries = at(entries).cast::<T>();
        Ok(Self { producer, consumer, flags, entries, size, map, _entries: PhantomData })
    }

    #[inline(always)]
    fn word(&self, ptr: *mut u32) -> &AtomicU32 {
        // SAFETY: `map` checked that the three words are aligned and inside of the mapping, which
        // lives as long as `self`; both sides reach them atomically only.
        unsafe { AtomicU32::from_ptr(ptr) }
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> *mut T {
        let index = index & self.size.wrapping_sub(1);
        self.entries.wrapping_add(index as usize)
    }

    /// Whether the kernel waits for a system call before it looks at the ring.
    #[inline(always)]
    fn needs_wakeup(&self) -> bool {
        self.word(self.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    /// How many entries lie between two indexes: 0 if that cannot be.
    #[inline(always)]
    fn between(&self, from: u32, to: u32) -> u32 {
        let count = to.wrapping_sub(from);
        if count > self.size { 0 } else { count }
    }
}

/// A ring that this process fills.
#[derive(Debug)]
pub(crate) struct Producer<T> {
    ring: Ring<T>,
    /// Where the next entry goes.
    next: u32,
    /// Where the kernel was when we looked last.
    seen: u32,
}

impl<T: Entry> Producer<T> {
    pub(crate) fn map(
        fd: BorrowedFd<'_>,
        page_offset: u64,
        at: &XdpRingOffset,
        size: u32,
    ) -> io::Result<Self> {
        let ring = Ring::map(fd, page_offset, at, size)?;
        // ORDERING: Acquire pairs with the kernel's release: its reads of entries are done.
        let seen = ring.word(ring.consumer).load(Ordering::Acquire);
        let next = ring.word(ring.producer).load(Ordering::Relaxed);
        Ok(Self { ring, next, seen })
    }

    /// Free entries, asked of the kernel only if there seem to be fewer than `want`.
    #[inline(always)]
    pub(crate) fn room(&mut self, want: u32) -> u32 {
        let size = self.ring.size;
        let room = size.wrapping_sub(self.next.wrapping_sub(self.seen));
        if room >= want && room <= size {
            return room;
        }
        // ORDERING: as in `map`.
        self.seen = self.ring.word(self.ring.consumer).load(Ordering::Acquire);
        let room = size.wrapping_sub(self.next.wrapping_sub(self.seen));
        if room > size { 0 } else { room }
    }

    /// Writes the next entry; the caller knows that there is room.
    #[inline(always)]
    pub(crate) fn put(&mut self, value: T) {
        // SAFETY: the index is masked to the ring, whose entries are mapped and aligned; the
        // kernel only reads them, as plain integers.
        unsafe { std::ptr::write_volatile(self.ring.entry(self.next), value) };
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the kernel what was put.
    #[inline(always)]
    pub(crate) fn publish(&self) {
        // ORDERING: Release pairs with the kernel's acquire of the producer index: entries, and
        // frames, are written before it sees them.
        self.ring.word(self.ring.producer).store(self.next, Ordering::Release);
    }

    /// How far we and the kernel are, for who has not the ring.
    pub(crate) fn positions(&self) -> (Position, Position) {
        let of = |word| Position { word, _map: Arc::clone(&self.ring.map) };
        (of(self.ring.producer), of(self.ring.consumer))
    }

    /// Published entries that the kernel has not taken.
    #[inline(always)]
    pub(crate) fn waiting(&mut self) -> u32 {
        // ORDERING: as in `map`.
        self.seen = self.ring.word(self.ring.consumer).load(Ordering::Acquire);
        self.ring.between(self.seen, self.next)
    }

    /// Where the kernel was when we looked last.
    #[inline(always)]
    pub(crate) fn seen(&self) -> u32 {
        self.seen
    }

    /// Whether the kernel waits for a system call before it looks at the ring.
    #[inline(always)]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }

    /// Copies of the entries that the kernel has taken and that stand there still, the last first.
    pub(crate) fn taken(&mut self) -> impl Iterator<Item = T> + '_ {
        let (count, end) = (self.ring.size.wrapping_sub(self.waiting()), self.seen);
        (1..=count).map(move |back| {
            let entry = self.ring.entry(end.wrapping_sub(back));
            // SAFETY: the index is masked to the ring, whose entries are mapped and aligned;
            // whatever stands there, every value is valid.
            unsafe { std::ptr::read_volatile(entry) }
        })
    }

    /// Copies of the published entries that the kernel has not taken.
    pub(crate) fn left(&mut self) -> impl Iterator<Item = T> + '_ {
        let (count, first) = (self.waiting(), self.seen);
        (0..count).map(move |index| {
            let entry = self.ring.entry(first.wrapping_add(index));
            // SAFETY: the index is masked to the ring, whose entries are mapped and aligned;
            // whatever stands there, every value is valid.
            unsafe { std::ptr::read_volatile(entry) }
        })
    }
}

/// A ring that the kernel fills.
#[derive(Debug)]
pub(crate) struct Consumer<T> {
    ring: Ring<T>,
    /// The next entry to take.
    next: u32,
    /// Where the kernel was when we looked last.
    seen: u32,
}

impl<T: Entry> Consumer<T> {
    pub(crate) fn map(
        fd: BorrowedFd<'_>,
        page_offset: u64,
        at: &XdpRingOffset,
        size: u32,
    ) -> io::Result<Self> {
        let ring = Ring::map(fd, page_offset, at, size)?;
        let next = ring.word(ring.consumer).load(Ordering::Relaxed);
        Ok(Self { ring, next, seen: next })
    }

    /// Entries that are there, asked of the kernel only if there seem to be fewer than `want`.
    #[inline(always)]
    pub(crate) fn available(&mut self, want: u32) -> u32 {
        let have = self.ring.between(self.next, self.seen);
        if have >= want {
            return have;
        }
        // ORDERING: Acquire pairs with the kernel's release of the producer index: entries, and
        // frames, are written before it is seen here.
        self.seen = self.ring.word(self.ring.producer).load(Ordering::Acquire);
        self.ring.between(self.next, self.seen)
    }

    /// How far the kernel is, for who has not the ring.
    pub(crate) fn kernel_position(&self) -> Position {
        Position { word: self.ring.producer, _map: Arc::clone(&self.ring.map) }
    }

    /// A copy of entry `index` of those that are there.
    #[inline(always)]
    pub(crate) fn peek(&self, index: u32) -> T {
        let entry = self.ring.entry(self.next.wrapping_add(index));
        // SAFETY: the index is masked to the ring, whose entries are mapped and aligned; whatever
        // the kernel wrote or writes, every value is valid.
        unsafe { std::ptr::read_volatile(entry) }
    }

    /// Gives the first `count` entries back to the kernel.
    #[inline(always)]
    pub(crate) fn consume(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
        // ORDERING: Release pairs with the kernel's acquire of the consumer index: our reads of
        // the entries are done before it writes new ones.
        self.ring.word(self.ring.consumer).store(self.next, Ordering::Release);
    }
}

/// How far one side is in a ring, whoever has the ring; the memory stays when the socket goes.
#[derive(Debug)]
pub(crate) struct Position {
    word: *const u32,
    _map: Arc<Mapping>,
}

// SAFETY: the pointer is to a mapping that is kept, and every access is atomic.
unsafe impl Send for Position {}
// SAFETY: as above.
unsafe impl Sync for Position {}

impl Position {
    pub(crate) fn read(&self) -> u32 {
        // SAFETY: `Ring::map` checked that the word is aligned and inside of the mapping, which
        // lives as long as `self`; both sides reach it atomically only.
        let word = unsafe { AtomicU32::from_ptr(self.word.cast_mut()) };
        // ORDERING: Acquire pairs with the kernel's release: what it did before is done.
        word.load(Ordering::Acquire)
    }
}

/// Frames that one call may send in copy mode: Linux 6.17 and later have the option.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Lets one call send up to `frames` frames; kernels before 6.17 cannot, and take 32.
pub(crate) fn set_tx_budget(fd: BorrowedFd<'_>, frames: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, frames)
}

/// Lets calls on `fd` run the driver's receive loop for up to `us` microseconds and `frames`
/// frames, in place of its interrupts.
pub(crate) fn set_busy_poll(fd: BorrowedFd<'_>, us: u32, frames: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL, 1)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL, us)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET, frames)
}

fn set_option(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: u32,
) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<u32>()).unwrap_or(4);
    let value = (&raw const value).cast();
    // SAFETY: the options read one `int`, which `value` points to for the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value, len) })
}
