//! The system calls that rustix has no safe form of: ioctls of tun devices and interfaces,
//! `writev` from guest memory, mappings of sockets, the rings of `AF_XDP`, and `bpf`.
//!
//! **Trust.** `writev` hands addresses of guest memory to the kernel, which tolerates concurrent
//! writers; no reference to such memory ever exists here.
#![expect(unsafe_code, reason = "ioctls of tun devices and writev from guest memory")]

pub(crate) mod bpf;
mod interface;
pub(crate) mod map;
pub(crate) mod packet;
pub(crate) mod xdp;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use virtq::mem::{ReadPiece, WritePiece};

use interface::InterfaceRequest;
pub(crate) use interface::{InterfaceSocket, Promiscuous};

/// The most pieces that one `writev` takes.
pub(crate) const PIECES_MAX: usize = 64;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `TUNSETIFF`: makes `fd` a queue of interface `name`, which is created if there is none.
pub(crate) fn tun_attach(fd: BorrowedFd<'_>, name: &str, flags: i16) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name)?;
    request.set_flags(flags);
    request.call(fd, libc::TUNSETIFF)
}

/// `TUNGETVNETHDRSZ`, `TUNGETVNETLE`: the bytes of headers, and whether they are little endian
/// whatever the machine is.
pub(crate) fn tun_header(fd: BorrowedFd<'_>) -> io::Result<(i32, bool)> {
    let (mut header_bytes, mut little): (libc::c_int, libc::c_int) = (0, 0);
    // SAFETY: the request writes one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut header_bytes) })?;
    // SAFETY: the request writes one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETLE, &raw mut little) })?;
    Ok((header_bytes, little != 0))
}

/// `TUNSETVNETHDRSZ`, `TUNSETVNETLE`, `TUNSETOFFLOAD`: headers as [`tun_header`] says them, and the
/// offloads that the kernel may leave to us.
pub(crate) fn tun_set_header(
    fd: BorrowedFd<'_>,
    (header_bytes, little): (i32, bool),
    offloads: libc::c_ulong,
) -> io::Result<()> {
    let little = libc::c_int::from(little);
    // SAFETY: the request reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) })?;
    // SAFETY: the request reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETLE, &raw const little) })?;
    // SAFETY: the request takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
}

/// A netlink socket that another process made.
pub(crate) fn netlink_socket(fd: OwnedFd) -> netlink_sys::Socket {
    // SAFETY: the fd is ours alone, and goes into the socket that closes it.
    unsafe { netlink_sys::Socket::from_raw_fd(fd.into_raw_fd()) }
}

/// `TUNSETOFFLOAD`: the offloads that the kernel may leave to us.
pub(crate) fn tun_set_offloads(fd: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: the request takes its argument by value.
    check(unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
    })
}

/// Reads once into guest memory; how many bytes came.
pub(crate) fn read_into(fd: BorrowedFd<'_>, to: WritePiece<'_>) -> io::Result<usize> {
    let room = to.len() as usize;
    // SAFETY: the piece is mapped and has `room` bytes while it is borrowed. The other side may
    // write there meanwhile, which the kernel tolerates; no reference to the bytes exists.
    let got = unsafe { libc::read(fd.as_raw_fd(), to.as_mut_ptr().cast(), room) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Runs `work` in a thread of its own inside the network namespace that `namespace` is.
pub(crate) fn in_namespace<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` in a thread of its own, whose mounts nobody else sees.
pub(crate) fn in_private_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: only what is mounted and where the thread stands becomes its own; its file
            // descriptors stay those of the process.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The pieces of one frame, at most `N`, in order, for `writev`.
pub(crate) struct Pieces<'a, const N: usize = PIECES_MAX> {
    vectors: [libc::iovec; N],
    len: usize,
    _borrowed: std::marker::PhantomData<&'a [u8]>,
}

impl<'a, const N: usize> Pieces<'a, N> {
    pub(crate) fn new() -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { vectors: [empty; N], len: 0, _borrowed: std::marker::PhantomData }
    }

    /// Appends private bytes; false if there is no room.
    pub(crate) fn private(&mut self, bytes: &'a [u8]) -> bool {
        self.push(bytes.as_ptr(), bytes.len())
    }

    /// Appends a piece of guest memory; false if there is no room.
    pub(crate) fn guest(&mut self, piece: ReadPiece<'a>) -> bool {
        self.push(piece.as_ptr(), piece.len())
    }

    fn push(&mut self, ptr: *const u8, len: usize) -> bool {
        let Some(place) = self.vectors.get_mut(self.len) else { return false };
        *place = libc::iovec { iov_base: ptr.cast_mut().cast(), iov_len: len };
        self.len = self.len.wrapping_add(1);
        true
    }

    /// Writes all pieces as one frame.
    pub(crate) fn write(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let count = libc::c_int::try_from(self.len).unwrap_or(0);
        // SAFETY: the first `len` vectors were made from borrows that live as long as `'a`, so
        // their bytes are mapped; the kernel only reads them, whoever else writes meanwhile.
        let written = unsafe { libc::writev(fd.as_raw_fd(), self.vectors.as_ptr(), count) };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
