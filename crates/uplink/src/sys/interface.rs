//! Interfaces by ioctl: what they are, and what can be set on them.
//!
//! **Trust.** Names come from the user and are checked for their length; everything that the
//! kernel answers is copied out of one `struct ifreq` or a buffer of ours.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::check;

/// Bytes of an interface name with its terminating zero.
const NAME_SIZE: usize = libc::IFNAMSIZ;

/// An interface request: a name, and 24 bytes whose meaning depends on the ioctl.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    data: [u8; 24],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let mut bytes = [0; NAME_SIZE];
        let room = bytes.get_mut(..NAME_SIZE.saturating_sub(1)).unwrap_or_default();
        let Some(room) = room.get_mut(..name.len()) else {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        };
        room.copy_from_slice(name.as_bytes());
        Ok(Self { name: bytes, data: [0; 24] })
    }

    fn name(&self) -> String {
        text(&self.name)
    }

    fn word(&self) -> i32 {
        i32::from_ne_bytes(self.data.first_chunk().copied().unwrap_or_default())
    }

    fn set_word(&mut self, word: i32) {
        if let Some(place) = self.data.first_chunk_mut() {
            *place = word.to_ne_bytes();
        }
    }

    fn flags(&self) -> i16 {
        i16::from_ne_bytes(self.data.first_chunk().copied().unwrap_or_default())
    }

    pub(super) fn set_flags(&mut self, flags: i16) {
        if let Some(place) = self.data.first_chunk_mut() {
            *place = flags.to_ne_bytes();
        }
    }

    pub(super) fn call(&mut self, fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: every request that this module and its parent pass reads and writes one
        // `struct ifreq`, whose size the assertion above compares; `self` is a unique reference.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(self)) })
    }
}

/// Questions about interfaces, asked in the network namespace where it was made.
#[derive(Debug)]
pub(crate) struct InterfaceSocket(OwnedFd);

