//! What an egress cannot take, made into what it can: the one way of doing that.
//!
//! ```text
//!  picked: │ fits │ fits │ partial checksum │ 64 KiB TSO │ fits │
//!             └──┬──┘            │                │          │
//!        sent as they are   a copy of the    segments: each a frame with a private head
//!                           head, finished   and a part of the same body  (a burst at a time)
//! ```
//!
//! Nothing is copied but heads: a segment's body is a part of the sender's, and the egress copies
//! it straight to where it goes. Frames keep their order.
//!
//! **Trust.** A body is read for its sum, and read again when it is copied. A guest that changes it
//! between gets a frame with a wrong checksum, and harms itself.
//! **Ledger.** A frame that is cut counts its segments when the cut begins, so what then finds no
//! room, segment by segment, is a drop like any other.

use std::ops::Range;

use packet::{Checksum, Cut};
use virtq::mem::SegSpan;

use crate::finish::{finish_checksum, sum_body};
use crate::{
    BURST_MAX, Batch, DropReason, EgressCounters, Frame, FrameBuf, Gso, Offload, OffloadSet,
    QueueFault,
};

/// An egress, as far as adaptation goes.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// What it takes.
    pub takes: OffloadSet,
    /// How frames are counted that were not sent because of a fault.
    pub lost: DropReason,
    /// Where segments and drops are counted.
    pub counters: &'a EgressCounters,
}

/// Room for adapted frames; each egress has one, made when it is first needed.
#[derive(Debug, Default)]
pub struct Adapter {
    frames: Option<Box<FrameBuf>>,
    picked: Vec<u16>,
}

/// A large frame that is being cut.
struct Large<'f> {
    frame: &'f Frame,
    cut: Cut,
    header_len: usize,
    next: u32,
    /// Where in the head the payload goes on.
    at: usize,
    /// What is left of the payload, and of the body.
    left: u32,
    body: SegSpan,
    /// Segments are left with partial checksums.
    unfinished: Option<Offload>,
}

