//! The sockets of an interface.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use port::QueueCounters;
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XDP_PGOFF_RX_RING,
    XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpOptionsFlags,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, sockopt};
use serde::{Deserialize, Serialize};
use virtq::mem::MapError;

use crate::direct::{Direct, Refused};
use crate::interface::Link;
use crate::sys::xdp::{self, Consumer, Desc, Producer};

use super::attach::Hook;
use super::egress::{AfXdpEgress, Outgoing};
use super::ingress::{AfXdpIngress, Incoming};
use super::layout::{CHUNK, RX_FRAMES, TX_FRAMES};
use super::umem::{InFlight, Knows, Lease, Umem, Umems};
use super::{AfXdpError, AfXdpSettings, KernelCounts, KernelDrops, Mode};

/// Bytes of `struct xsk_tx_metadata`.
pub(super) const METADATA: u32 = 24;
/// Bytes of frames on their way out that the kernel keeps: more than the chunks to send can take.
const SEND_BUFFER: usize = 32 << 20;
/// The largest MTU whose frames, with a tag, fit into a chunk behind the kernel's headroom.
const MTU_OF_ONE_CHUNK: u32 = CHUNK - 256 - 18;
/// Microseconds that one call polls the driver.
const BUSY_POLL_US: u32 = 20;
/// The pause between two tries to get a queue that is in use.
const BUSY_WAIT: Duration = Duration::from_millis(10);

/// The sockets of one queue and their rings.
///
/// Frames leave by a socket of their own, which no worker waits for: whenever the kernel is done
/// with a frame, it tells who waits for the frame's socket, and that is a tenth of all that it does
/// for one of 64 bytes.
#[derive(Debug)]
pub(super) struct Opened {
    fds: Fds,
    fill: Producer<u64>,
    rx: Consumer<Desc>,
    tx: Producer<Desc>,
    completion: Consumer<u64>,
}

/// The sockets of one queue.
#[derive(Debug, Clone)]
pub(super) struct Fds {
    /// Has the rings for frames that arrive, and the UMEM.
    pub(super) receive: Arc<OwnedFd>,
    /// Has the ring of frames to send. From a process that had one socket for both, the same.
    pub(super) send: Arc<OwnedFd>,
    /// Frames that the kernel dropped when somebody but the egress let it look at that ring.
    pub(super) lost: Arc<AtomicU32>,
}

impl Fds {
    pub(super) fn new(receive: Arc<OwnedFd>, send: Arc<OwnedFd>) -> Self {
        Self { receive, send, lost: Arc::default() }
    }

    /// Lets the kernel look at the ring of frames to send.
    pub(super) fn poke_tx(&self) -> Poked {
        poked(rustix::net::send(&self.send, &[], SendFlags::DONTWAIT).map(drop))
    }

    /// The same for who is not the egress, which counts what was lost.
    pub(super) fn nudge_tx(&self) -> Poked {
        let poked = self.poke_tx();
        if poked == Poked::Lost {
            // ORDERING: a number of its own.
            let _ = self.lost.fetch_add(1, Ordering::Relaxed);
        }
        poked
    }
}

/// A socket to receive that is not bound yet.
struct Unbound(OwnedFd);

/// How the sockets of an interface are bound.
struct Way<'a> {
    umems: &'a Umems,
    link: &'a Link,
    settings: &'a AfXdpSettings,
    /// The program is behind the driver.
    hook: Hook,
}

impl Unbound {
    fn new(busy_poll: bool) -> Result<Self, AfXdpError> {
        let fd = open_socket()?;
        let rings = || -> Result<_, Errno> {
            sockopt::set_xdp_umem_fill_ring_size(&fd, RX_FRAMES)?;
            sockopt::set_xdp_umem_completion_ring_size(&fd, TX_FRAMES)?;
            sockopt::set_xdp_rx_ring_size(&fd, RX_FRAMES)
        };
        rings().map_err(|error| no_rings(error.into()))?;
        if busy_poll {
            let burst = u32::try_from(port::BURST_MAX).unwrap_or(64);
            xdp::set_busy_poll(fd.as_fd(), BUSY_POLL_US, burst)
                .map_err(|error| AfXdpError::admin("set busy polling", error))?;
        }
        Ok(Self(fd))
    }

