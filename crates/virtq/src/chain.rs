//! Descriptor chains: they exist only if they are valid.

use std::ops::Range;

use crate::ChainError;
use crate::mem::{RawSeg, ReadPiece, Readable, SegSpan, SegStore, Writable, WritePiece};

/// What gives a chain back to the ring it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Token {
    /// Head index (split) or buffer id (packed).
    pub(crate) id: u16,
    /// Ring slots that the chain takes (packed; 1 for split).
    pub(crate) slots: u16,
}

/// Two 32-bit numbers in one word, so that a loop stores them at once without a branch: one of
/// the readable part of a chain, one of the writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Parts(u64);

impl Parts {
    #[inline(always)]
    pub(crate) fn new(readable: u32, writable: u32) -> Self {
        Self(u64::from(readable) | u64::from(writable) << 32)
    }

    /// `number` in one part, zero in the other.
    #[inline(always)]
    pub(crate) fn only(number: u32, writable: bool) -> Self {
        Self(u64::from(number) << (u32::from(writable) << 5))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "picks a bit field")]
    fn readable(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    fn writable(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A chain's token and its first segment in one word, for the same reason.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Start(u64);

#[expect(clippy::cast_possible_truncation, reason = "picks bit fields")]
impl Start {
    #[inline(always)]
    pub(crate) fn new(token: Token, first: u32) -> Self {
        Self(u64::from(token.id) | u64::from(token.slots) << 16 | u64::from(first) << 32)
    }

    #[inline(always)]
    pub(crate) fn token(self) -> Token {
        Token { id: self.0 as u16, slots: (self.0 >> 16) as u16 }
    }

    /// The first segment; readable ones come before writable ones.
    #[inline(always)]
    fn first(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// One chain of a burst: numbers only, the segments are in the [`ChainBuf`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Chain {
    pub(crate) start: Start,
    pub(crate) segs: Parts,
    pub(crate) bytes: Parts,
}

impl Chain {
    /// A chain of one buffer in one segment.
    #[inline(always)]
    pub(crate) fn single(token: Token, first: u32, writable: bool, bytes: u32) -> Self {
        Self {
            start: Start::new(token, first),
            segs: Parts::only(1, writable),
            bytes: Parts::only(bytes, writable),
        }
    }

    #[inline(always)]
    fn segments(self, writable: bool) -> Range<usize> {
        let middle = self.start.first().wrapping_add(self.segs.readable()) as usize;
        if writable {
            middle..middle.wrapping_add(self.segs.writable() as usize)
        } else {
            self.start.first() as usize..middle
        }
    }
}

/// A burst ends early when its chains have more segments than this. One chain can have more.
pub(crate) const BURST_SEGS: usize = 1 << 16;

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
    pub(crate) chains: Pile<Chain>,
    pub(crate) segs: Pile<RawSeg>,
}

impl ChainBuf {
    /// Room for bursts of `chains` chains without later allocation in the common case.
    pub fn with_capacity(chains: usize) -> Self {
        Self {
            chains: Pile::with_capacity(chains),
            segs: Pile::with_capacity(chains.saturating_mul(4)),
        }
    }

    /// Empties it; what a guest's oversized chains took goes back to the allocator.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.chains.truncate(0);
        self.segs.truncate(0);
        if self.segs.items.len() > BURST_SEGS.saturating_mul(2) {
            self.segs.items.truncate(BURST_SEGS);
            self.segs.items.shrink_to_fit();
        }
    }

    /// Ends the burst's last chain: keeps it, or drops what a broken one left.
    pub(crate) fn settle(
        &mut self,
        first: usize,
        chain: Result<Chain, ChainError>,
    ) -> Result<Token, ChainError> {
        match chain {
            Ok(chain) => {
                self.chains.push(chain);
                Ok(chain.start.token())
            }
            Err(fault) => {
                self.segs.truncate(first);
                Err(fault)
            }
        }
    }
}

/// The chains of one burst, borrowed from the queue (and so from its memory).
#[derive(Debug, Clone, Copy)]
pub struct Chains<'a> {
    chains: &'a [Chain],
    segs: &'a [RawSeg],
    fault: Option<ChainError>,
}

