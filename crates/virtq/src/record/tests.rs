//! A device that is killed before each of its stores, and goes on: the driver sees each chain
//! completed exactly once, with what was written into it.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::sync::atomic::Ordering::Relaxed;

use super::Recovery;
use crate::config::{Layout, QueueConfig, RingFeatures};
use crate::driver::{Buffer, DriverConfig, DriverQueue, Used};
use crate::mem::InflightArea;
use crate::mem::{GuestMap, GuestPhysAddr, PackedAreas, RecordMap, RecordPage, crash};
use crate::shared::Shared;
use crate::{ChainBuf, Inflight, RingPosition, Virtq, inflight_bytes};

/// What a run is about.
#[derive(Debug, Clone, Copy)]
struct Case {
    layout: Layout,
    size: u16,
    in_order: bool,
    /// A receiveq: several chains may be one frame.
    receives: bool,
    /// Descriptors of the longest chains.
    longest: usize,
    indirect: bool,
}

/// Chains that a run has.
const CHAINS: usize = 42;
const BUFFER: u32 = 64;

struct Guest {
    case: Case,
    map: GuestMap,
    driver: DriverQueue,
    added: usize,
    got: Vec<Used>,
}

impl Guest {
    fn new(case: Case) -> Self {
        let map = GuestMap::private(1 << 20).unwrap();
        let mut config = DriverConfig::new(case.layout, case.size);
        config.features =
            RingFeatures { event_idx: false, indirect: case.indirect, in_order: case.in_order };
        config.table_len = 4;
        let driver = DriverQueue::new(&map, config, GuestPhysAddr(0)).unwrap();
        Self { case, map, driver, added: 0, got: Vec::new() }
    }

    /// Adds chains as long as there is room: chain `n` is known by what it looks like.
    fn fill(&mut self, count: usize) {
        for _ in 0..count {
            let n = self.added;
            if n == CHAINS {
                break;
            }
            let parts = 1 + n % self.case.longest;
            let at = 0x8_0000 + (n as u64 % 64) * 1024;
            let buffer = |i| Buffer { addr: GuestPhysAddr(at + i as u64 * 64), len: BUFFER };
            let buffers: Vec<_> = (0..parts).map(buffer).collect();
            let (read, write) =
                if self.case.receives { (&[][..], &buffers[..]) } else { (&buffers[..], &[][..]) };
            let added = if self.case.indirect && !n.is_multiple_of(3) {
                self.driver.add_indirect(read, write, n as u64)
            } else {
                self.driver.add(read, write, n as u64)
            };
            if added.is_err() {
                break;
            }
            self.added += 1;
        }
        self.driver.publish();
    }

    fn poll(&mut self) {
        while let Some(used) = self.driver.poll_used().unwrap() {
            self.got.push(used);
        }
        assert!(!self.case.receives || ends_frame(self.got.len()), "half a frame: {:?}", self.got);
    }

    fn config(&self) -> QueueConfig {
        self.driver.queue_config()
    }
}

/// Whether a frame ends after `chains` chains: some have one, some two, some three.
fn ends_frame(chains: usize) -> bool {
    matches!(chains % 6, 0 | 1 | 3)
}

/// What is written into chain `n`.
fn written(n: usize) -> u32 {
    1 + n as u32 % BUFFER
}

/// A device at `position` works until all is done.
fn run(guest: &mut Guest, keeper: &Keeper, position: RingPosition) {
    let mut queue = QueueConfig { position, ..guest.config() }.activate(&guest.map).unwrap();
    match keeper {
        Keeper::Record(page) => queue.set_record(page.clone()),
        Keeper::Region(area) => {
            queue.set_inflight(Inflight::new(area.clone(), &guest.config()).unwrap());
        }
    }
    queue.disable_kicks();
    let mut buf = ChainBuf::default();
    let mut turn = 0;
    while guest.got.len() < CHAINS {
        turn += 1;
        assert!(turn < 1000, "stuck: {:?} {queue:?}", guest.got.len());
        guest.fill(1 + turn % 4);
        device_turn(guest, &mut queue, &mut buf, 1 + turn % 5);
        if turn % 3 != 0 {
            guest.poll();
        }
        assert_eq!(queue.fault(), None);
    }
}

fn device_turn(guest: &Guest, queue: &mut Virtq, buf: &mut ChainBuf, max: usize) {
    // Chains before the first popped one; the driver may not have looked yet.
    let first = guest.added - usize::from(left(queue, guest));
    let count = queue.pop(buf, max).len();
    let mut done = count;
    if guest.case.receives {
        done = (0..=count).rev().find(|n| ends_frame(first + n)).unwrap_or(0);
        let lens: Vec<u32> = (first..first + done).map(written).collect();
        queue.complete_written(buf, &lens);
    } else {
        queue.complete_read(buf);
    }
    queue.unpop_after(buf, done);
    if max.is_multiple_of(2) {
        queue.publish();
    }
    // With the other way to complete, too, and two of them before they are published.
    if !guest.case.receives && queue.pop(buf, 1).len() == 1 {
        let tokens: Vec<_> = buf.tokens().collect();
        queue.complete_all(&tokens);
    }
    queue.publish();
    let _ = max.is_multiple_of(2).then(|| queue.enable_kicks());
    queue.disable_kicks();
}

