//! Descriptor chains: they exist only if they are valid.

use std::ops::Range;
use std::slice::Windows;

use crate::ChainError;
use crate::mem::{RawSeg, ReadPiece, Readable, SegSpan, SegStore, Writable, WritePiece};
use crate::walk::narrow;

/// What gives a chain back to the ring it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Token {
    /// Head index (split) or buffer id (packed).
    pub(crate) id: u16,
    /// Ring slots that the chain takes (packed; 1 for split).
    pub(crate) slots: u16,
}

/// A chain of several segments, of none, of several ring slots or with both parts: numbers only,
/// the segments are in [`ChainBuf::segs`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spread {
    pub(crate) token: Token,
    /// The first segment; readable ones come before writable ones.
    pub(crate) first: u32,
    /// Segments and bytes of the readable part.
    pub(crate) readable: (u32, u32),
    /// Segments and bytes of the writable part.
    pub(crate) writable: (u32, u32),
}

impl Spread {
    #[inline(always)]
    fn segments(self, writable: bool) -> Range<usize> {
        let first = self.first as usize;
        let middle = first.wrapping_add(self.readable.0 as usize);
        if writable { middle..middle.wrapping_add(self.writable.0 as usize) } else { first..middle }
    }

    /// The only segment, if the chain is one slot and one buffer in one piece.
    fn single(self, writable: bool) -> Option<usize> {
        let segs = (self.readable.0, self.writable.0);
        let one = if writable { (0, 1) } else { (1, 0) };
        (self.token.slots == 1 && segs == one).then_some(self.first as usize)
    }
}

/// What a chain's record says besides address and length: the chain's id, and above it nothing for
/// a chain of one segment and one slot (nearly all), or the place of its [`Spread`] plus one.
#[derive(Debug, Clone, Copy)]
struct Tag(u32);

#[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
impl Tag {
    fn spread(id: u16, index: usize) -> Self {
        // A ring has at most 2^15 chains.
        let place = u16::try_from(index.saturating_add(1)).unwrap_or(u16::MAX);
        Self(u32::from(id) | u32::from(place) << 16)
    }

    #[inline(always)]
    fn id(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    fn index(self) -> Option<usize> {
        (self.0 >> 16).checked_sub(1).map(|index| index as usize)
    }
}

/// A burst ends early when its chains have more segments than this: what is behind it comes in the
/// next one. Each descriptor is at least one, but for chains of one segment. One chain can have
/// more, as many as the ring has entries and [`SPLITS_MAX`].
pub(crate) const BURST_SEGS: usize = 1 << 12;

/// How many segments more than descriptors a chain may have, because buffers lie in several
/// regions or, behind a vIOMMU, pages.
pub(crate) const SPLITS_MAX: usize = 1 << 12;

/// How far ahead of the chain in work the next ones' lines are asked for.
pub const AHEAD: usize = crate::swept!("AHEAD", 8);

/// As many chains are read in one go of a hot loop.
pub(crate) const RUN: usize = 256;

/// A list that keeps its items initialised beyond its end, so that a loop fills it by iterating
/// over a slice instead of asking for capacity at each item.
#[derive(Debug, Default)]
pub(crate) struct Pile<T> {
    items: Vec<T>,
    count: usize,
}

impl<T: Copy + Default> Pile<T> {
    fn with_capacity(count: usize) -> Self {
        Self { items: vec![T::default(); count], count: 0 }
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    #[inline(always)]
    pub(crate) fn filled(&self) -> &[T] {
        self.items.get(..self.count).unwrap_or_default()
    }

    /// The items, and behind them those that [`Self::pad`] left.
    #[inline(always)]
    fn padded(&self) -> &[T] {
        self.items.get(..self.count.saturating_add(AHEAD)).unwrap_or_default()
    }

    /// Writes the last item [`AHEAD`] times behind itself.
    #[inline(always)]
    pub(crate) fn pad(&mut self) {
        let last = self.filled().last().copied().unwrap_or_default();
        if let Some(spare) = self.spare(AHEAD).first_chunk_mut::<AHEAD>() {
            *spare = [last; AHEAD];
        }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, item: T) {
        match self.items.get_mut(self.count) {
            Some(place) => *place = item,
            None => self.items.push(item),
        }
        self.count = self.count.wrapping_add(1);
    }

    /// Room for `count` items behind the last one: [`Self::advance`] makes them part of the list.
    #[inline(always)]
    pub(crate) fn spare(&mut self, count: usize) -> &mut [T] {
        let end = self.count.saturating_add(count);
        if end > self.items.len() {
            self.grow(end);
        }
        self.items.get_mut(self.count..end).unwrap_or_default()
    }

    #[cold]
    fn grow(&mut self, end: usize) {
        self.items.resize(end, T::default());
    }

    #[inline(always)]
    pub(crate) fn advance(&mut self, count: usize) {
        self.count = self.count.saturating_add(count).min(self.items.len());
    }

    #[inline(always)]
    pub(crate) fn truncate(&mut self, count: usize) {
        self.count = self.count.min(count);
    }
}

impl<T: Copy + Default> Extend<T> for Pile<T> {
    #[inline(always)]
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        for item in items {
            self.push(item);
        }
    }
}

/// Storage for the chains of one burst; allocated once, reused for every burst.
#[derive(Debug, Default)]
pub struct ChainBuf {
    /// One record for each chain: its segment, or no bytes and where the rest of it is.
    pub(crate) chains: Pile<RawSeg>,
    /// Which part of the chains in one segment it is. Queues go one way, so this rarely changes.
    pub(crate) writable: bool,
    spread: Pile<Spread>,
    /// The segments of `spread`.
    pub(crate) segs: Pile<RawSeg>,
}

impl ChainBuf {
    /// Room for bursts of `chains` chains without later allocation in the common case.
    pub fn with_capacity(chains: usize) -> Self {
        Self {
            chains: Pile::with_capacity(chains.saturating_add(AHEAD)),
            writable: false,
            spread: Pile::with_capacity(chains),
            segs: Pile::with_capacity(chains.saturating_mul(4)),
        }
    }

