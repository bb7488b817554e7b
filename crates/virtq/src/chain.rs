//! Descriptor chains: they exist only if they are valid.

use std::ops::Range;

use crate::ChainError;
use crate::mem::{RawSeg, Readable, SegSpan, SegStore, Writable};

/// What gives a chain back to the ring it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Token {
    /// Head index (split) or buffer id (packed).
    pub(crate) id: u16,
    /// Ring slots that the chain takes (packed; 1 for split).
    pub(crate) slots: u16,
}

/// One chain of a burst: numbers only, the segments are in the [`ChainBuf`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain {
    pub(crate) token: Token,
    pub(crate) first: u32,
    pub(crate) readable_segs: u32,
    pub(crate) writable_segs: u32,
    pub(crate) readable_len: u32,
    pub(crate) writable_len: u32,
}

impl Chain {
    /// A chain of one buffer, whose segments are `segs`.
    #[inline(always)]
    pub(crate) fn single(token: Token, writable: bool, segs: Range<u32>, len: u32) -> Self {
        let count = segs.end.wrapping_sub(segs.start);
        let (readable_segs, writable_segs) = if writable { (0, count) } else { (count, 0) };
        let (readable_len, writable_len) = if writable { (0, len) } else { (len, 0) };
        Self { token, first: segs.start, readable_segs, writable_segs, readable_len, writable_len }
    }
}

/// A burst ends early when its chains have more segments than this. One chain can have more.
pub(crate) const BURST_SEGS: usize = 1 << 16;

/// Storage for the chains of one burst; allocated once, reused for every burst.
#[derive(Debug, Default)]
pub struct ChainBuf {
    pub(crate) chains: Vec<Chain>,
    pub(crate) segs: Vec<RawSeg>,
}

impl ChainBuf {
    /// Room for bursts of `chains` chains without later allocation in the common case.
    pub fn with_capacity(chains: usize) -> Self {
        Self {
            chains: Vec::with_capacity(chains),
            segs: Vec::with_capacity(chains.saturating_mul(4)),
        }
    }

    /// Empties it; what a guest's oversized chains took goes back to the allocator.
    #[inline(always)]
    pub(crate) fn clear(&mut self) {
        self.chains.clear();
        self.segs.clear();
        if self.segs.capacity() > BURST_SEGS.saturating_mul(2) {
            self.segs.shrink_to(BURST_SEGS);
        }
    }
}

/// The chains of one burst, borrowed from the queue (and so from its memory).
#[derive(Debug, Clone, Copy)]
pub struct Chains<'a> {
    pub(crate) buf: &'a ChainBuf,
    pub(crate) fault: Option<ChainError>,
}

impl<'a> Chains<'a> {
    /// Number of valid chains.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.buf.chains.len()
    }

    /// Whether the ring had nothing to give.
    pub fn is_empty(&self) -> bool {
        self.buf.chains.is_empty()
    }

    /// The fault that ended the burst, if the chain after the valid ones was broken. The queue
    /// gives no more chains from then on.
    pub fn fault(&self) -> Option<ChainError> {
        self.fault
    }

    /// What completes chain `index`.
    #[inline(always)]
    pub fn token(&self, index: usize) -> Token {
        self.buf.chains.get(index).map(|c| c.token).unwrap_or_default()
    }

    /// The device-readable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn readable(&self, index: usize) -> Readable<'a> {
        let Some(c) = self.buf.chains.get(index) else { return Readable { segs: &[], len: 0 } };
        let first = c.first as usize;
        let range = first..first.wrapping_add(c.readable_segs as usize);
        Readable { segs: self.buf.segs.get(range).unwrap_or_default(), len: c.readable_len }
    }

    /// The device-writable part of chain `index`; empty if there is no such chain.
    #[inline(always)]
    pub fn writable(&self, index: usize) -> Writable<'a> {
        let Some(c) = self.buf.chains.get(index) else { return Writable { segs: &[], len: 0 } };
        let first = (c.first as usize).wrapping_add(c.readable_segs as usize);
        let range = first..first.wrapping_add(c.writable_segs as usize);
        Writable { segs: self.buf.segs.get(range).unwrap_or_default(), len: c.writable_len }
    }

    /// The bytes of chain `index`'s readable part from `skip` on, as a span of [`Self::store`].
    #[inline(always)]
    pub fn span(&self, index: usize, skip: u32) -> SegSpan {
        let Some(c) = self.buf.chains.get(index) else { return SegSpan::default() };
        SegSpan {
            first: c.first,
            count: c.readable_segs,
            skip,
            len: c.readable_len.saturating_sub(skip),
        }
    }

    /// All segments of the burst.
    #[inline(always)]
    pub fn store(&self) -> SegStore<'a> {
        SegStore::new(&self.buf.segs)
    }
}
