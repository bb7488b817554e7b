//! Mappings of fds that the kernel fills: rings of sockets, memfds.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtq::mem::SharedMap;

/// A mapping that ends with this.
#[derive(Debug)]
pub(super) struct Mapping {
    ptr: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset` on.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        len: usize,
        offset: libc::off_t,
        populate: bool,
    ) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | if populate { libc::MAP_POPULATE } else { 0 };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let null = std::ptr::null_mut();
        // SAFETY: without MAP_FIXED, a new range is mapped: no memory in use is touched.
        let ptr = unsafe { libc::mmap(null, len, access, flags, fd.as_raw_fd(), offset) };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { ptr, len })
    }

    /// The first byte, aligned to a page.
    pub(super) fn ptr(&self) -> *mut u8 {
        self.ptr.cast()
    }
}

// SAFETY: a plain address that only `drop` uses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and whoever reached it held this.
        let _ = unsafe { libc::munmap(self.ptr, self.len) };
    }
}

/// Maps `len` bytes of `fd` from `offset` on, shared, for reading and writing. With `populate` the
/// pages are there before the first access.
pub(crate) fn map_fd(
    fd: BorrowedFd<'_>,
    len: usize,
    offset: libc::off_t,
    populate: bool,
) -> io::Result<SharedMap> {
    let mapping = Mapping::new(fd, len, offset, populate)?;
    let ptr = mapping.ptr();
    let keep = Arc::new(mapping);
    // SAFETY: the range is mapped until `keep` ends, aligned to a page as mmap gives it, and
    // nobody else in this process knows it.
    Ok(unsafe { SharedMap::new(ptr, len, keep) })
}
