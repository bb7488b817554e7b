//! Memory that changes under running rings, and regions that are refused.

use super::front::{
    Event, Front, GUEST, PLAIN, REGION_BYTES, USER, event, memory, region, ring_addr,
};
use crate::codec::{Request, VringState};
use crate::handover::{Incoming, RegionHandover};
use crate::memory::{FrontendAddr, MemoryError, RegionSpec, RegionTable, SLOTS_MAX};
use crate::session::{RingIndex, Unready};
use virtq::mem::GuestPhysAddr;

#[test]
fn rings_go_on_where_they_were_when_regions_come_and_go() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = front.base(1);
    front.describe(1, 77);
    front.kick(1);
    let _ = front.events();
    assert_eq!(front.ack(Request::AddMemReg(region(5)), vec![memory(REGION_BYTES)]), 0);
    let events = front.events();
    // Nobody runs while the memory changes.
    assert_eq!(events[..2], [Event::Parked(0), Event::Stopped(1)]);
    let position = virtq::RingPosition::Split { avail: 77, used: 77 };
    assert_eq!(events[3], Event::Started { ring: 1, enabled: true, position });
    assert_eq!(front.ack(Request::RemMemReg(region(5)), Vec::new()), 0);
    assert_eq!(front.running(), [0, 1]);
    assert_eq!(front.ack(Request::RemMemReg(region(5)), Vec::new()), 1);
    assert_eq!(front.running(), [0, 1]);
    // Some front ends pass the fd of what they remove.
    assert_eq!(front.ack(Request::AddMemReg(region(5)), vec![memory(REGION_BYTES)]), 0);
    assert_eq!(front.ack(Request::RemMemReg(region(5)), vec![event()]), 0);
}

#[test]
fn a_new_table_keeps_rings_that_it_still_maps_and_parks_the_others() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    front.say_fd(Request::SetMemTable(vec![region(0)]), memory(REGION_BYTES));
    assert_eq!(front.running(), [0, 1]);
    front.say_fd(Request::SetMemTable(vec![region(9)]), memory(REGION_BYTES));
    assert!(front.running().is_empty());
    assert_eq!(front.session.ready(), Err(Unready::NoMemory(RingIndex(0))));
    front.say_fd(Request::SetMemTable(vec![region(0)]), memory(REGION_BYTES));
    assert_eq!(front.running(), [0, 1]);
    front.say(Request::SetMemTable(vec![]));
    assert!(front.running().is_empty());
    assert_eq!(front.base(1), 0);
}

#[test]
fn a_ring_that_reaches_beyond_its_region_is_refused_or_waits() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.enable(1, true);
    let mut addr = ring_addr(1);
    addr.used = FrontendAddr(USER + REGION_BYTES - 4);
    front.say(Request::SetVringNum(VringState { ring: 1, num: 256 }));
    front.say(Request::SetVringAddr(addr));
    let kick = Request::SetVringKick(crate::codec::VringFd { ring: 1, has_fd: true });
    assert!(front.refused(kick, vec![event()]).contains("is not in guest memory"));
    assert!(front.running().is_empty());
    assert_eq!(front.ack(Request::AddMemReg(region(3)), vec![memory(REGION_BYTES)]), 0);
    assert!(front.running().is_empty());
    front.say(Request::SetVringAddr(ring_addr(1)));
    assert_eq!(front.running(), [1]);
}

fn try_region(spec: RegionSpec, file_bytes: u64) -> Result<RegionTable, MemoryError> {
    RegionTable::new(&[spec], vec![memory(file_bytes)])
}

