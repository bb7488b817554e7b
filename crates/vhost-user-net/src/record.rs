//! Where the rings of a port are, kept for a successor: one file per socket in a state directory.
//!
//! ```text
//!  STATE-DIR/vm1.sock-0123456789abcdef.rings
//!    page 0      version, boot, and the socket's path
//!    page n + 1  ring n: place, identity, lengths (virtq::mem::RecordPage)
//! ```
//!
//! A front end that finds a new back end sends the positions that it knows. For packed rings QEMU
//! knows only those from before the crash. So a ring's record is preferred to what the front end
//! says, if it is about the same areas of the same memory files and what is in the ring agrees.
//! Once the front end was told where a ring stopped (`GET_VRING_BASE`), or resets it, the record is
//! forgotten.
//!
//! Without a directory the same pages live in private memory and are written when a ring stops:
//! that serves front ends that come again to a switch which lives.
//!
//! **Trust.** Files are ours alone (0700, 0600, one process at a time by `flock`). A record belongs
//! to a socket: whoever may connect there had the rings anyway. Its contents are checked.
//! **Limits.** One page for each ring, taken when the ring first starts; without room in the file
//! system the ring runs without record.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use virtq::mem::{RECORD_BYTES, RecordMap, RecordPage};
use virtq::{Layout, QueueConfig};

use crate::memory::FilePlace;
use crate::session::RingIndex;

/// Changes with every change of the format.
const VERSION: u64 = u64::from_le_bytes(*b"CWRINGS1");
/// Words of page 0, and where the socket's path is.
const VERSION_WORD: usize = 1;
const BOOT_WORDS: [usize; 2] = [2, 3];
const PATH_AT: u64 = 64;
const PATH_MAX: usize = 1024;
/// Words of a ring's page that say which ring it is.
const IDENTITY_WORD: usize = 1;

/// Which ring it is: its areas in their memory files, and how they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity([u64; 7]);

impl Identity {
    /// The identity of a ring whose descriptors, driver area and device area are at `places`.
    pub fn new(config: &QueueConfig, places: [FilePlace; 3]) -> Self {
        let [desc, driver, device] = places;
        let features = config.features;
        let bits = [
            config.layout == Layout::Packed,
            features.event_idx,
            features.indirect,
            features.in_order,
        ];
        let bits = bits.iter().fold(1u64, |bits, bit| bits << 1 | u64::from(*bit));
        // The three areas are in one file, or nearly always; if not, the last word tells.
        let files = [driver, device].map(|place| [place.device, place.inode]);
        Self([
            u64::from(config.size) | bits << 16,
            desc.device,
            desc.inode,
            desc.offset,
            driver.offset,
            device.offset,
            hash(files.as_flattened().iter().flat_map(|word| word.to_le_bytes())),
        ])
    }

    fn is_of(&self, page: &RecordPage) -> bool {
        self.0.iter().zip(IDENTITY_WORD..).all(|(word, at)| page.get(at) == *word)
    }

    fn write(&self, page: &RecordPage) {
        page.forget();
        for (word, at) in self.0.iter().zip(IDENTITY_WORD..) {
            page.set(at, *word);
        }
    }
}

/// FNV-1a.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Makes the state directory if it is not there, checks that nobody else can write to it, and
/// removes the files of sockets whose directories are gone.
///
/// # Errors
///
/// What is wrong with the directory.
pub fn prepare_state_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let metadata = std::fs::metadata(dir)?;
    let ours = rustix::process::geteuid().as_raw() == metadata.uid();
    if !ours || metadata.mode() & 0o022 != 0 {
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        let text = format!(
            "owner {owner} and mode {mode:04o}, but only this user may write there (mode 0700)"
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    for entry in std::fs::read_dir(dir)?.flatten() {
        if entry.path().extension().is_some_and(|end| end == "rings") && is_left_over(&entry.path())
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Removes the file of a socket whose port is gone and will not come back, if nobody has it.
pub fn remove_record(dir: &Path, socket: &Path) {
    let path = dir.join(file_name(&absolute(socket)));
    let Ok(file) = open(&path, false) else { return };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        let _ = std::fs::remove_file(path);
    }
}

/// Whether nobody has the file, and nobody will ask for it.
fn is_left_over(path: &Path) -> bool {
    let Ok(file) = open(path, false) else { return false };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return false;
    }
    let mut bytes = [0u8; PATH_MAX];
    let count = file.read_at(&mut bytes, PATH_AT).unwrap_or(0);
    let text = bytes.get(..count).unwrap_or_default().split(|byte| *byte == 0).next();
    let socket = PathBuf::from(std::ffi::OsStr::from_bytes(text.unwrap_or_default()));
    socket.parent().is_none_or(|dir| !dir.exists())
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let nofollow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).mode(0o600).custom_flags(nofollow).open(path)
}

/// The records of one port's rings.
#[derive(Debug)]
pub(crate) struct Records {
    /// Whether the pages outlive this process.
    file: Option<(File, PathBuf)>,
    map: Option<RecordMap>,
    /// Rings whose pages are in the file.
    taken: BTreeSet<RingIndex>,
}

