//! Segments of one store in another order, as a store of their own.

use super::{RawSeg, SegSpan, SegStore};

/// Room for a [`Gather`]; kept, so that nothing is allocated while frames move.
#[derive(Debug, Default)]
pub struct GatherBuf {
    /// Of the last use: never looked at before [`Self::begin`] forgets them.
    list: Vec<RawSeg>,
}

impl GatherBuf {
    /// Begins with nothing. What is gathered is of `from`, and borrows what `from` does.
    pub fn begin<'g>(&'g mut self, from: SegStore<'g>) -> Gather<'g> {
        self.list.clear();
        Gather { list: &mut self.list, from }
    }
}

/// A list of segments in the making.
#[derive(Debug)]
pub struct Gather<'g> {
    list: &'g mut Vec<RawSeg>,
    from: SegStore<'g>,
}

impl<'g> Gather<'g> {
    /// Where the next segment will stand.
    pub fn next(&self) -> u32 {
        u32::try_from(self.list.len()).unwrap_or(u32::MAX)
    }

    /// Appends the bytes of `span`, one of the store; returns how many there are.
    pub fn push(&mut self, span: SegSpan) -> u32 {
        let mut reader = self.from.reader(span);
        let mut len = 0u32;
        while let Some(seg) = reader.next_seg() {
            len = len.saturating_add(seg.len());
            self.list.push(seg);
        }
        len
    }

    /// `len` bytes of what was appended from segment `first` on.
    pub fn span(&self, first: u32, len: u32) -> SegSpan {
        SegSpan { first, count: self.next().saturating_sub(first), skip: 0, len }
    }

    /// The store.
    pub fn finish(self) -> SegStore<'g> {
        SegStore::new(self.list, &[])
    }
}
