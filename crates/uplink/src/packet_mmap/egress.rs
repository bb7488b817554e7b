//! Frames to the transmit ring: written once, sent with one system call a burst.
//!
//! **Theory of operation.** All slots that were filled are settled before `send` returns: taken
//! by the kernel, or taken back and counted as dropped. So between two calls the kernel's place in
//! the ring is ours (`head`), and nothing waits that nobody would send.
//! **Trust.** Bodies may belong to a hostile guest: they are copied into the slot by the one copy,
//! or only their addresses are handed on.
//! **Limits.** A frame that is larger than a slot is sent by itself, in at most 64 pieces.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{
    Adapter, BURST_MAX, Batch, DropReason, Egress, Frame, Notified, OffloadSet, QueueCounters,
    QueueFault, Way,
};
use virtq::mem::Reader;

use crate::direct::{Direct, TRIES, VnetHeader, room, vnet_header};
use crate::sys::packet;
use crate::vnet::{HEADER, SHORT, kernel_knows_uso, segment_bytes};

use super::ring::{Fate, TransmitRing};
use super::socket::{Queue, Sender};

/// Slots filled at once after the kernel refused a frame: those behind it are filled again.
const CAREFUL: usize = 4;
#[expect(clippy::cast_possible_truncation, reason = "12 fits")]
const HEADER_BYTES: u32 = HEADER as u32;
#[expect(clippy::cast_possible_truncation, reason = "10 fits")]
const SHORT_BYTES: u32 = SHORT as u32;

/// Frames to the interface.
#[derive(Debug)]
pub struct PacketMmapEgress {
    queue: Queue,
    /// Has the ring.
    pub(super) socket: Arc<OwnedFd>,
    pub(super) ring: TransmitRing,
    /// The slot that the kernel looks at next.
    pub(super) head: u32,
    /// Takes the frames that are larger than a slot.
    pub(super) direct: Direct,
    /// Of each filled slot, from `head` on: its place in what was picked, and its frame's length.
    filled: [(u16, u32); BURST_MAX],
    /// What the kernel takes unfinished.
    takes: OffloadSet,
    adapter: Adapter,
}

/// How far `send` is in what was picked.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The next frame.
    from: usize,
    /// The first frame that was not looked at yet: one that the kernel refuses takes us back.
    seen: usize,
}

/// Why no more slots were filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// All frames are in slots.
    End,
    /// The next slot is not free, or enough were filled.
    Full,
    /// The next frame is larger than a slot.
    Large,
}

/// What the kernel did with the slots that were handed to it.
#[derive(Debug)]
enum Settled {
    /// It took all.
    All,
    /// It refused the frame that was picked at this place; those behind it have to be filled again.
    Refused(u16),
    /// The interface does not exist any more.
    Gone(io::Error),
}

impl PacketMmapEgress {
    pub(super) fn new(queue: Queue, most: OffloadSet, (sender, direct): (Sender, Direct)) -> Self {
        let Sender { fd: socket, ring } = sender;
        let adapter = Adapter::default();
        let takes = OffloadSet { uso: most.uso && kernel_knows_uso(), ..most };
        let filled = [(0, 0); BURST_MAX];
        Self { queue, socket, ring, head: 0, direct, filled, takes, adapter }
    }

    /// Fills slots with the frames picked from place `from` on. The slots filled, the place of the
    /// first frame that is not in one, and why.
    #[inline]
    fn fill(
        &mut self,
        batch: &Batch<'_>,
        picked: &[u16],
        at: &Place,
        (most, mtu): (usize, u32),
    ) -> (usize, usize, Stop) {
        let (mut count, mut slot) = (0, self.head);
        for (place, index) in picked.iter().enumerate().skip(at.from) {
            let Some(frame) = batch.frames().get(usize::from(*index)) else { continue };
            let len = frame.len();
            if segment_bytes(frame) > room(frame, mtu) {
                if place >= at.seen {
                    self.queue.counters.egress.dropped(DropReason::Oversize, 1);
                }
                continue;
            }
            if len.saturating_add(HEADER_BYTES) > self.ring.room() {
                return (count, place, Stop::Large);
            }
            let (Some(filled), true) = (self.filled.get_mut(count), count < most) else {
                return (count, place, Stop::Full);
            };
            if !self.ring.is_free(slot) {
                return (count, place, Stop::Full);
            }
            *filled = (u16::try_from(place).unwrap_or(u16::MAX), len);
            write(&mut self.ring, (slot, self.direct.header), batch, frame);
            count = count.wrapping_add(1);
            slot = self.after(slot);
        }
        (count, picked.len(), Stop::End)
    }

