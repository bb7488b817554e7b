#![expect(clippy::cast_possible_truncation, reason = "test code")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use super::{Inflight, inflight_bytes};
use crate::config::{Layout, RingPosition};
use crate::mem::InflightArea;
use crate::record::Recovery;
use crate::testing::{DATA, Guest};

const SIZE: u16 = 8;

fn region(layout: Layout) -> (File, InflightArea) {
    let file = tempfile::tempfile().unwrap();
    let bytes = inflight_bytes(layout, SIZE);
    file.set_len(bytes as u64).unwrap();
    let area = InflightArea::from_file(file.try_clone().unwrap(), 0, bytes).unwrap();
    (file, area)
}

fn u16_at(file: &File, at: u64) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, at).unwrap();
    u16::from_le_bytes(bytes)
}

fn u64_at(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_split_region_is_as_the_specification_says() {
    let mut guest = Guest::new(Layout::Split, SIZE);
    let (file, area) = region(Layout::Split);
    for head in 0..4 {
        guest.desc(head, (DATA, 10), 0, 0);
    }
    guest.avail(0, &[3, 1, 2]);
    let mut queue = guest.start();
    queue.set_inflight(Inflight::new(area, &guest.config).unwrap());
    assert_eq!((u64_at(&file, 0), u16_at(&file, 8), u16_at(&file, 10)), (0, 1, SIZE));
    let _ = guest.pop(&mut queue, 8);
    let state = |head: u64| (u16_at(&file, 16 + head * 16), u64_at(&file, 24 + head * 16));
    assert_eq!([state(3), state(1), state(2)], [(1, 0), (1, 1), (1, 2)], "in flight, counted");
    assert_eq!(state(0).0, 0);
    queue.complete_all(&guest.tokens[..2]);
    assert_eq!((u16_at(&file, 12), u16_at(&file, 16 + 16 + 6)), (1, 3), "the list of the batch");
    assert_eq!((state(3).0, u16_at(&file, 14)), (1, 0), "not before it is published");
    queue.publish();
    assert_eq!((state(3).0, state(1).0, state(2).0, u16_at(&file, 14)), (0, 0, 1, 2));
}

#[test]
fn a_packed_region_is_as_the_specification_says() {
    let mut guest = Guest::new(Layout::Packed, SIZE);
    let (file, area) = region(Layout::Packed);
    guest.slot(0, (DATA, 11), (5, 0), true);
    guest.slot(1, (DATA + 64, 12), (0, 1), true);
    guest.slot(2, (DATA + 128, 13), (6, 0), true);
    let mut queue = guest.start();
    queue.set_inflight(Inflight::new(area, &guest.config).unwrap());
    assert_eq!((u64_at(&file, 0), u16_at(&file, 8), u16_at(&file, 10)), (0, 1, SIZE));
    assert_eq!((u64_at(&file, 16), u16_at(&file, 12)), (0x0101 << 32, 0), "used 0, both wraps 1");
    let _ = guest.pop(&mut queue, 8);
    let at = |entry: u64| 32 + entry * 32;
    let words = |entry| [0, 4, 6, 16, 18, 20].map(|field| u16_at(&file, at(entry) + field));
    assert_eq!(words(0), [1, 0, 1, 5, 1 << 7, 11], "in flight, last, num, id, flags, len");
    assert_eq!(words(1), [1, 2, 2, 0, 1 << 7 | 1, 12]);
    assert_eq!((u64_at(&file, at(1) + 24), u64_at(&file, at(2) + 24)), (DATA + 64, DATA + 128));
    assert_eq!((u64_at(&file, at(0) + 8), u64_at(&file, at(1) + 8)), (0, 1), "counters");
    assert_eq!((u16_at(&file, 12), u16_at(&file, 14)), (3, 3), "free: from the fourth on");
    queue.complete_all(&guest.tokens[..1]);
    queue.publish();
    assert_eq!((u16_at(&file, 12), u16_at(&file, 14), u16_at(&file, at(0) + 2)), (0, 0, 3));
    assert_eq!((u64_at(&file, 16), words(0)[0], words(1)[0]), (0x0101_0001_0001, 0, 1));
}

#[test]
fn a_region_of_another_queue_is_refused() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut guest = Guest::new(layout, SIZE);
        let (file, area) = region(layout);
        assert!(Inflight::new(area.part(0, 64).unwrap(), &guest.config).is_none(), "too short");
        let mut queue = guest.start();
        queue.set_inflight(Inflight::new(area.clone(), &guest.config).unwrap());
        guest.config.size = SIZE / 2;
        assert!(Inflight::new(area.clone(), &guest.config).is_none(), "of another size");
        file.write_all_at(&[2, 0], 8).unwrap();
        guest.config.size = SIZE;
        assert!(Inflight::new(area, &guest.config).is_none(), "of another version");
    }
}

#[test]
fn whatever_is_in_a_region_the_recovery_ends() {
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for round in 0..2000 {
        let layout = if round % 2 == 0 { Layout::Split } else { Layout::Packed };
        let guest = Guest::new(layout, SIZE);
        let (file, area) = region(layout);
        let bytes: Vec<u8> = (0..area.len()).map(|_| (random() % 12) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(&[1, 0, SIZE as u8, 0], 8).unwrap();
        guest.write(0x18_0000, &[1, 0, 1, 0]);
        let mut inflight = Inflight::new(area, &guest.config).unwrap();
        let found = inflight.recover(&guest.config, &guest.map).unwrap();
        if let Recovery::At(RingPosition::Packed { used, .. }) = found {
            assert!(used < SIZE);
        }
        let mut queue = guest.start();
        queue.set_inflight(inflight);
    }
}

#[test]
fn counters_that_change_while_they_are_sorted_harm_nobody() {
    const MANY: u16 = 1024;
    let mut guest = Guest::new(Layout::Split, 256);
    guest.config.size = MANY;
    let bytes = inflight_bytes(Layout::Split, MANY);
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes as u64).unwrap();
    let area = InflightArea::from_file(file, 0, bytes).unwrap();
    let inflight = Inflight::new(area.clone(), &guest.config).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ = scope.spawn(|| {
            let mut seed = 1u64;
            while !stop.load(Relaxed) {
                for head in 0..MANY {
                    let at = inflight.state(head);
                    area.put16(at, 1);
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    area.put64(at + 8, seed);
                }
            }
        });
        let look = || (0..300).for_each(|_| drop(inflight.in_flight()));
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(look));
        stop.store(true, Relaxed);
        assert!(found.is_ok());
    });
}
