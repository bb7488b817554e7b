//! Segments of guest memory, and the cursors that copy from and to them.

use super::{ReadPiece, WritePiece, copy_guest, copy_private, prefetch_read, prefetch_write, sum};

/// A checked range of host-mapped guest memory. Only valid while its `GuestMap` lives, which the
/// lifetimes of [`SegStore`], [`Readable`] and [`Writable`] see to.
#[derive(Clone, Copy)]
pub(crate) struct RawSeg {
    ptr: *mut u8,
    len: u32,
    /// Room for who stores it: what would be padding.
    tag: u32,
}

// SAFETY: a plain address; whoever dereferences it holds the borrow that keeps it mapped.
unsafe impl Send for RawSeg {}

impl Default for RawSeg {
    /// No bytes.
    fn default() -> Self {
        Self::new(std::ptr::null_mut(), 0)
    }
}

impl RawSeg {
    #[inline(always)]
    pub(crate) fn new(ptr: *mut u8, len: u32) -> Self {
        Self { ptr, len, tag: 0 }
    }

    #[inline(always)]
    pub(crate) fn tagged(self, tag: u32) -> Self {
        Self { tag, ..self }
    }

    #[inline(always)]
    pub(crate) fn tag(self) -> u32 {
        self.tag
    }

    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        self.len
    }

    #[inline(always)]
    pub(crate) fn ptr(self) -> *mut u8 {
        self.ptr
    }

    /// Asks the CPU for the first two lines: a header may end where the frame's line begins.
    #[inline(always)]
    pub(crate) fn prefetch_read(self) {
        prefetch_read(self.ptr);
        prefetch_read(self.ptr.wrapping_add(64));
    }

    /// The same, in a writable state.
    #[inline(always)]
    pub(crate) fn prefetch_write(self) {
        prefetch_write(self.ptr);
        prefetch_write(self.ptr.wrapping_add(64));
    }
}

impl std::fmt::Debug for RawSeg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RawSeg({} B)", self.len())
    }
}

/// A range of bytes inside a [`SegStore`]: plain numbers, checked again when they are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegSpan {
    /// First segment; which list of the store it is in, is its affair.
    pub first: u32,
    /// Number of segments.
    pub count: u32,
    /// Bytes to skip in the first segment.
    pub skip: u32,
    /// Bytes in the span, after `skip`.
    pub len: u32,
}

/// Set in [`SegSpan::first`]: the segments are in the store's second list.
const SECOND: u32 = 1 << 31;

/// The segments of one burst, borrowed together with the memory that they point to: one list of
/// chains that are one segment, one of the segments of all other chains.
#[derive(Debug, Clone, Copy)]
pub struct SegStore<'a> {
    single: &'a [RawSeg],
    spread: &'a [RawSeg],
}

impl<'a> SegStore<'a> {
    /// A store without segments: for batches that live in private heads only.
    pub fn empty() -> Self {
        Self { single: &[], spread: &[] }
    }

    /// `'a` must be a borrow that keeps the segments' memory mapped.
    pub(crate) fn new(single: &'a [RawSeg], spread: &'a [RawSeg]) -> Self {
        Self { single, spread }
    }

    /// What [`SegSpan::first`] is for segment `index` of the second list.
    #[inline(always)]
    pub(crate) fn spread_index(index: u32) -> u32 {
        index | SECOND
    }

    #[inline(always)]
    fn list(self, first: u32) -> (&'a [RawSeg], usize) {
        let list = if first & SECOND == 0 { self.single } else { self.spread };
        (list, (first & !SECOND) as usize)
    }