impl InterfaceSocket {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let kind = SocketType::DGRAM;
        // A kernel without IPv4 still answers on a unix socket.
        let fd = socket_with(AddressFamily::INET, kind, flags, None)
            .or_else(|_| socket_with(AddressFamily::UNIX, kind, flags, None))?;
        Ok(Self(fd))
    }

    /// One that another process made.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The index of an interface; none if there is no such interface.
    pub(crate) fn index(&self, name: &str) -> io::Result<Option<u32>> {
        let mut request = InterfaceRequest::new(name)?;
        match request.call(self.0.as_fd(), libc::SIOCGIFINDEX) {
            Ok(()) => Ok(u32::try_from(request.word()).ok()),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The name that an interface has now; none if it is gone.
    pub(crate) fn name_of(&self, index: u32) -> io::Result<Option<String>> {
        let mut request = InterfaceRequest::new("")?;
        request.set_word(i32::try_from(index).unwrap_or(0));
        match request.call(self.0.as_fd(), libc::SIOCGIFNAME) {
            Ok(()) => Ok(Some(request.name())),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn mtu(&self, name: &str) -> io::Result<u32> {
        let mut request = InterfaceRequest::new(name)?;
        request.call(self.0.as_fd(), libc::SIOCGIFMTU)?;
        Ok(u32::try_from(request.word()).unwrap_or(0))
    }

    /// Whether the interface is set up, and whether it can carry frames now.
    pub(crate) fn is_up(&self, name: &str) -> io::Result<(bool, bool)> {
        let flags = self.flags(name)?;
        Ok((flags & UP != 0, flags & RUNNING != 0))
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

    /// The driver's name and what it says about its bus, as `ethtool -i` shows them.
    pub(crate) fn driver(&self, name: &str) -> io::Result<(String, String)> {
        let mut info = [0u8; DRIVER_INFO];
        self.ethtool(name, ETHTOOL_GDRVINFO, &mut info)?;
        let field = |at: usize| text(info.get(at..at.saturating_add(32)).unwrap_or_default());
        Ok((field(4), field(100)))
    }

    /// Whether the device has a carrier; one that is down has none.
    pub(crate) fn carrier(&self, name: &str) -> io::Result<bool> {
        let mut value = [0u8; FLAGS];
        self.ethtool(name, ETHTOOL_GLINK, &mut value)?;
        Ok(word(&value, 1) != 0)
    }

    /// Queues that receive and queues that transmit now, as `ethtool -l` shows them.
    pub(crate) fn channels(&self, name: &str) -> io::Result<(u32, u32)> {
        let mut info = [0u8; CHANNELS];
        self.ethtool(name, ETHTOOL_GCHANNELS, &mut info)?;
        let combined = word(&info, 8);
        Ok((combined.saturating_add(word(&info, 5)), combined.saturating_add(word(&info, 6))))
    }

    /// Whether the driver takes VLAN tags out of frames that arrive.
    pub(crate) fn takes_tags(&self, name: &str) -> io::Result<bool> {
        Ok(self.ethtool_flags(name)? & ETH_FLAG_RXVLAN != 0)
    }

    /// Says whether the driver is to take VLAN tags out of frames that arrive.
    pub(crate) fn set_takes_tags(&self, name: &str, takes: bool) -> io::Result<()> {
        let flags = self.ethtool_flags(name)?;
        let flags = if takes { flags | ETH_FLAG_RXVLAN } else { flags & !ETH_FLAG_RXVLAN };
        let mut value = [0u8; FLAGS];
        if let Some(place) = value.last_chunk_mut() {
            *place = flags.to_ne_bytes();
        }
        self.ethtool(name, ETHTOOL_SFLAGS, &mut value)
    }

    /// Which large frames the device takes, TCP and UDP ones.
    pub(crate) fn cuts(&self, name: &str) -> io::Result<(bool, bool)> {
        let mut count = [0u8; SET_INFO];
        if let Some(mask) = count.get_mut(8..).and_then(<[u8]>::first_chunk_mut) {
            *mask = (1u64 << FEATURES).to_ne_bytes();
        }
        self.ethtool(name, ETHTOOL_GSSET_INFO, &mut count)?;
        let count = word(&count, 4) as usize;
        if count > FEATURES_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        // The kernel writes so many names as it said, whatever it is told of the room.
        let mut names = vec![0u8; count.saturating_mul(NAME).saturating_add(12)];
        put_word(&mut names, 1, FEATURES);
        self.ethtool(name, ETHTOOL_GSTRINGS, &mut names)?;
        let blocks = count.div_ceil(32);
        let mut now = vec![0u8; blocks.saturating_mul(16).saturating_add(8)];
        put_word(&mut now, 1, u32::try_from(blocks).unwrap_or(0));
        self.ethtool(name, ETHTOOL_GFEATURES, &mut now)?;
        let is_on = |wanted: &str| {
            let mut all = names.get(12..).unwrap_or_default().chunks_exact(NAME);
            let Some(bit) = all.position(|name| text(name) == wanted) else { return false };
            // Of each 32: available, requested, active, never changed.
            let active = (bit / 32).saturating_mul(4).saturating_add(4);
            word(&now, active) >> (bit % 32) & 1 != 0
        };
        let tcp = is_on("tx-tcp-segmentation") && is_on("tx-tcp6-segmentation");
        Ok((tcp && is_on("tx-tcp-ecn-segmentation"), is_on("tx-udp-segmentation")))
    }

    fn ethtool_flags(&self, name: &str) -> io::Result<u32> {
        let mut value = [0u8; FLAGS];
        self.ethtool(name, ETHTOOL_GFLAGS, &mut value)?;
        Ok(u32::from_ne_bytes(value.last_chunk().copied().unwrap_or_default()))
    }

    fn ethtool(&self, name: &str, command: u32, info: &mut [u8]) -> io::Result<()> {
        if let Some(place) = info.first_chunk_mut() {
            *place = command.to_ne_bytes();
        }
        let mut request = InterfaceRequest::new(name)?;
        let address = info.as_mut_ptr().expose_provenance();
        if let Some(place) = request.data.first_chunk_mut() {
            *place = address.to_ne_bytes();
        }
        request.call(self.0.as_fd(), libc::SIOCETHTOOL)
    }
}

impl AsFd for InterfaceSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Word `number` of what ethtool filled in.
fn word(info: &[u8], number: usize) -> u32 {
    let field = info.chunks_exact(4).nth(number).and_then(<[u8]>::first_chunk);
    u32::from_ne_bytes(field.copied().unwrap_or_default())
}

fn put_word(info: &mut [u8], number: usize, value: u32) {
    let place = info.chunks_exact_mut(4).nth(number).and_then(<[u8]>::first_chunk_mut);
    if let Some(place) = place {
        *place = value.to_ne_bytes();
    }
}

/// An interface receives everything while this lives: the kernel undoes it when the socket goes,
/// whatever became of the process.
#[derive(Debug)]
pub(crate) struct Promiscuous {
    /// Held for what it does: it receives nothing.
    socket: OwnedFd,
}

impl Promiscuous {
    /// Sets it for the interface of that index in the calling thread's namespace.
    pub(crate) fn new(index: u32) -> io::Result<Self> {
        // Without a protocol a packet socket receives nothing.
        let socket =
            socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        let request = libc::packet_mreq {
            mr_ifindex: i32::try_from(index).unwrap_or(0),
            #[expect(clippy::cast_possible_truncation, reason = "it is 1")]
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        let bytes = libc::socklen_t::try_from(size_of_val(&request)).unwrap_or(0);
        // SAFETY: the option reads one `struct packet_mreq` of `bytes` bytes.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const request).cast(),
                bytes,
            )
        })?;
        Ok(Self { socket })
    }

    /// One that another process set.
    pub(crate) fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What stands before the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

const ETHTOOL_GDRVINFO: u32 = 3;
const ETHTOOL_GLINK: u32 = 0x0a;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GFEATURES: u32 = 0x3a;
/// `ETH_SS_FEATURES`: the set of names of features.
const FEATURES: u32 = 4;
/// The most features that are looked at.
const FEATURES_MAX: usize = 1024;
/// Bytes of `struct ethtool_sset_info` with one number, and of a feature's name.
const SET_INFO: usize = 20;
const NAME: usize = 32;
/// Bytes of `struct ethtool_value`: a command and a number.
const FLAGS: usize = 8;
/// Bytes of `struct ethtool_drvinfo`: a command, five texts of 32 bytes and more.
const DRIVER_INFO: usize = 196;
/// Bytes of `struct ethtool_channels`: a command, four limits and four numbers in use (receive,
/// transmit, other, combined).
const CHANNELS: usize = 36;

#[expect(clippy::cast_possible_truncation, reason = "IFF_UP is 1")]
const UP: i16 = libc::IFF_UP as i16;
#[expect(clippy::cast_possible_truncation, reason = "IFF_RUNNING is 64")]
const RUNNING: i16 = libc::IFF_RUNNING as i16;