    /// Empties it.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.chains.truncate(0);
        self.spread.truncate(0);
        self.segs.truncate(0);
    }

    /// Whether the burst in it ended early: the ring may have more chains.
    #[inline(always)]
    pub fn is_full(&self) -> bool {
        self.segs.len() > BURST_SEGS
    }

    /// What the burst in it was made of: chains, and segments of those that have not just one.
    pub fn pieces(&self) -> usize {
        self.chains.len().saturating_add(self.segs.len())
    }

    /// Lets chains in one segment go the other way, if none of the burst is there yet and a burst
    /// has not `turned` before. Returns whether they do.
    pub(crate) fn turn(&mut self, writable: bool, turned: &mut bool) -> bool {
        let open = self.chains.len() == self.spread.len();
        let turns = writable != self.writable && open && !*turned;
        if turns {
            (self.writable, *turned) = (writable, true);
        }
        turns
    }

    /// Ends the burst's last chain: keeps it, or drops what a broken one left.
    #[inline(always)]
    pub(crate) fn settle(
        &mut self,
        first: usize,
        chain: Result<Spread, ChainError>,
    ) -> Result<Token, ChainError> {
        match chain {
            Ok(chain) => {
                self.keep(chain);
                Ok(chain.token)
            }
            Err(fault) => {
                self.segs.truncate(first);
                Err(fault)
            }
        }
    }

    #[inline(always)]
    fn keep(&mut self, chain: Spread) {
        let first = self.segs.items.get(chain.first as usize).copied().unwrap_or_default();
        if let Some(index) = chain.single(self.writable) {
            self.chains.push(first.tagged(u32::from(chain.token.id)));
            self.segs.truncate(index);
        } else {
            // The address only, for prefetches.
            let tag = Tag::spread(chain.token.id, self.spread.len());
            self.chains.push(RawSeg::new(first.ptr(), 0).tagged(tag.0));
            self.spread.push(chain);
        }
    }

    /// What [`id`] and, if all of them are simple, nothing else is needed to complete.
    #[inline(always)]
    pub(crate) fn records(&self) -> &[RawSeg] {
        self.chains.filled()
    }

    /// Whether each chain is one segment and one slot.
    #[inline(always)]
    pub(crate) fn all_single(&self) -> bool {
        self.spread.len() == 0
    }

    /// The chains' tokens, in their order.
    #[inline(always)]
    pub(crate) fn tokens(&self) -> impl ExactSizeIterator<Item = Token> + DoubleEndedIterator {
        let spread = self.spread.filled();
        self.chains.filled().iter().map(move |record| token(record, spread))
    }
}

/// The id of the chain of `record`.
#[inline(always)]
pub(crate) fn id(record: &RawSeg) -> u16 {
    Tag(record.tag()).id()
}

#[inline(always)]
fn now(window: &[RawSeg]) -> RawSeg {
    window.first().copied().unwrap_or_default()
}

#[inline(always)]
fn later(window: &[RawSeg]) -> RawSeg {
    window.get(AHEAD).copied().unwrap_or_default()
}

/// What completes the chain of `record`.
#[inline(always)]
fn token(record: &RawSeg, spread: &[Spread]) -> Token {
    let tag = Tag(record.tag());
    match tag.index() {
        None => Token { id: tag.id(), slots: 1 },
        Some(index) => spread.get(index).map(|chain| chain.token).unwrap_or_default(),
    }
}

/// The chains of one burst, borrowed from the queue (and so from its memory).
#[derive(Debug, Clone, Copy)]
pub struct Chains<'a> {
    chains: &'a [RawSeg],
    /// The same, and [`AHEAD`] times the last one.
    padded: &'a [RawSeg],
    writable: bool,
    spread: &'a [Spread],
    segs: &'a [RawSeg],
    fault: Option<ChainError>,
}

