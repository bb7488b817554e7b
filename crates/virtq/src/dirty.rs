//! Notes the pages that a ring writes, for the migration of its guest.
//!
//! A page is noted *after* it was written: the front end takes the bit first and reads the page
//! then, so it finds either what was written or the bit once more.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::chain::{ChainBuf, Chains};
use crate::mem::{DirtyLog, GuestMap, GuestPhysAddr};

/// Where a ring's writes are noted. A ring that has none takes one branch per burst.
#[derive(Debug, Clone)]
pub struct RingLog {
    /// The bitmap.
    pub log: DirtyLog,
    /// Guest-physical memory, in which buffers are found by their host address.
    pub memory: GuestMap,
    /// The guest-physical address of the used ring (split) or of the device event suppression area
    /// (packed).
    pub device: GuestPhysAddr,
    /// The guest-physical address of the descriptor ring (packed).
    pub desc: GuestPhysAddr,
    /// What is to be signalled after pages were noted; by who has the ring, at its notifications.
    pub call: Option<Arc<OwnedFd>>,
}

impl RingLog {
    /// Notes what was written into the chains of the burst in `buf`.
    pub(crate) fn buffers(&self, buf: &ChainBuf, written: &[u32]) {
        let chains = Chains::new(buf, None);
        for (index, bytes) in written.iter().enumerate() {
            let mut left = *bytes;
            for seg in chains.writable(index).segs {
                let here = seg.len().min(left);
                self.host(seg.ptr(), here);
                left = left.saturating_sub(here);
            }
        }
    }

    /// Notes `len` bytes that were written at a host address.
    fn host(&self, ptr: *const u8, len: u32) {
        let (mut ptr, mut left) = (ptr, u64::from(len));
        while left > 0 {
            let Some((addr, here)) = self.memory.guest_of(ptr) else { return };
            let step = here.min(left);
            self.log.mark(addr, step);
            ptr = ptr.wrapping_add(usize::try_from(step).unwrap_or(usize::MAX));
            left = left.saturating_sub(step);
        }
    }

    /// Notes `len` bytes at `offset` of the used ring or device area.
    pub(crate) fn device(&self, offset: u64, len: u64) {
        self.log.mark(GuestPhysAddr(self.device.0.wrapping_add(offset)), len);
    }

    /// Notes `count` entries of `entry` bytes in a ring of `size` of them, from `index` on, that
    /// starts at `start`.
    pub(crate) fn entries(&self, start: GuestPhysAddr, ring: (u32, u32), run: (u32, u32)) {
        let ((size, entry), (index, count)) = (ring, run);
        let first = index.checked_rem(size).unwrap_or(0);
        let count = count.min(size);
        let straight = count.min(size.saturating_sub(first));
        let mark = |index: u32, count: u32| {
            let bytes = |n: u32| u64::from(n).saturating_mul(u64::from(entry));
            self.log.mark(GuestPhysAddr(start.0.wrapping_add(bytes(index))), bytes(count));
        };
        mark(first, straight);
        mark(0, count.saturating_sub(straight));
    }
}

#[cfg(test)]
mod tests;