/// Chains that are available and not popped, without a look at what they are.
fn left(queue: &mut Virtq, _: &Guest) -> u16 {
    let mut buf = ChainBuf::default();
    let count = queue.pop(&mut buf, usize::from(u16::MAX)).len();
    queue.unpop_after(&buf, 0);
    count as u16
}

/// Who remembers where the device was.
enum Keeper {
    Record(RecordPage),
    Region(InflightArea),
}

impl Keeper {
    fn record() -> Self {
        Self::Record(RecordMap::private(1).unwrap().page(0).unwrap())
    }

    fn region(case: Case) -> Self {
        let file = tempfile::tempfile().unwrap();
        let bytes = inflight_bytes(case.layout, case.size);
        file.set_len(bytes as u64 + 64).unwrap();
        Self::Region(InflightArea::from_file(file, 64, bytes).unwrap())
    }
}

fn recovered(guest: &Guest, keeper: &Keeper) -> RingPosition {
    let config = guest.config();
    let recovery = match keeper {
        Keeper::Record(page) => config.recover(&guest.map, page),
        Keeper::Region(area) => {
            Inflight::new(area.clone(), &config).unwrap().recover(&config, &guest.map)
        }
    };
    let recovery = recovery.unwrap();
    let Recovery::At(position) = recovery else { return guest.config().position };
    position
}

/// Kills a device at each store, and its successor's recovery at each of its own.
fn kill_at_each_store(case: Case, keeper: impl Fn() -> Keeper) {
    for stores in 0.. {
        let mut guest = Guest::new(case);
        let page = keeper();
        let start = guest.config().position;
        if crash::after(stores, || run(&mut guest, &page, start)).is_some() {
            assert!(stores > 60, "there were stores to be killed at");
            break;
        }
        let again = (0..).find_map(|n| crash::after(n, || recovered(&guest, &page)));
        guest.poll();
        run(&mut guest, &page, again.unwrap());
        let cookies: Vec<u64> = guest.got.iter().map(|used| used.cookie).collect();
        assert!(cookies.iter().copied().eq(0..CHAINS as u64), "{case:?} {stores}: {cookies:?}");
        let wrong = guest.got.iter().find(|used| used.len != written(used.cookie as usize));
        assert!(!case.receives || wrong.is_none(), "{case:?} {stores}: {wrong:?}");
    }
}

const CASES: [(bool, usize, bool); 5] =
    [(false, 1, false), (true, 1, false), (false, 3, false), (true, 3, true), (false, 2, true)];

#[test]
fn a_split_ring_survives_a_kill_at_each_store() {
    for (in_order, longest, indirect) in CASES {
        for receives in [false, true] {
            let layout = Layout::Split;
            let case = Case { layout, size: 16, in_order, receives, longest, indirect };
            kill_at_each_store(case, Keeper::record);
            kill_at_each_store(case, || Keeper::region(case));
        }
    }
}

#[test]
fn a_packed_ring_survives_a_kill_at_each_store() {
    for (in_order, longest, indirect) in CASES {
        for receives in [false, true] {
            for size in [16, 13] {
                let layout = Layout::Packed;
                let case = Case { layout, size, in_order, receives, longest, indirect };
                kill_at_each_store(case, Keeper::record);
                // Regions have more stores to be killed at: one size of ring does.
                if size == 13 {
                    kill_at_each_store(case, || Keeper::region(case));
                }
            }
        }
    }
}

/// A device ran for `turns`, then the driver sets the ring up anew, and perhaps adds `again`.
fn set_up_anew(case: Case, (turns, again): (usize, usize), clears: bool) {
    let layout = case.layout;
    let mut guest = Guest::new(case);
    let page = RecordMap::private(1).unwrap().page(0).unwrap();
    let mut queue = guest.config().activate(&guest.map).unwrap();
    queue.set_record(page.clone());
    queue.disable_kicks();
    let mut buf = ChainBuf::default();
    for turn in 1..=turns {
        guest.fill(3);
        device_turn(&guest, &mut queue, &mut buf, turn);
        guest.poll();
    }
    let ran = queue.stop().position;
    assert_eq!(guest.config().recover(&guest.map, &page), Ok(Recovery::At(ran)));
    let other = RecordMap::private(1).unwrap().page(0).unwrap();
    other.leave(ran);
    assert_eq!(guest.config().recover(&guest.map, &other), Ok(Recovery::At(ran)));
    let words = PackedAreas::new(&guest.map, &guest.config()).unwrap();
    let left = words.device_event().load(Relaxed);
    guest.driver.reset(|_| {}).unwrap();
    if !clears {
        words.device_event().store(left, Relaxed);
    }
    guest.fill(again);
    let recovery = guest.config().recover(&guest.map, &page).unwrap();
    let start = RingPosition::start(layout);
    let fresh = matches!(recovery, Recovery::Unlikely(_)) || recovery == Recovery::At(start);
    assert!(fresh, "{case:?} {turns} {again}: {recovery:?}");
}

