//! One chain under construction: every rule that both ring formats share is checked here, on
//! private copies of the descriptors.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::ChainError;
use crate::chain::{Pile, SPLITS_MAX, Spread, Token};
use crate::iotlb::RingIotlb;
use crate::mem::{GuestMap, GuestPhysAddr, Hit, RawDesc, RawSeg};

/// The descriptor goes on in another one.
pub(crate) const NEXT: u16 = 1;
/// The device may write the buffer; without it, read.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

const _: () = assert!(
    NEXT as u32 == VRING_DESC_F_NEXT
        && WRITE as u32 == VRING_DESC_F_WRITE
        && INDIRECT as u32 == VRING_DESC_F_INDIRECT
);

const DESC_BYTES: u32 = 16;
/// As many descriptors as a 16-bit `next` reaches.
const TABLE_BYTES: u32 = DESC_BYTES << 16;

/// Where buffers are looked up, and where their segments go.
#[derive(Debug)]
pub(crate) struct Sink<'a> {
    pub(crate) map: &'a GuestMap,
    /// Instead of `map`, behind a vIOMMU.
    pub(crate) iotlb: Option<&'a mut RingIotlb>,
    pub(crate) hit: &'a mut Hit,
    pub(crate) segs: &'a mut Pile<RawSeg>,
}

impl Sink<'_> {
    /// Adds the segments of a buffer that is not where the last one was: at least one. Returns
    /// false if a byte is not mapped.
    #[cold]
    #[inline(never)]
    fn resolve_slow(&mut self, addr: GuestPhysAddr, len: u32) -> bool {
        if len == 0 {
            self.segs.push(RawSeg::default());
            return true;
        }
        match &mut self.iotlb {
            None => self.map.resolve_slow(self.hit, addr, len, self.segs),
            Some(iotlb) => iotlb.resolve(self.hit, addr, len, self.segs),
        }
    }
}

/// A chain whose descriptors are being read, in order.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    sink: Sink<'a>,
    /// First segment of the chain, and first writable one if there is any.
    first: usize,
    writable_from: Option<usize>,
    readable_len: u32,
    total: u32,
    count: u32,
    limit: u16,
}

impl<'a> Walk<'a> {
    /// A chain of at most `limit` descriptors.
    #[inline(always)]
    pub(crate) fn new(sink: Sink<'a>, limit: u16) -> Self {
        let first = sink.segs.len();
        Self { sink, first, writable_from: None, readable_len: 0, total: 0, count: 0, limit }
    }

    /// Adds one buffer; `index` is for the error's text.
    #[inline(never)]
    pub(crate) fn add_one(
        &mut self,
        desc: RawDesc,
        flags: u16,
        index: u16,
    ) -> Result<(), ChainError> {
        self.add(desc, flags, index)
    }

    /// The same, in the loops over tables.
    #[inline(always)]
    fn add(&mut self, desc: RawDesc, flags: u16, index: u16) -> Result<(), ChainError> {
        self.count = self.count.saturating_add(1);
        if self.count > u32::from(self.limit) {
            return Err(ChainError::TooLong { count: self.count, limit: self.limit });
        }
        let (addr, len) = (GuestPhysAddr(desc.addr), desc.len());
        let total = u64::from(self.total).saturating_add(u64::from(len));
        self.total = u32::try_from(total).map_err(|_| ChainError::TotalLength { total })?;
        if flags & WRITE != 0 {
            let _ = self.writable_from.get_or_insert(self.sink.segs.len());
        } else if self.writable_from.is_some() {
            return Err(ChainError::ReadableAfterWritable { index });
        } else {
            self.readable_len = self.total;
        }
        if let Some(seg) = self.sink.hit.resolve(addr, len) {
            self.sink.segs.push(seg);
            return Ok(());
        }
        if !self.sink.resolve_slow(addr, len) {
            return Err(unmapped(addr, len));
        }
        // Few buffers can be in very many segments: what a chain costs is bounded by its ring.
        let segments = self.sink.segs.len().saturating_sub(self.first);
        let limit = SPLITS_MAX.saturating_add(self.count as usize);
        if segments > limit { Err(scattered(segments, limit)) } else { Ok(()) }
    }