    /// The bytes of `span` if they are in one segment: nearly all bodies.
    #[inline(always)]
    pub fn one(self, span: SegSpan) -> Option<ReadPiece<'a>> {
        let (list, first) = self.list(span.first);
        let seg = list.get(first)?;
        let here = seg.len.checked_sub(span.skip)?;
        let ptr = seg.ptr.wrapping_add(span.skip as usize);
        (span.count == 1 && here >= span.len).then(|| ReadPiece::new(RawSeg::new(ptr, span.len)))
    }

    /// Splits `span` behind its first `at` bytes, or at its end: both parts, of which neither has
    /// segments that it does not need.
    pub fn split(self, span: SegSpan, at: u32) -> (SegSpan, SegSpan) {
        let at = at.min(span.len);
        let (list, first) = self.list(span.first);
        let segs = list.get(first..first.saturating_add(span.count as usize)).unwrap_or_default();
        let (mut passed, mut skip, mut count) = (0u32, span.skip.saturating_add(at), 0u32);
        for seg in segs {
            count = count.wrapping_add(1);
            if skip < seg.len {
                break;
            }
            skip = skip.wrapping_sub(seg.len);
            passed = passed.wrapping_add(1);
        }
        let rest = SegSpan {
            first: span.first.wrapping_add(passed),
            count: span.count.saturating_sub(passed),
            skip,
            len: span.len.wrapping_sub(at),
        };
        // Where the first part ends with a segment, it needs nothing of the next one.
        let needed = if skip == 0 { passed } else { count };
        (SegSpan { count: needed.min(span.count), len: at, ..span }, rest)
    }

    /// A reader over `span`; empty where the span lies outside of the store.
    #[inline]
    pub fn reader(self, span: SegSpan) -> Reader<'a> {
        let (list, first) = self.list(span.first);
        let segs = list.get(first..first.saturating_add(span.count as usize)).unwrap_or_default();
        Reader { cursor: Cursor::new(segs, span.skip, span.len) }
    }
}

/// The device-readable part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Readable<'a> {
    pub(crate) segs: &'a [RawSeg],
    pub(crate) len: u32,
}

impl<'a> Readable<'a> {
    /// Bytes in the part.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the driver gave no readable bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A reader that starts at the first byte.
    #[inline(always)]
    pub fn reader(&self) -> Reader<'a> {
        Reader { cursor: Cursor::new(self.segs, 0, self.len) }
    }

    /// Asks the CPU for the first line.
    #[inline(always)]
    pub fn prefetch(&self) {
        if let Some(seg) = self.segs.first() {
            prefetch_read(seg.ptr);
        }
    }
}

/// The device-writable part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Writable<'a> {
    pub(crate) segs: &'a [RawSeg],
    pub(crate) len: u32,
}

impl<'a> Writable<'a> {
    /// Bytes in the part.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the driver gave no writable bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A writer that starts at the first byte.
    #[inline(always)]
    pub fn writer(&self) -> Writer<'a> {
        Writer { cursor: Cursor::new(self.segs, 0, self.len) }
    }

    /// Asks the CPU for the first two lines in a writable state.
    #[inline(always)]
    pub fn prefetch(&self) {
        if let Some(seg) = self.segs.first() {
            prefetch_write(seg.ptr);
            prefetch_write(seg.ptr.wrapping_add(64));
        }
    }
}

/// A position in a list of segments. Invariant: `ptr` is valid for `here` bytes, and `here` plus
/// the lengths of `rest` is at least `left`.
#[derive(Debug, Clone, Copy)]
struct Cursor<'a> {
    ptr: *mut u8,
    /// Bytes left in the current segment.
    here: u32,
    /// Bytes left as a whole.
    left: u32,
    rest: &'a [RawSeg],
}

impl<'a> Cursor<'a> {
    #[inline(always)]
    fn new(segs: &'a [RawSeg], skip: u32, len: u32) -> Self {
        match segs {
            [only] if only.len.checked_sub(skip).is_some_and(|here| here >= len) => Self {
                ptr: only.ptr.wrapping_add(skip as usize),
                here: only.len.wrapping_sub(skip),
                left: len,
                rest: &[],
            },
            _ => Self::new_slow(segs, skip, len),
        }
    }

    #[cold]
    #[inline(never)]
    fn new_slow(segs: &'a [RawSeg], skip: u32, len: u32) -> Self {
        let total = segs.iter().map(|s| u64::from(s.len)).sum::<u64>();
        let left = total.saturating_sub(u64::from(skip)).min(u64::from(len));
        let whole = u32::try_from(total.min(u64::from(u32::MAX))).unwrap_or(u32::MAX);
        let mut cursor = Self { ptr: std::ptr::null_mut(), here: 0, left: whole, rest: segs };
        let _ = cursor.advance(skip);
        cursor.left = u32::try_from(left).unwrap_or(0);
        cursor
    }

    /// Steps to the next segment when the current one is used up.
    #[inline(always)]
    fn refill(&mut self) -> bool {
        while self.here == 0 {
            let [first, rest @ ..] = self.rest else { return false };
            (self.ptr, self.here, self.rest) = (first.ptr, first.len, rest);
        }
        true
    }

    /// Takes exactly `count` contiguous bytes of the current segment, if it has them.
    #[inline(always)]
    fn take_whole(&mut self, count: usize) -> Option<*mut u8> {
        let step = u32::try_from(count).ok().filter(|c| *c <= self.here.min(self.left))?;
        let at = self.ptr;
        self.ptr = self.ptr.wrapping_add(count);
        self.here = self.here.wrapping_sub(step);
        self.left = self.left.wrapping_sub(step);
        Some(at)
    }

