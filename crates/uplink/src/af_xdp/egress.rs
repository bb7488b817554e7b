//! Frames to the interface: written into the UMEM, sent with one call for a burst.
//!
//! ```text
//!  picked ─► Coalescer: segments of a flow put together (if large frames can go)
//!         ─► Adapter: what is left of the checksums
//!         ─► UMEM, tx ring ──────────────────── one call a burst
//!         └► large frames: a packet socket ──── one call each, after what stands in the ring
//! ```
//!
//! `AF_XDP` takes nothing above the MTU. A veth pair would take a large TCP frame whole, which
//! saves the kernel nearly all of its work; so there such frames go by a packet socket beside the
//! ring, and segments are put together for it.

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use port::{
    Adapter, Batch, Coalescer, DropReason, Egress, Frame, Gso, Notified, Offload, OffloadSet,
    QueueCounters, QueueFault, Way,
};
use virtq::mem::{MapError, SharedMap, SharedSlots};

use crate::direct::{Direct, room};
use crate::sys::xdp::{Consumer, Desc, Producer};
use crate::vnet::{kernel_knows_uso, segment_bytes};
use port::finish_checksum;

use super::layout::{Area, CHUNK, PARTS_MAX, TX_FRAMES, TX_ROOM, TX_SKIP};
use super::socket::{METADATA, Poked, Socket};

/// Calls to the kernel in one burst that finds no free chunk.
const CALLS_FOR_ROOM: u32 = 4;
/// Calls to the kernel for one burst: it takes 32 frames in each before Linux 6.17.
const CALLS_FOR_BURST: u32 = 64;

const METADATA_BYTES: usize = METADATA as usize;
/// `XDP_TXMD_FLAGS_CHECKSUM`: the first word of the metadata.
const CHECKSUM: u64 = libc::XDP_TXMD_FLAGS_CHECKSUM as u64;

/// What an [`AfXdpEgress`] is made of.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) counters: Arc<QueueCounters>,
    pub(super) mtu: Arc<AtomicU32>,
    pub(super) carrier: Arc<AtomicBool>,
    pub(super) tx: Producer<Desc>,
    pub(super) completion: Consumer<u64>,
    /// The kernel finishes checksums, if it is told where.
    pub(super) metadata: bool,
    /// The device reads the ring itself.
    pub(super) zero_copy: bool,
    /// A frame can have several chunks.
    pub(super) spread: bool,
    /// Takes large frames, if they can go.
    pub(super) large: Option<Direct>,
    /// Dropped last: it has the place that the rings are about.
    pub(super) socket: Arc<Socket>,
}

/// Frames to the interface.
#[derive(Debug)]
pub struct AfXdpEgress {
    parts: Outgoing,
    area: Area,
    slots: SharedSlots,
    /// Chunks that hold nothing: the one that was used last comes first.
    pub(super) free: Vec<u32>,
    /// Frames were put since the last call.
    pending: bool,
    /// The interface was down at the last call.
    down: bool,
    /// How far the kernel said that it was in the ring when we looked last.
    said: u32,
    /// So many frames from there on it has dropped since, and not said so: before Linux 6.17 it
    /// says it with the next call.
    unsaid: u32,
    /// What a call without an answer met, to be told by the next one.
    fault: Option<QueueFault>,
    /// What the kernel takes unfinished.
    takes: OffloadSet,
    adapter: Adapter,
    coalescer: Coalescer,
}

impl AfXdpEgress {
    pub(super) fn new(
        parts: Outgoing,
        map: &SharedMap,
        (place, free): (u32, Vec<u32>),
    ) -> Result<Self, MapError> {
        let area = Area::transmit(place);
        let slots = SharedSlots::new(map, area.offset(), area.chunks(), CHUNK)?;
        let takes = match parts.large {
            Some(_) => OffloadSet { uso: kernel_knows_uso(), ..OffloadSet::ALL },
            None => OffloadSet { csum: parts.metadata, ..OffloadSet::NONE },
        };
        Ok(Self {
            area,
            slots,
            free,
            pending: false,
            down: false,
            said: parts.tx.seen(),
            unsaid: 0,
            fault: None,
            takes,
            adapter: Adapter::default(),
            coalescer: Coalescer::default(),
            parts,
        })
    }

