//! The reader's end of a capture.
//!
//! Frames come out by time, over all rings: an answer after its question. A ring may have got both
//! while others were read, so all are read twice, and what is newer than everything that the first
//! round found waits. So does what is newer than a frame whose fate is open: its burst ends soon.

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
    /// Whether something waits only because it is new.
    behind: bool,
}

/// Bytes that may wait for what is older: beyond that frames come out as they are there.
const HELD_MAX: usize = 1 << 22;

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
            behind: false,
        };
        Ok((capture, Tap(shared)))
    }

    /// Hands out what has come since the last call, by time. Returns how many frames.
    pub fn drain(&mut self, take: impl FnMut(&Captured<'_>)) -> u64 {
        self.pull();
        let newest = self.sources.iter().filter_map(Source::newest).max();
        self.give(newest, take)
    }

    /// Hands out what is not newer than `newest`, nor than a frame whose fate is open.
    fn give(&mut self, newest: Option<u64>, mut take: impl FnMut(&Captured<'_>)) -> u64 {
        self.pull();
        let open = self.sources.iter().filter_map(Source::open).min();
        let held: usize = self.sources.iter().map(|source| source.bytes.len()).sum();
        let may_go = |time: u64| {
            held > HELD_MAX || (Some(time) <= newest && open.is_none_or(|open| time < open))
        };
        let mut count = 0u64;
        // Few sources, each in order: the earliest of their first ones is next.
        loop {
            let first = |source: &&mut Source| source.first().map(|first| first.time_ns);
            let waiting = self.sources.iter_mut().filter(|source| first(source).is_some());
            let Some(source) = waiting.min_by_key(first) else { break };
            if !source.first().is_some_and(|first| may_go(first.time_ns)) {
                break;
            }
            if let Some(captured) = source.next() {
                take(&captured);
                count = count.wrapping_add(1);
            }
        }
        self.behind = self.sources.iter().any(|source| {
            source.first().is_some_and(|first| open.is_none_or(|open| first.time_ns < open))
        });
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

    /// Takes what is in all rings.
    fn pull(&mut self) {
        let new = std::mem::take(&mut *self.shared.new_rings());
        self.sources.extend(new.into_iter().map(Source::new));
        let drops = self.shared.settings.drops;
        self.sources.iter_mut().for_each(|source| source.pull(drops));
    }

    /// Whether there is anything to drain. If not, [`Self::wake_fd`] becomes readable as soon as
    /// there is, or as the capture ends.
    pub fn falls_asleep(&self) -> bool {
        self.shared.fall_asleep();
        let quiet = self.sources.iter().all(|source| source.outlet.ring.is_empty());
        quiet && !self.behind && self.shared.new_rings().is_empty() && self.ended().is_none()
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
        let open = self.records.get(self.settled..).unwrap_or_default();
        if !drops && open.iter().any(|record| record.fate != 0) {
            let open = self.records.split_off(self.settled);
            self.records.extend(open.into_iter().filter(|record| record.fate == 0));
        }
        self.settled = self.records.len();
    }

    /// When its newest frame came.
    fn newest(&self) -> Option<u64> {
        Some(self.records.last()?.time_ns)
    }

    /// When the first frame came whose fate is open.
    fn open(&self) -> Option<u64> {
        Some(self.records.get(self.settled)?.time_ns)
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

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use virtq::mem::SegStore;

    use super::super::Tap;
    use super::super::ring::{Inlet, Item, Stored};
    use super::*;
    use crate::FrameBuf;

    /// Stores frames that came at these times; each is a burst, of which the last one may not end.
    fn store(inlet: &mut Inlet, times: Range<u64>, ends: bool) {
        let mut frames = FrameBuf::default();
        let _ = frames.begin();
        frames.slot().unwrap().fill_private(&[0; 60]);
        frames.keep();
        let batch = frames.batch(SegStore::empty(), None);
        let frame = batch.frames().first().unwrap();
        for time_ns in times.clone() {
            assert_eq!(inlet.offer(&Item { batch: &batch, frame, index: 0, time_ns }), Stored::Yes);
            if ends || time_ns.wrapping_add(1) < times.end {
                inlet.end_burst();
            }
        }
    }

    fn times(capture: &mut Capture) -> Vec<u64> {
        let mut times = Vec::new();
        let count = capture.drain(|frame| times.push(frame.time_ns));
        assert_eq!(count, times.len() as u64);
        times
    }

    #[test]
    fn an_answer_comes_after_its_question_whose_fate_is_open() {
        let (mut capture, Tap(shared)) = Capture::new(CaptureSettings::default()).unwrap();
        let mut question = Inlet::new(&shared, 0, Direction::In);
        let mut answer = Inlet::new(&shared, 0, Direction::Out);
        store(&mut question, 1..2, false);
        store(&mut answer, 2..3, true);
        assert!(times(&mut capture).is_empty());
        assert!(capture.falls_asleep(), "it is woken when the burst ends");
        question.end_burst();
        assert!(!capture.falls_asleep());
        assert_eq!(times(&mut capture), [1, 2]);
        // Its worker died.
        store(&mut question, 3..4, false);
        store(&mut answer, 4..5, true);
        assert!(times(&mut capture).is_empty());
        drop(question);
        assert_eq!(times(&mut capture), [3, 4]);
    }

    #[test]
    fn what_is_newer_than_all_that_was_there_waits_once() {
        let (mut capture, Tap(shared)) = Capture::new(CaptureSettings::default()).unwrap();
        let mut inlet = Inlet::new(&shared, 0, Direction::In);
        store(&mut inlet, 1..3, true);
        assert_eq!(times(&mut capture), [1, 2]);
        assert!(capture.falls_asleep());
        store(&mut inlet, 3..4, true);
        assert_eq!(capture.give(None, |_| ()), 0, "it came in the second round");
        assert!(!capture.falls_asleep());
        assert_eq!(times(&mut capture), [3]);
        assert!(capture.falls_asleep());
    }

    /// However long a burst takes.
    #[test]
    fn what_waits_is_bounded() {
        let settings = CaptureSettings { ring_bytes: 2 * HELD_MAX, ..CaptureSettings::default() };
        let (mut capture, Tap(shared)) = Capture::new(settings).unwrap();
        let mut stuck = Inlet::new(&shared, 0, Direction::In);
        let mut other = Inlet::new(&shared, 0, Direction::Out);
        store(&mut stuck, 1..2, false);
        let most = u64::try_from(HELD_MAX / 84).unwrap();
        store(&mut other, 2..most, true);
        assert!(times(&mut capture).is_empty());
        store(&mut other, most..most.wrapping_add(9), true);
        assert_eq!(times(&mut capture).len() as u64, most.wrapping_add(7));
    }
}