    #[inline(always)]
    fn after(&self, slot: u32) -> u32 {
        let next = slot.wrapping_add(1);
        if next >= self.ring.count() { 0 } else { next }
    }

    /// Has the kernel send the first `count` slots from `head` on, and settles what it left.
    fn settle(&mut self, count: usize) -> Settled {
        let mut tries = TRIES;
        let mut done = 0;
        while done < count {
            let sent = packet::send_ring(self.socket.as_fd());
            let before = done;
            done = self.advance(done, count);
            if done == count {
                break;
            }
            if self.ring.fate(self.head) == Fate::Refused {
                let place = self.filled.get(done).map_or(u16::MAX, |(place, _)| *place);
                self.take_back(count.wrapping_sub(done));
                self.queue.counters.egress.dropped(DropReason::UplinkError, 1);
                return Settled::Refused(place);
            }
            let code = sent.as_ref().err().and_then(io::Error::raw_os_error);
            let reason = match code {
                Some(libc::ENXIO | libc::ENODEV | libc::ENETDOWN) => DropReason::UplinkError,
                Some(libc::EINTR) => continue,
                _ if before < done || tries > 1 => {
                    tries = if before < done { TRIES } else { tries.wrapping_sub(1) };
                    std::hint::spin_loop();
                    continue;
                }
                _ => DropReason::UplinkBusy,
            };
            let left = count.wrapping_sub(done);
            self.take_back(left);
            self.queue.counters.egress.dropped(reason, left as u64);
            return match (sent, code) {
                (Err(error), Some(libc::ENXIO | libc::ENODEV)) => Settled::Gone(error),
                _ => Settled::All,
            };
        }
        Settled::All
    }

    /// Counts the slots that the kernel took, from number `done` on; which one comes next.
    fn advance(&mut self, mut done: usize, count: usize) -> usize {
        let (mut frames, mut bytes) = (0u64, 0u64);
        while done < count && self.ring.fate(self.head) == Fate::Taken {
            let len = self.filled.get(done).map_or(0, |(_, len)| *len);
            bytes = bytes.wrapping_add(u64::from(len));
            frames = frames.wrapping_add(1);
            done = done.wrapping_add(1);
            self.head = self.after(self.head);
        }
        if frames > 0 {
            self.queue.counters.egress.sent(frames, bytes);
        }
        done
    }

    /// Takes `count` slots back that the kernel has not taken.
    fn take_back(&mut self, count: usize) {
        let mut slot = self.head;
        for _ in 0..count {
            self.ring.take_back(slot);
            slot = self.after(slot);
        }
    }

    /// Sends a frame that is larger than a slot straight from where it is.
    fn send_large(&self, batch: &Batch<'_>, frame: &Frame) -> Settled {
        let egress = &self.queue.counters.egress;
        match self.direct.send(batch, frame) {
            Ok(Ok(())) => egress.sent(1, u64::from(frame.len())),
            Ok(Err(reason)) => egress.dropped(reason, 1),
            Err(error) => {
                egress.dropped(DropReason::UplinkError, 1);
                return Settled::Gone(error);
            }
        }
        Settled::All
    }
}

/// Frames from `at` on that were neither sent nor counted: those above the MTU that were looked at
/// already are.
#[inline]
fn left(batch: &Batch<'_>, picked: &[u16], at: &Place, mtu: u32) -> u64 {
    let all = picked.len().saturating_sub(at.from);
    let seen = picked.get(at.from..at.seen).unwrap_or_default();
    let frame = |index: &u16| batch.frames().get(usize::from(*index));
    let above = |frame: &&Frame| segment_bytes(frame) > room(frame, mtu);
    all.saturating_sub(seen.iter().filter_map(frame).filter(above).count()) as u64
}

/// Writes a frame into a free slot and hands that over.
#[inline(always)]
fn write(
    ring: &mut TransmitRing,
    (slot, kind): (u32, VnetHeader),
    batch: &Batch<'_>,
    frame: &Frame,
) {
    let len = frame.len();
    let header = vnet_header(frame, len as usize);
    let body = batch.body_piece(frame);
    let simple = frame.body.len == 0 || body.is_some();
    let piece = if simple { ring.piece(slot) } else { None };
    let (whole, bytes) = match kind {
        VnetHeader::Long => {
            (piece.is_some_and(|p| p.write_frame(&header, frame.head(), body)), HEADER_BYTES)
        }
        VnetHeader::Short => {
            let short: &[u8; SHORT] = header.first_chunk().unwrap_or(&[0; SHORT]);
            (piece.is_some_and(|p| p.write_frame(short, frame.head(), body)), SHORT_BYTES)
        }
    };
    if !whole {
        let header = header.get(..kind.bytes()).unwrap_or_default();
        write_parts(ring, slot, (header, frame), batch.body(frame));
    }
    ring.hand_over(slot, len.wrapping_add(bytes));
}