    /// What large frames go by.
    pub(super) fn large(&self) -> Option<&Direct> {
        self.parts.large.as_ref()
    }

    /// Takes back the chunks of frames that were sent.
    #[inline(always)]
    fn reap(&mut self) -> Result<(), QueueFault> {
        let available = self.parts.completion.available(TX_FRAMES);
        for index in 0..available {
            let addr = self.parts.completion.peek(index);
            match self.area.chunk(addr) {
                Some(chunk) if self.free.len() < TX_FRAMES as usize => self.free.push(chunk),
                _ => return Err(self.fault(format!("{addr:#x} is not a chunk on its way"))),
            }
        }
        if available > 0 {
            self.parts.completion.consume(available);
        }
        Ok(())
    }

    #[cold]
    fn fault(&self, error: String) -> QueueFault {
        QueueFault::Host { what: format!("send to interface {}", self.parts.socket.name()), error }
    }

    /// Calls the kernel until it has taken what was put, or does not take more.
    fn kick(&mut self, calls: u32) -> Result<(), QueueFault> {
        let _ = self.waiting();
        let mut before = u32::MAX;
        for _ in 0..calls {
            let poked = self.parts.socket.fds.poke_tx();
            if poked == Poked::Lost {
                self.lost(1);
            }
            self.down = poked == Poked::Down;
            if let Poked::Gone(errno) = poked {
                return Err(self.fault(io::Error::from(errno).to_string()));
            }
            let waiting = self.waiting();
            if waiting == 0 || waiting >= before || self.down {
                break;
            }
            before = waiting;
        }
        Ok(())
    }

    /// Frames in the ring of which the kernel does not say that it took them.
    #[inline(always)]
    fn waiting(&mut self) -> u32 {
        let waiting = self.parts.tx.waiting();
        if self.said != self.parts.tx.seen() {
            self.said = self.parts.tx.seen();
            self.unsaid = 0;
        }
        waiting
    }

    /// Counts that of the frames that the kernel took, the last `frames` ones were dropped.
    #[cold]
    fn lost(&mut self, frames: u32) {
        // Without copies a call has nothing to do with a frame.
        if self.parts.zero_copy {
            return;
        }
        let _ = self.parts.tx.waiting();
        let bytes = if self.said == self.parts.tx.seen() {
            let before = self.unsaid;
            self.unsaid = before.saturating_add(frames);
            frames_of(self.parts.tx.left(), before, frames).1
        } else {
            last_frames(self.parts.tx.taken(), frames)
        };
        self.parts.counters.egress.lost(frames.into(), bytes);
    }

    /// Counts what others found lost. Which frames they met is not known any more.
    #[inline(always)]
    pub(super) fn settle(&mut self) {
        // ORDERING: a number of its own.
        if self.parts.socket.fds.lost.load(Ordering::Relaxed) != 0 {
            // ORDERING: the same.
            let frames = self.parts.socket.fds.lost.swap(0, Ordering::Relaxed);
            self.lost(frames);
        }
    }

    /// Chunks for one frame: calls the kernel if they are short, as often as `calls` still allows.
    #[inline(always)]
    fn has_room(&mut self, parts: u32, calls: &mut u32) -> Result<bool, QueueFault> {
        if self.free.len() >= parts as usize {
            return Ok(true);
        }
        self.make_room(parts, calls)
    }

    #[cold]
    #[inline(never)]
    fn make_room(&mut self, parts: u32, calls: &mut u32) -> Result<bool, QueueFault> {
        loop {
            self.reap()?;
            if self.free.len() >= parts as usize {
                return Ok(true);
            }
            if *calls == 0 {
                return Ok(false);
            }
            *calls = calls.saturating_sub(1);
            self.parts.tx.publish();
            self.kick(1)?;
        }
    }

