//! Large frames by a packet socket: one system call each, from where their bytes are, and cut by
//! the kernel or by whoever needs them cut.
//!
//! **Trust.** Bodies may belong to a hostile guest: only their addresses are handed on.
//! **Limits.** A frame of more than 64 pieces is copied before; a kernel without room is asked
//! [`TRIES`] times.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use port::{Batch, DropReason, Frame};
use serde::{Deserialize, Serialize};

use crate::sys::{Pieces, packet};
use crate::vnet::{self, HEADER, SHORT};

/// How often frames are offered to a kernel that has no room.
pub(crate) const TRIES: u32 = 4;
/// `PACKET_VNET_HDR_SZ`.
const PACKET_VNET_HDR_SZ: libc::c_int = 24;
/// Bytes of frames that may be on their way out of a socket.
const SEND_BUFFER: i32 = 8 << 20;

/// Bytes before the payload that an MTU counts.
const ETHERNET: u32 = 14;
const TAG: u32 = 4;

/// Which virtio-net header stands before frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VnetHeader {
    /// 10 bytes: all that kernels before 6.4 know.
    Short,
    /// 12 bytes.
    Long,
}

impl VnetHeader {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Short => SHORT,
            Self::Long => HEADER,
        }
    }
}

/// What the kernel refused.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) what: &'static str,
    pub(crate) error: io::Error,
}

/// A packet socket that sends frames with virtio-net headers, and receives none.
#[derive(Debug)]
pub(crate) struct Direct {
    pub(crate) fd: OwnedFd,
    pub(crate) header: VnetHeader,
}

/// What sockets need to send. Which header comes before frames; `short` asks for the short one.
/// Past the queueing discipline (`bypass`) the kernel cuts nothing, and drops what the device
/// cannot.
pub(crate) fn configure(
    fd: BorrowedFd<'_>,
    (short, bypass): (bool, bool),
) -> Result<VnetHeader, Refused> {
    let set = |option, value, what| {
        packet::set_number(fd, option, value).map_err(|error| Refused { what, error })
    };
    let what = "give virtio-net headers";
    set(libc::PACKET_VNET_HDR, 1, what)?;
    let bytes = i32::try_from(HEADER).unwrap_or(12);
    let long = if short {
        Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT))
    } else {
        packet::set_number(fd, PACKET_VNET_HDR_SZ, bytes)
    };
    let header = match long {
        Ok(()) => VnetHeader::Long,
        // Before Linux 6.4 there is one size only.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => VnetHeader::Short,
        Err(error) => return Err(Refused { what, error }),
    };
    if bypass {
        set(libc::PACKET_QDISC_BYPASS, 1, "send past the queueing discipline")?;
    }
    // With less room, bursts end earlier.
    let _ = packet::set_send_buffer(fd, SEND_BUFFER);
    Ok(header)
}

impl Direct {
    /// One for the interface with this index, in the namespace of the calling thread. The kernel
    /// cuts where the device takes no large frames.
    pub(crate) fn open(index: u32) -> Result<Self, Refused> {
        let fd = packet::open().map_err(|error| Refused { what: "open a packet socket", error })?;
        let header = configure(fd.as_fd(), (false, false))?;
        let what = "bind a packet socket";
        // Without a protocol nothing is received.
        packet::bind(fd.as_fd(), index, 0).map_err(|error| Refused { what, error })?;
        Ok(Self { fd, header })
    }

    /// Sends a frame; the reason if it is not sent.
    ///
    /// # Errors
    ///
    /// The interface does not exist any more.
    pub(crate) fn send(
        &self,
        batch: &Batch<'_>,
        frame: &Frame,
    ) -> io::Result<Result<(), DropReason>> {
        let header = vnet_header(frame, frame.head().len());
        let header = header.get(..self.header.bytes()).unwrap_or_default();
        let whole;
        let mut pieces: Pieces<'_> = Pieces::new();
        let mut fits = pieces.private(header) && pieces.private(frame.head());
        let mut body = batch.body(frame);
        while let Some(piece) = body.next_piece(u32::MAX) {
            fits &= pieces.guest(piece);
        }
        if !fits {
            whole = vnet::in_one_piece(header, frame.head(), batch.body(frame));
            pieces = Pieces::new();
            let _fits = pieces.private(&whole);
        }
        let mut tries = TRIES;
        while tries > 0 {
            let Err(error) = pieces.write(self.fd.as_fd()) else { return Ok(Ok(())) };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::ENOBUFS) => {
                    tries = tries.wrapping_sub(1);
                    std::hint::spin_loop();
                }
                Some(libc::ENXIO | libc::ENODEV) => return Err(error),
                _ => return Ok(Err(DropReason::UplinkError)),
            }
        }
        Ok(Err(DropReason::UplinkBusy))
    }
}

/// The virtio-net header of a frame of which the kernel is to copy `linear` bytes into a buffer of
/// its own. For the others it keeps pages of the ring; where they may not leave it (a veth peer),
/// it copies page by page, which costs more. The header length that a guest wrote is a hint.
#[inline(always)]
pub(crate) fn vnet_header(frame: &Frame, linear: usize) -> [u8; HEADER] {
    let mut header = vnet::encode(&frame.offload);
    let [_, _, lo, hi, ..] = &mut header;
    [*lo, *hi] = u16::try_from(linear).unwrap_or(u16::MAX).to_le_bytes();
    header
}

/// The most bytes of a frame on the wire.
#[inline(always)]
pub(crate) fn room(frame: &Frame, mtu: u32) -> u32 {
    let room = mtu.saturating_add(ETHERNET);
    if frame.tag().is_some() { room.saturating_add(TAG) } else { room }
}
