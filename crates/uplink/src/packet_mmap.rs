//! Any interface as a port, through packet sockets with mapped rings: no driver and no BPF needed.
//!
//! ```text
//!  interface ─► fan-out by flow ─► socket i: blocks of frames (TPACKET_V3) ─► PacketMmapIngress
//!            ◄──────────────────── socket i: ring of frames, one call a burst ◄ PacketMmapEgress
//! ```
//!
//! The interface stays the kernel's: its own stack sees the frames too, unless it has no address.
//! Frames that the kernel sends on the interface are not taken.
//!
//! **Offloads.** Both ways carry virtio-net headers. What a veth peer left undone, or the kernel's
//! GRO put together, goes into the switch as it is: unfinished checksums, frames of 64 KiB. What
//! guests leave undone is the kernel's to do; before Linux 6.2 all but USO, and less with
//! [`PacketMmapSettings::offloads`].
//! **Latency.** The kernel hands over a block when it is full or `retire_ms` old: at low rates a
//! frame waits that long.
//! **Limits.** At most [`QUEUES_MAX`] queues. Frames above what a block holds are dropped as
//! `kernel_truncated`.
//! **Trust.** `block` says how what the kernel wrote is checked.

mod block;
mod egress;
mod error;
mod geometry;
mod handover;
mod ingress;
mod ring;
mod socket;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{DropReason, OffloadSet, QueueCounters};

use crate::interface::{Link, Namespace};
use crate::sys::packet;

pub use egress::PacketMmapEgress;
pub use error::PacketMmapError;
pub use handover::{from_parts, parts};
pub use ingress::PacketMmapIngress;
use socket::Queue;

/// Walks `block` as if the kernel had written it, for the fuzzer. How many frames it has.
#[cfg(fuzzing)]
pub fn walk_any(block: &[u8]) -> usize {
    let bytes = u32::try_from(block.len()).unwrap_or(u32::MAX);
    let Some(description) = block.first_chunk() else { return 0 };
    let Ok(mut walk) = block::Walk::new(description, bytes) else { return 0 };
    let mut frames = 0_usize;
    while let Some(at) = walk.header_at() {
        let header = block.get(at as usize..).and_then(<[u8]>::first_chunk);
        let header = header.expect("a header within the block");
        let Ok(packet) = walk.take(header) else { break };
        let Some(packet) = packet else { continue };
        let frame = block.get(packet.start as usize..packet.end() as usize);
        assert_eq!(frame.map(<[u8]>::len), Some(packet.len as usize), "a frame within the block");
        frames = frames.saturating_add(1);
    }
    frames
}

/// The most queues of an interface: the kernel's limit of sockets in a fan-out group.
pub const QUEUES_MAX: u16 = 256;

/// Which interface to open, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketMmapSettings {
    /// The interface, which has to exist.
    pub ifname: String,
    /// Queue pairs: flows are spread over them.
    pub queues: u16,
    /// Bytes of a block of a receive ring: a multiple of the page size.
    pub block_size: u32,
    /// Blocks of a receive ring.
    pub blocks: u32,
    /// After how many milliseconds a block is handed over that is not full.
    pub retire_ms: u32,
    /// A network namespace: a name as `ip netns` knows it, or a path.
    pub netns: Option<String>,
    /// What is left to the kernel. What arrives is left undone as its sender wants.
    pub offloads: OffloadSet,
    /// Headers of 10 bytes as before Linux 6.4, to try what is done there.
    #[doc(hidden)]
    pub short_header: bool,
}

impl Default for PacketMmapSettings {
    /// One queue of 8 MiB, and the shortest wait. The interface has still to be named.
    ///
    /// At low rates a block holds what came within `retire_ms`: 64 of them last for 64 ms in which
    /// nobody reads, however few the frames are. A block of 128 KiB holds the largest frames.
    fn default() -> Self {
        Self {
            ifname: String::new(),
            queues: 1,
            block_size: 128 * 1024,
            blocks: 64,
            retire_ms: 1,
            netns: None,
            offloads: OffloadSet::ALL,
            short_header: false,
        }
    }
}

/// An open interface. Dropping the link before the queues restores what was changed; promiscuous
/// mode ends with the sockets.
#[derive(Debug)]
pub struct PacketMmap {
    /// The interface.
    pub link: Link,
    /// Both halves of each queue pair.
    pub queues: Vec<(PacketMmapIngress, PacketMmapEgress)>,
    /// What the kernel dropped, of each queue: for the control thread.
    pub kernel: Vec<KernelWatch>,
}

