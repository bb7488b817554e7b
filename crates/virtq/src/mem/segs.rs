//! Segments of guest memory, and the cursors that copy from and to them.

use std::marker::PhantomData;

use super::{copy_guest, prefetch_read, prefetch_write};

/// A checked range of host-mapped guest memory. Only valid while its `GuestMap` lives, which the
/// lifetimes of [`SegStore`], [`Readable`] and [`Writable`] see to.
#[derive(Clone, Copy)]
pub(crate) struct RawSeg {
    ptr: *mut u8,
    len: u32,
}

// SAFETY: a plain address; whoever dereferences it holds the borrow that keeps it mapped.
unsafe impl Send for RawSeg {}

impl RawSeg {
    #[inline(always)]
    pub(crate) fn new(ptr: *mut u8, len: u32) -> Self {
        Self { ptr, len }
    }

    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        self.len
    }

    #[inline(always)]
    pub(crate) fn ptr(self) -> *mut u8 {
        self.ptr
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
    /// First segment.
    pub first: u32,
    /// Number of segments.
    pub count: u32,
    /// Bytes to skip in the first segment.
    pub skip: u32,
    /// Bytes in the span, after `skip`.
    pub len: u32,
}

/// The segments of one burst, borrowed together with the memory that they point to.
#[derive(Debug, Clone, Copy)]
pub struct SegStore<'a> {
    segs: &'a [RawSeg],
}

impl<'a> SegStore<'a> {
    /// A store without segments: for batches that live in private heads only.
    pub fn empty() -> Self {
        Self { segs: &[] }
    }

    /// `'a` must be a borrow that keeps the segments' memory mapped.
    pub(crate) fn new(segs: &'a [RawSeg]) -> Self {
        Self { segs }
    }

    /// A reader over `span`; empty where the span lies outside of the store.
    #[inline]
    pub fn reader(self, span: SegSpan) -> Reader<'a> {
        let range = span.first as usize..(span.first as usize).saturating_add(span.count as usize);
        let segs = self.segs.get(range).unwrap_or_default();
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

/// One contiguous piece of guest memory, for system calls that take addresses (`writev`).
#[derive(Debug, Clone, Copy)]
pub struct ReadPiece<'a> {
    ptr: *const u8,
    len: usize,
    _mapped: PhantomData<&'a ()>,
}

impl ReadPiece<'_> {
    /// The address: mapped while the piece's lifetime lasts, its bytes hostile.
    pub fn as_ptr(self) -> *const u8 {
        self.ptr
    }

    /// The length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
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
        (len > 0).then_some(ReadPiece { ptr, len: len as usize, _mapped: PhantomData })
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

impl Writer<'_> {
    /// Bytes of room left.
    #[inline(always)]
    pub fn remaining(&self) -> u32 {
        self.cursor.left
    }

    /// Writes `data` as far as there is room; returns how many bytes were written.
    #[inline(always)]
    pub fn write(&mut self, data: &[u8]) -> usize {
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
        if (self.cursor.here.min(self.cursor.left) as usize) < N && !self.fits_after_refill(N) {
            return self.write(data);
        }
        let (dst, _) = self.cursor.take(u32::try_from(N).unwrap_or(u32::MAX));
        let mut now = [0u8; N];
        // SAFETY: the test above says that `N` contiguous bytes are mapped at `dst`.
        unsafe { copy_guest(dst, now.as_mut_ptr(), N) };
        if now != *data {
            // SAFETY: as above; the value is a hint only, a racing driver harms itself.
            unsafe { copy_guest(data.as_ptr(), dst, N) };
        }
        N
    }

    #[inline(always)]
    fn fits_after_refill(&mut self, count: usize) -> bool {
        self.cursor.refill() && self.cursor.here.min(self.cursor.left) as usize >= count
    }

    /// Skips up to `count` bytes of room; returns how many were skipped.
    #[inline(always)]
    pub fn skip(&mut self, count: u32) -> u32 {
        self.cursor.advance(count)
    }

    /// The one copy: moves up to `len` bytes from `from`; returns how many were moved.
    #[inline(always)]
    pub fn copy_from(&mut self, from: &mut Reader<'_>, len: u32) -> u32 {
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