    /// Puts one frame into the ring; the reason if it cannot go.
    #[inline(always)]
    fn put(
        &mut self,
        batch: &Batch<'_>,
        frame: &Frame,
        (mtu, calls): (u32, &mut u32),
    ) -> Result<Result<(), DropReason>, QueueFault> {
        let len = frame.len();
        if segment_bytes(frame) > room(frame, mtu) {
            return Ok(Err(DropReason::Oversize));
        }
        let body = batch.body_piece(frame);
        let simple = len <= TX_ROOM && frame.offload.is_none();
        if !simple || (body.is_none() && frame.body.len > 0) {
            return self.put_other(batch, frame, calls);
        }
        if !self.has_room(1, calls)? {
            return Ok(Err(DropReason::UplinkBusy));
        }
        let body = if frame.body.len > 0 { body } else { None };
        let Some(chunk) = self.free.pop() else { return Ok(Err(DropReason::UplinkBusy)) };
        if let Some(piece) = self.slots.piece(chunk, TX_SKIP) {
            let _fits = piece.write_frame(&[], frame.head(), body);
        }
        self.parts.tx.put(Desc { addr: self.area.address(chunk, TX_SKIP), len, options: 0 });
        Ok(Ok(()))
    }

    /// Puts a frame that has several chunks, or something left to do.
    #[cold]
    #[inline(never)]
    fn put_other(
        &mut self,
        batch: &Batch<'_>,
        frame: &Frame,
        calls: &mut u32,
    ) -> Result<Result<(), DropReason>, QueueFault> {
        if frame.offload.gso != Gso::None {
            return self.send_large(batch, frame);
        }
        let parts = frame.len().div_ceil(TX_ROOM);
        if parts > if self.parts.spread { PARTS_MAX.saturating_sub(1) } else { 1 } {
            return Ok(Err(DropReason::Oversize));
        }
        if !self.has_room(parts, calls)? {
            return Ok(Err(DropReason::UplinkBusy));
        }
        if !frame.offload.needs_csum || self.tell(frame) {
            let told = frame.offload.needs_csum.then_some(&frame.offload);
            self.write(batch, frame, told);
            return Ok(Ok(()));
        }
        let mut finished = frame.clone();
        if !finish_checksum(&mut finished, batch.body(frame)) {
            return Ok(Err(DropReason::BadOffload));
        }
        self.write(batch, &finished, None);
        Ok(Ok(()))
    }

    /// Sends a large frame by the packet socket, behind all that stands in the ring.
    fn send_large(
        &mut self,
        batch: &Batch<'_>,
        frame: &Frame,
    ) -> Result<Result<(), DropReason>, QueueFault> {
        self.parts.tx.publish();
        if self.parts.tx.waiting() > 0 {
            self.kick(CALLS_FOR_BURST)?;
            if self.down {
                return Ok(Err(DropReason::UplinkError));
            }
            if self.parts.tx.waiting() > 0 {
                // It would overtake them.
                return Ok(Err(DropReason::UplinkBusy));
            }
        }
        let Some(large) = &self.parts.large else { return Ok(Err(DropReason::BadOffload)) };
        large.send(batch, frame).map_err(|error| self.fault(error.to_string()))
    }

    /// Whether the kernel can finish the frame's checksum: it must be within the first chunk.
    fn tell(&self, frame: &Frame) -> bool {
        let Offload { csum_start, csum_offset, .. } = frame.offload;
        let end = u32::from(csum_start).saturating_add(u32::from(csum_offset)).saturating_add(2);
        self.parts.metadata && end <= frame.len().min(TX_ROOM)
    }

    /// Writes a frame into as many chunks as it takes; the caller knows that they are there.
    fn write(&mut self, batch: &Batch<'_>, frame: &Frame, told: Option<&Offload>) {
        let mut left = frame.len();
        let mut body = batch.body(frame);
        let mut head = frame.head();
        let mut options = 0;
        while left > 0 {
            let Some(chunk) = self.free.pop() else { return };
            let here = left.min(TX_ROOM);
            if let Some(offload) = told.filter(|_| !head.is_empty()) {
                let mut writer = self.slots.writer(chunk, TX_SKIP.saturating_sub(METADATA));
                let _all = writer.write(&metadata(offload));
                options = libc::XDP_TX_METADATA;
            }
            let mut writer = self.slots.writer(chunk, TX_SKIP);
            let of_head = u32::try_from(writer.write(head)).unwrap_or(0);
            head = &[];
            let _all = writer.copy_from(&mut body, here.saturating_sub(of_head));
            left = left.saturating_sub(here);
            let more = if left > 0 { libc::XDP_PKT_CONTD } else { 0 };
            let addr = self.area.address(chunk, TX_SKIP);
            self.parts.tx.put(Desc { addr, len: here, options: options | more });
            options = 0;
        }
    }
}

