//! Whatever a ring writes into its guest's memory is noted: memory is compared page by page.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Places, RingLog};
use crate::Virtq;
use crate::config::{Layout, QueueConfig, RingPosition};
use crate::mem::{DirtyLog, GuestPhysAddr, LOG_PAGE, RecordMap, crash};
use crate::record::Recovery;
use crate::testing::{DATA, END, Guest, NEXT, SECOND, WRITE};

const PAGES: usize = (END / LOG_PAGE) as usize;
const SIZE: u16 = 512;

/// A guest, its memory as it was last, and the log.
struct Bed {
    guest: Guest,
    before: Vec<u8>,
    log: File,
    next: u16,
    wrap: bool,
}

impl Bed {
    fn new(layout: Layout, event_idx: bool) -> (Self, Virtq) {
        let mut guest = Guest::new(layout, SIZE);
        guest.config.features.event_idx = event_idx;
        let log = tempfile::tempfile().unwrap();
        log.set_len(PAGES as u64 / 8).unwrap();
        let mut queue = guest.start();
        let before = guest.all();
        let bed = Self { guest, before, log, next: 0, wrap: true };
        queue.set_log(Some(bed.log()));
        (bed, queue)
    }

    fn log(&self) -> RingLog {
        RingLog {
            log: DirtyLog::from_file(self.log.try_clone().unwrap(), 0, PAGES / 8).unwrap(),
            memory: self.guest.map.clone(),
            device: self.guest.config.device.into(),
            desc: self.guest.config.desc.into(),
            call: None,
        }
    }

    /// Two writable buffers in one chain, or one.
    fn offer(&mut self, buffers: &[(u64, u32)]) {
        let count = buffers.len() as u16;
        for (n, buffer) in (0u16..).zip(buffers) {
            let more = if n + 1 < count { NEXT } else { 0 };
            let at = (self.next + n) % SIZE;
            match self.guest.config.layout {
                Layout::Split => self.guest.desc(at, *buffer, WRITE | more, (at + 1) % SIZE),
                Layout::Packed => {
                    let wrap = self.wrap ^ (self.next + n >= SIZE);
                    self.guest.slot(at, *buffer, (self.next, WRITE | more), wrap);
                }
            }
        }
    }

    fn passed(&mut self, count: u16) {
        self.next += count;
        if self.next >= SIZE {
            self.next -= SIZE;
            self.wrap = !self.wrap;
        }
    }

    /// The pages that the device wrote since the last look: those that differ, and those noted.
    fn look(&mut self) -> (BTreeSet<usize>, BTreeSet<usize>) {
        let now = self.guest.all();
        let page = LOG_PAGE as usize;
        let differ = (0..PAGES)
            .filter(|n| now[n * page..(n + 1) * page] != self.before[n * page..(n + 1) * page]);
        let differ = differ.collect();
        self.before = now;
        let mut bits = vec![0; PAGES / 8];
        self.log.read_exact_at(&mut bits, 0).unwrap();
        self.log.write_all_at(&[0; PAGES / 8], 0).unwrap();
        (differ, (0..PAGES).filter(|n| bits[n / 8] & 1 << (n % 8) != 0).collect())
    }
}

fn everything_written_is_noted(layout: Layout, event_idx: bool) {
    let (mut bed, mut queue) = Bed::new(layout, event_idx);
    let _ = bed.look();
    let mut heads = 0u16;
    for turn in 0..600u64 {
        // The second buffer crosses from one region into the next in some turns.
        let first = (DATA + turn * 1733 % 0x8_0000, 700);
        let second = (SECOND - 300 + turn * 4099 % 0x8_0000, 5000);
        let buffers = if turn % 3 == 0 { vec![first, second] } else { vec![first] };
        bed.offer(&buffers);
        if layout == Layout::Split {
            bed.guest.avail(heads, &[bed.next]);
            heads = heads.wrapping_add(1);
        }
        bed.before = bed.guest.all();
        let guest = &mut bed.guest;
        let chains = queue.pop(&mut guest.buf, 8);
        assert_eq!((chains.len(), chains.fault()), (1, None), "turn {turn}");
        let bytes = if buffers.len() == 2 { 100 + turn as u32 * 9 % 5600 } else { 60 };
        let mut writer = chains.writable(0).writer();
        assert_eq!(writer.write(&vec![turn as u8 | 1; bytes as usize]), bytes as usize);
        queue.complete_written(&guest.buf, &[bytes]);
        queue.publish();
        match turn % 7 {
            0 => drop(queue.enable_kicks()),
            1 => queue.disable_kicks(),
            _ => {}
        }
        bed.passed(buffers.len() as u16);
        let (differ, noted) = bed.look();
        assert!(differ.is_subset(&noted), "turn {turn}: {differ:?} changed, {noted:?} noted");
        // Nothing is noted without need, which would keep a migration from converging: at most the
        // buffers' pages, one of the ring and those of the words beside it.
        assert!(noted.len() <= differ.len() + 4, "turn {turn}: {differ:?}, noted {noted:?}");
        assert!(!differ.is_empty());
    }
    queue.set_log(None);
    bed.offer(&[(DATA, 64)]);
    bed.guest.avail(heads, &[bed.next]);
    assert_eq!(queue.pop(&mut bed.guest.buf, 8).len(), 1);
    queue.complete_written(&bed.guest.buf, &[64]);
    queue.publish();
    assert_eq!(bed.look().1, BTreeSet::new(), "and nothing when logging is over");
}