#[test]
fn a_ring_that_its_driver_set_up_anew_is_not_taken_for_the_old_one() {
    for layout in [Layout::Split, Layout::Packed] {
        for (in_order, receives) in [(false, false), (true, false), (false, true), (true, true)] {
            for (turns, again) in (1..12).flat_map(|turns| [0, 1, 7, 16].map(|a| (turns, a))) {
                let (size, longest, indirect) = (16, 1, false);
                let case = Case { layout, size, in_order, receives, longest, indirect };
                set_up_anew(case, (turns, again), true);
                // Without the device area the descriptors tell, unless a batch left no trace.
                if layout == Layout::Packed && !in_order {
                    set_up_anew(case, (turns, again), false);
                }
            }
        }
    }
}

#[test]
fn what_nobody_wrote_is_unknown_and_what_makes_no_sense_unlikely() {
    for layout in [Layout::Split, Layout::Packed] {
        let case =
            Case { layout, size: 8, in_order: false, receives: true, longest: 1, indirect: false };
        let mut guest = Guest::new(case);
        let page = RecordMap::private(1).unwrap().page(0).unwrap();
        assert_eq!(guest.config().recover(&guest.map, &page), Ok(Recovery::Unknown));
        assert!(!page.is_known());
        let mut queue = guest.config().activate(&guest.map).unwrap();
        queue.set_record(page.clone());
        assert!(page.is_known());
        queue.disable_kicks();
        guest.fill(3);
        device_turn(&guest, &mut queue, &mut ChainBuf::default(), 3);
        let at = queue.position();
        assert_eq!(guest.config().recover(&guest.map, &page), Ok(Recovery::At(at)));
        for word in [0x2_0009_0009, 0x1_0009_0009, 0x0009_0021_0002_0002, u64::MAX] {
            page.place().store(word, Relaxed);
            let found = guest.config().recover(&guest.map, &page).unwrap();
            assert!(matches!(found, Recovery::Unlikely(_)), "{layout:?} {word:#x} {found:?}");
        }
        page.forget();
        assert_eq!(guest.config().recover(&guest.map, &page), Ok(Recovery::Unknown));
    }
}

#[test]
fn a_split_ring_that_cannot_be_where_it_is_said_to_be_goes_on_at_its_used_index() {
    let case = Case {
        layout: Layout::Split,
        size: 16,
        in_order: false,
        receives: false,
        longest: 1,
        indirect: false,
    };
    let mut guest = Guest::new(case);
    let mut queue = guest.config().activate(&guest.map).unwrap();
    for turn in 1..12 {
        guest.fill(3);
        device_turn(&guest, &mut queue, &mut ChainBuf::default(), turn);
        guest.poll();
    }
    guest.fill(2);
    let (used, said) = (33, |at| RingPosition::Split { avail: at, used: at });
    assert_eq!(queue.stop().position, said(used));
    let rescue =
        |at| QueueConfig { position: said(at), ..guest.config() }.rescue(&guest.map).unwrap();
    assert_eq!(rescue(0), Some(said(used)));
    assert_eq!(rescue(used + 3), Some(said(used)), "beyond what is available");
    assert_eq!((rescue(used), rescue(used + 2), rescue(used - 14)), (None, None, None));
}

#[test]
fn pages_hold_their_owners_words() {
    let map = RecordMap::private(2).unwrap();
    assert!(map.page(2).is_none());
    let (first, second) = (map.page(0).unwrap(), map.page(1).unwrap());
    for index in 0..9 {
        first.set(index, index as u64 + 7);
    }
    let read = |page: &RecordPage| (0..9).map(|index| page.get(index)).collect::<Vec<_>>();
    assert_eq!(read(&first), [0, 8, 9, 10, 11, 12, 13, 14, 0]);
    assert_eq!(read(&second), [0; 9]);
    assert!(!first.is_known(), "word 0 is not the owner's");
    second.write_lens(&[5; 2000]);
    assert_eq!((second.len_at(1007), second.len_at(1008), read(&second)), (5, 0, vec![0; 9]));
}
