//! The reader's end of a capture.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::ring::{END, FRAME, LONG, NOTE, Outlet, SHORT};
use super::{CaptureSettings, CaptureTotals, Direction, Shared, Tap, reason};
use crate::DropReason;

/// A captured frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured<'a> {
    /// Nanoseconds since 1970; frames of one burst share it.
    pub time_ns: u64,
    /// Which way it went.
    pub direction: Direction,
    /// The queue pair.
    pub pair: u16,
    /// Its first bytes.
    pub data: &'a [u8],
    /// Bytes of the whole frame.
    pub frame_bytes: u32,
    /// Why it was dropped, if it was.
    pub dropped: Option<DropReason>,
}

/// A capture: frames come out here.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    sources: Vec<Source>,
    /// Of rings that are gone: in, out.
    gone: [CaptureTotals; 2],
}

/// One ring and what was taken from it.
#[derive(Debug)]
struct Source {
    outlet: Outlet,
    bytes: Vec<u8>,
    /// Frames in `bytes`, in order; those before `settled` are to be given out.
    records: Vec<Record>,
    settled: usize,
    /// Records that were given out.
    given: usize,
    /// Where the next record begins.
    parsed: usize,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    /// Where its bytes begin and how many there are.
    at: usize,
    captured: u32,
    original: u32,
    time_ns: u64,
    index: u16,
    fate: u8,
}

impl Capture {
    /// A capture that nothing feeds yet, and what the switch needs for it.
    ///
    /// # Errors
    ///
    /// The kernel has no eventfd left.
    pub fn new(settings: CaptureSettings) -> std::io::Result<(Self, Tap)> {
        let shared = Arc::new(Shared::new(settings)?);
        let capture = Self {
            shared: Arc::clone(&shared),
            sources: Vec::new(),
            gone: [CaptureTotals::default(); 2],
        };
        Ok((capture, Tap(shared)))
    }

    /// Hands out what has come since the last call, by time. Returns how many frames.
    pub fn drain(&mut self, mut take: impl FnMut(&Captured<'_>)) -> u64 {
        let new = std::mem::take(&mut *self.shared.new_rings());
        self.sources.extend(new.into_iter().map(Source::new));
        let drops = self.shared.settings.drops;
        self.sources.iter_mut().for_each(|source| source.pull(drops));
        let mut count = 0u64;
        // Few sources, each in order: the earliest of their first ones is next.
        loop {
            let first = |source: &&mut Source| source.first().map(|first| first.time_ns);
            let waiting = self.sources.iter_mut().filter(|source| first(source).is_some());
            let Some(source) = waiting.min_by_key(first) else { break };
            if let Some(captured) = source.next() {
                take(&captured);
                count = count.wrapping_add(1);
            }
        }
        let gone = &mut self.gone;
        self.sources.retain_mut(|source| {
            source.forget_given();
            let kept = !source.is_over();
            if !kept && let Some(totals) = gone.get_mut(source.outlet.direction as usize) {
                totals.add(&source.outlet.counts.read());
            }
            kept
        });
        count
    }

    /// Whether there is anything to drain. If not, [`Self::wake_fd`] becomes readable as soon as
    /// there is, or as the capture ends.
    pub fn falls_asleep(&self) -> bool {
        self.shared.fall_asleep();
        let quiet = self.sources.iter().all(|source| source.outlet.ring.is_empty());
        quiet && self.shared.new_rings().is_empty() && self.ended().is_none()
    }

    /// From now on frames do not wake: only the end of the capture does.
    pub fn ignores_frames(&self) {
        self.shared.stay_awake();
    }

    /// Readable when there is something to do, after [`Self::falls_asleep`].
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake_fd()
    }

    /// Why the switch ended the capture, if it did.
    pub fn ended(&self) -> Option<String> {
        self.shared.ended().clone()
    }

    /// What was counted so far in one direction.
    pub fn totals(&self, direction: Direction) -> CaptureTotals {
        let mut totals = self.gone.get(direction as usize).copied().unwrap_or_default();
        let of = self.sources.iter().filter(|source| source.outlet.direction == direction);
        of.for_each(|source| totals.add(&source.outlet.counts.read()));
        totals
    }
}

