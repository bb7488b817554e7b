//! Packet sockets: options, rings, and the system call that sends a ring's frames.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// `struct tpacket_req3`: how a ring is to be.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RingRequest {
    pub(crate) block_size: u32,
    pub(crate) blocks: u32,
    pub(crate) frame_size: u32,
    pub(crate) frames: u32,
    pub(crate) retire_ms: u32,
    pub(crate) private_bytes: u32,
    pub(crate) features: u32,
}

const _: () = assert!(size_of::<RingRequest>() == size_of::<libc::tpacket_req3>());

/// `struct tpacket_stats_v3`: what happened since it was asked for last.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Statistics {
    pub(crate) packets: u32,
    pub(crate) drops: u32,
    pub(crate) freezes: u32,
}

/// A packet socket that takes no frames before it is bound to a protocol.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    check(fd)?;
    // SAFETY: the fd is new, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set<T: Copy>(fd: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    set_at(fd, libc::SOL_PACKET, option, value)
}

fn set_at<T: Copy>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the option is read from a value of `len` bytes, which lives during the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value, len) })
}

/// Sets an option that is a number.
pub(crate) fn set_number(fd: BorrowedFd<'_>, option: libc::c_int, value: i32) -> io::Result<()> {
    set(fd, option, &value)
}

/// Makes the ring that `option` names (`PACKET_RX_RING` or `PACKET_TX_RING`).
pub(crate) fn set_ring(
    fd: BorrowedFd<'_>,
    option: libc::c_int,
    ring: &RingRequest,
) -> io::Result<()> {
    set(fd, option, ring)
}

/// Room for frames on their way out: beyond the system's limit if the process may.
pub(crate) fn set_send_buffer(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    set_at(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes)
        .or_else(|_| set_at(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes))
}

/// Asks for an option that is one number.
pub(crate) fn number(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u32> {
    ask(fd, option)
}

/// Asks what happened since this was asked last: asking sets the kernel's counters back.
pub(crate) fn statistics(fd: BorrowedFd<'_>) -> io::Result<Statistics> {
    ask(fd, libc::PACKET_STATISTICS)
}

/// A value of which all bytes may be anything.
trait Plain: Copy + Default {}
impl Plain for u32 {}
impl Plain for Statistics {}

fn ask<T: Plain>(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    let place = std::ptr::from_mut(&mut value).cast();
    let len = std::ptr::from_mut(&mut len);
    // SAFETY: the kernel writes at most `len` bytes, which the value has; any bytes are valid.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, option, place, len) })?;
    Ok(value)
}

/// Promiscuous mode of an interface for as long as the socket lives.
pub(crate) fn join_promiscuous(fd: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let request = libc::packet_mreq {
        mr_ifindex: signed(index)?,
        mr_type: u16::try_from(libc::PACKET_MR_PROMISC).unwrap_or(1),
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set(fd, libc::PACKET_ADD_MEMBERSHIP, &request)
}

fn signed(index: u32) -> io::Result<i32> {
    i32::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))
}

fn address(index: i32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).unwrap_or(17),
        sll_protocol: protocol.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

const ADDRESS_BYTES: libc::socklen_t = {
    #[expect(clippy::cast_possible_truncation, reason = "20 fits")]
    let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    bytes
};

/// Binds to an interface; with protocol 0 to send only.
pub(crate) fn bind(fd: BorrowedFd<'_>, index: u32, protocol: u16) -> io::Result<()> {
    let address = address(signed(index)?, protocol);
    let place = std::ptr::from_ref(&address).cast();
    // SAFETY: the kernel reads an address of that many bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), place, ADDRESS_BYTES) })
}

/// The hardware type (`ARPHRD_...`) of the interface that the socket is bound to; none if the
/// interface is gone.
pub(crate) fn hardware_type(fd: BorrowedFd<'_>) -> io::Result<Option<u16>> {
    let (mut address, mut len) = (address(0, 0), ADDRESS_BYTES);
    let (place, len) = (std::ptr::from_mut(&mut address).cast(), std::ptr::from_mut(&mut len));
    // SAFETY: the kernel writes at most `len` bytes, which the address has; any bytes are valid.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), place, len) })?;
    Ok((address.sll_ifindex > 0).then_some(address.sll_hatype))
}

/// Lets no frame in until [`let_in`].
pub(crate) fn keep_out(fd: BorrowedFd<'_>) -> io::Result<()> {
    // One instruction: return 0, of every frame nothing.
    let mut nothing = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    set_at(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Ends [`keep_out`].
pub(crate) fn let_in(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_at(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0_i32)
}

/// Sends what stands in the transmit ring; does not wait for room.
pub(crate) fn send_ring(fd: BorrowedFd<'_>) -> io::Result<()> {
    let (none, flags) = (std::ptr::null(), libc::MSG_DONTWAIT);
    // SAFETY: no bytes and no address are passed.
    let sent = unsafe { libc::sendto(fd.as_raw_fd(), none, 0, flags, std::ptr::null(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
