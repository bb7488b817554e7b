//! Memory that arrives while it is in use: who touches a page that is missing sleeps until the
//! front end has served it (postcopy migration, `userfaultfd`).
//!
//! ```text
//!  access to a registered page that its file does not have ──► the thread sleeps
//!     front end reads "missed at …" from its duplicate of the fd ─► fills the page in the file
//!                                                                ─► wakes: the access is repeated
//! ```
//!
//! **Trust.** Who holds a duplicate of the fd can do more than serve pages: the kernel lets it
//! register, fill and protect any memory *of this process* that may be missing, of other guests
//! too. So it goes to front ends only that are trusted as much as this process.
//! **Limits.** A page that is never served blocks who touches it, until [`Userfault::abandon`].
//! Files of memfd, tmpfs and hugetlbfs only; accesses by the kernel for us (`writev`) fail there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::ioctl::{Setter, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::guard::Watch;

/// `UFFD_API`, the one version of the interface, and the group of its requests.
const API: u8 = 0xaa;
/// `UFFD_USER_MODE_ONLY` (Linux 5.11): needs no privilege, and the kernel itself never sleeps.
const USER_MODE_ONLY: u32 = 1;
/// `UFFDIO_REGISTER_MODE_MISSING`
const MODE_MISSING: u64 = 1;

/// `UFFD_EVENT_PAGEFAULT`
#[cfg(feature = "driver")]
const PAGEFAULT: u8 = 0x12;

#[derive(Debug)]
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[derive(Debug)]
#[repr(C)]
struct Registration {
    range: Range,
    mode: u64,
    ioctls: u64,
}

const HANDSHAKE: rustix::ioctl::Opcode = opcode::read_write::<Handshake>(API, 0x3f);
const REGISTER: rustix::ioctl::Opcode = opcode::read_write::<Registration>(API, 0);
const UNREGISTER: rustix::ioctl::Opcode = opcode::read::<Range>(API, 1);
const WAKE: rustix::ioctl::Opcode = opcode::read::<Range>(API, 2);

/// Where the kernel tells of missing pages. Nothing is registered at first.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Opens one for this process.
    ///
    /// # Errors
    ///
    /// The kernel has none, or does not let us.
    pub fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let modest = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: making the fd changes nothing: pages are registered below only, and only those
        // of guests, whose contents are never relied on.
        let fd = unsafe { userfaultfd(modest) };
        // SAFETY: as above, for a kernel that does not know the flag.
        let fd = fd.or_else(|_| unsafe { userfaultfd(flags) })?;
        let mut handshake = Handshake { api: u64::from(API), features: 0, ioctls: 0 };
        // SAFETY: the request takes and fills exactly this structure (linux/userfaultfd.h).
        let request = unsafe { Updater::<HANDSHAKE, Handshake>::new(&mut handshake) };
        // SAFETY: it agrees on a version and touches no memory but that.
        unsafe { ioctl(&fd, request) }?;
        Ok(Self { fd })
    }

    /// From now on who touches a page of the mapping that its file does not have sleeps.
    ///
    /// # Errors
    ///
    /// The kernel's answer: the file is none of memfd, tmpfs or hugetlbfs.
    pub fn register(&self, watch: &Watch) -> io::Result<()> {
        let range = range_of(watch);
        let mut registration = Registration { range, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the request takes and fills exactly this structure.
        let request = unsafe { Updater::<REGISTER, Registration>::new(&mut registration) };
        // SAFETY: the range is a whole mapping of a guest's memory, kept by the watch. Accesses
        // there may take longer from now on; contents are hostile as before.
        unsafe { ioctl(&self.fd, request) }?;
        Ok(())
    }

    /// Ends [`Self::register`]: pages that are still missing are zeros, and who sleeps goes on.
    ///
    /// # Errors
    ///
    /// The kernel's answer: it was not registered.
    pub fn unregister(&self, watch: &Watch) -> io::Result<()> {
        // SAFETY: the request takes exactly this structure.
        let request = unsafe { Setter::<UNREGISTER, Range>::new(range_of(watch)) };
        // SAFETY: accesses to the guest's memory take no longer than usual from now on.
        unsafe { ioctl(&self.fd, request) }?;
        Ok(())
    }

    /// Gives a registered mapping up: it holds zeros that nobody else sees, and who sleeps goes
    /// on with those. What the front end still has to serve does not change.
    pub fn abandon(&self, watch: &Watch) {
        let _ = watch.blank();
        // SAFETY: the request takes exactly this structure.
        let request = unsafe { Setter::<WAKE, Range>::new(range_of(watch)) };
        // SAFETY: who sleeps in the range looks again; nothing else happens.
        let _ = unsafe { ioctl(&self.fd, request) };
    }
}

