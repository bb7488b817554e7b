//! Single contiguous buffers: the straight way of a frame whose chain is one segment.

use std::marker::PhantomData;

use super::{RawSeg, copy_guest, copy_private, prefetch_read};

/// One contiguous piece of guest memory, to read; also for system calls that take addresses.
#[derive(Debug, Clone, Copy)]
pub struct ReadPiece<'a> {
    ptr: *const u8,
    len: u32,
    _mapped: PhantomData<&'a ()>,
}

impl ReadPiece<'_> {
    /// `'a` must be a borrow that keeps the segment mapped.
    #[inline(always)]
    pub(crate) fn new(seg: RawSeg) -> Self {
        Self { ptr: seg.ptr(), len: seg.len(), _mapped: PhantomData }
    }

    /// The address: mapped while the piece's lifetime lasts, its bytes hostile.
    pub fn as_ptr(self) -> *const u8 {
        self.ptr
    }

    /// The length in bytes.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.len as usize
    }

    /// Whether there are no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Copies `N` bytes from the start; none if there are fewer.
    #[inline(always)]
    pub fn first<const N: usize>(self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.copy_to(0, &mut bytes).then_some(bytes)
    }

    /// Fills `out` from byte `offset` on. False, and nothing copied, if there are fewer bytes.
    #[inline(always)]
    pub fn copy_to(self, offset: u32, out: &mut [u8]) -> bool {
        let fits = self.len.checked_sub(offset).is_some_and(|left| left as usize >= out.len());
        if fits {
            let src = self.ptr.wrapping_add(offset as usize);
            // SAFETY: the piece is mapped and long enough; `out` is private.
            unsafe { copy_private(src, out.as_mut_ptr(), out.len()) };
        }
        fits
    }

    /// Asks the CPU for the first `lines` lines.
    #[inline(always)]
    pub fn prefetch(self, lines: usize) {
        for line in 0..lines {
            prefetch_read(self.ptr.wrapping_add(line.wrapping_mul(64)));
        }
    }
}

/// One contiguous piece of guest memory, to write.
#[derive(Debug, Clone, Copy)]
pub struct WritePiece<'a> {
    ptr: *mut u8,
    len: u32,
    _mapped: PhantomData<&'a ()>,
}

impl WritePiece<'_> {
    /// `'a` must be a borrow that keeps the segment mapped.
    #[inline(always)]
    pub(crate) fn new(seg: RawSeg) -> Self {
        Self { ptr: seg.ptr(), len: seg.len(), _mapped: PhantomData }
    }

    /// The length in bytes.
    #[inline(always)]
    pub fn len(self) -> u32 {
        self.len
    }

    /// Whether there is no room.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The address of `count` bytes from `offset` on, if they are in the piece.
    #[inline(always)]
    fn room(self, offset: u32, count: usize) -> Option<*mut u8> {
        let fits = self.len.checked_sub(offset).is_some_and(|left| left as usize >= count);
        fits.then(|| self.ptr.wrapping_add(offset as usize))
    }

    /// Writes `data` at `offset`. False, and nothing written, if there is no room.
    #[inline(always)]
    pub fn write(self, offset: u32, data: &[u8]) -> bool {
        let Some(dst) = self.room(offset, data.len()) else { return false };
        // SAFETY: the piece is mapped and long enough; `data` is private.
        unsafe { copy_private(data.as_ptr(), dst, data.len()) };
        true
    }

    /// Writes `data` at the start, but leaves memory that holds it already untouched, so that the
    /// line is not taken from the guest's cache in a modified state without need.
    #[inline(always)]
    pub fn write_if_different<const N: usize>(self, data: &[u8; N]) -> bool {
        let Some(dst) = self.room(0, N) else { return false };
        let mut now = [0u8; N];
        // SAFETY: the piece is mapped and has `N` bytes; `now` is private.
        unsafe { copy_private(dst, now.as_mut_ptr(), N) };
        if now != *data {
            // SAFETY: as above; the comparison is a hint only, a racing driver harms itself.
            unsafe { copy_private(data.as_ptr(), dst, N) };
        }
        true
    }

    /// The one copy: all of `from` to `offset`. False, and nothing copied, if there is no room.
    #[inline(always)]
    pub fn copy_from(self, offset: u32, from: ReadPiece<'_>) -> bool {
        let Some(dst) = self.room(offset, from.len()) else { return false };
        // SAFETY: both pieces are mapped and long enough; pieces of two guests may alias, the
        // copy allows it.
        unsafe { copy_guest(from.ptr, dst, from.len()) };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{RawSeg, ReadPiece, WritePiece};

    #[test]
    fn pieces_never_reach_beyond_their_end() {
        let mut memory = [7u8; 200];
        let seg = RawSeg::new(memory.as_mut_ptr(), 150);
        let (read, write) = (ReadPiece::new(seg), WritePiece::new(seg));
        assert_eq!(read.first::<150>(), Some([7; 150]));
        assert_eq!(read.first::<151>(), None);
        for len in 0..=150u8 {
            let data = vec![len; usize::from(len)];
            let end = 150 - u32::from(len);
            assert!(write.write(end, &data) && !write.write(end + 1, &data));
            let mut out = data.clone();
            out.fill(0);
            assert!(read.copy_to(end, &mut out) && out == data);
            assert!(!read.copy_to(end + 1, &mut out));
        }
        assert!(!write.write(151, &[]) && !write.write(u32::MAX, &[1]));
        assert!(write.write_if_different(&[9; 150]) && !write.write_if_different(&[9; 151]));
        let mut other = [3u8; 100];
        let from = ReadPiece::new(RawSeg::new(other.as_mut_ptr(), 100));
        assert!(write.copy_from(50, from) && !write.copy_from(51, from));
        assert_eq!((memory[49], memory[50], memory[149], memory[150]), (9, 3, 3, 7));
    }
}
