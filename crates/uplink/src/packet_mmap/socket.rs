//! Packet sockets with both rings, set up in the order that the kernel wants.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use port::{QueueCounters, QueueFault};
use virtq::mem::{SharedMap, SharedSlots};

use crate::direct::{self, Direct, Refused, VnetHeader};
use crate::interface::{Cuts, Link};
use crate::sys::map::map_fd;
use crate::sys::packet::{self, RingRequest};

use super::ring::{ReceiveRing, TransmitRing};
use super::{PacketMmapError, PacketMmapSettings, geometry};

/// Every protocol.
const ALL: u16 = 0x0003;
/// Options that libc does not name.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const FANOUT_HASH: u32 = 0;
/// Options of the group as a whole: without the second one the sockets' own wish is not heard.
const FANOUT_UNIQUE_ID: u32 = 0x2000 << 16;
const FANOUT_IGNORE_OUTGOING: u32 = 0x4000 << 16;

/// What the halves of a queue pair share.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    /// The socket that receives.
    pub(super) fd: Arc<OwnedFd>,
    pub(super) name: Arc<str>,
    pub(super) mtu: Arc<AtomicU32>,
    pub(super) cuts: Arc<Cuts>,
    pub(super) counters: Arc<QueueCounters>,
    /// Frames for which the kernel made room and then gave them up: it counts them as drops.
    pub(super) given_up: Arc<AtomicU64>,
}

impl Queue {
    pub(super) fn fault(&self, what: &str, error: &dyn std::fmt::Display) -> QueueFault {
        QueueFault::Host { what: format!("{what} {}", self.name), error: error.to_string() }
    }
}

/// The sockets of a queue pair.
///
/// No worker waits for those that send: whenever the kernel is done with a frame, it tells who
/// waits for the frame's socket, which is a tenth of what it does for one of 64 bytes.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) receive: ReceiveRing,
    pub(super) sender: Sender,
    /// For frames that are too large for the ring: a socket with a transmit ring sends nothing
    /// else.
    pub(super) direct: Direct,
}

/// The socket that sends, and its ring.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) ring: TransmitRing,
}

/// Opens the sockets of all queues.
pub(super) fn open_all(
    settings: &PacketMmapSettings,
    link: &Link,
) -> Result<Vec<Socket>, PacketMmapError> {
    let mut sockets = Vec::with_capacity(usize::from(settings.queues));
    let mut group = None;
    for number in 0..settings.queues {
        let socket = open_one(settings, link)?;
        if settings.queues > 1 {
            let id = join_group(socket.fd.as_fd(), group, settings)?;
            group = Some(id);
        }
        if number == 0 {
            packet::join_promiscuous(socket.fd.as_fd(), link.index()).map_err(|error| {
                PacketMmapError::raw(format!("make {} promiscuous", settings.ifname), error)
            })?;
        }
        sockets.push(socket);
    }
    // Before the last one was in the group, frames would have come twice.
    for socket in &sockets {
        packet::let_in(socket.fd.as_fd())
            .map_err(|e| PacketMmapError::raw(format!("receive on {}", settings.ifname), e))?;
    }
    Ok(sockets)
}

fn check_ethernet(name: &str, fd: BorrowedFd<'_>) -> Result<(), PacketMmapError> {
    let kind = packet::hardware_type(fd).map_err(|error| {
        PacketMmapError::raw(format!("ask for the hardware type of interface {name}"), error)
    })?;
    match kind {
        // The loopback interface has Ethernet headers too.
        Some(libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) | None => Ok(()),
        Some(kind) => Err(PacketMmapError::NotEthernet { name: name.to_owned(), kind }),
    }
}

/// Whether this process may open packet sockets.
pub(super) fn check_right(ifname: &str) -> Result<(), PacketMmapError> {
    let socket = packet::open();
    socket.map(drop).map_err(|e| PacketMmapError::raw(format!("open a socket on {ifname}"), e))
}

fn open_one(settings: &PacketMmapSettings, link: &Link) -> Result<Socket, PacketMmapError> {
    let name = &settings.ifname;
    let open =
        || packet::open().map_err(|e| PacketMmapError::raw(format!("open a socket on {name}"), e));
    let (fd, sender, direct) = (open()?, open()?, open()?);
    set(fd.as_fd(), PACKET_IGNORE_OUTGOING, 1, "leave out the frames that it sends")?;
    let header = configure(fd.as_fd(), settings)?;
    let _same = configure(sender.as_fd(), settings)?;
    let _same = configure_direct(direct.as_fd(), settings)?;
    let receive = geometry::receive(settings);
    // ORDERING: a number of its own; a change beside this makes frames go the slower way.
    let transmit = geometry::transmit(link.mtu().load(Ordering::Relaxed));
    for (fd, option, ring) in
        [(&fd, libc::PACKET_RX_RING, &receive), (&sender, libc::PACKET_TX_RING, &transmit)]
    {
        packet::set_ring(fd.as_fd(), option, ring).map_err(|e| ring_error(settings, e))?;
    }
    let unmapped =
        |error| PacketMmapError::raw(format!("map the rings of interface {name}"), error);
    let receive = map_receive(fd.as_fd(), &receive).map_err(unmapped)?;
    let ring = map_transmit(sender.as_fd(), &transmit).map_err(unmapped)?;
    packet::keep_out(fd.as_fd())
        .map_err(|e| PacketMmapError::raw(format!("filter frames of interface {name}"), e))?;
    // Without a protocol nothing is received.
    for (socket, protocol) in [(&fd, ALL), (&sender, 0), (&direct, 0)] {
        packet::bind(socket.as_fd(), link.index(), protocol)
            .map_err(|e| PacketMmapError::raw(format!("bind to interface {name}"), e))?;
    }
    check_ethernet(name, fd.as_fd())?;
    // An interface that is down says so at once; it is brought up later.
    let _ = rustix::net::sockopt::socket_error(&fd);
    let direct = Direct { fd: direct, header };
    let sender = Sender { fd: Arc::new(sender), ring };
    Ok(Socket { fd: Arc::new(fd), receive, sender, direct })
}