    /// Binds it to a queue, with all that have the memory already.
    fn bind(&self, umem: &Umem, way: &Way<'_>, queue: u32) -> Result<(), AfXdpError> {
        let Way { umems, link, settings, .. } = way;
        for other in umem.sockets() {
            let flags = SocketAddrXdpFlags::XDP_SHARED_UMEM;
            let addr = SocketAddrXdp::new(flags, link.index(), queue);
            let addr = SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: other.as_fd() };
            match bind_to(self, &addr, (umems, settings.patience)) {
                // That one has lost its interface.
                Err(Errno::BADF) => {}
                result => return result.map_err(|e| bind_error(link, queue, settings.mode, e)),
            }
        }
        self.bind_first(umem, way, queue)
    }

    /// Binds it to a queue, and tells the kernel of the memory.
    fn bind_first(&self, umem: &Umem, way: &Way<'_>, queue: u32) -> Result<(), AfXdpError> {
        let Way { umems, link, settings, hook } = way;
        let metadata = umem.register(&self.0)?;
        let mode = match (settings.mode, hook) {
            (Mode::ZeroCopy, _) => SocketAddrXdpFlags::XDP_ZEROCOPY,
            // The kernel takes zero-copy if the driver can.
            (Mode::Auto, Hook::Native) if umem.name().is_none() => SocketAddrXdpFlags::empty(),
            _ => SocketAddrXdpFlags::XDP_COPY,
        };
        let flags = mode | SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP;
        let to = |flags| SocketAddrXdp::new(flags, link.index(), queue);
        let waits = (*umems, settings.patience);
        // Before Linux 6.6 a frame has one chunk.
        let spread = match bind_to(self, &to(flags | SocketAddrXdpFlags::XDP_USE_SG), waits) {
            Ok(()) => Ok(true),
            // Nor on a zero-copy device whose driver knows no such frames.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                bind_to(self, &to(flags), waits).map(|()| false)
            }
            Err(error) => Err(error),
        };
        let spread = spread.map_err(|error| bind_error(link, queue, settings.mode, error))?;
        umem.set_knows(Knows { metadata, spread });
        Ok(())
    }

    /// Now that it is bound: opens the socket to send, on the same queue and the same memory.
    fn complete(self, link: &Link, queue: u32) -> Result<Opened, AfXdpError> {
        let send = open_socket()?;
        sockopt::set_xdp_tx_ring_size(&send, TX_FRAMES).map_err(|error| no_rings(error.into()))?;
        // What the kernel cannot do here costs calls, not frames.
        let _old_kernel = xdp::set_tx_budget(send.as_fd(), TX_FRAMES);
        if sockopt::set_socket_send_buffer_size_force(&send, SEND_BUFFER).is_err() {
            let _best = sockopt::set_socket_send_buffer_size(&send, SEND_BUFFER);
        }
        let addr = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_SHARED_UMEM, link.index(), queue);
        let addr = SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: self.0.as_fd() };
        bind(&send, &addr).map_err(|error| {
            let name = link.name();
            AfXdpError::raw(format!("send on queue {queue} of interface {name}"), error.into())
        })?;
        Opened::anew(self.0, Some(send)).map_err(no_rings)
    }
}

fn open_socket() -> Result<OwnedFd, AfXdpError> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, flags, None)
        .map_err(|error| AfXdpError::raw("open an AF_XDP socket", error.into()))
}

fn no_rings(error: io::Error) -> AfXdpError {
    AfXdpError::raw("make the rings of an AF_XDP socket", error)
}