impl<'a> Chains<'a> {
    /// `'a` must be a borrow that keeps the segments mapped.
    #[inline(always)]
    pub(crate) fn new(buf: &'a ChainBuf, fault: Option<ChainError>) -> Self {
        Self { chains: buf.chains.filled(), segs: buf.segs.filled(), fault }
    }

    #[inline(always)]
    fn chain(&self, index: usize) -> Option<&'a Chain> {
        self.chains.get(index)
    }

    #[inline(always)]
    fn segments(&self, range: Range<usize>) -> &'a [RawSeg] {
        self.segs.get(range).unwrap_or_default()
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
        self.chain(index).map(|c| c.start.token()).unwrap_or_default()
    }

    /// What completes the chains, in their order.
    #[inline(always)]
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = Token> + 'a {
        self.chains.iter().map(|chain| chain.start.token())
    }

    /// The device-readable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn readable(&self, index: usize) -> Readable<'a> {
        let Some(c) = self.chain(index) else { return Readable { segs: &[], len: 0 } };
        Readable { segs: self.segments(c.segments(false)), len: c.bytes.readable() }
    }

    /// The device-writable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn writable(&self, index: usize) -> Writable<'a> {
        let Some(c) = self.chain(index) else { return Writable { segs: &[], len: 0 } };
        Writable { segs: self.segments(c.segments(true)), len: c.bytes.writable() }
    }

    /// The chains from `first` on, for hot loops.
    #[inline(always)]
    pub fn from(&self, first: usize) -> impl ExactSizeIterator<Item = OneChain<'a>> + 'a {
        let segs = self.segs;
        let chains = self.chains.get(first..).unwrap_or_default();
        chains.iter().map(move |chain| OneChain { chain, segs })
    }

    /// Asks the CPU for the first two lines of the first `count` segments, to read.
    #[inline(always)]
    pub fn prefetch_read(&self, count: usize) {
        self.segs.iter().take(count).for_each(|seg| seg.prefetch_read());
    }

    /// The same, to write.
    #[inline(always)]
    pub fn prefetch_write(&self, count: usize) {
        self.segs.iter().take(count).for_each(|seg| seg.prefetch_write());
    }

    /// The bytes of chain `index`'s readable part from `skip` on, as a span of [`Self::store`].
    #[inline(always)]
    pub fn span(&self, index: usize, skip: u32) -> SegSpan {
        let Some(c) = self.chain(index) else { return SegSpan::default() };
        SegSpan {
            first: c.start.first(),
            count: c.segs.readable(),
            skip,
            len: c.bytes.readable().saturating_sub(skip),
        }
    }

    /// All segments of the burst.
    #[inline(always)]
    pub fn store(&self) -> SegStore<'a> {
        SegStore::new(self.segs)
    }
}

/// One chain of a burst, for hot loops over chains of one segment.
#[derive(Debug, Clone, Copy)]
pub struct OneChain<'a> {
    chain: &'a Chain,
    segs: &'a [RawSeg],
}

impl<'a> OneChain<'a> {
    /// Index of the first segment in the burst's store.
    #[inline(always)]
    pub fn first(self) -> u32 {
        self.chain.start.first()
    }

    /// The chain if it is one readable segment: nearly all chains of a transmitq.
    #[inline(always)]
    pub fn one_readable(self) -> Option<ReadPiece<'a>> {
        self.one(false).map(ReadPiece::new)
    }

    /// The chain if it is one writable segment: nearly all chains of a receiveq.
    #[inline(always)]
    pub fn one_writable(self) -> Option<WritePiece<'a>> {
        self.one(true).map(WritePiece::new)
    }

    #[inline(always)]
    fn one(self, writable: bool) -> Option<RawSeg> {
        let one = self.chain.segs == Parts::only(1, writable);
        self.segs.get(self.first() as usize).copied().filter(|_| one)
    }

    /// Asks the CPU for the first two lines of segment `ahead` after this chain's, to read.
    #[inline(always)]
    pub fn prefetch_read_after(self, ahead: usize) {
        if let Some(seg) = self.segs.get((self.first() as usize).wrapping_add(ahead)) {
            seg.prefetch_read();
        }
    }

    /// The same, to write.
    #[inline(always)]
    pub fn prefetch_write_after(self, ahead: usize) {
        if let Some(seg) = self.segs.get((self.first() as usize).wrapping_add(ahead)) {
            seg.prefetch_write();
        }
    }
}