impl Drop for AfXdpEgress {
    /// Frames that the kernel does not take in the end were not sent.
    fn drop(&mut self) {
        // ORDERING: set by the thread that drops this, or before it was told to.
        if self.parts.socket.left.load(Ordering::Relaxed) {
            return;
        }
        self.settle();
        let _ = self.kick(CALLS_FOR_BURST);
        self.settle();
        let (frames, bytes) = frames_of(self.parts.tx.left(), self.unsaid, u32::MAX);
        self.parts.counters.egress.lost(frames, bytes);
    }
}

/// How many frames, and their bytes, there are behind the first `skip` ones, at most `most`.
fn frames_of(descs: impl Iterator<Item = Desc>, skip: u32, most: u32) -> (u64, u64) {
    let (mut ends, mut bytes) = (0u32, 0u64);
    for desc in descs {
        if ends >= skip.saturating_add(most) {
            break;
        }
        if ends >= skip {
            bytes = bytes.wrapping_add(u64::from(desc.len));
        }
        ends = ends.wrapping_add(u32::from(desc.options & libc::XDP_PKT_CONTD == 0));
    }
    (ends.saturating_sub(skip).into(), bytes)
}

/// Bytes of the last `frames` frames; the last descriptor comes first.
fn last_frames(taken: impl Iterator<Item = Desc>, frames: u32) -> u64 {
    let (mut ends, mut bytes) = (0u32, 0u64);
    for desc in taken {
        ends = ends.wrapping_add(u32::from(desc.options & libc::XDP_PKT_CONTD == 0));
        if ends > frames {
            break;
        }
        bytes = bytes.wrapping_add(u64::from(desc.len));
    }
    bytes
}

/// `struct xsk_tx_metadata`: finish this checksum.
fn metadata(offload: &Offload) -> [u8; METADATA_BYTES] {
    let mut bytes = [0; METADATA_BYTES];
    let [s0, s1] = offload.csum_start.to_ne_bytes();
    let [o0, o1] = offload.csum_offset.to_ne_bytes();
    let flags = CHECKSUM.to_ne_bytes();
    for (place, byte) in bytes.iter_mut().zip(flags.into_iter().chain([s0, s1, o0, o1])) {
        *place = byte;
    }
    bytes
}

impl AfXdpEgress {
    /// Sends frames of which nothing is left to do but a checksum that the kernel is told of.
    fn send_fitting(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        // ORDERING: a number of its own; a frame beside a change of the MTU may see either.
        let mtu = self.parts.mtu.load(Ordering::Relaxed);
        let mut result = self.fault.clone().map_or_else(|| self.reap(), Err);
        if self.down && result.is_ok() {
            result = self.kick(1);
        }
        // ORDERING: a hint: a frame beside a change may see either.
        let no_way = self.down || !self.parts.carrier.load(Ordering::Relaxed);
        let (mut count, mut bytes) = (0u64, 0u64);
        let mut calls = CALLS_FOR_ROOM;
        for (done, index) in picked.iter().enumerate() {
            let Some(frame) = batch.frames().get(usize::from(*index)) else { continue };
            let put = match &result {
                Ok(()) if no_way || self.down => Ok(Err(DropReason::UplinkError)),
                Ok(()) => self.put(batch, frame, (mtu, &mut calls)),
                Err(fault) => Err(fault.clone()),
            };
            match put {
                Ok(Ok(())) => {
                    count = count.wrapping_add(1);
                    bytes = bytes.wrapping_add(u64::from(frame.len()));
                }
                Ok(Err(reason)) => self.parts.counters.egress.dropped(reason, 1),
                Err(fault) => {
                    let left = picked.len().saturating_sub(done) as u64;
                    self.parts.counters.egress.dropped(DropReason::UplinkError, left);
                    result = Err(fault);
                    break;
                }
            }
        }
        self.settle();
        if count > 0 {
            self.parts.tx.publish();
            self.pending = true;
            self.parts.counters.egress.sent_but_lost(DropReason::UplinkError, count, bytes);
        }
        result
    }
}

