//! A bitmap of guest pages that were written, shared with the front end that migrates the guest.
//!
//! Bit `n` of the bitmap, counted from the low bits of its first byte, stands for the page of 4096
//! bytes at guest-physical address `4096 * n` (vhost-user, "Migration").
//!
//! **Trust.** The front end clears bits, and may write others: nothing is ever read from here.
//! **Limits.** Pages beyond the bitmap are not noted: it is the front end who chose its size.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::guard::Watch;
use super::kept::Kept;
use super::{GuestPhysAddr, SharedMap};

/// Bytes of a page: those of the log, whatever the guest's are.
pub const LOG_PAGE: u64 = 4096;

/// The bitmap. Clones are the same one.
#[derive(Clone)]
pub struct DirtyLog {
    map: SharedMap,
    watch: Arc<Watch>,
    skip: usize,
    bytes: usize,
}

impl DirtyLog {
    /// Maps `bytes` bytes of `file` from `offset` on.
    ///
    /// # Errors
    ///
    /// If the file is shorter than that, has huge pages, or cannot be mapped.
    pub fn from_file(file: File, offset: u64, bytes: usize) -> io::Result<Self> {
        let Kept { map, watch, skip } = Kept::map(file, offset, bytes)?;
        Ok(Self { map, watch, skip, bytes })
    }

    /// Whether its file was cut short: see [`super::guard`].
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    /// Pages that the log has a bit for.
    pub fn pages(&self) -> u64 {
        (self.bytes as u64).saturating_mul(8)
    }

    /// Notes that `[addr, addr + len)` was written. To be called after the write.
    pub fn mark(&self, addr: GuestPhysAddr, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let first = addr.0 / LOG_PAGE;
        let end = addr.0.saturating_add(last) / LOG_PAGE;
        for page in first..=end.min(self.pages().saturating_sub(1)) {
            self.set(page);
        }
    }

    fn set(&self, page: u64) {
        let Ok(at) = usize::try_from(page / 8) else { return };
        if at >= self.bytes {
            return;
        }
        let byte = self.map.as_ptr().wrapping_add(self.skip).wrapping_add(at);
        // SAFETY: the byte is one of the `bytes` behind `skip` that `Kept` has mapped, the mapping
        // lives as long as `map`, and this process reaches it only atomically.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        // ORDERING: Release pairs with the front end's atomic exchange that takes the bit: when it
        // reads the page after that, it finds what was written before this.
        let _ = byte.fetch_or(1 << (page % 8), Ordering::Release);
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyLog({} pages)", self.pages())
    }
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "test code")]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::{DirtyLog, LOG_PAGE};
    use crate::mem::GuestPhysAddr;

    fn bits(file: &File, from: u64, bytes: usize) -> Vec<usize> {
        let mut all = vec![0; bytes];
        file.read_exact_at(&mut all, from).unwrap();
        (0..bytes * 8).filter(|bit| all[bit / 8] & 1 << (bit % 8) != 0).collect()
    }

    #[test]
    fn each_page_that_is_touched_has_its_bit_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let log = DirtyLog::from_file(file.try_clone().unwrap(), 4096 + 8, 16).unwrap();
        assert_eq!(log.pages(), 128);
        log.mark(GuestPhysAddr(3 * LOG_PAGE), 1);
        log.mark(GuestPhysAddr(11 * LOG_PAGE - 1), 2);
        log.mark(GuestPhysAddr(20 * LOG_PAGE), LOG_PAGE);
        log.mark(GuestPhysAddr(30 * LOG_PAGE), 0);
        assert_eq!(bits(&file, 4104, 16), [3, 10, 11, 20]);
        assert_eq!(bits(&file, 0, 4104), [0; 0]);
        assert_eq!(bits(&file, 4120, 100), [0; 0]);
    }

    #[test]
    fn what_the_log_has_no_bit_for_is_left_alone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let log = DirtyLog::from_file(file.try_clone().unwrap(), 0, 2).unwrap();
        log.mark(GuestPhysAddr(15 * LOG_PAGE), u64::MAX);
        log.mark(GuestPhysAddr(u64::MAX), 1);
        log.mark(GuestPhysAddr(16 * LOG_PAGE), 1);
        assert_eq!(bits(&file, 0, 4096), [15]);
        let short = DirtyLog::from_file(file.try_clone().unwrap(), 4000, 97);
        assert!(short.is_err(), "the file ends before the log does");
    }
}
