//! Ring words: the few shared integers of a virtqueue, read and written atomically.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::{GuestMap, GuestPhysAddr, HostRange};
use crate::config::{QueueError, RingArea};
use crate::shared::Shared;

/// A checked, host-contiguous, aligned part of guest memory that holds one ring area.
///
/// It is mapped as long as the [`GuestMap`] lives that made it: whoever stores it stores that too.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingMem {
    pub(super) ptr: *mut u8,
}

impl RingMem {
    /// Checks that `[addr, addr + len)` is mapped, contiguous and aligned in the guest and here.
    pub(super) fn new(
        map: &GuestMap,
        area: RingArea,
        addr: GuestPhysAddr,
        (len, align): (u64, u64),
    ) -> Result<Self, QueueError> {
        if addr.0.checked_rem(align) != Some(0) {
            return Err(QueueError::Unaligned { area, addr, align });
        }
        match map.host_range(addr, len) {
            HostRange::Unmapped => Err(QueueError::Unmapped { area, addr, len }),
            HostRange::Scattered => Err(QueueError::Scattered { area, addr, len }),
            HostRange::Contiguous(ptr) if (ptr.addr() as u64).checked_rem(align) != Some(0) => {
                Err(QueueError::HostUnaligned { area, addr, align })
            }
            HostRange::Contiguous(ptr) => Ok(Self { ptr }),
        }
    }

    /// Asks the CPU for the lines of the `bytes` bytes (at most `size`) from `at` on, in a ring of
    /// `size` bytes. Never faults.
    #[inline(always)]
    pub(super) fn ask(
        self,
        prefetch: impl Fn(*const u8),
        at: usize,
        (bytes, size): (usize, usize),
    ) {
        let end = at.wrapping_add(bytes);
        self.ask_lines(&prefetch, at, end.min(size));
        if end > size {
            self.ask_lines(&prefetch, 0, end.wrapping_sub(size));
        }
    }

    #[inline(always)]
    fn ask_lines(self, prefetch: &impl Fn(*const u8), start: usize, end: usize) {
        let end = self.ptr.wrapping_add(end);
        let mut line = self.ptr.wrapping_add(start).map_addr(|addr| addr & !63);
        while line < end {
            prefetch(line);
            line = line.wrapping_add(64);
        }
    }

    /// The integer at `offset`.
    ///
    /// # Safety
    ///
    /// `[offset, offset + size_of::<T>())` lies in the checked range, `offset` is a multiple of
    /// the size of `T`, and the map lives for `'a`.
    #[inline(always)]
    pub(super) unsafe fn word<'a, T>(self, offset: usize) -> Word<'a, T> {
        let ptr = self.ptr.wrapping_add(offset).cast::<T>();
        Word { ptr, _mapped: PhantomData }
    }
}

/// One integer in guest memory, little-endian there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word<'a, T> {
    ptr: *mut T,
    _mapped: PhantomData<&'a ()>,
}

macro_rules! guest_word {
    ($int:ty, $atomic:ty) => {
        impl Shared<$int> for Word<'_, $int> {
            #[inline(always)]
            fn load(&self, order: Ordering) -> $int {
                // SAFETY: `RingMem::word`'s contract: aligned, and mapped for the lifetime; we
                // access it atomically only, and what the guest does to it is another process's
                // doing, of which every value is valid.
                let word = unsafe { <$atomic>::from_ptr(self.ptr) };
                <$int>::from_le(word.load(order))
            }

            #[inline(always)]
            fn store(&self, value: $int, order: Ordering) {
                crash_point();
                // SAFETY: as in `load`.
                let word = unsafe { <$atomic>::from_ptr(self.ptr) };
                word.store(value.to_le(), order);
            }

            #[inline(always)]
            fn full_fence() {
                // ORDERING: the algorithms in `notify` say what it pairs with.
                fence(Ordering::SeqCst);
            }
        }
    };
}

guest_word!(u16, AtomicU16);
guest_word!(u32, AtomicU32);
guest_word!(u64, AtomicU64);

/// Where a test may end the device: before each of its stores.
#[inline(always)]
pub(super) fn crash_point() {
    #[cfg(test)]
    crash::point();
}

/// A kill at a chosen store of this thread.
#[cfg(test)]
pub(crate) mod crash {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// Runs `device` up to its store number `stores`; none if it came no further.
    pub(crate) fn after<T>(stores: u64, device: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(stores));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(device));
        LEFT.set(None);
        done.map_err(|end| assert!(end.is::<Killed>(), "the device panicked")).ok()
    }

    struct Killed;

    pub(super) fn point() {
        match LEFT.get() {
            None => {}
            Some(0) => std::panic::resume_unwind(Box::new(Killed)),
            Some(left) => LEFT.set(left.checked_sub(1)),
        }
    }
}