impl AfXdpEgress {
    /// Sends frames, put together where large ones can go.
    #[inline(never)]
    fn coalesce(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let mut coalescer = std::mem::take(&mut self.coalescer);
        let counters = Arc::clone(&self.parts.counters);
        // Who receives datagrams would have to take them apart again.
        let takes = OffloadSet { uso: false, ..self.takes };
        let way = (takes, &*counters.egress);
        let sent = coalescer.send(batch, picked, way, |batch, picked| self.adapt(batch, picked));
        self.coalescer = coalescer;
        sent
    }

    /// Sends frames; what the kernel does not take is adapted.
    fn adapt(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let mut adapter = std::mem::take(&mut self.adapter);
        let counters = Arc::clone(&self.parts.counters);
        let way =
            Way { takes: self.takes, lost: DropReason::UplinkError, counters: &counters.egress };
        let sent =
            adapter.send(batch, picked, &way, |batch, picked| self.send_fitting(batch, picked));
        self.adapter = adapter;
        sent
    }
}

impl Egress for AfXdpEgress {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if self.parts.large.is_some() && self.coalescer.wants(batch, picked) {
            return self.coalesce(batch, picked);
        }
        self.adapt(batch, picked)
    }

    fn notify(&mut self) -> Notified {
        if !self.pending {
            return Notified::Nobody;
        }
        self.pending = false;
        // A large frame may have had them sent.
        if self.parts.tx.needs_wakeup() && self.parts.tx.waiting() > 0 {
            self.fault = self.kick(CALLS_FOR_BURST).err();
            self.settle();
            let stuck = !self.down && self.parts.tx.waiting() > 0;
            if stuck {
                // ORDERING: a hint between the halves.
                self.parts.socket.stuck.store(true, Ordering::Relaxed);
            }
        }
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.parts.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use port::{DropReason, Egress, FrameBuf};
    use virtq::mem::SegStore;

    use crate::af_xdp::hostile::{Hostile, Which};

    /// A kernel before 6.17 does not say that it took a frame when it drops it.
    #[test]
    fn frames_that_are_dropped_by_a_kernel_that_does_not_say_so_count_once() {
        // How many are dropped, and how far the kernel says that it is then.
        for (dropped, said, more) in [(0, 0, 0), (2, 0, 0), (2, 2, 0), (2, 2, 1), (2, 0, 8)] {
            let Hostile { mut egress, ingress: _ingress, .. } = {
                let mut queue = Hostile::new();
                let mut frames = FrameBuf::default();
                for len in 60..70 {
                    let frame = frames.slot().unwrap();
                    frame.fill_private(&vec![2; len]);
                    frames.keep();
                }
                let picked: Vec<u16> = (0..10).collect();
                let sent = queue.egress.send(&frames.batch(SegStore::empty(), None), &picked);
                sent.unwrap();
                (0..dropped).for_each(|_| queue.egress.lost(1));
                queue.set_kernel(Which::Tx, said);
                let _ = queue.egress.kick(1);
                (0..more).for_each(|_| queue.egress.lost(1));
                queue
            };
            let counters = Arc::clone(egress.counters());
            let _ = egress.notify();
            drop(egress);
            counters.egress.sent_but_lost(DropReason::UplinkError, 100, 10_000);
            let mut totals = counters.read_ends();
            counters.read_rx(&mut totals);
            let shown = (totals.dropped(), totals.tx_frames, totals.tx_bytes);
            assert_eq!(shown, (10, 100, 10_000), "{dropped} {said} {more}");
        }
    }
}