#[test]
fn everything_that_a_split_ring_writes_is_noted() {
    everything_written_is_noted(Layout::Split, true);
    everything_written_is_noted(Layout::Split, false);
}

#[test]
fn everything_that_a_packed_ring_writes_is_noted() {
    everything_written_is_noted(Layout::Packed, true);
    everything_written_is_noted(Layout::Packed, false);
}

/// A ring behind a vIOMMU may have each of its pages somewhere else.
#[test]
fn a_part_in_pieces_is_noted_piece_by_piece() {
    let (mut bed, _queue) = Bed::new(Layout::Split, true);
    let _ = bed.look();
    let page = |n: u64| (GuestPhysAddr(n * LOG_PAGE), LOG_PAGE);
    let pieces = Places::of([page(9), page(3), page(4), page(20)]);
    assert_eq!(pieces, Places::of([page(9), (page(3).0, 2 * LOG_PAGE), page(20)]));
    let log = RingLog { device: pieces.clone(), desc: pieces, ..bed.log() };
    log.device(0, 4);
    assert_eq!(bed.look().1, BTreeSet::from([9]));
    log.device(LOG_PAGE, 2);
    assert_eq!(bed.look().1, BTreeSet::from([3]));
    log.device(LOG_PAGE - 1, 2);
    assert_eq!(bed.look().1, BTreeSet::from([3, 9]));
    // The last entry before, and the first one of, the second page.
    log.used(2048, (511, 1));
    assert_eq!(bed.look().1, BTreeSet::from([3, 9]));
    log.descs(1024, (700, 200));
    assert_eq!(bed.look().1, BTreeSet::from([4, 20]));
    log.descs(1024, (1023, 2));
    assert_eq!(bed.look().1, BTreeSet::from([9, 20]));
    log.device(4 * LOG_PAGE, 5);
    assert_eq!(bed.look().1, BTreeSet::new(), "there is no such piece");
    // However small they are.
    let device = Places::of((0..4096).map(|n| (GuestPhysAddr(n % 7 * 2 * LOG_PAGE), 1)));
    let log = RingLog { device, ..log };
    log.device(3, 2);
    assert_eq!(bed.look().1, BTreeSet::from([6, 8]));
    log.device(4095, 1);
    assert_eq!(bed.look().1, BTreeSet::from([0]));
    log.device(4094, 9);
    assert_eq!(bed.look().1, BTreeSet::from([0, 12]));
}

#[test]
fn entries_around_the_end_of_the_ring_are_two_runs() {
    let (mut bed, _queue) = Bed::new(Layout::Split, true);
    let log = bed.log();
    let _ = bed.look();
    log.descs(1024, (1023, 2));
    assert_eq!(bed.look().1, BTreeSet::from([0, 3]));
    log.descs(1024, (u32::from(u16::MAX), 1));
    assert_eq!(bed.look().1, BTreeSet::from([3]), "free-running indexes are taken modulo the size");
    log.descs(1024, (5, 5000));
    assert_eq!(bed.look().1, BTreeSet::from([0, 1, 2, 3]));
}

/// What a successor takes as done was noted, or is noted by it: a device is killed at each store.
#[test]
fn a_kill_loses_no_page() {
    for layout in [Layout::Split, Layout::Packed] {
        for stores in 0.. {
            let (mut bed, mut queue) = Bed::new(layout, false);
            let record = RecordMap::private(1).unwrap().page(0).unwrap();
            queue.set_record(record.clone());
            queue.disable_kicks();
            for n in 0..2 {
                bed.offer(&[(DATA + n * LOG_PAGE, 700)]);
                bed.passed(1);
            }
            if layout == Layout::Split {
                bed.guest.avail(0, &[0, 1]);
            }
            let _ = bed.look();
            let buf = &mut bed.guest.buf;
            let ended = crash::after(stores, || {
                let chains = queue.pop(buf, 8);
                for n in 0..2 {
                    assert_eq!(chains.writable(n).writer().write(&[7; 60]), 60);
                }
                queue.complete_written(buf, &[60, 60]);
                queue.publish();
            });
            let config = bed.guest.config;
            let Ok(Recovery::At(position)) = config.recover(&bed.guest.map, &record) else {
                panic!("{layout:?} {stores}: it is lost");
            };
            let next = QueueConfig { position, ..config }.activate(&bed.guest.map);
            next.unwrap().set_log(Some(bed.log()));
            let (mut differ, noted) = bed.look();
            if position == RingPosition::start(layout) {
                // They come again.
                let comes = |page: &usize| (*page as u64) < DATA / LOG_PAGE;
                differ.retain(comes);
            }
            assert!(differ.is_subset(&noted), "{layout:?} {stores}: {differ:?}, {noted:?} noted");
            if ended.is_some() {
                assert!(stores > 2 && differ.len() > 2, "{stores} {differ:?}");
                break;
            }
        }
    }
}