/// The side of who serves pages: a front end, with the fd that a back end gave it.
#[cfg(feature = "driver")]
impl Userfault {
    /// That of another process.
    pub fn of(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Where somebody sleeps, as an address of the process that registered it; none if nobody
    /// does.
    pub fn missed(&self) -> Option<usize> {
        let mut event = [0u8; 32];
        let count = rustix::io::read(&self.fd, &mut event).ok()?;
        let [kind, .., a, b, c, d, e, f, g, h, _, _, _, _, _, _, _, _] = event;
        let is_fault = count == event.len() && kind == PAGEFAULT;
        is_fault.then_some(usize::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }

    /// Lets who sleeps in these pages look again.
    pub fn wake(&self, start: usize, len: usize) {
        let range = Range { start: start as u64, len: len as u64 };
        // SAFETY: the request takes exactly this structure.
        let request = unsafe { Setter::<WAKE, Range>::new(range) };
        // SAFETY: who sleeps in the range looks again; nothing else happens.
        let _ = unsafe { ioctl(&self.fd, request) };
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn range_of(watch: &Watch) -> Range {
    let (start, len) = watch.range();
    Range { start: start as u64, len: len as u64 }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::Userfault;
    use crate::mem::guard::Watch;

    const BYTES: usize = 1 << 20;

    fn mapping() -> (Arc<MmapRegion>, File) {
        let file = File::from(memfd_create("late", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, BYTES as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        (Arc::new(MmapRegion::from_file(offset, BYTES).unwrap()), file)
    }

    fn byte(mapping: &MmapRegion, at: usize) -> u8 {
        mapping.as_volatile_slice().read_obj(at).unwrap()
    }

    #[test]
    fn who_touches_a_missing_page_sleeps_until_it_is_given_up() {
        let (mapping, file) = mapping();
        let watch = Watch::new(&mapping);
        let userfault = Userfault::open().expect("a userfaultfd");
        userfault.register(&watch).unwrap();
        let reader = Arc::clone(&mapping);
        let asleep = thread::spawn(move || byte(&reader, 0x3001));
        let missed = loop {
            if let Some(missed) = userfault.missed() {
                break missed;
            }
            thread::yield_now();
        };
        assert_eq!(missed, mapping.as_ptr().addr() + 0x3000);
        thread::sleep(Duration::from_millis(20));
        assert!(!asleep.is_finished());
        userfault.abandon(&watch);
        assert_eq!(asleep.join().unwrap(), 0);
        // Nothing of that got into the file.
        mapping.as_volatile_slice().write_obj(7u8, 0x3001).unwrap();
        let mut there = [0; 1];
        assert_eq!(rustix::io::pread(&file, &mut there, 0x3001).unwrap(), 1);
        assert_eq!(there, [0]);
    }

    #[test]
    fn what_is_there_is_read_at_once_and_what_ends_is_zeros() {
        let (mapping, file) = mapping();
        let watch = Watch::new(&mapping);
        let userfault = Userfault::open().expect("a userfaultfd");
        userfault.register(&watch).unwrap();
        assert_eq!(rustix::io::pwrite(&file, &[9], 0x1000).unwrap(), 1);
        assert_eq!(byte(&mapping, 0x1000), 9);
        userfault.unregister(&watch).unwrap();
        assert_eq!(byte(&mapping, 0x8000), 0);
        assert_eq!(rustix::io::pwrite(&file, &[5], 0x8000).unwrap(), 1);
        assert_eq!(byte(&mapping, 0x8000), 5, "it is the file as before");
    }
}
