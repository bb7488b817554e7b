use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::time::Timespec;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};

use super::{GuestMap, Watch, install, losses, notice, rescue, take_place};

const PAGE: usize = 4096;
const CHILD: &str = "VIRTQ_GUARD_CHILD";

/// A file of `pages` pages and a mapping of it.
fn mapped(pages: usize) -> (File, Arc<MmapRegion<()>>) {
    let file = File::from(memfd_create("guard", MemfdFlags::CLOEXEC).unwrap());
    let bytes = pages.saturating_mul(PAGE);
    ftruncate(&file, bytes as u64).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping = MmapRegion::from_file(offset, bytes).unwrap();
    (file, Arc::new(mapping))
}

fn read(mapping: &MmapRegion<()>, at: usize) -> u8 {
    // SAFETY: within the mapping, which lives; a byte may have any value.
    unsafe { mapping.as_ptr().wrapping_add(at).read_volatile() }
}

fn write(mapping: &MmapRegion<()>, at: usize, value: u8) {
    // SAFETY: as in `read`; nobody else uses the memory.
    unsafe { mapping.as_ptr().wrapping_add(at).write_volatile(value) }
}

fn is_readable(fd: &impl std::os::fd::AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).unwrap() > 0
}

/// Runs this very test in a process of its own, where `CHILD` is set.
fn in_child(test: &str) -> Option<std::process::ExitStatus> {
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = format!("mem::guard::tests::{test}");
    let command = command.args(["--exact", &name, "--test-threads=1"]).env(CHILD, "1");
    Some(command.output().unwrap().status)
}

#[test]
fn a_file_that_shrinks_becomes_zeros_and_is_told() {
    install().unwrap();
    install().unwrap();
    let notice = notice().unwrap();
    let (file, mapping) = mapped(8);
    let watch = Watch::new(&mapping);
    let twice = Watch::new(&mapping);
    let (_other_file, other_mapping) = mapped(8);
    let other = Watch::new(&other_mapping);
    (0..8).for_each(|page| write(&mapping, page * PAGE, 7));
    write(&other_mapping, 7 * PAGE, 9);
    let before = losses();
    ftruncate(&file, 2 * PAGE as u64).unwrap();
    assert_eq!(read(&mapping, PAGE), 7, "what is there is read");
    assert!(!watch.is_lost());
    assert_eq!(read(&mapping, 5 * PAGE + 1), 0);
    assert!(watch.is_lost() && twice.is_lost() && !other.is_lost());
    assert!(losses() > before && is_readable(&notice));
    write(&mapping, 6 * PAGE, 3);
    assert_eq!(read(&mapping, 6 * PAGE), 3, "private pages");
    write(&mapping, 2 * PAGE, 4);
    assert_eq!(read(&mapping, PAGE), 7);
    assert_eq!(read(&other_mapping, 7 * PAGE), 9);
    drop((watch, twice));
    let again = Watch::new(&other_mapping);
    assert!(!again.is_lost(), "a place that is used again begins anew");
}

#[test]
fn hundreds_are_watched_and_places_are_used_again() {
    let (_file, mapping) = mapped(1);
    for _ in 0..3 {
        let many: Vec<_> = (0..600).map(|_| Watch::new(&mapping)).collect();
        assert!(many.iter().all(|watch| !watch.is_lost()));
    }
    let chunks = super::chunks().count();
    let many: Vec<_> = (0..600).map(|_| Watch::new(&mapping)).collect();
    assert_eq!(super::chunks().count(), chunks);
    drop(many);
    assert!(take_place().range().is_some());
}

#[test]
fn an_address_that_nobody_watches_is_not_touched() {
    // What stands beside it is ours too: another test's memory may be watched.
    let (_file, around) = mapped(4);
    let (middle, flags) = (around.as_ptr().wrapping_add(PAGE), libc::MAP_SHARED);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the two pages in the middle are mapped like this for as long as `around` lives.
    let mapping = unsafe { MmapRegion::build_raw(middle, 2 * PAGE, access, flags) }.unwrap();
    let mapping = Arc::new(mapping);
    write(&mapping, PAGE, 5);
    let at = mapping.as_ptr().addr();
    assert!(!rescue(at) && !rescue(0) && !rescue(usize::MAX));
    let watch = Watch::new(&mapping);
    assert!(!rescue(at + 2 * PAGE) && !rescue(at - 1));
    assert!(!watch.is_lost());
    assert!(rescue(at + PAGE + 9));
    assert_eq!((read(&mapping, PAGE), watch.is_lost()), (0, true));
}

