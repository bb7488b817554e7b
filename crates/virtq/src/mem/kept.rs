//! Files that a front end keeps beside its memory, mapped: the log of written pages, the in-flight
//! regions.
//!
//! **Trust.** Its owner may write every byte at any time, and cut the file short: see
//! [`super::guard`].
//! **Not supported.** Huge pages: the kernel maps and unmaps only whole ones, and nobody needs one
//! for what is kept here.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{FsWord, fstatfs};
use vm_memory::{FileOffset, MmapRegion};

use super::SharedMap;
use super::guard::Watch;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// What `statfs` calls hugetlbfs; a memfd with huge pages is in one, too.
const HUGETLBFS: FsWord = 0x9584_58f6;

/// The mapping begins `skip` bytes before the part that was asked for. Invariant: all of that part
/// is mapped for reading and writing while `map` lives.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) map: SharedMap,
    pub(super) watch: Arc<Watch>,
    pub(super) skip: usize,
}

impl Kept {
    /// Maps `bytes` bytes of `file` from `offset` on.
    pub(super) fn map(file: File, offset: u64, bytes: usize) -> io::Result<Self> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let (has, end) = (file.metadata()?.len(), offset.saturating_add(bytes as u64));
        if bytes == 0 || has < end {
            return Err(wrong(format!("a part at {offset} to {end} of a file of {has} bytes")));
        }
        if fstatfs(&file)?.f_type == HUGETLBFS {
            return Err(wrong("a file of huge pages".to_owned()));
        }
        let skip = usize::try_from(offset % PAGE).unwrap_or(0);
        let file = FileOffset::new(file, offset.saturating_sub(skip as u64));
        let len = bytes.saturating_add(skip);
        let region: MmapRegion =
            MmapRegion::from_file(file, len).map_err(|error| wrong(error.to_string()))?;
        let region = Arc::new(region);
        let (ptr, watch) = (region.as_ptr(), Arc::new(Watch::new(&region)));
        // SAFETY: the region is mapped for reading and writing while the `Arc` lives, nobody makes
        // references to its bytes, and a mapping starts at a page.
        let map = unsafe { SharedMap::new(ptr, len, region) };
        Ok(Self { map, watch, skip })
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::Kept;

    #[test]
    fn huge_pages_are_refused_before_anything_is_mapped() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = memfd_create("huge", flags).unwrap();
        ftruncate(&file, 2 << 20).unwrap();
        let error = Kept::map(file.into(), 0, 4160).unwrap_err().to_string();
        assert_eq!(error, "a file of huge pages");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains("memfd:huge"));
    }
}