#[test]
fn bad_regions_are_refused_by_name() {
    let good = region(0);
    let text = |spec, bytes| try_region(spec, bytes).unwrap_err().to_string();
    assert!(text(RegionSpec { size: 0, ..good }, 4096).ends_with("is empty"));
    let high = GuestPhysAddr(u64::MAX - 10);
    assert!(text(RegionSpec { guest: high, ..good }, 4096).ends_with("wraps around"));
    let user = FrontendAddr(u64::MAX - 10);
    assert!(text(RegionSpec { user, ..good }, 4096).ends_with("wraps around"));
    assert!(text(RegionSpec { mmap_offset: u64::MAX, ..good }, 4096).ends_with("wraps around"));
    assert!(text(good, REGION_BYTES - 1).contains("has 0xfffff bytes, 0x100000 are needed"));
    let late = RegionSpec { mmap_offset: 4096, ..good };
    assert!(text(late, REGION_BYTES).contains("0x101000 are needed"));
    let huge = RegionSpec { size: 1 << 45, ..good };
    assert!(text(huge, 4096).contains("at most"));
    let not_a_file = RegionTable::new(&[good], vec![event()]);
    let said = not_a_file.unwrap_err().to_string();
    assert!(said.contains("not used as memory"), "{said}");
}

#[test]
fn overlap_in_either_address_space_is_refused() {
    let other = RegionSpec { user: FrontendAddr(USER * 2), ..region(0) };
    let table = RegionTable::new(&[region(0)], vec![memory(REGION_BYTES)]).unwrap();
    let error = table.with(other, memory(REGION_BYTES)).unwrap_err();
    assert!(matches!(error, MemoryError::Overlap(_, _)), "{error}");
    let other = RegionSpec { guest: GuestPhysAddr(GUEST * 2), ..region(0) };
    let error = table.with(other, memory(REGION_BYTES)).unwrap_err();
    assert!(matches!(error, MemoryError::Overlap(_, _)), "{error}");
    assert!(table.with(region(1), memory(REGION_BYTES)).is_ok());
}

#[test]
fn a_region_added_twice_is_removed_twice() {
    // QEMU 7.2 adds and removes every region once for each queue pair.
    let file = memory(REGION_BYTES);
    let again = || rustix::io::dup(&file).unwrap();
    let mut table = RegionTable::new(&[region(0)], vec![again()]).unwrap();
    table = table.with(region(0), again()).unwrap();
    assert_eq!(table.len(), 1);
    let other_file = table.with(region(0), memory(REGION_BYTES)).unwrap_err();
    assert!(matches!(other_file, MemoryError::Overlap(_, _)), "{other_file}");
    table = table.without(&region(0)).unwrap();
    assert_eq!(table.len(), 1);
    table = table.without(&region(0)).unwrap();
    assert!(table.is_empty() && table.map().is_none());
    assert!(table.without(&region(0)).is_err());
    let twice = RegionTable::new(&[region(0), region(0)], vec![again(), again()]).unwrap_err();
    assert!(matches!(twice, MemoryError::Overlap(_, _)), "a table names a region once: {twice}");
    table = RegionTable::new(&[region(0)], vec![again()]).unwrap();
    for _ in 1..128 {
        table = table.with(region(0), again()).unwrap();
    }
    assert!(table.with(region(0), again()).is_err(), "more often than there are queue pairs");
}

#[test]
fn a_region_may_start_anywhere_in_its_file() {
    let fd = memory(0x3000);
    let writer = rustix::io::dup(&fd).unwrap();
    let spec = RegionSpec { size: 0x1800, mmap_offset: 0x1234, ..region(0) };
    let _ = rustix::io::pwrite(&writer, b"causeway", 0x1234).unwrap();
    let table = RegionTable::new(&[spec], vec![fd]).unwrap();
    let map = table.map().unwrap();
    assert!(map.contains(spec.guest, spec.size));
    assert!(!map.contains(spec.guest, spec.size + 1));
    assert_eq!(table.translate(FrontendAddr(USER + 5)), Some(GuestPhysAddr(GUEST + 5)));
    assert_eq!(table.translate(FrontendAddr(USER + 0x1800)), None);
    assert_eq!(table.translate(FrontendAddr(USER - 1)), None);
    assert_eq!(&table.peek(spec.guest), b"causeway");
}

