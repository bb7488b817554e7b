//! The front end's memory regions: checked, mapped, and looked up by front-end address.
//!
//! ```text
//!   front-end address ──translate──► guest-physical address ──GuestMap──► host mapping
//!   (rings' parts)                   (descriptors' buffers)
//! ```
//!
//! **Trust.** Region descriptions and files come from the front end. A region is refused if its
//! file is shorter than it claims. A file that shrinks later is met by `virtq::mem::guard`, if the
//! program installed it: see [`RegionTable::lost`].
//! **Limits.** [`SLOTS_MAX`] regions, [`BYTES_MAX`] bytes in total, and each byte of a file in
//! [`ALIASES_MAX`] regions. Every region has page tables of its own: a page of them for 2 MiB in
//! which anything was touched. So they take no more than that many times what the front end's files
//! do, and a few pages for each region.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FileType;
use virtq::mem::guard::Watch;
use virtq::mem::{GuestMap, GuestPhysAddr, MapError};
use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection,
    GuestUsize, MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice, guest_memory,
};

use crate::handover::{AdoptError, Incoming, Outgoing, RegionHandover};

/// The most memory slots: what kernels' vhost offers, too.
pub const SLOTS_MAX: usize = 509;
/// The most bytes of all regions of a front end.
pub const BYTES_MAX: u64 = 1 << 44;
/// The most regions that may show the same bytes of a file; no VMM is known that needs a second.
pub const ALIASES_MAX: usize = 2;

/// A file of so many bytes is not freed in passing: it takes a tenth of a second.
pub(crate) const LARGE: u64 = if cfg!(test) { 4 << 20 } else { 1 << 30 };

/// Bytes that a file takes: what is freed if we are the last who have it.
pub(crate) fn file_bytes(file: impl AsFd) -> u64 {
    let blocks = rustix::fs::fstat(file).map_or(0, |stat| stat.st_blocks);
    u64::try_from(blocks).unwrap_or(0).saturating_mul(512)
}

/// A virtual address of the front end's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FrontendAddr(pub u64);

/// A region as the front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub guest: GuestPhysAddr,
    /// Bytes.
    pub size: u64,
    /// Where the front end sees it.
    pub user: FrontendAddr,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    /// Whether both stand for the same slot; the offset does not matter.
    fn same_slot(&self, other: &Self) -> bool {
        (self.guest, self.size, self.user) == (other.guest, other.size, other.user)
    }

    fn check(&self) -> Result<(), MemoryError> {
        if self.size == 0 {
            return Err(MemoryError::Empty(self.guest));
        }
        let ends = [self.guest.0, self.user.0, self.mmap_offset].map(|s| s.checked_add(self.size));
        if ends.contains(&None) {
            return Err(MemoryError::Wraps(self.guest, self.size));
        }
        Ok(())
    }

    /// Where it is in its file: from, and up to.
    fn span(&self) -> (u64, u64) {
        (self.mmap_offset, self.mmap_offset.saturating_add(self.size))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet =
            |a: u64, b: u64| a < b.saturating_add(other.size) && b < a.saturating_add(self.size);
        meet(self.guest.0, other.guest.0) || meet(self.user.0, other.user.0)
    }
}

/// How often a front end may add the same region: once for each queue pair.
const USES_MAX: u16 = 128;

/// A region, and how often the front end has added it. QEMU 7.2 adds each region once for every
/// queue pair, and removes it as often.
#[derive(Debug, Clone)]
struct Slot {
    region: Arc<Region>,
    uses: u16,
}

/// The regions of a session and the map that rings run on.
#[derive(Debug, Clone, Default)]
pub struct RegionTable {
    slots: Vec<Slot>,
    map: Option<GuestMap>,
}

impl RegionTable {
    /// Maps all of `specs`, each from its fd. No region may be there twice.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if a region is refused; nothing stays mapped then.
    pub fn new(specs: &[RegionSpec], fds: Vec<OwnedFd>) -> Result<Self, MemoryError> {
        let mut table = Self::default();
        for (spec, fd) in specs.iter().zip(fds) {
            table.insert(*spec, fd)?;
            table.check_aliases()?;
        }
        table.publish()
    }

    /// This table and one region more.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if the region is refused.
    pub fn with(&self, spec: RegionSpec, fd: OwnedFd) -> Result<Self, MemoryError> {
        let mut table = self.clone();
        if !table.use_again(&spec, &fd)? {
            table.insert(spec, fd)?;
            table.check_aliases()?;
        }
        table.publish()
    }