impl Records {
    /// The records of the port that has `socket`, of `queues` pairs; in private memory without a
    /// directory, or if its file cannot be had.
    pub(crate) fn new(dir: Option<&Path>, socket: &Path, queues: u16) -> Self {
        let pages = usize::from(queues).saturating_mul(2).saturating_add(1);
        let opened = dir.map(|dir| {
            let path = absolute(socket);
            let file = dir.join(file_name(&path));
            Self::open(&file, &path, pages).map_err(|error| (file, error))
        });
        match opened {
            Some(Ok(records)) => return records,
            Some(Err((file, error))) => {
                let file = file.display();
                tracing::warn!(%file, "no record of ring positions: {error}");
            }
            None => {}
        }
        Self { file: None, map: RecordMap::private(pages).ok(), taken: BTreeSet::new() }
    }

    fn open(path: &Path, socket: &Path, pages: usize) -> io::Result<Self> {
        let file = open(path, true)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| io::Error::other("another process has it"))?;
        Self::adopt(file, path, socket, pages)
    }

    /// Goes on with a file that this process has locked.
    fn adopt(file: File, path: &Path, socket: &Path, pages: usize) -> io::Result<Self> {
        let page_bytes = RECORD_BYTES as u64;
        let before = file.metadata()?.len();
        let bytes = (pages as u64).saturating_mul(page_bytes).max(before);
        let boot = boot_id();
        let header = |map: &RecordMap| {
            let page = map.page(0);
            page.map_or([0; 3], |page| [VERSION_WORD, 2, 3].map(|word| page.get(word)))
        };
        let want = [VERSION, boot[0], boot[1]];
        file.set_len(bytes)?;
        fallocate(&file, FallocateFlags::empty(), 0, page_bytes)?;
        let mut map = RecordMap::from_file(file.try_clone()?, pages)?;
        let found = header(&map);
        if found != want {
            if before > 0 && found[0] != VERSION {
                let path = path.display();
                tracing::warn!(%path, "ignored: not a record of this version");
            }
            drop(map);
            file.set_len(0)?;
            file.set_len(bytes)?;
            fallocate(&file, FallocateFlags::empty(), 0, page_bytes)?;
            file.write_all_at(socket.as_os_str().as_bytes(), PATH_AT)?;
            map = RecordMap::from_file(file.try_clone()?, pages)?;
            if let Some(page) = map.page(0) {
                BOOT_WORDS.iter().zip(boot).for_each(|(word, value)| page.set(*word, value));
                page.set(VERSION_WORD, VERSION);
            }
        }
        Ok(Self { file: Some((file, path.to_owned())), map: Some(map), taken: BTreeSet::new() })
    }

    /// Whether the records outlive this process.
    pub(crate) fn outlive(&self) -> bool {
        self.file.is_some()
    }

    /// The locked file, for a successor that takes over while this process lives.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|(file, _)| file.as_fd())
    }

    /// Goes on with the locked file of a predecessor that lives; what was there before is dropped.
    pub(crate) fn take_over(&mut self, fd: OwnedFd, dir: &Path, socket: &Path, queues: u16) {
        let pages = usize::from(queues).saturating_mul(2).saturating_add(1);
        let socket = absolute(socket);
        let path = dir.join(file_name(&socket));
        match Self::adopt(File::from(fd), &path, &socket, pages) {
            Ok(records) => *self = records,
            Err(error) => {
                let path = path.display();
                tracing::warn!(%path, "no record of ring positions: {error}");
            }
        }
    }

    /// Ends a file whose port goes on without one.
    pub(crate) fn end(fd: OwnedFd) {
        let at = (VERSION_WORD as u64).saturating_mul(8);
        let _ = File::from(fd).write_all_at(&[0; 8], at);
    }

    /// The page of a ring, in memory that is really there.
    pub(crate) fn page(&mut self, ring: RingIndex) -> Option<RecordPage> {
        let index = usize::from(ring.0).saturating_add(1);
        if let Some((file, path)) = &self.file
            && !self.taken.contains(&ring)
        {
            let at = (index as u64).saturating_mul(RECORD_BYTES as u64);
            if let Err(error) = fallocate(file, FallocateFlags::empty(), at, RECORD_BYTES as u64) {
                let path = path.display();
                tracing::warn!(%path, ring = ring.0, "no room for a record: {error}");
                return None;
            }
            let _ = self.taken.insert(ring);
        }
        self.map.as_ref()?.page(index)
    }

    /// Makes `page` that of the ring with `identity`.
    pub(crate) fn claim(page: &RecordPage, identity: &Identity) {
        if !identity.is_of(page) {
            identity.write(page);
        }
    }

    /// Whether `page` has a place of the ring with `identity`.
    pub(crate) fn knows(page: &RecordPage, identity: &Identity) -> bool {
        page.is_known() && identity.is_of(page)
    }

    /// Forgets where a ring is.
    pub(crate) fn forget(&mut self, ring: RingIndex) {
        if let Some(page) = self.page(ring) {
            page.forget();
        }
    }
}

/// The path without symbolic links before its last part, so that it is the same however the
/// switch is started.
fn absolute(socket: &Path) -> PathBuf {
    let parent = socket.parent().filter(|dir| !dir.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new(".")).canonicalize();
    match (parent, socket.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => socket.to_owned(),
    }
}

/// The socket's name, for people, and a hash of its path.
fn file_name(socket: &Path) -> String {
    let hash = hash(socket.as_os_str().as_bytes().iter().copied());
    let name = socket.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).take(64).collect();
    format!("{name}-{hash:016x}.rings")
}

/// Which boot it is: positions are worth nothing after the next one.
fn boot_id() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| digits.get(range).and_then(|hex| u64::from_str_radix(hex, 16).ok());
    [half(0..16), half(16..32)].map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests;
