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
    /// Where the guest has the used ring (split) or the device event suppression area (packed).
    pub device: Places,
    /// Where it has the descriptor ring (packed).
    pub desc: Places,
    /// What is to be signalled after pages were noted; by who has the ring, at its notifications.
    pub call: Option<Arc<OwnedFd>>,
}

/// Where the guest has a part of a ring: pieces, one behind the other. Behind a vIOMMU they may be
/// anywhere, and very small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places(Vec<Piece>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Bytes of all pieces before it.
    offset: u64,
    bytes: u64,
    addr: GuestPhysAddr,
}

impl Piece {
    /// Bytes of it from `offset` on, which is within it.
    fn left(&self, offset: u64) -> u64 {
        self.bytes.saturating_sub(offset.saturating_sub(self.offset))
    }

    /// Notes `len` bytes of it, or what there is of them.
    fn mark(&self, log: &DirtyLog, offset: u64, len: u64) {
        let skip = offset.saturating_sub(self.offset);
        log.mark(GuestPhysAddr(self.addr.0.wrapping_add(skip)), len.min(self.left(offset)));
    }
}

impl From<GuestPhysAddr> for Places {
    /// All of it from one address on.
    fn from(addr: GuestPhysAddr) -> Self {
        Self(vec![Piece { offset: 0, bytes: u64::MAX, addr }])
    }
}

impl Places {
    /// These pieces, one behind the other; those that go on in the guest, too, are one.
    pub(crate) fn of(pieces: impl IntoIterator<Item = (GuestPhysAddr, u64)>) -> Self {
        let mut all: Vec<Piece> = Vec::new();
        let mut offset = 0u64;
        for (addr, bytes) in pieces {
            match all.last_mut() {
                Some(last) if last.addr.0.checked_add(last.bytes) == Some(addr.0) => {
                    last.bytes = last.bytes.saturating_add(bytes);
                }
                _ => all.push(Piece { offset, bytes, addr }),
            }
            offset = offset.saturating_add(bytes);
        }
        Self(all)
    }

    /// Notes `len` bytes at `offset`.
    fn mark(&self, log: &DirtyLog, offset: u64, len: u64) {
        if let [piece] = self.0.as_slice() {
            return piece.mark(log, offset, len);
        }
        let first = self.0.partition_point(|piece| piece.offset <= offset).saturating_sub(1);
        let (mut offset, mut left) = (offset, len);
        for piece in self.0.get(first..).unwrap_or_default() {
            let here = piece.left(offset).min(left);
            piece.mark(log, offset, here);
            (offset, left) = (offset.saturating_add(here), left.saturating_sub(here));
            if left == 0 {
                break;
            }
        }
    }
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
        self.device.mark(&self.log, offset, len);
    }

    /// Notes the entries of a run, (index, count), in a used ring of `size`.
    pub(crate) fn used(&self, size: u16, run: (u32, u32)) {
        self.entries((&self.device, 4), (size.into(), 8), run);
    }

    /// Notes the descriptors of a run, (index, count), in a packed ring of `size`.
    pub(crate) fn descs(&self, size: u16, run: (u32, u32)) {
        self.entries((&self.desc, 0), (size.into(), 16), run);
    }

    /// Notes `count` entries of `entry` bytes in a ring of `size` of them, from `index` on, that
    /// starts `skip` bytes behind `start`.
    fn entries(&self, (start, skip): (&Places, u64), ring: (u32, u32), run: (u32, u32)) {
        let ((size, entry), (index, count)) = (ring, run);
        let first = index.checked_rem(size).unwrap_or(0);
        let count = count.min(size);
        let straight = count.min(size.saturating_sub(first));
        let mark = |index: u32, count: u32| {
            let bytes = |n: u32| u64::from(n).saturating_mul(u64::from(entry));
            start.mark(&self.log, skip.saturating_add(bytes(index)), bytes(count));
        };
        mark(first, straight);
        mark(0, count.saturating_sub(straight));
    }
}

#[cfg(test)]
mod tests;