impl Opened {
    /// Of bound sockets, which another process may have opened; without `send` one for both.
    pub(super) fn anew(receive: OwnedFd, send: Option<OwnedFd>) -> io::Result<Self> {
        let receive = Arc::new(receive);
        let send = send.map_or_else(|| Arc::clone(&receive), Arc::new);
        let at = sockopt::xdp_mmap_offsets(&receive)?;
        let (fd, tx) = (receive.as_fd(), sockopt::xdp_mmap_offsets(&send)?.tx);
        let fill = Producer::map(fd, XDP_UMEM_PGOFF_FILL_RING, &at.fr, RX_FRAMES)?;
        let rx = Consumer::map(fd, XDP_PGOFF_RX_RING, &at.rx, RX_FRAMES)?;
        let tx = Producer::map(send.as_fd(), XDP_PGOFF_TX_RING, &tx, TX_FRAMES)?;
        let completion = Consumer::map(fd, XDP_UMEM_PGOFF_COMPLETION_RING, &at.cr, TX_FRAMES)?;
        Ok(Self { fds: Fds::new(receive, send), fill, rx, tx, completion })
    }

    /// The socket that receives.
    pub(super) fn receive(&self) -> &Arc<OwnedFd> {
        &self.fds.receive
    }

    /// What the kernel has of the frames to send.
    pub(super) fn in_flight(&self) -> InFlight {
        InFlight::new(self.tx.positions(), self.completion.kernel_position())
    }
}

/// Whether the kernel surely sends copies of our frames: then it is done with them when it has
/// taken them. For other devices it may send the pages themselves (`IFF_TX_SKB_NO_LINEAR`).
fn gets_copies(link: &Link) -> bool {
    let driver = link.driver().0;
    ["veth", "macvlan", "ipvlan", "tun", "dummy", "bridge"].contains(&driver.as_str())
}

/// Both halves of all queues, and what says that another process has them.
pub(super) type Halves = (Vec<(AfXdpIngress, AfXdpEgress)>, Arc<AtomicBool>);

/// All sockets of an interface.
#[derive(Debug)]
pub(super) struct Queues {
    opened: Vec<Opened>,
    /// Their places in the memory.
    leases: Vec<Arc<Lease>>,
    pub(super) can: Abilities,
    /// What the large frames of the only queue go by.
    large: Option<Direct>,
}

/// What the kernel and the device can do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Abilities {
    /// Frames to send can carry what is left to do on them.
    pub(super) metadata: bool,
    /// Frames can have several chunks.
    pub(super) spread: bool,
    busy_poll: bool,
    /// The device writes into the UMEM.
    pub(super) zero_copy: bool,
    /// Frames are marked with how they are to be cut.
    #[serde(default)]
    marked: bool,
}

/// Which chunks of a queue are ours, not the kernel's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ours {
    /// Of frames that arrived, to be given back.
    pub(super) taken: Vec<u32>,
    /// For frames to send, and free. The one that was used last comes first.
    pub(super) free: Vec<u32>,
}

impl Ours {
    /// All of them.
    pub(super) fn all() -> Self {
        Self { taken: (0..RX_FRAMES).collect(), free: (0..TX_FRAMES).rev().collect() }
    }

    /// Whether they can be.
    pub(super) fn is_valid(&self) -> bool {
        let within = |chunks: &[u32], most: u32| {
            chunks.len() <= most as usize && chunks.iter().all(|chunk| *chunk < most)
        };
        within(&self.taken, RX_FRAMES) && within(&self.free, TX_FRAMES)
    }
}

