//! The layout of one guest's memory, resolved to host addresses.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::{RawDesc, RawSeg};

/// The most regions that one map may have: vhost-user's 509 slots fit.
pub const MAX_REGIONS: usize = 1024;

/// An address as the guest's driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestPhysAddr(pub u64);

impl fmt::Display for GuestPhysAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// One region: `[base, base + len)` of the guest is at `host`.
#[derive(Clone, Copy)]
struct Region {
    base: u64,
    len: u64,
    host: *mut u8,
}

/// The region that was used last, by value: most lookups end here. Belongs to one map, in whose
/// owner it lives.
#[derive(Clone, Copy)]
pub(crate) struct Hit {
    region: Region,
}

// SAFETY: the pointer is as good in every thread; see `Inner`.
unsafe impl Send for Hit {}
// SAFETY: as above; the struct itself is immutable behind a shared reference.
unsafe impl Sync for Hit {}

impl Hit {
    /// A cache that holds nothing.
    pub(crate) fn none() -> Self {
        Self { region: Region { base: 0, len: 0, host: std::ptr::null_mut() } }
    }

    /// The segment `[addr, addr + len)` if it lies in the region.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "64-bit only, asserted in `mem`")]
    pub(crate) fn resolve(&self, addr: GuestPhysAddr, len: u32) -> Option<RawSeg> {
        let offset = addr.0.wrapping_sub(self.region.base);
        let fits =
            offset < self.region.len && self.region.len.wrapping_sub(offset) >= u64::from(len);
        fits.then(|| RawSeg::new(self.region.host.wrapping_add(offset as usize), len))
    }

    /// The bytes from `addr` to the end of the region; none if it is outside.
    #[inline(always)]
    pub(crate) fn left(&self, addr: u64) -> u64 {
        self.region.len.saturating_sub(addr.wrapping_sub(self.region.base))
    }

    /// Copies the descriptor at `addr`, if it lies in the region.
    #[inline]
    pub(crate) fn fetch_desc(&self, addr: GuestPhysAddr) -> Option<RawDesc> {
        self.resolve(addr, 16).and_then(RawDesc::fetch)
    }

    /// Copies the descriptor at `addr`, in one piece or several; `find` tells what each is in.
    pub(crate) fn fetch_desc_in_pieces(
        addr: GuestPhysAddr,
        find: impl Fn(u64) -> Option<Self>,
    ) -> Option<RawDesc> {
        let (mut segs, mut at, mut left) = (Vec::new(), addr.0, 16u32);
        while left > 0 {
            let hit = find(at)?;
            let step = u32::try_from(hit.left(at)).unwrap_or(u32::MAX).min(left);
            segs.push(hit.resolve(GuestPhysAddr(at), step)?);
            left = left.wrapping_sub(step);
            at = at.wrapping_add(u64::from(step));
        }
        RawDesc::fetch_bytes(&segs)
    }

    /// Whether the descriptor's buffer is in the region.
    #[inline(always)]
    pub(crate) fn holds(&self, desc: RawDesc) -> bool {
        self.left(desc.addr) >= u64::from(desc.len()).max(1)
    }
}

/// Buffers of fewer bytes are found with one comparison: the 14 low bits of a length.
const SHORT: u32 = 1 << 14;
const LONG: u64 = !(SHORT - 1) as u64;

/// What a descriptor must look like to be a short buffer in the region of a [`Hit`], in a form
/// that a loop keeps in registers.
#[derive(Clone, Copy)]
pub(crate) struct Simple {
    mask: u64,
    want: u64,
    base: u64,
    /// Short buffers that start below this offset end in the region.
    near: u64,
    host: *mut u8,
}

impl Hit {
    /// Descriptors whose second word, under `mask`, is `want`. Neither says anything about the
    /// length.
    #[inline(always)]
    pub(crate) fn simple(&self, mask: u64, want: u64) -> Simple {
        Simple {
            mask: mask | LONG,
            want: want & !LONG,
            base: self.region.base,
            near: self.region.len.saturating_sub(u64::from(SHORT - 1)),
            host: self.region.host,
        }
    }
}

