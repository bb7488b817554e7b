//! The system call `bpf`: maps, programs and links, as few as an XDP redirect needs.
//!
//! **Trust.** Everything that is handed to the kernel is ours; what it answers about other
//! people's programs is copied into buffers of fixed size.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const PROG_LOAD: libc::c_int = 5;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_GET_FD_BY_ID: libc::c_int = 30;
const LINK_GET_NEXT_ID: libc::c_int = 31;

const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
const LINK_TYPE_XDP: u32 = 6;
/// The program takes frames of several buffers.
const F_XDP_HAS_FRAGS: u32 = 1 << 5;
/// A hash map.
pub(crate) const MAP_TYPE_HASH: u32 = 1;
/// A map of `AF_XDP` sockets by queue.
pub(crate) const MAP_TYPE_XSKMAP: u32 = 17;

/// Bytes of the verifier's log that are kept: its end says what is wrong.
const LOG_BYTES: usize = 64 * 1024;

/// `union bpf_attr`: as much as the commands here use. The kernel takes any size whose unknown
/// bytes are zero.
#[repr(C, align(8))]
struct Attributes([u8; 128]);

impl Attributes {
    fn new() -> Self {
        Self([0; 128])
    }

    fn bytes(mut self, at: usize, bytes: &[u8]) -> Self {
        if let Some(place) = self.0.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
        self
    }

    fn word(self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_ne_bytes())
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.bytes(at, &fd.as_raw_fd().to_ne_bytes())
    }

    fn pointer<T>(self, at: usize, to: *const T) -> Self {
        self.bytes(at, &(to.expose_provenance() as u64).to_ne_bytes())
    }

    fn read(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk);
        u32::from_ne_bytes(bytes.copied().unwrap_or_default())
    }

    /// # Safety
    ///
    /// Every pointer in the attributes is to memory that is as large as the command makes it.
    unsafe fn call(&mut self, command: libc::c_int) -> io::Result<libc::c_int> {
        let (at, size) = (self.0.as_mut_ptr(), self.0.len());
        // SAFETY: `at` points to `size` bytes; the caller vouches for the pointers among them.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, at, size) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(libc::c_int::try_from(result).unwrap_or(0))
    }

    /// # Safety
    ///
    /// As [`Self::call`], and the command answers with a new fd.
    unsafe fn open(&mut self, command: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: the caller's promise.
        let fd = unsafe { self.call(command) }?;
        // SAFETY: the kernel made this fd for us (bpf sets close-on-exec on all of them).
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Makes a map.
pub(crate) fn create_map(
    kind: u32,
    (key_bytes, value_bytes): (u32, u32),
    entries: u32,
    name: &[u8],
) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::new()
        .word(0, kind)
        .word(4, key_bytes)
        .word(8, value_bytes)
        .word(12, entries)
        .bytes(28, name);
    // SAFETY: the command has no pointers, and answers with a new fd.
    unsafe { attributes.open(MAP_CREATE) }
}

/// Sets the value of a key; the map has keys and values of those sizes.
pub(crate) fn update<const K: usize, const V: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; K],
    value: &[u8; V],
) -> io::Result<()> {
    check_sizes(map, K, V)?;
    let mut attributes =
        Attributes::new().fd(0, map).pointer(8, key.as_ptr()).pointer(16, value.as_ptr());
    // SAFETY: `check_sizes` says that the kernel reads `K` and `V` bytes.
    let _zero = unsafe { attributes.call(MAP_UPDATE_ELEM) }?;
    Ok(())
}

/// Removes a key; the map has keys of that size and values of `value_bytes`.
pub(crate) fn delete<const K: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; K],
    value_bytes: usize,
) -> io::Result<()> {
    check_sizes(map, K, value_bytes)?;
    let mut attributes = Attributes::new().fd(0, map).pointer(8, key.as_ptr());
    // SAFETY: `check_sizes` says that the kernel reads `K` bytes.
    let _zero = unsafe { attributes.call(MAP_DELETE_ELEM) }?;
    Ok(())
}

