//! The system calls that rustix has no safe form of: tun and interface ioctls, and `writev` from
//! guest memory.
//!
//! **Trust.** `writev` hands addresses of guest memory to the kernel, which tolerates concurrent
//! writers; no reference to such memory ever exists here.
#![expect(unsafe_code, reason = "ioctls of tun devices and writev from guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use virtq::mem::ReadPiece;

/// Bytes of an interface name with its terminating zero.
const NAME_SIZE: usize = libc::IFNAMSIZ;
/// The most pieces that one `writev` takes.
pub(crate) const PIECES_MAX: usize = 64;

/// An interface request: a name, and 24 bytes whose meaning depends on the ioctl.
#[repr(C)]
#[derive(Clone, Copy)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    data: [u8; 24],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &str) -> io::Result<Self> {
        let mut bytes = [0; NAME_SIZE];
        let room = bytes.get_mut(..NAME_SIZE.saturating_sub(1)).unwrap_or_default();
        let Some(room) = room.get_mut(..name.len()) else {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        };
        room.copy_from_slice(name.as_bytes());
        Ok(Self { name: bytes, data: [0; 24] })
    }

    fn word(&self) -> i32 {
        i32::from_ne_bytes(self.data.first_chunk().copied().unwrap_or_default())
    }

    fn flags(&self) -> i16 {
        i16::from_ne_bytes(self.data.first_chunk().copied().unwrap_or_default())
    }

    fn set_flags(&mut self, flags: i16) {
        if let Some(place) = self.data.first_chunk_mut() {
            *place = flags.to_ne_bytes();
        }
    }

    fn call(&mut self, fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: every request that this module passes reads and writes one `struct ifreq`,
        // whose size the assertion above compares; `self` is a unique reference to one.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(self)) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `TUNSETIFF`: makes `fd` a queue of interface `name`, which is created if there is none.
pub(crate) fn tun_attach(fd: BorrowedFd<'_>, name: &str, flags: i16) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name)?;
    request.set_flags(flags);
    request.call(fd, libc::TUNSETIFF)
}

/// `TUNSETVNETHDRSZ`, `TUNSETVNETLE`, `TUNSETOFFLOAD`: headers of `header_bytes` bytes, little
/// endian, and the offloads that the kernel may leave to us.
pub(crate) fn tun_set_header(
    fd: BorrowedFd<'_>,
    header_bytes: i32,
    offloads: libc::c_ulong,
) -> io::Result<()> {
    let little: libc::c_int = 1;
    // SAFETY: the request reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) })?;
    // SAFETY: the request reads one `int`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETLE, &raw const little) })?;
    // SAFETY: the request takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
}

/// Questions about interfaces, asked in the network namespace where it was made.
#[derive(Debug)]
pub(crate) struct InterfaceSocket(OwnedFd);

impl InterfaceSocket {
    pub(crate) fn new() -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
        let fd = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self(fd))
    }

    pub(crate) fn exists(&self, name: &str) -> io::Result<bool> {
        match InterfaceRequest::new(name)?.call(self.0.as_fd(), libc::SIOCGIFINDEX) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the interface is a tap, as `ethtool -i` says it.
    pub(crate) fn is_tap(&self, name: &str) -> bool {
        let mut info = [0u8; DRIVER_INFO];
        if let Some(command) = info.first_chunk_mut() {
            *command = ETHTOOL_GDRVINFO.to_ne_bytes();
        }
        let Ok(mut request) = InterfaceRequest::new(name) else { return false };
        let address = info.as_mut_ptr().expose_provenance();
        if let Some(place) = request.data.first_chunk_mut() {
            *place = address.to_ne_bytes();
        }
        let asked = request.call(self.0.as_fd(), libc::SIOCETHTOOL);
        asked.is_ok() && info.get(4..8) == Some(b"tun\0") && info.get(100..104) == Some(b"tap\0")
    }

    pub(crate) fn mtu(&self, name: &str) -> io::Result<u32> {
        let mut request = InterfaceRequest::new(name)?;
        request.call(self.0.as_fd(), libc::SIOCGIFMTU)?;
        Ok(u32::try_from(request.word()).unwrap_or(0))
    }

    pub(crate) fn is_up(&self, name: &str) -> io::Result<bool> {
        Ok(self.flags(name)? & UP != 0)
    }

    pub(crate) fn set_up(&self, name: &str, up: bool) -> io::Result<()> {
        let flags = self.flags(name)?;
        let mut request = InterfaceRequest::new(name)?;
        request.set_flags(if up { flags | UP } else { flags & !UP });
        request.call(self.0.as_fd(), libc::SIOCSIFFLAGS)
    }

    fn flags(&self, name: &str) -> io::Result<i16> {
        let mut request = InterfaceRequest::new(name)?;
        request.call(self.0.as_fd(), libc::SIOCGIFFLAGS)?;
        Ok(request.flags())
    }
}

const ETHTOOL_GDRVINFO: u32 = 3;
/// Bytes of `struct ethtool_drvinfo`: a command, five texts of 32 bytes and more.
const DRIVER_INFO: usize = 196;

#[expect(clippy::cast_possible_truncation, reason = "IFF_UP is 1")]
const UP: i16 = libc::IFF_UP as i16;

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

/// The pieces of one frame, in order, for `writev`.
pub(crate) struct Pieces<'a> {
    vectors: [libc::iovec; PIECES_MAX],
    len: usize,
    _borrowed: std::marker::PhantomData<&'a [u8]>,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new() -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { vectors: [empty; PIECES_MAX], len: 0, _borrowed: std::marker::PhantomData }
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