    /// Takes up to `want` contiguous bytes: their address and number (0 at the end).
    #[inline(always)]
    fn take(&mut self, want: u32) -> (*mut u8, u32) {
        if self.left == 0 || !self.refill() {
            return (std::ptr::null_mut(), 0);
        }
        let step = want.min(self.here).min(self.left);
        let at = self.ptr;
        self.ptr = self.ptr.wrapping_add(step as usize);
        self.here = self.here.wrapping_sub(step);
        self.left = self.left.wrapping_sub(step);
        (at, step)
    }

    #[inline(always)]
    fn advance(&mut self, count: u32) -> u32 {
        let mut done = 0u32;
        while done < count {
            let (_, step) = self.take(count.wrapping_sub(done));
            if step == 0 {
                break;
            }
            done = done.wrapping_add(step);
        }
        done
    }
}

/// Reads from guest memory, once, in order.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Reader<'a> {
    /// A reader over whole segments; `'a` must be a borrow that keeps their memory mapped.
    pub(super) fn over(segs: &'a [RawSeg]) -> Self {
        let len = segs.iter().fold(0u32, |sum, seg| sum.saturating_add(seg.len));
        Self { cursor: Cursor::new(segs, 0, len) }
    }

    /// Bytes not yet read.
    #[inline(always)]
    pub fn remaining(&self) -> u32 {
        self.cursor.left
    }

    /// Fills `out` as far as there are bytes; returns how many were read.
    #[inline(always)]
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let Some(src) = self.cursor.take_whole(out.len()) else { return self.read_pieces(out) };
        // SAFETY: `take_whole` gave that many mapped bytes; `out` is private, as long, no overlap.
        unsafe { copy_private(src, out.as_mut_ptr(), out.len()) };
        out.len()
    }

    #[cold]
    #[inline(never)]
    fn read_pieces(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0usize;
        while done < out.len() {
            let want = u32::try_from(out.len().wrapping_sub(done)).unwrap_or(u32::MAX);
            let (src, step) = self.cursor.take(want);
            if step == 0 {
                break;
            }
            let dst = out.as_mut_ptr().wrapping_add(done);
            // SAFETY: `take` gave `step` mapped bytes at `src`; `out` has room for them from
            // `done` on, because `step <= want`.
            unsafe { copy_guest(src, dst, step as usize) };
            done = done.wrapping_add(step as usize);
        }
        done
    }

    /// Skips up to `count` bytes; returns how many were skipped.
    #[inline(always)]
    pub fn skip(&mut self, count: u32) -> u32 {
        self.cursor.advance(count)
    }

    /// Takes the next contiguous piece, at most `max` bytes.
    pub fn next_piece(&mut self, max: u32) -> Option<ReadPiece<'a>> {
        let (ptr, len) = self.cursor.take(max);
        (len > 0).then(|| ReadPiece::new(RawSeg::new(ptr, len)))
    }

    /// Takes the next contiguous piece, as a segment.
    pub(super) fn next_seg(&mut self) -> Option<RawSeg> {
        let (ptr, len) = self.cursor.take(u32::MAX);
        (len > 0).then(|| RawSeg::new(ptr, len))
    }

    /// The Internet sum of up to `max` bytes of the next contiguous piece, as if the first were at
    /// an even place, and how many there were, 0 at the end.
    #[inline(always)]
    pub fn sum_piece(&mut self, max: u32) -> (u16, u32) {
        let (src, len) = self.cursor.take(max);
        // SAFETY: `take` gave that many mapped bytes, or none.
        (unsafe { sum::look(src, len as usize) }, len)
    }

    /// Asks the CPU for the first `lines` lines from here.
    #[inline(always)]
    pub fn prefetch(&self, lines: usize) {
        for line in 0..lines {
            prefetch_read(self.cursor.ptr.wrapping_add(line.wrapping_mul(64)));
        }
    }
}