    /// Adds the descriptors of the indirect table that `table` points to, linked by `next`.
    #[inline(always)]
    pub(crate) fn add_linked_table(&mut self, table: RawDesc, head: u16) -> Result<(), ChainError> {
        let entries = table_entries(table)?;
        let (mut index, mut seen) = (0u16, 0u32);
        loop {
            seen = seen.saturating_add(1);
            if seen > entries {
                return Err(ChainError::Loop { head, table: entries });
            }
            let desc = self.fetch(table, index)?;
            let (flags, next) = (desc.third(), desc.fourth());
            if flags & INDIRECT != 0 {
                return Err(ChainError::NestedIndirect { index });
            }
            self.add(desc, flags, index)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            if u32::from(next) >= entries {
                return Err(ChainError::Next { next, table: entries });
            }
            index = next;
        }
    }

    /// Adds the descriptors of the indirect table that `table` points to, one after the other.
    /// Flags outside of `known` are ignored.
    #[inline(always)]
    pub(crate) fn add_flat_table(&mut self, table: RawDesc, known: u16) -> Result<(), ChainError> {
        let entries = table_entries(table)?;
        for index in 0..=u16::try_from(entries.wrapping_sub(1)).unwrap_or(u16::MAX) {
            let desc = self.fetch(table, index)?;
            // NEXT means nothing in such a table, and real drivers set it.
            let flags = desc.fourth() & known;
            if flags & INDIRECT != 0 {
                return Err(ChainError::NestedIndirect { index });
            }
            self.add(desc, flags, index)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn fetch(&mut self, table: RawDesc, index: u16) -> Result<RawDesc, ChainError> {
        let offset = u64::from(index).wrapping_mul(u64::from(DESC_BYTES));
        let addr = GuestPhysAddr(table.addr.wrapping_add(offset));
        let desc = match &mut self.sink.iotlb {
            None => self.sink.map.fetch_desc(self.sink.hit, addr),
            Some(iotlb) => iotlb.fetch_desc(addr),
        };
        desc.ok_or(ChainError::TableUnmapped { addr })
    }

    /// The chain, complete.
    #[inline(always)]
    pub(crate) fn finish(self, token: Token) -> Spread {
        let end = self.sink.segs.len();
        let split = self.writable_from.unwrap_or(end);
        let writable_len = self.total.wrapping_sub(self.readable_len);
        Spread {
            token,
            first: narrow(self.first),
            readable: (narrow(split.wrapping_sub(self.first)), self.readable_len),
            writable: (narrow(end.wrapping_sub(split)), writable_len),
        }
    }
}

#[cold]
fn scattered(segments: usize, limit: usize) -> ChainError {
    ChainError::Scattered { segments: narrow(segments), limit: narrow(limit) }
}

/// Segments of one burst: [`crate::chain::BURST_SEGS`] before its last chain, which has as many as
/// descriptors, [`SPLITS_MAX`] and those of one buffer.
#[inline(always)]
pub(crate) fn narrow(segments: usize) -> u32 {
    u32::try_from(segments).unwrap_or(u32::MAX)
}

#[cold]
fn unmapped(addr: GuestPhysAddr, len: u32) -> ChainError {
    match addr.0.checked_add(u64::from(len.saturating_sub(1))) {
        Some(_) => ChainError::Unmapped { addr, len },
        None => ChainError::AddressOverflow { addr, len },
    }
}

/// Checks an indirect descriptor's own rules.
pub(crate) fn check_indirect(allowed: bool, flags: u16, index: u16) -> Result<(), ChainError> {
    if !allowed {
        return Err(ChainError::IndirectNotNegotiated { index });
    }
    if flags & NEXT != 0 {
        return Err(ChainError::IndirectNext { index });
    }
    Ok(())
}

fn table_entries(table: RawDesc) -> Result<u32, ChainError> {
    let len = table.len();
    if len == 0 || !len.is_multiple_of(DESC_BYTES) {
        return Err(ChainError::IndirectLength { len });
    }
    if len > TABLE_BYTES {
        return Err(ChainError::IndirectTooLarge { len, limit: TABLE_BYTES });
    }
    if table.addr.checked_add(u64::from(len).wrapping_sub(1)).is_none() {
        return Err(ChainError::AddressOverflow { addr: GuestPhysAddr(table.addr), len });
    }
    Ok(len / DESC_BYTES)
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "test code")]
mod tests;