/// Opens the interface and brings it up. Each queue pair counts in its own `counters`.
///
/// # Errors
///
/// [`PacketMmapError`] says what is missing.
pub fn open(
    settings: &PacketMmapSettings,
    counters: &[Arc<QueueCounters>],
) -> Result<PacketMmap, PacketMmapError> {
    geometry::check(settings)?;
    if counters.len() != usize::from(settings.queues) {
        return Err(PacketMmapError::Queues(settings.queues));
    }
    let namespace = Namespace::open(settings.netns.as_deref())?;
    let (link, sockets) = namespace.run(|| open_here(settings, &namespace))??;
    let name: Arc<str> = settings.ifname.as_str().into();
    let mut queues = Vec::with_capacity(sockets.len());
    let mut kernel = Vec::with_capacity(sockets.len());
    for (socket, counters) in sockets.into_iter().zip(counters) {
        let queue = Queue {
            fd: socket.fd,
            name: Arc::clone(&name),
            mtu: Arc::clone(link.mtu()),
            cuts: Arc::clone(link.cuts()),
            counters: Arc::clone(counters),
            given_up: Arc::default(),
        };
        kernel.push(KernelWatch { queue: queue.clone(), freezes: 0, packets: 0 });
        let ingress = PacketMmapIngress::new(queue.clone(), socket.receive);
        let egress =
            PacketMmapEgress::new(queue, settings.offloads, (socket.sender, socket.direct));
        queues.push((ingress, egress));
    }
    Ok(PacketMmap { link, queues, kernel })
}

/// Opens link and sockets in the namespace of the calling thread.
fn open_here(
    settings: &PacketMmapSettings,
    namespace: &Namespace,
) -> Result<(Link, Vec<socket::Socket>), PacketMmapError> {
    let mut link = Link::find(namespace, &settings.ifname)?;
    // Without the right to open a socket, nothing is to be changed.
    socket::check_right(&settings.ifname)?;
    // Before Linux 6.13 only sockets on an interface that is up can be in a group.
    link.bring_up()?;
    let sockets = socket::open_all(settings, &link)?;
    Ok((link, sockets))
}

/// What the kernel did to the frames of a queue before they reached its ring. One thread asks.
#[derive(Debug)]
pub struct KernelWatch {
    queue: Queue,
    freezes: u64,
    packets: u64,
}

/// What was found new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelDrops {
    /// Frames that found no room in the ring.
    pub ring_full: u64,
    /// Frames that the kernel cannot describe to us: SCTP that is to be segmented.
    pub given_up: u64,
    /// How often the ring was full.
    pub freezes: u64,
}

impl KernelWatch {
    /// Asks the kernel what it dropped since the last time, counts that in the queue's counters as
    /// `kernel_ring_full` and `bad_offload`, and returns it.
    pub fn kernel_drops(&mut self) -> KernelDrops {
        use std::os::fd::AsFd;
        // Of a socket whose interface is gone too; if it fails all the same, nothing is known.
        let Ok(new) = packet::statistics(self.queue.fd.as_fd()) else {
            return KernelDrops::default();
        };
        let dropped = u64::from(new.drops);
        // ORDERING: a number of its own. What the worker has not seen yet counts as a full ring,
        // and makes one frame less of a later one count so.
        let seen = self.queue.given_up.swap(0, Ordering::Relaxed);
        let given_up = seen.min(dropped);
        let _ = self.queue.given_up.fetch_add(seen.wrapping_sub(given_up), Ordering::Relaxed);
        let ring_full = dropped.wrapping_sub(given_up);
        let drops = KernelDrops { ring_full, given_up, freezes: u64::from(new.freezes) };
        self.packets = self.packets.wrapping_add(u64::from(new.packets));
        self.freezes = self.freezes.wrapping_add(drops.freezes);
        for (reason, count) in
            [(DropReason::KernelRingFull, ring_full), (DropReason::BadOffload, given_up)]
        {
            if count > 0 {
                self.queue.counters.kernel.dropped(reason, count);
            }
        }
        drops
    }

    /// How often the ring was full as a whole.
    pub fn freezes(&self) -> u64 {
        self.freezes
    }

    /// Frames that came for the socket so far, those that were dropped included.
    pub fn packets(&self) -> u64 {
        self.packets
    }
}