/// A file of huge pages shrinks: the kernel splits such mappings at huge pages only.
#[test]
fn huge_pages_are_replaced_too() {
    const HUGE: usize = 2 << 20;
    install().unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(fd) = memfd_create("guard", flags) else { return };
    ftruncate(&fd, 4 * HUGE as u64).unwrap();
    // No page need be there: one that the kernel cannot give is lost in the same way.
    let offset = FileOffset::new(File::from(fd.try_clone().unwrap()), 0);
    let mapping = Arc::new(MmapRegion::<()>::from_file(offset, 4 * HUGE).unwrap());
    let watch = Watch::new(&mapping);
    ftruncate(&fd, 2 * HUGE as u64).unwrap();
    assert_eq!(read(&mapping, 3 * HUGE + 5), 0);
    assert!(watch.is_lost());
    write(&mapping, 3 * HUGE + 5, 1);
    let _ = read(&mapping, 2 * HUGE);
    assert_eq!(read(&mapping, 3 * HUGE + 5), 0, "all behind the second fault is new");
    drop((mapping, watch));
}

#[test]
fn all_regions_of_a_map_are_watched() {
    install().unwrap();
    let files = [mapped(4), mapped(4)].map(|(file, _)| file);
    let range = |(number, file): (u64, &File)| {
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        (GuestAddress(number << 20), 4 * PAGE, Some(offset))
    };
    let ranges = (0..).zip(&files).map(range);
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
    let memory = Arc::new(memory);
    let watches = Watch::all(&GuestMap::new(Arc::clone(&memory)).unwrap());
    ftruncate(&files[1], 0).unwrap();
    let mut byte = [9];
    memory.read_slice(&mut byte, GuestAddress((1 << 20) + 5)).unwrap();
    assert_eq!(byte, [0]);
    let lost: Vec<bool> = watches.iter().map(Watch::is_lost).collect();
    assert_eq!(lost, [false, true]);
}

/// Faults by many threads at once, at many places of one mapping and of several.
#[test]
fn threads_may_fault_at_once() {
    install().unwrap();
    for _ in 0..20 {
        let (file, mapping) = mapped(64);
        let watch = Watch::new(&mapping);
        ftruncate(&file, 0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let mapping = &mapping;
                let _ = scope.spawn(move || {
                    for page in 0..64 {
                        let _ = read(mapping, ((page * 7 + thread) % 64) * PAGE);
                    }
                });
            }
        });
        assert!(watch.is_lost());
    }
}

#[test]
fn a_fault_elsewhere_still_ends_the_process() {
    let Some(status) = in_child("a_fault_elsewhere_still_ends_the_process") else {
        install().unwrap();
        let (file, mapping) = mapped(2);
        let (_other, watched) = mapped(2);
        let _watch = Watch::new(&watched);
        ftruncate(&file, 0).unwrap();
        let _ = read(&mapping, 0);
        return;
    };
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

#[test]
fn a_signal_that_was_sent_still_ends_the_process() {
    let Some(status) = in_child("a_signal_that_was_sent_still_ends_the_process") else {
        install().unwrap();
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::BUS).unwrap();
        std::thread::sleep(std::time::Duration::from_secs(20));
        return;
    };
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

/// The handler that was there before still gets what is not ours.
#[test]
fn a_handler_from_before_is_asked() {
    extern "C" fn theirs(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: ends the process at once, which a handler may.
        unsafe { libc::_exit(42) }
    }
    let Some(status) = in_child("a_handler_from_before_is_asked") else {
        vmm_sys_util::signal::register_signal_handler(libc::SIGBUS, theirs).unwrap();
        install().unwrap();
        let (file, mapping) = mapped(2);
        let watch = Watch::new(&mapping);
        ftruncate(&file, 0).unwrap();
        assert_eq!((read(&mapping, 0), watch.is_lost()), (0, true), "ours is ours");
        let (file, mapping) = mapped(2);
        ftruncate(&file, 0).unwrap();
        let _ = read(&mapping, 0);
        return;
    };
    assert_eq!(status.code(), Some(42), "{status}");
}