impl Simple {
    /// The descriptor's buffer, if it is as wanted.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "64-bit only, asserted in `mem`")]
    pub(crate) fn resolve(&self, desc: RawDesc) -> Option<RawSeg> {
        // Without the bits of LONG the buffer has at most SHORT - 1 bytes.
        let short = desc.meta & self.mask == self.want;
        let offset = desc.addr.wrapping_sub(self.base);
        (short && offset < self.near)
            .then(|| RawSeg::new(self.host.wrapping_add(offset as usize), desc.len()))
    }

    /// Whether the descriptor is as wanted, of any length and anywhere.
    #[inline(always)]
    pub(crate) fn is_like(&self, desc: RawDesc) -> bool {
        desc.meta & self.mask & !LONG == self.want
    }
}

impl fmt::Debug for Hit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hit({:#x}, {:#x} B)", self.region.base, self.region.len)
    }
}

/// Where a range of guest addresses is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostRange {
    /// In one piece, from this address on.
    Contiguous(*mut u8),
    /// In several pieces.
    Scattered,
    /// Not all of it is mapped.
    Unmapped,
}

struct Inner {
    /// Sorted by `base`, without overlap.
    regions: Box<[Region]>,
    /// What keeps the mappings alive.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are never dereferenced without the checks of this module, the mappings
// behind them live as long as `_keep`, and every access is one that tolerates concurrent writers.
unsafe impl Send for Inner {}
// SAFETY: as above; the struct itself is immutable.
unsafe impl Sync for Inner {}

/// A snapshot of a guest's memory layout that keeps the memory mapped while a clone of it lives.
#[derive(Clone)]
pub struct GuestMap {
    inner: Arc<Inner>,
}

/// Why a memory could not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// More regions than a map holds.
    #[error("{0} memory regions, at most {MAX_REGIONS} are supported")]
    TooManyRegions(usize),
    /// A region that has no host mapping (vm-memory gives none for it).
    #[error("the memory region at {0} has no host mapping")]
    NotMapped(GuestPhysAddr),
    /// A region that ends above the highest address.
    #[error("the memory region at {0} wraps around the address space")]
    Wraps(GuestPhysAddr),
    /// Two regions overlap.
    #[error("the memory region at {0} overlaps the one before it")]
    Overlap(GuestPhysAddr),
    /// A private memory could not be mapped.
    #[error("cannot map {0} bytes of private memory")]
    Private(usize),
    /// Something shared lies outside of its mapping.
    #[error("what ends at byte {end} is not within a mapping of {len} bytes, or not aligned")]
    Outside {
        /// Where it ends.
        end: usize,
        /// Bytes of the mapping.
        len: usize,
    },
}