impl Queues {
    /// Opens and binds one socket for each queue, each in a place of the memory; `umems` are what
    /// queues that were closed may have been in.
    pub(super) fn open(
        (umems, umem, leases): (&Umems, &Umem, Vec<Lease>),
        link: &Link,
        settings: &AfXdpSettings,
        (hook, marked): (Hook, bool),
    ) -> Result<Self, AfXdpError> {
        let way = Way { umems, link, settings, hook };
        let mut opened = Vec::with_capacity(leases.len());
        let mut zero_copy = false;
        for queue in 0..u32::from(settings.queues) {
            let next = Unbound::new(settings.busy_poll)?;
            next.bind(umem, &way, queue)?;
            zero_copy = sockopt::xdp_options(&next.0)
                .is_ok_and(|options| options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY));
            let next = next.complete(link, queue)?;
            umem.bound(next.receive());
            opened.push(next);
        }
        let Knows { metadata, spread } =
            umem.knows().unwrap_or(Knows { metadata: false, spread: false });
        // ORDERING: a number of its own.
        let mtu = link.mtu().load(Ordering::Relaxed);
        if !spread && mtu > MTU_OF_ONE_CHUNK {
            return Err(AfXdpError::Mtu { name: link.name(), mtu });
        }
        // A driver without metadata of its own would not look at it.
        let metadata = metadata && !zero_copy;
        let busy_poll = settings.busy_poll;
        let can = Abilities { metadata, spread, busy_poll, zero_copy, marked };
        Ok(Self::of((opened, leases), can, (link, large(link, settings, zero_copy))))
    }

    /// Queues that are open, which another process may have opened.
    pub(super) fn of(
        (opened, leases): (Vec<Opened>, Vec<Lease>),
        can: Abilities,
        (link, large): (&Link, Option<Direct>),
    ) -> Self {
        if !gets_copies(link) {
            for (lease, queue) in leases.iter().zip(&opened) {
                lease.watch(queue.in_flight());
            }
        }
        let leases = leases.into_iter().map(Arc::new).collect();
        Self { opened, leases, can, large }
    }

    /// Their places in the memory, by queue.
    pub(super) fn leases(&self) -> &[Arc<Lease>] {
        &self.leases
    }

    /// The sockets, by queue.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Fds> {
        self.opened.iter().map(|opened| &opened.fds)
    }

    /// Divides the queues into their halves; `ours` says which chunks are in our hands. With them
    /// comes what says that another process has them.
    pub(super) fn into_halves(
        self,
        umem: &Umem,
        link: &Link,
        (counters, ours): (&[Arc<QueueCounters>], Vec<Ours>),
    ) -> Result<Halves, MapError> {
        let left = Arc::new(AtomicBool::new(false));
        let name: Arc<str> = link.name().into();
        let mut halves = Vec::with_capacity(self.opened.len());
        let can = self.can;
        let mut large = self.large;
        let queues = self.opened.into_iter().zip(self.leases).zip(ours);
        for (((opened, lease), ours), counters) in queues.zip(counters) {
            let place = lease.place;
            let Opened { fds, fill, rx, mut tx, completion } = opened;
            let socket = Arc::new(Socket {
                fds,
                name: Arc::clone(&name),
                stuck: AtomicBool::new(tx.waiting() > 0),
                left: Arc::clone(&left),
                _lease: Some(lease),
            });
            let incoming = Incoming {
                socket: Arc::clone(&socket),
                counters: Arc::clone(counters),
                rx,
                fill,
                busy_poll: can.busy_poll,
                unfinished: !can.zero_copy,
                marked: can.marked,
            };
            let outgoing = Outgoing {
                socket,
                counters: Arc::clone(counters),
                mtu: Arc::clone(link.mtu()),
                carrier: Arc::clone(link.carrier()),
                tx,
                completion,
                metadata: can.metadata,
                zero_copy: can.zero_copy,
                spread: can.spread,
                large: large.take(),
            };
            let ingress = AfXdpIngress::new(incoming, umem.memory(), (place, ours.taken))?;
            let egress = AfXdpEgress::new(outgoing, umem.memory(), (place, ours.free))?;
            halves.push((ingress, egress));
        }
        Ok((halves, left))
    }
}

/// What large frames go by: a veth pair hands over at once whatever comes, so they leave in the
/// order in which they were sent. A network card has queues in which they could overtake what is
/// in the ring, or be overtaken. Without it they are cut here.
fn large(link: &Link, settings: &AfXdpSettings, zero_copy: bool) -> Option<Direct> {
    let (_, transmit) = link.queues();
    if zero_copy || settings.queues > 1 || transmit > 1 || link.driver().0 != "veth" {
        return None;
    }
    let said = |Refused { what, error }: &Refused| {
        tracing::warn!(interface = link.name(), what, %error, "large frames are cut by us");
    };
    Direct::open(link.index()).inspect_err(said).ok()
}