impl Adapter {
    /// Calls `send` with runs of the frames `picked`, in their order, that all are what `way`
    /// takes. Frames that cannot be adapted are dropped as `bad_offload`.
    ///
    /// # Errors
    ///
    /// The first fault of `send`; what was not handed to it is counted as lost.
    pub fn send(
        &mut self,
        batch: &Batch<'_>,
        picked: &[u16],
        way: &Way<'_>,
        mut send: impl FnMut(&Batch<'_>, &[u16]) -> Result<(), QueueFault>,
    ) -> Result<(), QueueFault> {
        let mut left = picked;
        while !left.is_empty() {
            let fits = left.iter().take_while(|index| fits(batch, **index, way.takes)).count();
            let (run, rest) = left.split_at_checked(fits).unwrap_or_default();
            left = rest;
            let sent = if run.is_empty() {
                let (done, sent) = self.adapt(batch, left, way, &mut send);
                left = left.get(done..).unwrap_or_default();
                sent
            } else {
                send(batch, run)
            };
            if sent.is_err() {
                way.counters.dropped(way.lost, left.len() as u64);
                return sent;
            }
        }
        Ok(())
    }

    /// Adapts the first of `picked`, as many as need it one after the other, and calls `send` with
    /// what became of them. Returns how many were done.
    pub fn adapt(
        &mut self,
        batch: &Batch<'_>,
        picked: &[u16],
        way: &Way<'_>,
        mut send: impl FnMut(&Batch<'_>, &[u16]) -> Result<(), QueueFault>,
    ) -> (usize, Result<(), QueueFault>) {
        let out = self.frames.get_or_insert_default();
        out.clear();
        if self.picked.is_empty() {
            self.picked.extend((0u16..).take(BURST_MAX));
        }
        let all = &self.picked;
        let mut flush = |out: &mut FrameBuf| {
            let count = out.len();
            let result =
                send(&out.batch(batch.store(), None), all.get(..count).unwrap_or_default());
            out.clear();
            result
        };
        let mut done = 0usize;
        for index in picked {
            let Some(frame) = batch.frames().get(usize::from(*index)) else { break };
            if way.takes.takes(&frame.offload) {
                break;
            }
            done = done.wrapping_add(1);
            let result = if frame.offload.gso == Gso::None {
                one(batch, frame, way, out, &mut flush)
            } else {
                segments(batch, frame, way, out, &mut flush)
            };
            if result.is_err() {
                return (done, result);
            }
        }
        let result = if out.is_empty() { Ok(()) } else { flush(out) };
        (done, result)
    }
}

#[inline]
fn fits(batch: &Batch<'_>, index: u16, takes: OffloadSet) -> bool {
    batch.frames().get(usize::from(index)).is_none_or(|frame| takes.takes(&frame.offload))
}

/// Finishes the checksum of `frame`.
fn one(
    batch: &Batch<'_>,
    frame: &Frame,
    way: &Way<'_>,
    out: &mut FrameBuf,
    flush: &mut impl FnMut(&mut FrameBuf) -> Result<(), QueueFault>,
) -> Result<(), QueueFault> {
    if out.slot().is_none() {
        let sent = flush(out);
        if sent.is_err() {
            way.counters.dropped(way.lost, 1);
            return sent;
        }
    }
    let Some(slot) = out.slot() else { return Ok(()) };
    slot.clone_from(frame);
    if finish_checksum(slot, batch.body(frame)) {
        out.keep();
    } else {
        way.counters.dropped(DropReason::BadOffload, 1);
    }
    Ok(())
}

/// Cuts `frame` into segments.
fn segments(
    batch: &Batch<'_>,
    frame: &Frame,
    way: &Way<'_>,
    out: &mut FrameBuf,
    flush: &mut impl FnMut(&mut FrameBuf) -> Result<(), QueueFault>,
) -> Result<(), QueueFault> {
    let Some(mut large) = Large::new(frame, way.takes) else {
        way.counters.dropped(DropReason::BadOffload, 1);
        return Ok(());
    };
    let count = large.cut.count();
    way.counters.segmented(u64::from(count.saturating_sub(1)));
    while large.next < count {
        let made = large.run(out.room());
        out.keep_many(made);
        match out.slot() {
            Some(slot) => {
                large.segment(batch, slot);
                out.keep();
            }
            None => {
                let sent = flush(out);
                if sent.is_err() {
                    let left = count.saturating_sub(large.next);
                    way.counters.dropped(way.lost, u64::from(left));
                    return sent;
                }
            }
        }
    }
    Ok(())
}

impl<'f> Large<'f> {
    fn new(frame: &'f Frame, takes: OffloadSet) -> Option<Self> {
        let cut = Cut::new(frame.head(), frame.len(), frame.offload.gso_size).ok()?;
        let (csum_start, csum_offset) = cut.checksum_place();
        let partial = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
        let header_len = usize::try_from(cut.header_len()).ok()?;
        let (at, body) = (header_len, frame.body);
        let left = frame.len().saturating_sub(cut.header_len());
        let unfinished = takes.csum.then_some(partial);
        Some(Self { frame, cut, header_len, next: 0, at, left, body, unfinished })
    }

    /// Takes the next `len` bytes of the payload: where in the head, and where in the body.
    #[inline]
    fn take(&mut self, batch: &Batch<'_>, len: u32) -> (Range<usize>, SegSpan) {
        let head_len = self.frame.head().len();
        let of_head = head_len.saturating_sub(self.at).min(usize::try_from(len).unwrap_or(0));
        let in_head = self.at..self.at.saturating_add(of_head);
        let of_body = len.saturating_sub(u32::try_from(of_head).unwrap_or(0));
        let (body, rest) = batch.store().split(self.body, of_body);
        (self.at, self.body) = (in_head.end, rest);
        (in_head, body)
    }

    /// Makes segments in `room` as long as they are left with partial checksums, lie in one piece
    /// of the body, and are neither the first nor the last one: nearly all. Returns how many.
    #[inline(never)]
    fn run(&mut self, room: &mut [Frame]) -> usize {
        let Some(offload) = self.unfinished else { return 0 };
        let (size, mut next) = (self.cut.size(), self.next);
        if next == 0 || self.body.count != 1 || self.at != self.frame.head().len() {
            return 0;
        }
        let shape = self.frame.shape(self.header_len);
        let (mut body, mut left) = (SegSpan { len: size, ..self.body }, self.body.len);
        let last = self.cut.count().saturating_sub(1);
        let mut made = 0usize;
        for slot in room {
            if next >= last || left <= size {
                break;
            }
            let header = slot.begin_header(shape, body, offload);
            self.cut.write_between(next, header);
            body.skip = body.skip.wrapping_add(size);
            left = left.wrapping_sub(size);
            next = next.wrapping_add(1);
            made = made.wrapping_add(1);
        }
        (self.next, self.left, self.body) = (next, left, SegSpan { len: left, ..body });
        made
    }

    /// Makes the next segment in `slot`.
    fn segment(&mut self, batch: &Batch<'_>, slot: &mut Frame) {
        let len = self.left.min(self.cut.size());
        self.left = self.left.wrapping_sub(len);
        let (in_head, body) = self.take(batch, len);
        match self.unfinished {
            Some(offload) => {
                let shape = (self.header_len, in_head);
                let header = slot.begin_segment(self.frame, shape, (body, offload));
                self.cut.write_header(self.next, None, header);
            }
            None => self.finished(batch, slot, (in_head, body)),
        }
        self.next = self.next.wrapping_add(1);
    }

    /// Makes the next segment in `slot`, with its checksum.
    #[inline(never)]
    fn finished(
        &self,
        batch: &Batch<'_>,
        slot: &mut Frame,
        (in_head, body): (Range<usize>, SegSpan),
    ) {
        let mut sum = Checksum::default();
        sum.add(self.frame.head().get(in_head.clone()).unwrap_or_default());
        sum_body(&mut sum, batch.store().reader(body));
        let shape = (self.header_len, in_head);
        let header = slot.begin_segment(self.frame, shape, (body, Offload::default()));
        self.cut.write_header(self.next, Some(sum), header);
    }
}

#[cfg(test)]
mod tests;