impl Source {
    fn new(outlet: Outlet) -> Self {
        Self { outlet, bytes: Vec::new(), records: Vec::new(), settled: 0, given: 0, parsed: 0 }
    }

    /// Takes everything out of the ring and parses it.
    fn pull(&mut self, drops: bool) {
        let abandoned = self.outlet.ring.is_abandoned();
        let available = self.outlet.ring.slots();
        if let Ok(chunk) = self.outlet.ring.read_chunk(available) {
            let (first, second) = chunk.as_slices();
            self.bytes.extend_from_slice(first);
            self.bytes.extend_from_slice(second);
            chunk.commit_all();
        }
        while self.parse(drops).is_some() {}
        if abandoned {
            // The burst has no end any more: its worker died in it.
            self.settle(drops);
        }
    }

    /// Parses one record, if all of it is there.
    fn parse(&mut self, drops: bool) -> Option<()> {
        let rest = self.bytes.get(self.parsed..)?;
        let [kind, fate, index @ ..] = *rest.first_chunk::<SHORT>()?;
        let index = u16::from_ne_bytes(index);
        let mut len = SHORT;
        match kind {
            FRAME => {
                let word =
                    |at: usize| -> Option<[u8; 4]> { rest.get(at..)?.first_chunk().copied() };
                let captured = u32::from_ne_bytes(word(SHORT)?);
                let original = u32::from_ne_bytes(word(SHORT.wrapping_add(4))?);
                let time: [u8; 8] = *rest.get(SHORT.wrapping_add(8)..)?.first_chunk()?;
                len = LONG.checked_add(captured as usize)?;
                let _all = rest.get(..len)?;
                let time_ns = u64::from_ne_bytes(time);
                let at = self.parsed.checked_add(LONG)?;
                self.records.push(Record { at, captured, original, time_ns, index, fate });
                if self.outlet.direction == Direction::Out {
                    self.settled = self.records.len();
                }
            }
            NOTE => {
                let open = self.records.get_mut(self.settled..).unwrap_or_default();
                if let Some(record) = open.iter_mut().find(|record| record.index == index) {
                    record.fate = fate;
                }
            }
            END => self.settle(drops),
            _ => return None,
        }
        self.parsed = self.parsed.checked_add(len)?;
        Some(())
    }

    /// Ends a burst: its frames may be given out.
    fn settle(&mut self, drops: bool) {
        if !drops && self.outlet.direction == Direction::In {
            let settled = self.settled;
            let mut at = 0usize;
            self.records.retain(|record| {
                let kept = at < settled || record.fate == 0;
                at = at.wrapping_add(1);
                kept
            });
        }
        self.settled = self.records.len();
    }

    fn first(&self) -> Option<&Record> {
        self.records.get(self.given..self.settled)?.first()
    }

    fn next(&mut self) -> Option<Captured<'_>> {
        let record = *self.first()?;
        self.given = self.given.wrapping_add(1);
        let end = record.at.checked_add(record.captured as usize)?;
        Some(Captured {
            time_ns: record.time_ns,
            direction: self.outlet.direction,
            pair: self.outlet.pair,
            data: self.bytes.get(record.at..end)?,
            frame_bytes: record.original,
            dropped: reason(record.fate),
        })
    }

    /// Makes room: keeps only what was not given out.
    fn forget_given(&mut self) {
        let begin = self
            .records
            .get(self.given)
            .map_or(self.parsed, |record| record.at.saturating_sub(LONG));
        drop(self.records.drain(..self.given.min(self.records.len())));
        drop(self.bytes.drain(..begin.min(self.bytes.len())));
        for record in &mut self.records {
            record.at = record.at.saturating_sub(begin);
        }
        self.settled = self.settled.saturating_sub(self.given);
        self.parsed = self.parsed.saturating_sub(begin);
        self.given = 0;
    }

    /// Whether nothing comes from here any more.
    fn is_over(&self) -> bool {
        self.outlet.ring.is_abandoned() && self.outlet.ring.is_empty() && self.records.is_empty()
    }
}
