//! Whatever a ring writes into its guest's memory is noted: memory is compared page by page.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::RingLog;
use crate::Virtq;
use crate::config::Layout;
use crate::mem::{DirtyLog, LOG_PAGE};
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
        queue.set_log(Some(RingLog {
            log: DirtyLog::from_file(log.try_clone().unwrap(), 0, PAGES / 8).unwrap(),
            memory: guest.map.clone(),
            device: guest.config.device,
            desc: guest.config.desc,
            call: None,
        }));
        let before = guest.all();
        (Self { guest, before, log, next: 0, wrap: true }, queue)
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

#[test]
fn entries_around_the_end_of_the_ring_are_two_runs() {
    let (mut bed, _queue) = Bed::new(Layout::Split, true);
    let log = DirtyLog::from_file(bed.log.try_clone().unwrap(), 0, PAGES / 8).unwrap();
    let memory = bed.guest.map.clone();
    let (device, desc) = (bed.guest.config.device, bed.guest.config.desc);
    let log = RingLog { log, memory, device, desc, call: None };
    log.entries(desc, (1024, 16), (1023, 2));
    assert_eq!(bed.look().1, BTreeSet::from([0, 3]));
    log.entries(desc, (1024, 16), (u32::from(u16::MAX), 1));
    assert_eq!(bed.look().1, BTreeSet::from([3]), "free-running indexes are taken modulo the size");
    log.entries(desc, (1024, 16), (5, 5000));
    assert_eq!(bed.look().1, BTreeSet::from([0, 1, 2, 3]));
}
