//! Single contiguous buffers: the straight way of a frame whose chain is one segment.

use std::marker::PhantomData;

use super::{RawSeg, copy_guest, copy_private, prefetch_read, prefetch_write, sum};

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

    /// The length in the type that lengths of chains have.
    #[inline(always)]
    pub fn len_u32(self) -> u32 {
        self.len
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

    /// The address, for system calls that write there: mapped while the piece's lifetime lasts,
    /// and shared with the other side.
    pub fn as_mut_ptr(self) -> *mut u8 {
        self.ptr
    }

    /// Whether there is no room.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Asks the CPU for the first `lines` lines in a writable state.
    #[inline(always)]
    pub fn prefetch(self, lines: usize) {
        for line in 0..lines {
            prefetch_write(self.ptr.wrapping_add(line.wrapping_mul(64)));
        }
    }

    /// Writes a head and a body behind each other. The Internet sum of the body, as if its first
    /// byte were at an even place; none, and nothing written, if there is no room for both.
    #[inline(always)]
    pub fn write_summed(self, head: &[u8], body: ReadPiece<'_>) -> Option<u16> {
        if head.len().saturating_add(body.len()) > self.len as usize {
            return None;
        }
        // SAFETY: the piece is mapped and has `head.len()` bytes; `head` is private.
        unsafe { copy_private(head.as_ptr(), self.ptr, head.len()) };
        let to = self.ptr.wrapping_add(head.len());
        // SAFETY: both pieces are mapped, this one has room behind the head.
        Some(unsafe { sum::copy(body.ptr, to, body.len()) })
    }

    /// Writes `bytes` behind the first `at`, if there is room.
    #[inline(always)]
    pub fn write_at<const N: usize>(self, at: usize, bytes: [u8; N]) {
        if at.saturating_add(N) <= self.len as usize {
            // SAFETY: the piece is mapped and has `N` bytes there; `bytes` are private.
            unsafe { copy_private(bytes.as_ptr(), self.ptr.wrapping_add(at), N) };
        }
    }

    /// Writes a header, a head and a body behind each other. The header is left alone where memory
    /// holds it already, so that its line is not taken from the guest's cache in a modified state
    /// without need. False, and nothing written, if there is no room for all.
    #[inline(always)]
    pub fn write_frame<const N: usize>(
        self,
        header: &[u8; N],
        head: &[u8],
        body: Option<ReadPiece<'_>>,
    ) -> bool {
        let body_len = body.map_or(0, ReadPiece::len);
        let head_end = N.saturating_add(head.len());
        if head_end.saturating_add(body_len) > self.len as usize {
            return false;
        }
        let mut now = [0u8; N];
        // SAFETY: the piece is mapped and has `N` bytes; `now` is private.
        unsafe { copy_private(self.ptr, now.as_mut_ptr(), N) };
        if now != *header {
            // SAFETY: as above; the comparison is a hint only, a racing driver harms itself.
            unsafe { copy_private(header.as_ptr(), self.ptr, N) };
        }
        // SAFETY: the piece has `head.len()` bytes after the header; `head` is private.
        unsafe { copy_private(head.as_ptr(), self.ptr.wrapping_add(N), head.len()) };
        if let Some(body) = body {
            // SAFETY: both pieces are mapped, this one has room behind the head; pieces of two
            // guests may alias, the copy allows it.
            unsafe { copy_guest(body.ptr, self.ptr.wrapping_add(head_end), body_len) };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::sum::tests::plain;
    use super::{RawSeg, ReadPiece, WritePiece};

    #[test]
    fn pieces_never_reach_beyond_their_end() {
        let mut memory = [7u8; 200];
        let seg = RawSeg::new(memory.as_mut_ptr(), 150);
        let (read, write) = (ReadPiece::new(seg), WritePiece::new(seg));
        assert_eq!(read.first::<150>(), Some([7; 150]));
        assert_eq!(read.first::<151>(), None);
        for len in 0..=150u8 {
            let mut out = vec![0; usize::from(len)];
            let end = 150 - u32::from(len);
            assert!(read.copy_to(end, &mut out) && out == vec![7; usize::from(len)]);
            assert!(!read.copy_to(end + 1, &mut out));
        }
        let mut other = [3u8; 101];
        let from = |len| Some(ReadPiece::new(RawSeg::new(other.as_mut_ptr(), len)));
        let [whole, more] = [100, 101].map(from);
        for len in 0..=128u8 {
            let head = vec![len; usize::from(len)];
            let fits = len <= 40;
            assert_eq!(write.write_frame(&[9; 10], &head, whole), fits, "{len}");
            assert_eq!(write.write_frame(&[9; 10], &head, more), len <= 39, "{len}");
            assert!(write.write_frame(&[9; 10], &head, None));
            assert_eq!(read.first::<10>(), Some([9; 10]));
            let mut out = head.clone();
            out.fill(0);
            assert!(read.copy_to(10, &mut out) && out == head);
        }
        for len in 0..=60u8 {
            let head = vec![len; usize::from(len)];
            let sum = whole.and_then(|body| write.write_summed(&head, body));
            let wanted = (len <= 50).then_some(plain(&[3; 100]));
            assert_eq!(sum, wanted, "{len}");
            let mut out = vec![len; usize::from(len) + 100];
            out[usize::from(len)..].fill(3);
            let mut now = vec![0; out.len()];
            assert!(sum.is_none() || read.copy_to(0, &mut now) && now == out);
        }
        for at in [0, 1, 148, 149, 150, usize::MAX] {
            write.write_at(at, [5, 6]);
            let now = |at: u32| {
                let mut out = [0; 2];
                read.copy_to(at, &mut out).then_some(out)
            };
            let fits = u32::try_from(at).ok().and_then(now) == Some([5, 6]);
            assert_eq!(fits, at <= 148, "{at}");
        }
        assert!(write.write_frame(&[8; 10], &[4; 40], whole));
        assert!(!write.write_frame(&[1; 151], &[], None));
        assert_eq!((memory[9], memory[10]), (8, 4));
        assert_eq!((memory[49], memory[50], memory[149], memory[150]), (4, 3, 3, 7));
    }
}
