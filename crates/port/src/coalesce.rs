//! Segments of one flow made into large frames, for an egress that takes them.
//!
//! ```text
//!  picked:  a1 │ b1 │ a2 │ a3 │ x │ b2          (x: anything else)
//!  sent:    a1+a2+a3 │ b1 │ x │ b2
//! ```
//!
//! Nothing waits for another burst, and each flow keeps its order: what is no segment ends all
//! trains, so nothing overtakes it. Only heads are copied; the egress copies the bodies straight to
//! where they go.
//!
//! **Trust.** A checksum is lost where frames are put together, so it must be right before: the
//! sender left it to others, or somebody we may trust verified it, or we do, reading the body once
//! more. The payload that stands in a private head is read again from where it came from: nobody
//! interprets it.
//! **Limits.** [`TRAINS_MAX`] flows at a time; only frames with a body (more than `HEAD_MAX`
//! bytes), so a short last segment goes by itself.

use packet::{CutKind, Fit, Merge, Segment};
use virtq::mem::{GatherBuf, SegSpan};

use crate::finish::sum_body;
use crate::{
    BURST_MAX, Batch, EgressCounters, Frame, FrameBuf, Gso, Offload, OffloadSet, QueueFault,
};

/// Flows that are followed at a time.
const TRAINS_MAX: usize = 8;
/// Bursts without a look after one in which nothing went together.
const PAUSE: u8 = 7;
/// No frame.
const NONE: u16 = u16::MAX;

/// Room for what is put together; each egress that coalesces has one.
#[derive(Debug, Default)]
pub struct Coalescer {
    frames: Option<Box<FrameBuf>>,
    gather: GatherBuf,
    units: Vec<Unit>,
    /// The units that may go on.
    trains: Vec<usize>,
    /// Of each place in what was picked: the place of the next one of its train.
    next: Vec<u16>,
    all: Vec<u16>,
    pause: u8,
}

/// One frame that is sent, made of one or more.
#[derive(Debug)]
struct Unit {
    first: u16,
    last: u16,
    count: u16,
    /// The first one's checksum is known to be right.
    verified: bool,
    /// What it would be together with more; none if it cannot go on.
    merge: Option<Merge>,
}

impl Unit {
    fn new(place: u16, merge: Option<Merge>) -> Self {
        Self { first: place, last: place, count: 1, verified: false, merge }
    }
}

impl Coalescer {
    /// Whether it is worth a look: there are frames with bodies, and it was not in vain lately.
    #[inline]
    pub fn wants(&mut self, batch: &Batch<'_>, picked: &[u16]) -> bool {
        if self.pause > 0 {
            self.pause = self.pause.wrapping_sub(1);
            return false;
        }
        let has_body = |index: &&u16| {
            batch.frames().get(usize::from(**index)).is_some_and(|frame| frame.body.len > 0)
        };
        picked.iter().filter(has_body).nth(1).is_some()
    }

    /// Calls `send` once, with what became of the frames `picked` for an egress that takes `takes`.
    ///
    /// # Errors
    ///
    /// The fault of `send`.
    pub fn send(
        &mut self,
        batch: &Batch<'_>,
        picked: &[u16],
        (takes, counters): (OffloadSet, &EgressCounters),
        send: impl FnOnce(&Batch<'_>, &[u16]) -> Result<(), QueueFault>,
    ) -> Result<(), QueueFault> {
        if picked.len() > BURST_MAX {
            return send(batch, picked);
        }
        self.plan(batch, picked, takes);
        let merged = picked.len().saturating_sub(self.units.len());
        if merged == 0 {
            self.pause = PAUSE;
            return send(batch, picked);
        }
        let Self { frames, gather, units, next, all, .. } = self;
        let out = frames.get_or_insert_default();
        out.clear();
        let mut gather = gather.begin(batch.store());
        let frame_at = |place: u16| {
            let index = picked.get(usize::from(place))?;
            batch.frames().get(usize::from(*index))
        };
        for unit in &*units {
            let (Some(first), Some(slot)) = (frame_at(unit.first), out.slot()) else { continue };
            slot.clone_from(first);
            let begin = gather.next();
            let mut len = gather.push(first.body);
            let mut place = unit.first;
            for _ in 1..unit.count {
                place = next.get(usize::from(place)).copied().unwrap_or(NONE);
                let header_len = unit.merge.as_ref().map_or(0, Merge::header_len);
                let payload = frame_at(place).and_then(|frame| payload(frame, header_len));
                len = len.saturating_add(payload.map_or(0, |span| gather.push(span)));
            }
            slot.body = gather.span(begin, len);
            if let (2.., Some(merge)) = (unit.count, &unit.merge) {
                merge.write(slot.head_mut());
                slot.offload = intent(merge);
            }
            out.keep();
        }
        counters.merged(merged as u64);
        let count = out.len();
        if all.is_empty() {
            all.extend((0u16..).take(BURST_MAX));
        }
        send(&out.batch(gather.finish(), None), all.get(..count).unwrap_or_default())
    }

    /// Decides what goes together.
    fn plan(&mut self, batch: &Batch<'_>, picked: &[u16], takes: OffloadSet) {
        self.units.clear();
        self.trains.clear();
        self.next.clear();
        self.next.resize(picked.len(), NONE);
        for (place, _) in (0u16..).zip(picked) {
            let frame = |place: u16| {
                let index = picked.get(usize::from(place))?;
                batch.frames().get(usize::from(*index))
            };
            match frame(place).and_then(|frame| candidate(frame, takes)) {
                Some(segment) => self.place(batch, place, &segment, frame),
                None => {
                    self.trains.clear();
                    self.units.push(Unit::new(place, None));
                }
            }
        }
    }

    /// Adds a segment to its train, or begins one.
    fn place<'f>(
        &mut self,
        batch: &Batch<'_>,
        place: u16,
        segment: &Segment<'_>,
        frame: impl Fn(u16) -> Option<&'f Frame>,
    ) {
        let of_flow = self.trains.iter().enumerate().find_map(|(at, number)| {
            let fit = self.units.get(*number)?.merge.as_ref()?.fit(segment);
            (fit != Fit::Other).then_some((at, *number, fit))
        });
        if let Some((at, number, fit)) = of_flow {
            if let (Fit::Follows, Some(unit)) = (fit, self.units.get_mut(number))
                && go_together(batch, unit, &frame, (place, segment))
            {
                if let Some(link) = self.next.get_mut(usize::from(unit.last)) {
                    *link = place;
                }
                unit.last = place;
                return;
            }
            let _ = self.trains.swap_remove(at);
        }
        if self.trains.len() >= TRAINS_MAX {
            let _ = self.trains.swap_remove(0);
        }
        self.trains.push(self.units.len());
        self.units.push(Unit::new(place, Some(Merge::begin(segment))));
    }
}