/// What has to be set before the rings are made.
fn configure(
    fd: BorrowedFd<'_>,
    settings: &PacketMmapSettings,
) -> Result<VnetHeader, PacketMmapError> {
    let version = libc::tpacket_versions::TPACKET_V3;
    set(fd, libc::PACKET_VERSION, i32::try_from(version as u32).unwrap_or(2), "use TPACKET_V3")?;
    configure_direct(fd, settings)
}

/// What both kinds of sockets need to send. Which header comes before frames.
fn configure_direct(
    fd: BorrowedFd<'_>,
    settings: &PacketMmapSettings,
) -> Result<VnetHeader, PacketMmapError> {
    direct::configure(fd, (settings.short_header, true))
        .map_err(|Refused { what, error }| refused(what, error))
}

fn set(
    fd: BorrowedFd<'_>,
    option: libc::c_int,
    value: i32,
    what: &'static str,
) -> Result<(), PacketMmapError> {
    packet::set_number(fd, option, value).map_err(|error| refused(what, error))
}

fn refused(what: &'static str, error: io::Error) -> PacketMmapError {
    match error.raw_os_error() {
        Some(libc::ENOPROTOOPT | libc::EINVAL) => PacketMmapError::Kernel(what),
        _ => PacketMmapError::raw(what, error),
    }
}

fn ring_error(settings: &PacketMmapSettings, error: io::Error) -> PacketMmapError {
    let PacketMmapSettings { queues, blocks, block_size: size, .. } = *settings;
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::ENOBUFS) => PacketMmapError::Memory { queues, blocks, size },
        _ => PacketMmapError::raw(format!("make the rings of {}", settings.ifname), error),
    }
}

/// Bytes of a ring.
fn bytes(ring: &RingRequest) -> usize {
    (ring.block_size as usize).saturating_mul(ring.blocks as usize)
}

/// Maps the ring of a socket that receives.
fn map_receive(fd: BorrowedFd<'_>, ring: &RingRequest) -> io::Result<ReceiveRing> {
    let map = map_fd(fd, bytes(ring), 0, true)?;
    receive_ring(&map, ring)
}

/// Maps the ring of a socket that sends.
fn map_transmit(fd: BorrowedFd<'_>, ring: &RingRequest) -> io::Result<TransmitRing> {
    let map = map_fd(fd, bytes(ring), 0, true)?;
    transmit_ring(&map, 0, ring)
}

fn receive_ring(map: &SharedMap, ring: &RingRequest) -> io::Result<ReceiveRing> {
    let blocks = SharedSlots::new(map, 0, ring.blocks, ring.block_size);
    blocks.map(ReceiveRing::new).map_err(io::Error::other)
}

fn transmit_ring(map: &SharedMap, at: usize, ring: &RingRequest) -> io::Result<TransmitRing> {
    let slots = SharedSlots::new(map, at, ring.frames, ring.frame_size);
    slots.map(TransmitRing::new).map_err(io::Error::other)
}

/// Maps the rings of sockets that another process opened: with no `sender` both are of `fd`, and
/// stand one behind the other.
pub(super) fn map_anew(
    fd: &Arc<OwnedFd>,
    sender: Option<OwnedFd>,
    (receive, transmit): (&RingRequest, &RingRequest),
) -> io::Result<(ReceiveRing, Sender)> {
    if let Some(sender) = sender {
        let ring = map_transmit(sender.as_fd(), transmit)?;
        return Ok((map_receive(fd.as_fd(), receive)?, Sender { fd: Arc::new(sender), ring }));
    }
    let first = bytes(receive);
    let map = map_fd(fd.as_fd(), first.saturating_add(bytes(transmit)), 0, true)?;
    let ring = transmit_ring(&map, first, transmit)?;
    Ok((receive_ring(&map, receive)?, Sender { fd: Arc::clone(fd), ring }))
}

/// Joins the group of this port's sockets; the first one makes it, with an id that nobody has.
fn join_group(
    fd: BorrowedFd<'_>,
    group: Option<u32>,
    settings: &PacketMmapSettings,
) -> Result<u32, PacketMmapError> {
    let failed = |error| {
        PacketMmapError::raw(format!("join the fan-out group of {}", settings.ifname), error)
    };
    let common = FANOUT_HASH | FANOUT_IGNORE_OUTGOING;
    let value = group.map_or(FANOUT_UNIQUE_ID, |id| id) | common;
    packet::set_number(fd, libc::PACKET_FANOUT, value.cast_signed()).map_err(failed)?;
    let joined = packet::number(fd, libc::PACKET_FANOUT).map_err(failed)?;
    Ok(joined & 0xffff)
}
