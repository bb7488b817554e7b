//! What a queue refuses to start from, and the encodings of positions.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{Layout, QueueError, RingArea, RingPosition};
use crate::mem::{GuestMap, GuestPhysAddr};
use crate::testing::{END, Guest};

fn packed(avail: u16, avail_wrap: bool, used: u16, used_wrap: bool) -> RingPosition {
    RingPosition::Packed { avail, avail_wrap, used, used_wrap }
}

#[test]
fn sizes() {
    for (layout, size, fine) in [
        (Layout::Split, 0, false),
        (Layout::Split, 1, true),
        (Layout::Split, 3, false),
        (Layout::Split, 32768, true),
        (Layout::Split, 32769, false),
        (Layout::Split, 65535, false),
        (Layout::Packed, 0, false),
        (Layout::Packed, 1, true),
        (Layout::Packed, 3, true),
        (Layout::Packed, 32768, true),
        (Layout::Packed, 32769, false),
    ] {
        let guest = Guest::new(layout, size);
        let want = if fine { Ok((layout, size)) } else { Err(QueueError::Size(size)) };
        let have = guest.try_start().map(|queue| (queue.layout(), queue.size()));
        assert_eq!(have, want);
        assert_eq!(guest.config.resume_at_used(&guest.map).is_ok(), fine);
    }
}

#[test]
fn areas_must_be_aligned_and_mapped() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut guest = Guest::new(layout, 16);
        let (driver_align, ring) = if layout == Layout::Split { (2, 256u64) } else { (4, 256) };
        let (driver, device) = if layout == Layout::Split { (38, 134) } else { (4, 4) };
        let good = guest.config;
        let at = GuestPhysAddr;
        let mut refused = |area, addr: GuestPhysAddr, error| {
            guest.config = good;
            match area {
                RingArea::Descriptors => guest.config.desc = addr,
                RingArea::Driver => guest.config.driver = addr,
                RingArea::Device => guest.config.device = addr,
            }
            assert_eq!(guest.try_start().err(), error);
        };
        for (area, align, len) in [
            (RingArea::Descriptors, 16u64, ring),
            (RingArea::Driver, driver_align, driver),
            (RingArea::Device, 4, device),
        ] {
            let addr = at(0x1000 + align / 2);
            refused(area, addr, Some(QueueError::Unaligned { area, addr, align }));
            let room = len.next_multiple_of(align);
            refused(area, at(END - room), None);
            let addr = at(END - room + align);
            refused(area, addr, Some(QueueError::Unmapped { area, addr, len }));
            let addr = at(u64::MAX - 15);
            refused(area, addr, Some(QueueError::Unmapped { area, addr, len }));
        }
    }
}

#[test]
fn an_area_without_event_index_is_shorter() {
    let mut guest = Guest::split(16);
    guest.config.device = GuestPhysAddr(END - 132);
    assert!(guest.try_start().is_err());
    guest.config.features.event_idx = false;
    assert!(guest.try_start().is_ok());
}

#[test]
fn an_area_over_regions_that_are_apart_here_is_refused() {
    let page = 4096u64;
    let mut regions = [0, 1].map(|_| MmapRegion::new(4096).unwrap());
    regions.sort_by_key(|region| std::cmp::Reverse(region.as_ptr().addr()));
    let mut base = 0;
    let regions = regions.map(|region| {
        let region = Arc::new(GuestRegionMmap::new(region, GuestAddress(base)).unwrap());
        base += page;
        region
    });
    let memory = GuestMemoryMmap::<()>::from_arc_regions(regions.to_vec()).unwrap();
    let map = GuestMap::new(Arc::new(memory)).unwrap();
    let mut config = Guest::split(16).config;
    config.driver = GuestPhysAddr(0);
    config.device = GuestPhysAddr(1024);
    let addr = GuestPhysAddr(page - 16);
    config.desc = addr;
    let error = QueueError::Scattered { area: RingArea::Descriptors, addr, len: 256 };
    assert_eq!(config.activate(&map).err(), Some(error));
    config.desc = GuestPhysAddr(page);
    assert!(config.activate(&map).is_ok());
}

#[test]
fn an_area_in_a_region_at_an_odd_host_address_is_refused() {
    // Guest address 8 is the region's first byte, so guest address 16 is at host page + 8.
    let region = GuestRegionMmap::new(MmapRegion::new(8192).unwrap(), GuestAddress(8)).unwrap();
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region]).unwrap();
    let map = GuestMap::new(Arc::new(memory)).unwrap();
    let mut config = Guest::split(16).config;
    (config.desc, config.driver) = (GuestPhysAddr(16), GuestPhysAddr(1024));
    config.device = GuestPhysAddr(2048);
    let addr = config.desc;
    let error = QueueError::HostUnaligned { area: RingArea::Descriptors, addr, align: 16 };
    assert_eq!(config.activate(&map).err(), Some(error));
}

#[test]
fn positions_must_be_possible() {
    let split = |avail, used| RingPosition::Split { avail, used };
    for (layout, position, fine) in [
        (Layout::Split, split(16, 0), true),
        (Layout::Split, split(5, 65530), true),
        (Layout::Split, split(17, 0), false),
        (Layout::Split, split(0, 1), false),
        (Layout::Packed, packed(15, true, 15, true), true),
        (Layout::Packed, packed(16, true, 16, true), false),
        (Layout::Packed, packed(0, true, 16, true), false),
        (Layout::Packed, packed(5, true, 4, true), true),
        (Layout::Packed, packed(4, true, 5, true), false),
        (Layout::Packed, packed(4, false, 5, true), true),
        (Layout::Packed, packed(5, false, 5, true), true),
        (Layout::Packed, packed(6, false, 5, true), false),
    ] {
        let mut guest = Guest::new(layout, 16);
        guest.config.position = position;
        let want = if fine { None } else { Some(QueueError::Position { position, size: 16 }) };
        assert_eq!(guest.try_start().err(), want);
    }
    let mut guest = Guest::split(16);
    guest.config.position = RingPosition::start(Layout::Packed);
    let error = QueueError::PositionLayout(Layout::Split);
    assert_eq!(guest.try_start().err(), Some(error));
    assert_eq!(guest.config.resume_at_used(&guest.map).err(), Some(error));
    let mut guest = Guest::packed(16);
    guest.config.position = RingPosition::start(Layout::Split);
    let error = QueueError::PositionLayout(Layout::Packed);
    assert_eq!(guest.try_start().err(), Some(error));
    guest.config.position = packed(16, true, 16, true);
    assert!(guest.config.resume_at_used(&guest.map).is_err());
}

#[test]
fn vhost_bases() {
    let from = RingPosition::from_vhost_base;
    assert_eq!(from(Layout::Packed, 0x8000), RingPosition::start(Layout::Packed));
    assert_eq!(from(Layout::Packed, 0x8000_8000), RingPosition::start(Layout::Packed));
    assert_eq!(from(Layout::Packed, 0x0005), packed(5, false, 5, false));
    assert_eq!(from(Layout::Packed, 0x8003_0001), packed(1, false, 3, true));
    assert_eq!(from(Layout::Split, 0x1_fffe), RingPosition::Split { avail: 65534, used: 65534 });
    assert_eq!(RingPosition::start(Layout::Packed).to_vhost_base(), 0x8000_8000);
    assert_eq!(packed(1, false, 3, true).to_vhost_base(), 0x8003_0001);
    assert_eq!(packed(1, false, 3, true).refetch(), packed(3, true, 3, true));
    assert_eq!(RingPosition::Split { avail: 65534, used: 9 }.to_vhost_base(), 65534);
}