/// Writes to guest memory, once, in order.
#[derive(Debug, Clone, Copy)]
pub struct Writer<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Writer<'a> {
    /// The next `len` bytes, which are not taken, if they are in one piece.
    #[inline(always)]
    pub fn whole(&self, len: u32) -> Option<WritePiece<'a>> {
        let Cursor { ptr, here, left, .. } = self.cursor;
        (len <= here.min(left)).then(|| WritePiece::new(RawSeg::new(ptr, len)))
    }

    /// Bytes of room left.
    #[inline(always)]
    pub fn remaining(&self) -> u32 {
        self.cursor.left
    }

    /// Writes `data` as far as there is room; returns how many bytes were written.
    #[inline(always)]
    pub fn write(&mut self, data: &[u8]) -> usize {
        let Some(dst) = self.cursor.take_whole(data.len()) else { return self.write_pieces(data) };
        // SAFETY: `take_whole` gave that many mapped bytes; `data` is private and as long.
        unsafe { copy_private(data.as_ptr(), dst, data.len()) };
        data.len()
    }

    #[cold]
    #[inline(never)]
    fn write_pieces(&mut self, data: &[u8]) -> usize {
        let mut done = 0usize;
        while done < data.len() {
            let want = u32::try_from(data.len().wrapping_sub(done)).unwrap_or(u32::MAX);
            let (dst, step) = self.cursor.take(want);
            if step == 0 {
                break;
            }
            let src = data.as_ptr().wrapping_add(done);
            // SAFETY: `take` gave `step` mapped bytes at `dst`; `data` has them from `done` on.
            unsafe { copy_guest(src, dst, step as usize) };
            done = done.wrapping_add(step as usize);
        }
        done
    }

    /// Writes `data` like [`Self::write`], but leaves memory that holds it already untouched, so
    /// that the line is not taken from the guest's cache in a modified state without need.
    #[inline(always)]
    pub fn write_if_different<const N: usize>(&mut self, data: &[u8; N]) -> usize {
        let Some(dst) = self.cursor.take_whole(N) else { return self.write_pieces(data) };
        let mut now = [0u8; N];
        // SAFETY: `take_whole` says that `N` contiguous bytes are mapped at `dst`.
        unsafe { copy_guest(dst, now.as_mut_ptr(), N) };
        if now != *data {
            // SAFETY: as above; the value is a hint only, a racing driver harms itself.
            unsafe { copy_guest(data.as_ptr(), dst, N) };
        }
        N
    }

    /// Skips up to `count` bytes of room; returns how many were skipped.
    #[inline(always)]
    pub fn skip(&mut self, count: u32) -> u32 {
        self.cursor.advance(count)
    }

    /// The one copy: moves up to `len` bytes from `from`; returns how many were moved.
    #[inline(always)]
    pub fn copy_from(&mut self, from: &mut Reader<'_>, len: u32) -> u32 {
        let here = self.cursor.here.min(self.cursor.left);
        let there = from.cursor.here.min(from.cursor.left);
        if len > here.min(there) {
            return self.copy_pieces(from, len);
        }
        let ((dst, _), (src, _)) = (self.cursor.take(len), from.cursor.take(len));
        // SAFETY: both cursors have `len` mapped bytes in their current segments; ranges of two
        // guests may alias, the copy allows it.
        unsafe { copy_guest(src, dst, len as usize) };
        len
    }

    /// As [`Self::copy_from`], but only within the next contiguous pieces of both sides, and with
    /// the Internet sum of what was moved, as if its first byte were at an even place. Returns that
    /// sum, and how many bytes there were, 0 where either side ends.
    #[inline(always)]
    pub fn copy_sum(&mut self, from: &mut Reader<'_>, max: u32) -> (u16, u32) {
        if !from.cursor.refill() {
            return (0, 0);
        }
        let (dst, len) = self.cursor.take(max.min(from.cursor.here).min(from.cursor.left));
        let (src, _) = from.cursor.take(len);
        // SAFETY: both cursors have `len` mapped bytes in their current segments.
        (unsafe { sum::copy(src, dst, len as usize) }, len)
    }

    #[cold]
    #[inline(never)]
    fn copy_pieces(&mut self, from: &mut Reader<'_>, len: u32) -> u32 {
        let mut done = 0u32;
        while done < len {
            let want = len.wrapping_sub(done).min(from.cursor.left);
            if !from.cursor.refill() {
                break;
            }
            let (dst, step) = self.cursor.take(want.min(from.cursor.here));
            if step == 0 {
                break;
            }
            let (src, _) = from.cursor.take(step);
            // SAFETY: both cursors gave `step` mapped bytes (`step` is at most what the reader
            // has in its current segment); ranges of two guests may alias, the copy allows it.
            unsafe { copy_guest(src, dst, step as usize) };
            done = done.wrapping_add(step);
        }
        done
    }
}

#[cfg(test)]
mod tests;