impl<'a> Chains<'a> {
    /// `'a` must be a borrow that keeps the segments mapped.
    #[inline(always)]
    pub(crate) fn new(buf: &'a ChainBuf, fault: Option<ChainError>) -> Self {
        Self {
            chains: buf.chains.filled(),
            padded: buf.chains.padded(),
            writable: buf.writable,
            spread: buf.spread.filled(),
            segs: buf.segs.filled(),
            fault,
        }
    }

    /// Number of valid chains.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Whether the ring had nothing to give.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// The fault that ended the burst, if the chain after the valid ones was broken. The queue
    /// gives no more chains from then on.
    #[inline(always)]
    pub fn fault(&self) -> Option<ChainError> {
        self.fault
    }

    /// What completes chain `index`.
    #[inline(always)]
    pub fn token(&self, index: usize) -> Token {
        self.chains.get(index).map(|record| token(record, self.spread)).unwrap_or_default()
    }

    /// What completes the chains, in their order.
    #[inline(always)]
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = Token> + 'a {
        let spread = self.spread;
        self.chains.iter().map(move |record| token(record, spread))
    }

    /// Segments and bytes of a part of chain `index`.
    #[inline(always)]
    fn part(&self, index: usize, writable: bool) -> (&'a [RawSeg], u32) {
        let Some(record) = self.chains.get(index) else { return (&[], 0) };
        match Tag(record.tag()).index() {
            None if writable == self.writable => (std::slice::from_ref(record), record.len()),
            None => (&[], 0),
            Some(index) => self.spread_part(index, writable),
        }
    }

    fn spread_part(&self, index: usize, writable: bool) -> (&'a [RawSeg], u32) {
        let Some(chain) = self.spread.get(index) else { return (&[], 0) };
        let (_, bytes) = if writable { chain.writable } else { chain.readable };
        (self.segs.get(chain.segments(writable)).unwrap_or_default(), bytes)
    }

    /// The device-readable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn readable(&self, index: usize) -> Readable<'a> {
        let (segs, len) = self.part(index, false);
        Readable { segs, len }
    }

    /// The device-writable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn writable(&self, index: usize) -> Writable<'a> {
        let (segs, len) = self.part(index, true);
        Writable { segs, len }
    }

    /// The chains from `first` on as readable pieces, for hot loops: all of their bytes if they
    /// are in one segment (nearly all chains of a transmitq), otherwise none. Each with the one
    /// that comes [`AHEAD`] later, to be prefetched, or the last one if there is none.
    #[inline(always)]
    pub fn read_pieces(
        &self,
        first: usize,
    ) -> impl ExactSizeIterator<Item = (ReadPiece<'a>, ReadPiece<'a>)> + 'a {
        self.windows(first, false)
            .map(|window| (ReadPiece::new(now(window)), ReadPiece::new(later(window))))
    }

    /// The same as writable pieces (nearly all chains of a receiveq).
    #[inline(always)]
    pub fn write_pieces(
        &self,
        first: usize,
    ) -> impl ExactSizeIterator<Item = (WritePiece<'a>, WritePiece<'a>)> + 'a {
        self.windows(first, true)
            .map(|window| (WritePiece::new(now(window)), WritePiece::new(later(window))))
    }

    /// Each record from `first` on with those that follow it.
    #[inline(always)]
    fn windows(&self, first: usize, writable: bool) -> Windows<'a, RawSeg> {
        let records = self.padded.get(first..).unwrap_or_default();
        let records = if writable == self.writable { records } else { &[] };
        records.windows(const { AHEAD + 1 })
    }

    /// Asks the CPU for the first two lines of the first [`AHEAD`] chains, to read.
    #[inline(always)]
    pub fn prefetch_read(&self) {
        self.padded.iter().take(AHEAD).for_each(|seg| seg.prefetch_read());
    }

    /// The same, to write.
    #[inline(always)]
    pub fn prefetch_write(&self) {
        self.padded.iter().take(AHEAD).for_each(|seg| seg.prefetch_write());
    }

    /// The bytes of chain `index`'s readable part from `skip` on, as a span of [`Self::store`].
    #[inline(always)]
    pub fn span(&self, index: usize, skip: u32) -> SegSpan {
        let Some(record) = self.chains.get(index) else { return SegSpan::default() };
        let (first, (count, len)) = match Tag(record.tag()).index() {
            None if self.writable => return SegSpan::default(),
            None => (narrow(index), (1, record.len())),
            Some(index) => match self.spread.get(index) {
                Some(chain) => (SegStore::spread_index(chain.first), chain.readable),
                None => return SegSpan::default(),
            },
        };
        SegSpan { first, count, skip, len: len.saturating_sub(skip) }
    }

    /// Leaves the first `count` chains only; the others stay popped.
    pub fn keep_first(&mut self, count: usize) {
        self.chains = self.chains.get(..count).unwrap_or(self.chains);
        let ahead = self.chains.len().saturating_add(AHEAD);
        self.padded = self.padded.get(..ahead).unwrap_or(self.padded);
    }

    /// All segments of the burst.
    #[inline(always)]
    pub fn store(&self) -> SegStore<'a> {
        SegStore::new(self.chains, self.segs)
    }
}