    /// This table without one region.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NoSuchRegion`] if there is none with exactly these addresses and size.
    pub fn without(&self, spec: &RegionSpec) -> Result<Self, MemoryError> {
        let mut table = self.clone();
        let at = table.slots.iter().position(|slot| slot.region.spec.same_slot(spec));
        let at = at.ok_or(MemoryError::NoSuchRegion(spec.guest, spec.size))?;
        match table.slots.get_mut(at) {
            Some(slot) if slot.uses > 1 => slot.uses = slot.uses.saturating_sub(1),
            _ => drop(table.slots.remove(at)),
        }
        table.publish()
    }

    /// The regions and their files, for another process.
    ///
    /// # Errors
    ///
    /// The process has no fd left.
    pub fn export(&self, fds: &mut Outgoing) -> io::Result<Vec<RegionHandover>> {
        let regions = self.slots.iter().filter_map(|slot| {
            let spec = slot.region.spec;
            let file = slot.region.mapping.file_offset()?;
            Some(fds.add(file.file()).map(|fd| RegionHandover {
                fd,
                guest: spec.guest.0,
                size: spec.size,
                user: spec.user.0,
                mmap_offset: spec.mmap_offset,
                uses: slot.uses,
            }))
        });
        regions.collect()
    }

    /// Maps the regions that another process had. What that one let in stays, although this one
    /// may allow less.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] if a file did not come along, or a region is refused.
    pub fn adopt(regions: &[RegionHandover], fds: &mut Incoming) -> Result<Self, AdoptError> {
        let mut table = Self::default();
        for region in regions {
            let spec = RegionSpec {
                guest: GuestPhysAddr(region.guest),
                size: region.size,
                user: FrontendAddr(region.user),
                mmap_offset: region.mmap_offset,
            };
            table.insert(spec, fds.take(region.fd)?)?;
            if let Some(slot) = table.slots.last_mut() {
                slot.uses = region.uses.clamp(1, USES_MAX);
            }
        }
        Ok(table.publish()?)
    }

    /// The region as it was described, with the address where this process has it.
    pub fn mapped(&self, spec: &RegionSpec) -> Option<RegionSpec> {
        let slot = self.slots.iter().find(|slot| slot.region.spec.same_slot(spec))?;
        let start = slot.region.mapping.as_ptr().addr() as u64;
        Some(RegionSpec { user: FrontendAddr(start.wrapping_add(slot.region.skip)), ..*spec })
    }

    /// The mappings of regions that are not in `other`, too.
    pub(crate) fn beyond<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a Watch> {
        self.regions_beyond(other).map(|region| &region.watch)
    }

    /// Files of regions that are not in `other`, too.
    pub(crate) fn fds_beyond(&self, other: &Self) -> usize {
        self.regions_beyond(other).count()
    }

    fn regions_beyond<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a Region> {
        let is_new = |slot: &&Slot| {
            !other.slots.iter().any(|known| Arc::ptr_eq(&known.region, &slot.region))
        };
        self.slots.iter().filter(is_new).map(|slot| &*slot.region)
    }

    /// All mappings.
    pub(crate) fn watches(&self) -> impl Iterator<Item = &Watch> {
        self.slots.iter().map(|slot| &slot.region.watch)
    }

    /// The memory, if there is any.
    pub fn map(&self) -> Option<&GuestMap> {
        self.map.as_ref()
    }

    /// Where the guest sees what the front end has at `addr`.
    pub fn translate(&self, addr: FrontendAddr) -> Option<GuestPhysAddr> {
        self.slots.iter().find_map(|slot| {
            let spec = &slot.region.spec;
            let offset = addr.0.checked_sub(spec.user.0)?;
            (offset < spec.size).then(|| GuestPhysAddr(spec.guest.0.wrapping_add(offset)))
        })
    }

    /// The first region of which a page was gone when it was needed.
    pub fn lost(&self) -> Option<GuestPhysAddr> {
        let lost = self.slots.iter().find(|slot| slot.region.watch.is_lost());
        lost.map(|slot| slot.region.spec.guest)
    }

    /// In which file, and where, the front end has what is at `addr`.
    pub fn file_place(&self, addr: FrontendAddr) -> Option<FilePlace> {
        self.slots.iter().find_map(|slot| {
            let Region { spec, file, .. } = &*slot.region;
            let inside = addr.0.checked_sub(spec.user.0).filter(|inside| *inside < spec.size)?;
            let offset = spec.mmap_offset.wrapping_add(inside);
            Some(FilePlace { device: file.device, inode: file.inode, offset })
        })
    }