impl GuestMap {
    /// Resolves the regions of `memory`.
    ///
    /// # Errors
    ///
    /// [`MapError`] if there are too many regions, one overlaps another or has no host mapping.
    pub fn new<M>(memory: Arc<M>) -> Result<Self, MapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let count = memory.num_regions();
        if count > MAX_REGIONS {
            return Err(MapError::TooManyRegions(count));
        }
        let mut regions = Vec::with_capacity(count);
        for region in memory.iter() {
            let base = GuestPhysAddr(region.start_addr().raw_value());
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|_| MapError::NotMapped(base))?;
            if region.len().checked_sub(1).and_then(|last| base.0.checked_add(last)).is_none() {
                return Err(MapError::Wraps(base));
            }
            regions.push(Region { base: base.0, len: region.len(), host });
        }
        regions.sort_by_key(|r| r.base);
        for pair in regions.windows(2) {
            if let [a, b] = pair
                && a.base.saturating_add(a.len) > b.base
            {
                return Err(MapError::Overlap(GuestPhysAddr(b.base)));
            }
        }
        Ok(Self { inner: Arc::new(Inner { regions: regions.into(), _keep: memory }) })
    }

    /// This memory as seen behind a vIOMMU: each piece is (address there, address here, bytes).
    /// They must be sorted and must not overlap; what of them is not in this memory is left out.
    pub(crate) fn view(&self, pieces: impl Iterator<Item = (u64, u64, u64)>) -> Self {
        let mut regions = Vec::new();
        for (mut base, mut addr, mut left) in pieces {
            while left > 0 {
                let Some((host, here)) = self.lookup(addr) else { break };
                let step = here.min(left);
                regions.push(Region { base, len: step, host });
                left = left.saturating_sub(step);
                (base, addr) = (base.saturating_add(step), addr.saturating_add(step));
            }
        }
        let keep = Arc::clone(&self.inner);
        Self { inner: Arc::new(Inner { regions: regions.into(), _keep: keep }) }
    }

    /// What of a piece (address there, address here, bytes) is in one region of this memory, around
    /// the address `at` there; as seen from there.
    pub(crate) fn seen_from(&self, piece: (u64, u64, u64), at: u64) -> Option<Hit> {
        let (base, addr, len) = piece;
        let here = addr.checked_add(at.checked_sub(base)?)?;
        let region = self.inner.regions.get(self.index_of(here)?)?;
        let first = addr.max(region.base);
        let behind = region.base.saturating_add(region.len).min(addr.saturating_add(len));
        let skipped = usize::try_from(first.wrapping_sub(region.base)).ok()?;
        let region = Region {
            base: base.wrapping_add(first.wrapping_sub(addr)),
            len: behind.checked_sub(first)?,
            host: region.host.wrapping_add(skipped),
        };
        Some(Hit { region })
    }

    /// No memory at all.
    pub fn nothing() -> Self {
        Self { inner: Arc::new(Inner { regions: Box::default(), _keep: Arc::new(()) }) }
    }

    /// Maps `len` bytes of private memory at guest address 0: buffers of uplinks and tests.
    ///
    /// # Errors
    ///
    /// [`MapError::Private`] if the kernel refuses the mapping.
    pub fn private(len: usize) -> Result<Self, MapError> {
        let ranges = [(vm_memory::GuestAddress(0), len)];
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&ranges).map_err(|_| MapError::Private(len))?;
        Self::new(Arc::new(memory))
    }

    /// The number of regions.
    pub fn region_count(&self) -> usize {
        self.inner.regions.len()
    }

    /// Where each region is here, and its bytes.
    pub(super) fn host_ranges(&self) -> impl Iterator<Item = (usize, usize)> {
        let range = |r: &Region| (r.host.addr(), usize::try_from(r.len).unwrap_or(usize::MAX));
        self.inner.regions.iter().map(range)
    }

    /// Whether both are the same snapshot.
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether every byte of `[addr, addr + len)` is mapped; regions may be adjacent.
    pub fn contains(&self, addr: GuestPhysAddr, len: u64) -> bool {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let Some((_, here)) = self.lookup(at) else { return false };
            let step = here.min(left);
            let Some(next) = at.checked_add(step) else { return left == step };
            at = next;
            left = left.saturating_sub(step);
        }
        true
    }

    /// Where `[addr, addr + len)` is here. Adjacent regions count as one if they are adjacent here
    /// too.
    pub(crate) fn host_range(&self, addr: GuestPhysAddr, len: u64) -> HostRange {
        if !self.contains(addr, len) {
            return HostRange::Unmapped;
        }
        let Some((start, mut have)) = self.lookup(addr.0) else { return HostRange::Unmapped };
        while have < len {
            let here = usize::try_from(have).ok().map(|have| start.wrapping_add(have));
            match self.lookup(addr.0.wrapping_add(have)) {
                Some((host, more)) if Some(host) == here => have = have.saturating_add(more),
                _ => return HostRange::Scattered,
            }
        }
        HostRange::Contiguous(start)
    }

    /// The host pointer of `addr` if `[addr, addr + len)` is in one piece here.
    #[cfg(feature = "driver")]
    pub(crate) fn contiguous(&self, addr: GuestPhysAddr, len: u64) -> Option<*mut u8> {
        match self.host_range(addr, len) {
            HostRange::Contiguous(ptr) => Some(ptr),
            HostRange::Scattered | HostRange::Unmapped => None,
        }
    }

    /// Appends the segments of `[addr, addr + len)`, split at region boundaries.
    /// Returns false, and may have appended some, if a byte is not mapped.
    #[cfg(any(test, feature = "driver"))]
    pub(crate) fn resolve(
        &self,
        hit: &mut Hit,
        addr: GuestPhysAddr,
        len: u32,
        out: &mut impl Extend<RawSeg>,
    ) -> bool {
        match hit.resolve(addr, len) {
            Some(seg) => {
                out.extend([seg]);
                true
            }
            None => self.resolve_slow(hit, addr, len, out),
        }
    }

    /// The same, for what is not in the region of `hit`.
    #[cold]
    #[inline(never)]
    pub(crate) fn resolve_slow(
        &self,
        hit: &mut Hit,
        addr: GuestPhysAddr,
        len: u32,
        out: &mut impl Extend<RawSeg>,
    ) -> bool {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let Some(index) = self.index_of(at) else { return false };
            let Some((host, here)) = self.lookup(at) else { return false };
            if let Some(region) = self.inner.regions.get(index) {
                hit.region = *region;
            }
            let step = u32::try_from(here).unwrap_or(u32::MAX).min(left);
            out.extend([RawSeg::new(host, step)]);
            left = left.saturating_sub(step);
            let Some(next) = at.checked_add(u64::from(step)) else { return left == 0 };
            at = next;
        }
        true
    }

    /// Copies the 16 bytes of a descriptor in an indirect table; None if a byte is not mapped.
    #[inline]
    pub(crate) fn fetch_desc(&self, hit: &mut Hit, addr: GuestPhysAddr) -> Option<RawDesc> {
        match hit.resolve(addr, 16) {
            Some(seg) => RawDesc::fetch(seg),
            None => self.fetch_desc_slow(hit, addr),
        }
    }

    #[cold]
    #[inline(never)]
    fn fetch_desc_slow(&self, hit: &mut Hit, addr: GuestPhysAddr) -> Option<RawDesc> {
        hit.region = *self.inner.regions.get(self.index_of(addr.0)?)?;
        if let Some(seg) = hit.resolve(addr, 16) {
            return RawDesc::fetch(seg);
        }
        let mut segs = Vec::new();
        let mapped = self.resolve_slow(hit, addr, 16, &mut segs);
        mapped.then(|| RawDesc::fetch_bytes(&segs))?
    }

    /// The guest address of what is at `ptr` here, and the bytes from there to the end of its
    /// region.
    pub(crate) fn guest_of(&self, ptr: *const u8) -> Option<(GuestPhysAddr, u64)> {
        self.inner.regions.iter().find_map(|region| {
            let offset = u64::try_from(ptr.addr().checked_sub(region.host.addr())?).ok()?;
            let left = region.len.checked_sub(offset).filter(|left| *left > 0)?;
            Some((GuestPhysAddr(region.base.wrapping_add(offset)), left))
        })
    }

    fn index_of(&self, addr: u64) -> Option<usize> {
        let after = self.inner.regions.partition_point(|r| r.base <= addr);
        let index = after.checked_sub(1)?;
        let region = self.inner.regions.get(index)?;
        (addr.wrapping_sub(region.base) < region.len).then_some(index)
    }

    /// Host pointer of `addr` and the bytes from there to the end of its region.
    fn lookup(&self, addr: u64) -> Option<(*mut u8, u64)> {
        let region = self.inner.regions.get(self.index_of(addr)?)?;
        let offset = addr.wrapping_sub(region.base);
        let left = region.len.wrapping_sub(offset);
        Some((region.host.wrapping_add(usize::try_from(offset).ok()?), left))
    }
}

impl fmt::Debug for GuestMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMap").field("regions", &self.inner.regions.len()).finish()
    }
}

#[cfg(test)]
mod tests;
