//! A tap without a port: frames with their virtio-net headers, as a guest's driver handles them.
//!
//! ```text
//!  kernel ── read ──► one piece of memory: virtio-net header (12 bytes) | frame
//!  kernel ◄─ writev ─ pieces: the same
//! ```
//!
//! **Trust.** The pieces may be shared with somebody hostile: only their addresses are handed on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use port::OffloadSet;
use virtq::mem::{ReadPiece, WritePiece};

use crate::interface::{Link, Namespace};
use crate::sys::{self, Pieces};

use super::found::Found;
use super::{Opened, TapError, TapSettings, check, offloads, open_here};

/// An open tap whose frames keep their headers. Dropping the link before the queues restores what
/// was changed.
#[derive(Debug)]
pub struct RawTap {
    /// The interface.
    pub link: Link,
    /// Its queues.
    pub queues: Vec<RawQueue>,
}

/// A queue of such a tap.
#[derive(Debug)]
pub struct RawQueue {
    fd: OwnedFd,
    _found: Option<Arc<Found>>,
}

/// Opens or makes the interface and brings it up.
///
/// # Errors
///
/// [`TapError`] says what is missing.
pub fn open_raw(settings: &TapSettings) -> Result<RawTap, TapError> {
    check(settings)?;
    let namespace = Namespace::open(settings.netns.as_deref())?;
    let Opened { fds, link, found } = namespace.run(|| open_here(settings, &namespace))??;
    let queue = |fd| RawQueue { fd, _found: found.clone() };
    let queues: Vec<_> = fds.into_iter().map(queue).collect();
    for queue in &queues {
        let set = queue.set_offloads(settings.offloads);
        let what = || format!("set the offloads of interface {}", settings.ifname);
        let _ = set.map_err(|error| TapError::system(what(), error))?;
    }
    Ok(RawTap { link, queues })
}

impl RawQueue {
    /// Lets the kernel leave `wanted` to us; what it agreed to (no USO before Linux 6.2).
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn set_offloads(&self, wanted: OffloadSet) -> io::Result<OffloadSet> {
        offloads::set(self.fd.as_fd(), wanted)
    }

    /// Reads one frame with its header to the start of `to`; its length in bytes, header included,
    /// or none if there is no frame now. A frame that is longer than `to` loses its end.
    ///
    /// # Errors
    ///
    /// The kernel's: `EBADFD` if the interface is gone.
    #[inline]
    pub fn read(&self, to: WritePiece<'_>) -> io::Result<Option<usize>> {
        loop {
            let error = match sys::read_into(self.fd.as_fd(), to) {
                Ok(len) => return Ok(Some(len)),
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => return Ok(None),
                _ => return Err(error),
            }
        }
    }

    /// Writes the frame that `pieces` are, its header first.
    ///
    /// # Errors
    ///
    /// The kernel's: `EAGAIN` or `ENOBUFS` if it has no room, `EINVAL` if header and frame do not
    /// fit together, `EIO` if the interface is down, `EBADFD` if it is gone.
    #[inline]
    pub fn write<'a>(&self, pieces: impl Iterator<Item = ReadPiece<'a>> + Clone) -> io::Result<()> {
        let mut vectors: Pieces<'_> = Pieces::new();
        if pieces.clone().all(|piece| vectors.guest(piece)) {
            return vectors.write(self.fd.as_fd());
        }
        self.write_copied(pieces)
    }

    /// A frame of more pieces than one call takes.
    #[cold]
    fn write_copied<'a>(&self, pieces: impl Iterator<Item = ReadPiece<'a>>) -> io::Result<()> {
        let mut frame = Vec::new();
        for piece in pieces {
            let start = frame.len();
            frame.resize(start.saturating_add(piece.len()), 0);
            let _ = piece.copy_to(0, frame.get_mut(start..).unwrap_or_default());
        }
        let mut vectors: Pieces<'_> = Pieces::new();
        let _ = vectors.private(&frame);
        vectors.write(self.fd.as_fd())
    }
}

impl AsFd for RawQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