    /// Where the guest sees what the front end has at `addr`, and how many bytes there are from
    /// there to the end of its region.
    pub fn piece(&self, addr: FrontendAddr) -> Option<(GuestPhysAddr, u64)> {
        self.slots.iter().find_map(|slot| {
            let spec = &slot.region.spec;
            let offset = addr.0.checked_sub(spec.user.0)?;
            let left = spec.size.checked_sub(offset).filter(|left| *left > 0)?;
            Some((GuestPhysAddr(spec.guest.0.wrapping_add(offset)), left))
        })
    }

    /// Bytes of regions that are not in `other`, too, or of their files if these have more.
    pub(crate) fn bytes_beyond(&self, other: &Self) -> u64 {
        let bytes = self.regions_beyond(other).map(|region| {
            let file = region.mapping.file_offset();
            region.spec.size.max(file.map_or(0, |offset| file_bytes(offset.file())))
        });
        bytes.fold(0, u64::saturating_add)
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are no regions.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Eight bytes of a region, for tests.
    #[cfg(test)]
    pub(crate) fn peek(&self, at: GuestPhysAddr) -> [u8; 8] {
        let region = &self.slots.iter().find(|s| s.region.spec.guest <= at).unwrap().region;
        let mut bytes = [0; 8];
        let offset = at.0.checked_sub(region.spec.guest.0).unwrap();
        vm_memory::Bytes::read_slice(&**region, &mut bytes, MemoryRegionAddress(offset)).unwrap();
        bytes
    }

    /// Counts one use more of a region that is there already; false if it is not.
    fn use_again(&mut self, spec: &RegionSpec, fd: &OwnedFd) -> Result<bool, MemoryError> {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.region.spec == *spec)
            && slot.uses < USES_MAX
            && slot.region.file == FileId::of(fd, spec.guest)?
        {
            slot.uses = slot.uses.saturating_add(1);
            return Ok(true);
        }
        Ok(false)
    }

    fn insert(&mut self, spec: RegionSpec, fd: OwnedFd) -> Result<(), MemoryError> {
        spec.check()?;
        if self.slots.len() >= SLOTS_MAX {
            return Err(MemoryError::TooManyRegions);
        }
        let sizes = self.slots.iter().map(|slot| slot.region.spec.size);
        let total = sizes.fold(spec.size, u64::saturating_add);
        if total > BYTES_MAX {
            return Err(MemoryError::TooLarge(total));
        }
        if let Some(other) = self.slots.iter().find(|slot| slot.region.spec.overlaps(&spec)) {
            return Err(MemoryError::Overlap(spec.guest, other.region.spec.guest));
        }
        self.slots.push(Slot { region: Arc::new(Region::map(spec, fd)?), uses: 1 });
        Ok(())
    }

    /// Whether the region that came last shows bytes of its file that enough others show.
    fn check_aliases(&self) -> Result<(), MemoryError> {
        let Some((new, others)) = self.slots.split_last() else { return Ok(()) };
        let same_file = others.iter().filter(|slot| slot.region.file == new.region.file);
        let spans = same_file.map(|slot| slot.region.spec.span());
        match deepest(new.region.spec.span(), spans) {
            (at, regions) if regions >= ALIASES_MAX => {
                Err(MemoryError::Aliases { guest: new.region.spec.guest, at, regions })
            }
            _ => Ok(()),
        }
    }

    fn publish(mut self) -> Result<Self, MemoryError> {
        self.map = None;
        if !self.slots.is_empty() {
            let mut regions: Vec<_> = self.slots.iter().map(|s| Arc::clone(&s.region)).collect();
            regions.sort_by_key(|region| region.spec.guest);
            let memory = GuestRegionCollection::from_arc_regions(regions)
                .map_err(|_| MemoryError::TooManyRegions)?;
            self.map = Some(GuestMap::new(Arc::new(memory))?);
        }
        Ok(self)
    }
}

/// The place within a span of a file that most of `others` have, and how many.
fn deepest((from, to): (u64, u64), others: impl Iterator<Item = (u64, u64)>) -> (u64, usize) {
    let inside = others.map(|(start, end)| (start.max(from), end.min(to)));
    // Ends come before beginnings at the same place.
    let mut edges: Vec<(u64, bool)> = inside
        .filter(|(start, end)| start < end)
        .flat_map(|(start, end)| [(start, true), (end, false)])
        .collect();
    edges.sort_unstable();
    let (mut now, mut most) = (0usize, (from, 0));
    for (at, begins) in edges {
        now = if begins { now.saturating_add(1) } else { now.saturating_sub(1) };
        if now > most.1 {
            most = (at, now);
        }
    }
    most
}

/// A byte of a memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePlace {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
    /// Bytes from its start.
    pub offset: u64,
}