/// Binds a socket. A queue whose last socket was closed a moment ago is not free yet: the kernel
/// lets go of it behind our back, and first a place in `umems` does whose frames it still has.
fn bind_to(
    socket: &Unbound,
    addr: &impl SocketAddrArg,
    (umems, patience): (&Umems, Duration),
) -> Result<(), Errno> {
    let start = Instant::now();
    loop {
        match bind(&socket.0, addr) {
            Err(Errno::BUSY) if start.elapsed() < patience => {
                umems.look();
                std::thread::sleep(BUSY_WAIT);
            }
            result => return result,
        }
    }
}

fn bind_error(link: &Link, queue: u32, mode: Mode, error: Errno) -> AfXdpError {
    let name = link.name();
    match (error, mode) {
        (Errno::BUSY, _) => AfXdpError::Busy { name, queue },
        (Errno::OPNOTSUPP | Errno::INVAL, Mode::ZeroCopy) => {
            let (what, instead) = ("zero-copy", "copy");
            AfXdpError::Mode { name, driver: link.driver().0, what, instead }
        }
        _ => AfXdpError::raw(format!("bind to queue {queue} of interface {name}"), error.into()),
    }
}

/// What the kernel counted for a queue.
pub(super) fn counts(fds: &Fds) -> io::Result<KernelCounts> {
    let numbers = sockopt::xdp_statistics(&fds.receive)?;
    let sent = sockopt::xdp_statistics(&fds.send)?;
    let drops = KernelDrops {
        ring_full: numbers.rx_ring_full.unwrap_or(0),
        no_buffer: numbers.rx_dropped,
        refused: numbers.rx_invalid_descs.saturating_add(sent.tx_invalid_descs),
    };
    Ok(KernelCounts {
        drops,
        fill_ring_empty: numbers.rx_fill_ring_empty_descs.unwrap_or(0),
        tx_ring_empty: sent.tx_ring_empty_descs.unwrap_or(0),
    })
}

/// What both halves of a queue share.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fds: Fds,
    name: Arc<str>,
    /// Frames to send are left in the ring, and nobody may come to send more.
    pub(super) stuck: AtomicBool,
    /// Another process goes on with the rings.
    pub(super) left: Arc<AtomicBool>,
    /// Goes when the sockets are closed; none in tests.
    _lease: Option<Arc<Lease>>,
}

/// How a call to the kernel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Poked {
    /// It did what there was to do.
    Done,
    /// There is more to do, or something is in the way.
    Again,
    /// The same, and the frame that it took last was dropped: there is no carrier, or the device
    /// had no room. A device that reads the ring itself says something else with this.
    Lost,
    /// The interface is down.
    Down,
    /// The interface is gone.
    Gone(Errno),
}

impl Socket {
    /// One that leads nowhere.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of(fd: Arc<OwnedFd>, left: Arc<AtomicBool>) -> Self {
        let fds = Fds::new(Arc::clone(&fd), fd);
        Self { fds, name: "none".into(), stuck: AtomicBool::new(false), left, _lease: None }
    }

    /// Readable while frames have arrived.
    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fds.receive.as_fd()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Lets the kernel look for frames, and at the fill ring.
    pub(super) fn poke_rx(&self) -> Poked {
        let nothing: &mut [u8] = &mut [];
        poked(rustix::net::recv(&self.fds.receive, nothing, RecvFlags::DONTWAIT).map(drop))
    }
}

fn poked(result: Result<(), Errno>) -> Poked {
    match result {
        Ok(()) => Poked::Done,
        Err(Errno::BUSY) => Poked::Lost,
        Err(Errno::NETDOWN) => Poked::Down,
        Err(error @ (Errno::NXIO | Errno::BADF | Errno::NODEV)) => Poked::Gone(error),
        Err(_) => Poked::Again,
    }
}
