//! Telling the control thread that the forwarding database changed, no more often than it wants.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::event::{signal, wake_fd};

/// An eventfd that exists once somebody asked for it, and is written once each time it is armed.
#[derive(Debug, Default)]
pub(super) struct Notice {
    fd: OnceLock<OwnedFd>,
    armed: AtomicBool,
}

impl Notice {
    /// What becomes readable after a change, once armed.
    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        if self.fd.get().is_none() {
            // Whoever else made one at the same time was first.
            let _ = self.fd.set(wake_fd()?);
        }
        let fd = self.fd.get().ok_or_else(|| io::Error::other("no eventfd"))?;
        Ok(fd.as_fd())
    }

    /// Waits for the next change. What changed before is seen by who looks after this.
    pub(super) fn arm(&self) {
        if let Some(fd) = self.fd.get() {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
        // ORDERING: SeqCst pairs with the swap in `changed`: a change that does not see this was
        // written before it, and is seen by who looks now.
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Something changed.
    pub(super) fn changed(&self) {
        // ORDERING: SeqCst pairs with the store in `arm`: either this sees it, or the change that
        // was written before is seen by who armed and then looks.
        if self.armed.swap(false, Ordering::SeqCst)
            && let Some(fd) = self.fd.get()
        {
            signal(fd);
        }
    }
}
