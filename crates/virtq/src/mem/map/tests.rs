//! Lookups at the edges of regions.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{GuestMap, GuestPhysAddr, Hit, HostRange, MAX_REGIONS, MapError};

const PAGE: usize = 4096;

fn map_of(ranges: &[(u64, usize)]) -> (Arc<GuestMemoryMmap>, GuestMap) {
    let ranges: Vec<_> = ranges.iter().map(|(base, len)| (GuestAddress(*base), *len)).collect();
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let map = GuestMap::new(memory.clone()).unwrap();
    (memory, map)
}

/// The lengths of the segments of a range.
fn lens(map: &GuestMap, hit: &mut Hit, addr: u64, len: u32) -> Option<Vec<u32>> {
    let mut segs = Vec::new();
    let mapped = map.resolve(hit, GuestPhysAddr(addr), len, &mut segs);
    mapped.then(|| segs.iter().map(|seg| seg.len()).collect())
}

#[test]
fn ranges_are_split_at_region_boundaries_and_end_at_holes() {
    let page = PAGE as u64;
    let (memory, map) =
        map_of(&[(page, PAGE), (2 * page, 2 * PAGE), (5 * page, PAGE), (6 * page, PAGE)]);
    assert_eq!(map.region_count(), 4);
    let mut hit = Hit::none();
    for _ in 0..2 {
        assert_eq!(lens(&map, &mut hit, page, 4096), Some(vec![4096]));
        assert_eq!(lens(&map, &mut hit, page, 4097), Some(vec![4096, 1]));
        assert_eq!(lens(&map, &mut hit, 2 * page - 1, 3), Some(vec![1, 2]));
        assert_eq!(lens(&map, &mut hit, 4 * page - 1, 1), Some(vec![1]));
        assert_eq!(lens(&map, &mut hit, 4 * page - 1, 2), None);
        assert_eq!(lens(&map, &mut hit, page - 1, 2), None);
        assert_eq!(lens(&map, &mut hit, 7 * page, 1), None);
        assert_eq!(lens(&map, &mut hit, u64::MAX, u32::MAX), None);
        assert_eq!(lens(&map, &mut hit, 5 * page, 8192), Some(vec![4096, 4096]));
    }
    for (addr, len, want) in [
        (page, 3 * page, true),
        (page, 3 * page + 1, false),
        (page - 1, 2, false),
        (page, u64::MAX, false),
        (u64::MAX, 2, false),
        (0, 0, true),
    ] {
        assert_eq!(map.contains(GuestPhysAddr(addr), len), want);
    }
    let host = memory.get_host_address(GuestAddress(2 * page + 5)).unwrap();
    let range = map.host_range(GuestPhysAddr(2 * page + 5), 100);
    assert_eq!(range, HostRange::Contiguous(host));
    assert_eq!(map.host_range(GuestPhysAddr(4 * page - 1), 2), HostRange::Unmapped);
    let after = memory.get_host_address(GuestAddress(5 * page)).unwrap().wrapping_add(PAGE);
    let next = memory.get_host_address(GuestAddress(6 * page)).unwrap();
    let range = map.host_range(GuestPhysAddr(5 * page), 2 * page);
    assert_eq!(range == HostRange::Scattered, after != next);
}

#[test]
fn the_last_byte_of_the_address_space_can_be_memory() {
    let page = PAGE as u64;
    let base = u64::MAX - page; // vm-memory has no region that ends at 2^64
    let (_memory, map) = map_of(&[(base, PAGE)]);
    assert_eq!(lens(&map, &mut Hit::none(), base, 4096), Some(vec![4096]));
    assert_eq!(lens(&map, &mut Hit::none(), base + 1, 4096), None);
    assert_eq!(lens(&map, &mut Hit::none(), base + page - 1, u32::MAX), None);
}

#[test]
fn maps_have_limits() {
    let ranges: Vec<_> = (0..=MAX_REGIONS as u64).map(|i| (i * 2 * 4096, PAGE)).collect();
    let (_memory, map) = map_of(&ranges[..MAX_REGIONS]);
    assert!(map.same_as(&map.clone()));
    let starts: Vec<_> = ranges.iter().map(|(base, len)| (GuestAddress(*base), *len)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&starts).unwrap();
    let error = GuestMap::new(Arc::new(memory)).err();
    assert_eq!(error, Some(MapError::TooManyRegions(MAX_REGIONS + 1)));
    assert_eq!(GuestMap::private(usize::MAX).err(), Some(MapError::Private(usize::MAX)));
}
