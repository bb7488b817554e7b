//! Fixed-size buffers in guest memory, for who plays the guest.

use super::{Buffer, DriverError};
use crate::mem::{GuestMap, GuestPhysAddr, Hit, RawSeg, Readable, Writable, WritePiece};

/// Buffers of one size, at consecutive addresses; their contents are read and written by index.
#[derive(Debug)]
pub struct BufferPool {
    base: GuestPhysAddr,
    stride: u32,
    /// One per buffer.
    segs: Vec<RawSeg>,
    /// Indexes that nobody took.
    free: Vec<u32>,
    /// Keeps the buffers mapped.
    _map: GuestMap,
}

impl BufferPool {
    /// `count` buffers of `bytes` bytes from `base` on.
    ///
    /// # Errors
    ///
    /// [`DriverError::Area`] if one of them is not mapped in one piece.
    pub fn new(
        map: &GuestMap,
        base: GuestPhysAddr,
        bytes: u32,
        count: u32,
    ) -> Result<Self, DriverError> {
        let whole = u64::from(bytes).wrapping_mul(u64::from(count));
        if base.0.checked_add(whole).is_none() {
            return Err(DriverError::Area(base));
        }
        let mut segs = Vec::new();
        let mut hit = Hit::none();
        for index in 0..count {
            let offset = u64::from(index).wrapping_mul(u64::from(bytes));
            let at = GuestPhysAddr(base.0.wrapping_add(offset));
            let before = segs.len();
            let mapped = map.resolve(&mut hit, at, bytes, &mut segs);
            if !mapped || segs.len() != before.wrapping_add(1) {
                return Err(DriverError::Area(at));
            }
        }
        let free = (0..count).rev().collect();
        Ok(Self { base, stride: bytes, segs, free, _map: map.clone() })
    }

    /// Number of buffers.
    pub fn len(&self) -> usize {
        self.segs.len()
    }

    /// Whether there are no buffers at all.
    pub fn is_empty(&self) -> bool {
        self.segs.is_empty()
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> u32 {
        self.stride
    }

    /// The first `len` bytes of buffer `index`, as descriptors name them.
    #[inline(always)]
    pub fn buffer(&self, index: u32, len: u32) -> Buffer {
        let offset = u64::from(index).wrapping_mul(u64::from(self.stride));
        Buffer { addr: GuestPhysAddr(self.base.0.wrapping_add(offset)), len: len.min(self.stride) }
    }

    /// Takes a buffer that nobody has.
    #[inline(always)]
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Gives a taken buffer back.
    #[inline(always)]
    pub fn give(&mut self, index: u32) {
        self.free.push(index);
    }

    /// Number of buffers that nobody has.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Buffer `index` to read from; empty if there is none.
    #[inline(always)]
    pub fn readable(&self, index: u32) -> Readable<'_> {
        let segs = self.seg(index);
        Readable { segs, len: segs.first().map_or(0, |s| s.len()) }
    }

    /// Buffer `index` to write to; empty if there is none.
    #[inline(always)]
    pub fn writable(&self, index: u32) -> Writable<'_> {
        let segs = self.seg(index);
        Writable { segs, len: segs.first().map_or(0, |s| s.len()) }
    }

    /// Buffer `index` as one piece to write to; none if there is no such buffer.
    #[inline]
    pub fn write_piece(&self, index: u32) -> Option<WritePiece<'_>> {
        self.seg(index).first().map(|seg| WritePiece::new(*seg))
    }

    fn seg(&self, index: u32) -> &[RawSeg] {
        let index = index as usize;
        self.segs.get(index..index.wrapping_add(1)).unwrap_or_default()
    }

    /// Fills `out` from byte `offset` of buffer `index` on; returns how many bytes there were.
    #[inline]
    pub fn read(&self, index: u32, offset: u32, out: &mut [u8]) -> usize {
        let mut reader = self.readable(index).reader();
        if reader.skip(offset) < offset { 0 } else { reader.read(out) }
    }

    /// Writes `data` at byte `offset` of buffer `index`; returns how many bytes had room.
    #[inline]
    pub fn write(&self, index: u32, offset: u32, data: &[u8]) -> usize {
        let mut writer = self.writable(index).writer();
        if writer.skip(offset) < offset { 0 } else { writer.write(data) }
    }
}