/// All keys of a map of at most `most` entries, whose values have `value_bytes` bytes.
pub(crate) fn keys<const K: usize>(
    map: BorrowedFd<'_>,
    value_bytes: usize,
    most: u32,
) -> io::Result<Vec<[u8; K]>> {
    check_sizes(map, K, value_bytes)?;
    let mut keys: Vec<[u8; K]> = Vec::new();
    let mut next = [0u8; K];
    // A key that is removed meanwhile starts the walk again: it ends all the same.
    for _ in 0..most {
        let mut attributes = Attributes::new().fd(0, map).pointer(16, next.as_mut_ptr());
        if let Some(last) = keys.last() {
            attributes = attributes.pointer(8, last.as_ptr());
        }
        // SAFETY: `check_sizes` says that the kernel reads and writes `K` bytes.
        match unsafe { attributes.call(MAP_GET_NEXT_KEY) } {
            Ok(_) => keys.push(next),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

fn check_sizes(map: BorrowedFd<'_>, key: usize, value: usize) -> io::Result<()> {
    // struct bpf_map_info: type, id, key size, value size.
    let info = info::<16>(map)?;
    let at = |at: usize| word(&info, at) as usize;
    let right = at(8) == key && at(12) == value;
    if right { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

/// Loads an XDP program under a license. The error comes with the end of the verifier's log, if it
/// wrote one.
pub(crate) fn load_xdp(
    instructions: &[u64],
    name: &[u8],
    license: &CStr,
) -> Result<OwnedFd, (io::Error, String)> {
    let mut log = vec![0u8; LOG_BYTES];
    let count = u32::try_from(instructions.len()).unwrap_or(0);
    let without_log = || {
        Attributes::new()
            .word(0, PROG_TYPE_XDP)
            .word(4, count)
            .pointer(8, instructions.as_ptr())
            .pointer(16, license.as_ptr())
            .word(44, F_XDP_HAS_FRAGS)
            .bytes(48, name)
            .word(68, ATTACH_TYPE_XDP)
    };
    // SAFETY: `count` instructions of 8 bytes and a string are behind the pointers; the answer is
    // a new fd.
    let error = match unsafe { without_log().open(PROG_LOAD) } {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    let log_bytes = u32::try_from(log.len()).unwrap_or(0);
    let mut again = without_log().word(24, 1).word(28, log_bytes).pointer(32, log.as_mut_ptr());
    // SAFETY: as above, and the log has the size that stands beside its pointer.
    let _same_error = unsafe { again.open(PROG_LOAD) };
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(log.get(..end).unwrap_or_default()).into_owned();
    Err((error, text))
}

/// Attaches an XDP program to an interface until the fd is closed, by whatever.
pub(crate) fn link_xdp(program: BorrowedFd<'_>, index: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attributes =
        Attributes::new().fd(0, program).word(4, index).word(8, ATTACH_TYPE_XDP).word(12, flags);
    // SAFETY: the command has no pointers, and answers with a new fd.
    unsafe { attributes.open(LINK_CREATE) }
}

/// Opens the program `id`.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: the command has no pointers, and answers with a new fd.
    unsafe { Attributes::new().word(0, id).open(PROG_GET_FD_BY_ID) }
}

/// The name that a program was loaded with.
pub(crate) fn program_name(program: BorrowedFd<'_>) -> io::Result<String> {
    // struct bpf_prog_info: the name's 16 bytes stand behind 64 others.
    let info = info::<80>(program)?;
    let name = info.get(64..).unwrap_or_default();
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned())
}

/// The id of the link that holds program `program` at interface `index`, if a link does. It takes
/// `CAP_SYS_ADMIN` to look for it.
pub(crate) fn link_of(program: u32, index: u32) -> io::Result<Option<u32>> {
    let mut id = 0;
    loop {
        let mut next = Attributes::new().word(0, id);
        // SAFETY: the command has no pointers.
        match unsafe { next.call(LINK_GET_NEXT_ID) } {
            Ok(_) => {}
            // That was the last one; or a kernel that has no links.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        id = next.read(4);
        // SAFETY: the command has no pointers, and answers with a new fd.
        let Ok(link) = (unsafe { Attributes::new().word(0, id).open(LINK_GET_FD_BY_ID) }) else {
            continue;
        };
        // struct bpf_link_info: type, id, program, padding, and for XDP the interface.
        let Ok(info) = info::<24>(std::os::fd::AsFd::as_fd(&link)) else { continue };
        let (kind, holds, at) = (word(&info, 0), word(&info, 8), word(&info, 16));
        if kind == LINK_TYPE_XDP && holds == program && at == index {
            return Ok(Some(id));
        }
    }
}

/// The first `N` bytes of what the kernel says about a bpf object.
fn info<const N: usize>(object: BorrowedFd<'_>) -> io::Result<[u8; N]> {
    let mut info = [0; N];
    let size = u32::try_from(N).unwrap_or(0);
    let mut attributes =
        Attributes::new().fd(0, object).word(4, size).pointer(8, info.as_mut_ptr());
    // SAFETY: the kernel writes at most `N` bytes to `info`; all pointers inside are zero.
    let _zero = unsafe { attributes.call(OBJ_GET_INFO_BY_FD) }?;
    Ok(info)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
    u32::from_ne_bytes(word.copied().unwrap_or_default())
}