#[test]
fn the_last_slot_is_the_509th() {
    let page = |n: u64| RegionSpec {
        guest: GuestPhysAddr(n * 8192),
        size: 4096,
        user: FrontendAddr(USER + n * 8192),
        mmap_offset: n * 4096,
    };
    let mut table = RegionTable::default();
    let slots = u64::try_from(SLOTS_MAX).unwrap();
    let file = memory((slots + 1) * 4096);
    for n in 0..slots {
        table = table.with(page(n), rustix::io::dup(&file).unwrap()).unwrap();
    }
    let error = table.with(page(slots), file).unwrap_err();
    assert_eq!(error.to_string(), "more than 509 memory regions");
    assert_eq!(table.len(), SLOTS_MAX);
    assert_eq!(table.without(&page(7)).unwrap().len(), SLOTS_MAX - 1);
}

/// A region of pages `from` to `to` of a file, beside all others.
fn shows(n: u64, from: u64, to: u64) -> RegionSpec {
    RegionSpec {
        guest: GuestPhysAddr(n << 40),
        size: (to - from) * 4096,
        user: FrontendAddr(USER + (n << 40)),
        mmap_offset: from * 4096,
    }
}

#[test]
fn bytes_of_a_file_are_in_two_regions_at_most() {
    // However large the file is: what counts is what is shown.
    let file = memory(1 << 40);
    let again = || rustix::io::dup(&file).unwrap();
    let of = |specs: &[RegionSpec]| {
        let fds = specs.iter().map(|_| again()).collect();
        RegionTable::new(specs, fds)
    };
    let two = of(&[shows(0, 0, 8), shows(1, 0, 8)]).unwrap();
    let error = two.with(shows(2, 7, 9), again()).unwrap_err().to_string();
    assert_eq!(
        error,
        "the memory region at 0x20000000000 shows its file from 0x7000 on as 2 others do: at most \
         2 regions may show the same bytes of a file"
    );
    let three = [shows(0, 0, 8), shows(1, 0, 8), shows(2, 0, 1)];
    assert!(matches!(of(&three), Err(MemoryError::Aliases { at: 0, regions: 2, .. })));
    // Beside them, of another file, and as often as before.
    assert!(two.with(shows(2, 8, 16), again()).is_ok());
    assert!(two.with(shows(2, 0, 8), memory(1 << 20)).is_ok());
    assert!(two.with(shows(1, 0, 8), again()).is_ok());
    let one = two.without(&shows(0, 0, 8)).unwrap();
    let two = one.with(shows(2, 7, 9), again()).unwrap();
    // Many small ones that one large one has all of.
    let small: Vec<_> = (0..300).map(|n| shows(n, n, n + 1)).collect();
    let small = of(&small).unwrap().with(shows(300, 0, 300), again()).unwrap();
    let error = small.with(shows(301, 299, 400), again()).unwrap_err();
    assert!(matches!(error, MemoryError::Aliases { at: 0x12b000, .. }), "{error}");
    assert!(small.with(shows(301, 300, 400), again()).is_ok());
    // Page 7 is in both already.
    assert!(
        two.with(shows(3, 6, 8), again()).is_err() && two.with(shows(3, 0, 7), again()).is_ok()
    );
}

#[test]
fn what_another_process_let_in_is_adopted_however_often_it_shows_a_file() {
    let file = memory(1 << 20);
    let mut fds = Vec::new();
    let mut regions = Vec::new();
    for n in 0..4u64 {
        let spec = shows(n, 0, 8);
        regions.push(RegionHandover {
            fd: u32::try_from(n).unwrap(),
            guest: spec.guest.0,
            size: spec.size,
            user: spec.user.0,
            mmap_offset: spec.mmap_offset,
            uses: 1,
        });
        fds.push(rustix::io::dup(&file).unwrap());
    }
    let table = RegionTable::adopt(&regions, &mut Incoming::from(fds)).unwrap();
    assert_eq!(table.len(), 4);
    // Nothing more of that.
    assert!(table.with(shows(4, 7, 9), rustix::io::dup(&file).unwrap()).is_err());
    assert!(table.with(shows(4, 8, 9), rustix::io::dup(&file).unwrap()).is_ok());
}