/// Adds a segment that follows to its unit, if the checksums of both are right.
fn go_together<'f>(
    batch: &Batch<'_>,
    unit: &mut Unit,
    frame: &impl Fn(u16) -> Option<&'f Frame>,
    (place, segment): (u16, &Segment<'_>),
) -> bool {
    let right = |place, segment: &Segment<'_>| {
        frame(place).is_some_and(|frame| is_right(batch, frame, segment))
    };
    if !unit.verified {
        let first = frame(unit.first);
        let first = first.and_then(|frame| Segment::parse(frame.head(), frame.len()));
        unit.verified = first.is_some_and(|first| right(unit.first, &first));
    }
    let good = unit.verified && right(place, segment);
    if let (true, Some(merge)) = (good, &mut unit.merge) {
        merge.add(segment);
        unit.count = unit.count.saturating_add(1);
    }
    good
}

/// The frame as a segment that may be put together with others for an egress that takes `takes`.
fn candidate(frame: &Frame, takes: OffloadSet) -> Option<Segment<'_>> {
    if frame.offload.gso != Gso::None || frame.body.len == 0 {
        return None;
    }
    let segment = Segment::parse(frame.head(), frame.len())?;
    let taken = match segment.kind() {
        CutKind::TcpV4 => takes.tso4,
        CutKind::TcpV6 => takes.tso6,
        CutKind::Udp => takes.uso,
    };
    let good = taken && takes.csum && (takes.ecn || !segment.has_cwr());
    (good && payload(frame, segment.header_len()).is_some()).then_some(segment)
}

/// Where the payload of a frame is: what the head has of it stands before the body.
fn payload(frame: &Frame, header_len: usize) -> Option<SegSpan> {
    let in_head = u32::try_from(frame.head().len().checked_sub(header_len)?).ok()?;
    let SegSpan { skip, len, .. } = frame.body;
    let (skip, len) = (skip.checked_sub(in_head)?, len.checked_add(in_head)?);
    Some(SegSpan { skip, len, ..frame.body })
}

/// Whether the checksum of a frame is right, or will be made right by whoever gets it.
fn is_right(batch: &Batch<'_>, frame: &Frame, segment: &Segment<'_>) -> bool {
    let Offload { needs_csum, data_valid, csum_start, csum_offset, .. } = frame.offload;
    if needs_csum {
        return (csum_start, csum_offset) == segment.checksum_place();
    }
    if data_valid {
        return true;
    }
    let mut sum = segment.sum(frame.head());
    sum_body(&mut sum, batch.body(frame));
    sum.finish() == 0
}

/// What is left to do on frames that were put together.
fn intent(merge: &Merge) -> Offload {
    let (csum_start, csum_offset) = merge.checksum_place();
    Offload {
        needs_csum: true,
        data_valid: false,
        ecn: merge.has_cwr(),
        gso: match merge.kind() {
            CutKind::TcpV4 => Gso::TcpV4,
            CutKind::TcpV6 => Gso::TcpV6,
            CutKind::Udp => Gso::UdpL4,
        },
        hdr_len: u16::try_from(merge.header_len()).unwrap_or(u16::MAX),
        gso_size: merge.size(),
        csum_start,
        csum_offset,
    }
}

#[cfg(test)]
mod tests;