#[cold]
fn write_parts(
    ring: &mut TransmitRing,
    slot: u32,
    (header, frame): (&[u8], &Frame),
    mut body: Reader<'_>,
) {
    let mut writer = ring.writer(slot);
    let _ = writer.write(header);
    let _ = writer.write(frame.head());
    let _ = writer.copy_from(&mut body, frame.body.len);
}

impl PacketMmapEgress {
    /// Sends frames that the kernel takes as they are.
    fn send_fitting(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        // ORDERING: a number of its own; a frame beside a change of the MTU may see either.
        let mtu = self.queue.mtu.load(Ordering::Relaxed);
        let (mut at, mut most, mut waits) = (Place { from: 0, seen: 0 }, BURST_MAX, TRIES);
        loop {
            let (count, next, stop) = self.fill(batch, picked, &at, (most, mtu));
            at = Place { from: next, seen: next.max(at.seen) };
            let mut settled = self.settle(count);
            if let Settled::Refused(place) = settled {
                at.from = usize::from(place).saturating_add(1);
                most = CAREFUL;
                continue;
            }
            let large =
                picked.get(at.from).and_then(|index| batch.frames().get(usize::from(*index)));
            if let (Settled::All, Stop::Large, Some(frame)) = (&settled, stop, large) {
                settled = self.send_large(batch, frame);
                at.from = at.from.saturating_add(1);
            }
            let left = left(batch, picked, &at, mtu);
            if let Settled::Gone(error) = settled {
                self.queue.counters.egress.dropped(DropReason::UplinkError, left);
                return Err(self.queue.fault("write to interface", &error));
            }
            if stop == Stop::End || at.from >= picked.len() {
                return Ok(());
            }
            if stop == Stop::Full && count == 0 {
                waits = waits.wrapping_sub(1);
                if waits == 0 {
                    self.queue.counters.egress.dropped(DropReason::UplinkBusy, left);
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
    }
}

impl Egress for PacketMmapEgress {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let takes = self.queue.cuts.of(self.takes);
        if takes == OffloadSet::ALL {
            return self.send_fitting(batch, picked);
        }
        let mut adapter = std::mem::take(&mut self.adapter);
        let counters = Arc::clone(&self.queue.counters);
        let counters = &counters.egress;
        let way = Way { takes, lost: DropReason::UplinkError, counters };
        let sent =
            adapter.send(batch, picked, &way, |batch, picked| self.send_fitting(batch, picked));
        self.adapter = adapter;
        sent
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.queue.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[cfg(test)]
mod tests {
    use port::{FrameBuf, Offload};
    use virtq::mem::Pool;

    use super::{Place, left};

    /// Frames of these lengths, all in private heads but for those that are longer.
    fn burst(lens: &[u32]) -> (Pool, FrameBuf) {
        let pool = Pool::new(1, 4096).unwrap();
        let mut frames = FrameBuf::default();
        for len in lens {
            let span = Pool::span(0, 0, *len);
            let reader = pool.store().reader(span);
            assert!(frames.slot().unwrap().fill(reader, span, Offload::default()));
            frames.keep();
        }
        (pool, frames)
    }

    /// The kernel refuses the frame at place 1 and takes us back there, and the interface is gone
    /// when the frames behind it are offered again.
    #[test]
    fn an_oversize_frame_before_a_fault_counts_once() {
        let (pool, mut frames) = burst(&[60, 60, 2000, 60, 1514, 1515, 60, 2000]);
        let batch = frames.batch(pool.store(), None);
        let picked: Vec<u16> = (0..8).collect();
        let lost = |from, seen| left(&batch, &picked, &Place { from, seen }, 1500);
        // Frames 2 and 5 were looked at, and counted as oversize; 7 was not.
        assert_eq!(lost(2, 6), 6 - 2);
        assert_eq!(lost(3, 6), 5 - 1);
        assert_eq!(lost(2, 2), 6, "nothing behind was looked at");
        assert_eq!(lost(0, 8), 8 - 3);
        assert_eq!((lost(8, 8), lost(9, 9)), (0, 0));
    }
}
