//! The guest's memory: one memfd, two regions, handed out from the start on.
//!
//! ```text
//!  memfd   ┌ rings ─────────┬ buffers ────────────────────────────┐
//!  guest   0 …              4 GiB …                                  (two regions, with a hole)
//! ```
//!
//! The two regions differ in guest address, file offset and front end address, so that a back end
//! that mixes any of them up cannot work by accident.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// Guest address of the buffers.
const BUFFERS_BASE: u64 = 0x1_0000_0000;
/// What a front end address has more than the guest address: a number, never dereferenced.
const FRONTEND_OFFSET: u64 = 0x7a00_0000_0000;
/// Regions are whole large pages, whether there are such pages or not.
const REGION_ALIGN: u64 = 2 << 20;
/// Alignment of what is handed out.
const ALIGN: u64 = 4096;

/// Guest memory that a back end can map.
#[derive(Debug)]
pub(crate) struct Memory {
    file: Arc<File>,
    map: GuestMap,
    rings: Area,
    buffers: Area,
}

/// A region and how much of it is taken.
#[derive(Debug, Clone, Copy)]
struct Area {
    base: u64,
    len: u64,
    file_offset: u64,
    used: u64,
}

impl Memory {
    /// Maps memory for `rings` and `buffers` bytes.
    pub(crate) fn new(rings: u64, buffers: u64, hugepages: bool) -> anyhow::Result<Self> {
        let rings = Area { base: 0, len: round_up(rings)?, file_offset: 0, used: 0 };
        let buffers =
            Area { base: BUFFERS_BASE, len: round_up(buffers)?, file_offset: rings.len, used: 0 };
        let mut flags = MemfdFlags::CLOEXEC;
        if hugepages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create("causeway-guest", flags).context("cannot create guest memory")?;
        let total = rings.len.saturating_add(buffers.len);
        ftruncate(&fd, total).with_context(|| format!("cannot size guest memory to {total} B"))?;
        let file = Arc::new(File::from(fd));
        let range = |area: &Area| -> anyhow::Result<_> {
            let offset = FileOffset::from_arc(Arc::clone(&file), area.file_offset);
            Ok((GuestAddress(area.base), usize::try_from(area.len)?, Some(offset)))
        };
        let memory =
            GuestMemoryMmap::<()>::from_ranges_with_files([range(&rings)?, range(&buffers)?])
                .with_context(|| {
                    let hint = if hugepages { " of large pages (are there enough?)" } else { "" };
                    format!("cannot map {total} B{hint}")
                })?;
        let map = GuestMap::new(Arc::new(memory))?;
        Ok(Self { file, map, rings, buffers })
    }

    /// The map for rings and buffers.
    pub(crate) fn map(&self) -> &GuestMap {
        &self.map
    }

    /// Takes `bytes` for a ring.
    pub(crate) fn take_ring(&mut self, bytes: u64) -> anyhow::Result<GuestPhysAddr> {
        self.rings.take(bytes)
    }

    /// Takes `bytes` for buffers.
    pub(crate) fn take_buffers(&mut self, bytes: u64) -> anyhow::Result<GuestPhysAddr> {
        self.buffers.take(bytes)
    }

    /// What a guest address is called in the front end's address space.
    pub(crate) fn frontend_addr(addr: GuestPhysAddr) -> u64 {
        addr.0.wrapping_add(FRONTEND_OFFSET)
    }

    /// The regions as a back end is told.
    pub(crate) fn regions(&self) -> [VhostUserMemoryRegionInfo; 2] {
        [self.rings, self.buffers].map(|area| VhostUserMemoryRegionInfo {
            guest_phys_addr: area.base,
            memory_size: area.len,
            userspace_addr: Self::frontend_addr(GuestPhysAddr(area.base)),
            mmap_offset: area.file_offset,
            mmap_handle: self.file.as_raw_fd(),
        })
    }
}

impl Area {
    fn take(&mut self, bytes: u64) -> anyhow::Result<GuestPhysAddr> {
        let at = self.used;
        let end = at.checked_add(bytes).and_then(|e| e.checked_next_multiple_of(ALIGN));
        let end = end.filter(|e| *e <= self.len).ok_or_else(|| anyhow!("guest memory is full"))?;
        self.used = end;
        Ok(GuestPhysAddr(self.base.saturating_add(at)))
    }
}

fn round_up(bytes: u64) -> anyhow::Result<u64> {
    bytes.max(1).checked_next_multiple_of(REGION_ALIGN).context("too much guest memory")
}

#[cfg(test)]
mod tests {
    use super::Memory;

    #[test]
    fn what_is_taken_is_mapped_and_apart() {
        let mut memory = Memory::new(10_000, 3 << 20, false).unwrap();
        let a = memory.take_ring(5000).unwrap();
        let b = memory.take_ring(5000).unwrap();
        assert!(b.0 >= a.0 + 5000);
        let c = memory.take_buffers(4 << 20).unwrap();
        assert!(memory.map().contains(c, 4 << 20));
        assert!(memory.take_buffers(1).is_err());
        let [rings, buffers] = memory.regions();
        assert_eq!(buffers.mmap_offset, rings.memory_size);
        assert_ne!(buffers.guest_phys_addr, buffers.mmap_offset);
    }
}