/// Which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(fd: &OwnedFd, guest: GuestPhysAddr) -> Result<Self, MemoryError> {
        let stat = rustix::fs::fstat(fd).map_err(|e| MemoryError::Stat(guest, e.into()))?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// One mapped region. The mapping starts at a page of the file, so perhaps before the region.
#[derive(Debug)]
struct Region {
    spec: RegionSpec,
    file: FileId,
    /// Ends before the mapping does.
    watch: Watch,
    mapping: Arc<MmapRegion>,
    /// Bytes of the mapping before the region.
    skip: u64,
}

impl Region {
    fn map(spec: RegionSpec, fd: OwnedFd) -> Result<Self, MemoryError> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| MemoryError::Stat(spec.guest, e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NoFile(spec.guest));
        }
        let needs = spec.mmap_offset.saturating_add(spec.size);
        let has = u64::try_from(stat.st_size).unwrap_or(0);
        if has < needs {
            return Err(MemoryError::FileTooShort { guest: spec.guest, has, needs });
        }
        // On hugetlbfs the block size is that of the huge pages, which offset and length of a
        // mapping must be multiples of.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096);
        let page = if page.is_power_of_two() { page } else { 4096 };
        let mask = page.wrapping_sub(1);
        let skip = spec.mmap_offset & mask;
        let len = spec.size.saturating_add(skip).saturating_add(mask) & !mask;
        // The file of an ordinary memfd may end inside of the last page: do not map beyond it.
        let len = len.min(has.saturating_sub(spec.mmap_offset.wrapping_sub(skip)));
        let len = usize::try_from(len).map_err(|_| MemoryError::TooLarge(spec.size))?;
        let id = FileId { device: stat.st_dev, inode: stat.st_ino };
        let file = FileOffset::new(File::from(fd), spec.mmap_offset.wrapping_sub(skip));
        let mapping = MmapRegion::from_file(file, len)
            .map_err(|e| MemoryError::Map(spec.guest, io::Error::other(e)))?;
        let mapping = Arc::new(mapping);
        Ok(Self { spec, file: id, watch: Watch::new(&mapping), mapping, skip })
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.spec.size
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.spec.guest.0)
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        self.get_slice(addr, 1).map(|slice| slice.ptr_guard_mut().as_ptr())
    }

    fn get_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, ()>>> {
        let offset = addr.0.saturating_add(self.skip);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(self.mapping.get_slice(offset, count)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Why a memory region was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No bytes.
    #[error("the memory region at {0} is empty")]
    Empty(GuestPhysAddr),
    /// It goes beyond the end of an address space.
    #[error("the memory region at {0} with {1:#x} bytes wraps around")]
    Wraps(GuestPhysAddr, u64),
    /// It shares addresses with another.
    #[error("the memory region at {0} overlaps the one at {1}")]
    Overlap(GuestPhysAddr, GuestPhysAddr),
    /// All slots are taken.
    #[error("more than {SLOTS_MAX} memory regions")]
    TooManyRegions,
    /// Too many bytes.
    #[error("{0:#x} bytes of memory, at most {BYTES_MAX:#x} are allowed")]
    TooLarge(u64),
    /// Something that cannot hold memory, or could make us wait for another program.
    #[error(
        "the memory region at {0} is in something that is not used as memory: it must be a file of \
         memfd_create, tmpfs, hugetlbfs, or a file system on a disk, and not of btrfs, ZFS, \
         overlayfs, NFS or FUSE"
    )]
    NoFile(GuestPhysAddr),
    /// The file ends before the region does.
    #[error("the file of the memory region at {guest} has {has:#x} bytes, {needs:#x} are needed")]
    FileTooShort {
        /// The region.
        guest: GuestPhysAddr,
        /// Bytes of the file.
        has: u64,
        /// Where the region ends.
        needs: u64,
    },
    /// Page tables for it would be out of proportion to the file.
    #[error(
        "the memory region at {guest} shows its file from {at:#x} on as {regions} others do: at \
         most {ALIASES_MAX} regions may show the same bytes of a file"
    )]
    Aliases {
        /// The region.
        guest: GuestPhysAddr,
        /// A place in the file.
        at: u64,
        /// Regions that have it already.
        regions: usize,
    },
    /// None to remove.
    #[error("there is no memory region at {0} with {1:#x} bytes")]
    NoSuchRegion(GuestPhysAddr, u64),
    /// The kernel does not tell the file's size.
    #[error("cannot read the size of the file of the memory region at {0}: {1}")]
    Stat(GuestPhysAddr, io::Error),
    /// The kernel does not map it.
    #[error("cannot map the memory region at {0}: {1}")]
    Map(GuestPhysAddr, io::Error),
    /// The regions make no map.
    #[error(transparent)]
    Layout(#[from] MapError),
}
