//! An interface's packet sockets as fds, and where in their rings we are.
//!
//! Frames that the kernel wrote into a ring stay there; frames to send are settled when a burst
//! ends. So nothing is lost and nothing is sent twice.

use std::sync::Arc;

use port::{Ingress, OffloadSet, QueueCounters};
use serde::{Deserialize, Serialize};

use crate::direct::{Direct, VnetHeader};
use crate::interface::{Link, LinkParts};
use crate::parts::{Collected, Parts, PartsError, Remaining, check_queues};
use crate::sys::packet::RingRequest;

use super::egress::PacketMmapEgress;
use super::ingress::{PacketMmapIngress, Position};
use super::socket::{Queue, map_anew};
use super::{KernelWatch, PacketMmap};

const KIND: &str = "packet-mmap";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    kind: String,
    link: LinkParts,
    /// Each queue has a socket to send, too.
    #[serde(default)]
    senders: bool,
    queues: Vec<QueueState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct QueueState {
    /// Bytes and number of the receive ring's blocks, and of the transmit ring's slots.
    block_size: u32,
    blocks: u32,
    slot_size: u32,
    slots: u32,
    receive: Position,
    header: VnetHeader,
    /// The slot that the kernel looks at next.
    head: u32,
    /// How often the receive ring was full.
    freezes: u64,
    /// Frames that came so far.
    #[serde(default)]
    packets: u64,
}

/// What an open interface is made of. Between this and the time when one of both goes on, nobody
/// may use the queues.
///
/// # Errors
///
/// [`PartsError`]: the process has no fds left.
pub fn parts<'a>(
    link: &Link,
    kernel: &[KernelWatch],
    queues: impl IntoIterator<Item = (&'a mut PacketMmapIngress, &'a mut PacketMmapEgress)>,
) -> Result<Parts, PartsError> {
    let mut fds = Collected::default();
    let link = link.parts(&mut fds)?;
    let (mut states, mut senders) = (Vec::new(), false);
    for ((ingress, egress), watch) in queues.into_iter().zip(kernel) {
        ingress.release();
        fds.add(watch.queue.fd.as_ref())?;
        // It may come from a process that had one socket for both rings.
        if !Arc::ptr_eq(&egress.socket, &watch.queue.fd) {
            senders = true;
            fds.add(egress.socket.as_ref())?;
        }
        fds.add(&egress.direct.fd)?;
        let (blocks, slots) = (&ingress.ring, &egress.ring);
        states.push(QueueState {
            block_size: blocks.block_bytes(),
            blocks: blocks.count(),
            slot_size: slots.slot_bytes(),
            slots: slots.count(),
            receive: ingress.position(),
            header: egress.direct.header,
            head: egress.head,
            freezes: watch.freezes,
            packets: watch.packets,
        });
    }
    fds.finish(&State { kind: KIND.to_owned(), link, senders, queues: states })
}

/// Puts together again what [`parts`] took apart, with these offloads: other ones hold at once.
/// Each queue pair counts in its own `counters`.
///
/// # Errors
///
/// [`PartsError`] says what does not fit.
pub fn from_parts(
    parts: Parts,
    offloads: OffloadSet,
    counters: &[Arc<QueueCounters>],
) -> Result<PacketMmap, PartsError> {
    let (state, mut fds) = Remaining::open::<State>(parts, KIND)?;
    check_queues(state.queues.len(), counters.len())?;
    let mut link = Link::from_parts(&state.link, &mut fds)?;
    let name: Arc<str> = link.name().into();
    let (mut queues, mut kernel) = (Vec::new(), Vec::new());
    let senders = state.senders;
    for (state, counters) in state.queues.into_iter().zip(counters) {
        let (fd, sender) = (Arc::new(fds.next()?), fds.next_if(senders)?);
        let direct = Direct { fd: fds.next()?, header: state.header };
        let (receive, transmit) = state.rings();
        let (receive, sender) = map_anew(&fd, sender, (&receive, &transmit))
            .map_err(|error| PartsError::Map { name: name.to_string(), error })?;
        let queue = Queue {
            fd,
            name: Arc::clone(&name),
            mtu: Arc::clone(link.mtu()),
            cuts: Arc::clone(link.cuts()),
            counters: Arc::clone(counters),
            given_up: Arc::default(),
        };
        kernel.push(KernelWatch {
            queue: queue.clone(),
            freezes: state.freezes,
            packets: state.packets,
        });
        let ingress = PacketMmapIngress::at(queue.clone(), receive, &state.receive)
            .map_err(PartsError::state)?;
        let mut egress = PacketMmapEgress::new(queue, offloads, (sender, direct));
        egress.head = state.head.min(state.slots.saturating_sub(1));
        queues.push((ingress, egress));
    }
    link.own(&state.link);
    Ok(PacketMmap { link, queues, kernel })
}

impl QueueState {
    fn rings(&self) -> (RingRequest, RingRequest) {
        let receive = RingRequest {
            block_size: self.block_size,
            blocks: self.blocks,
            ..RingRequest::default()
        };
        // Slots follow each other without gaps: as if each were a block.
        let transmit = RingRequest {
            block_size: self.slot_size,
            blocks: self.slots,
            frame_size: self.slot_size,
            frames: self.slots,
            ..RingRequest::default()
        };
        (receive, transmit)
    }
}
