//! The same seeded script on split and on packed rings gives the same frames, and both do what
//! three queues of a naive model do.
//!
//! ```text
//!  added ─publish─► available ─pop─► popped ─complete─► done ─publish─► used ─poll─► log
//! ```

use std::collections::VecDeque;

use virtq::driver::{Buffer, DriverConfig, DriverError, Used};
use virtq::{Layout, RingPosition, Token};

use crate::bench::{BUFFER_BYTES, Bench, LAYOUTS, Rng, TABLE_LEN, all_features};

/// A chain as the model knows it.
#[derive(Debug, Default)]
struct Request {
    cookie: u64,
    entries: u64,
    readable: Vec<u8>,
    /// Buffers of both parts, to be given back.
    buffers: Vec<u32>,
    /// The writable ones and their lengths.
    writable: Vec<(u32, u32)>,
    /// How often the device has popped chains when it popped this one.
    popped_as: u64,
    token: Token,
    /// What the device wrote.
    written: Vec<u8>,
}

impl Request {
    fn writable_len(&self) -> u64 {
        self.writable.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

/// What the driver got back, in order.
type Log = Vec<(u64, Vec<u8>)>;

struct Model {
    bench: Bench,
    config: DriverConfig,
    rng: Rng,
    added: VecDeque<Request>,
    available: VecDeque<Request>,
    popped: VecDeque<Request>,
    done: VecDeque<Request>,
    used: VecDeque<Request>,
    free: u64,
    next_cookie: u64,
    pops: u64,
    /// `popped_as` of the newest completed chain.
    newest_done: u64,
    log: Log,
}

impl Model {
    fn new(config: DriverConfig, seed: u64) -> Self {
        let buffers = 8 + u32::from(config.size) * u32::from(TABLE_LEN);
        Self {
            bench: Bench::new(config, buffers),
            config,
            rng: Rng(seed),
            added: VecDeque::new(),
            available: VecDeque::new(),
            popped: VecDeque::new(),
            done: VecDeque::new(),
            used: VecDeque::new(),
            free: u64::from(config.size),
            next_cookie: 0,
            pops: 0,
            newest_done: 0,
            log: Vec::new(),
        }
    }

    fn step(&mut self) {
        let burst = 1 + self.rng.below(u64::from(self.config.size).min(40));
        match self.rng.below(20) {
            0..4 => (0..burst).for_each(|_| self.add()),
            4..7 => self.publish(),
            7..11 => self.pop(burst as usize),
            11..14 => (0..burst).for_each(|_| self.complete()),
            14 => self.complete_all(),
            15 => self.publish_used(),
            16..18 => self.poll(burst as usize),
            18 => self.toggle_notifications(),
            _ => match self.rng.below(8) {
                0 => self.ring_reset(),
                1..4 => self.stop_and_resume(),
                _ => self.unpop(),
            },
        }
        assert_eq!(u64::from(self.bench.driver.free()), self.free);
    }

    fn add(&mut self) {
        let indirect = self.config.features.indirect && self.rng.one_in(2);
        // A chain must not be longer than the queue, not even in an indirect table.
        let longest = TABLE_LEN.min(self.config.size).min(5);
        let total = 1 + self.rng.below(u64::from(longest));
        let readable_count = self.rng.below(total + 1);
        let mut request = Request { cookie: self.next_cookie, ..Request::default() };
        let (mut readable, mut writable) = (Vec::<Buffer>::new(), Vec::<Buffer>::new());
        for position in 0..total {
            let index = self.bench.pool.take().expect("the pool has a buffer for every entry");
            let len = 1 + self.rng.below(u64::from(BUFFER_BYTES)) as u32;
            request.buffers.push(index);
            if position < readable_count {
                let data = self.rng.bytes(len as usize);
                assert_eq!(self.bench.pool.write(index, 0, &data), data.len());
                request.readable.extend(data);
                readable.push(self.bench.pool.buffer(index, len));
            } else {
                request.writable.push((index, len));
                writable.push(self.bench.pool.buffer(index, len));
            }
        }
        request.entries = if indirect { 1 } else { total };
        let driver = &mut self.bench.driver;
        let result = if indirect {
            driver.add_indirect(&readable, &writable, request.cookie)
        } else {
            driver.add(&readable, &writable, request.cookie)
        };
        if request.entries <= self.free {
            assert_eq!(result, Ok(()));
            self.free -= request.entries;
            self.next_cookie += 1;
            self.added.push_back(request);
        } else {
            let (needed, free) = (request.entries as usize, self.free as u16);
            assert_eq!(result, Err(DriverError::Full { needed, free }));
            request.buffers.iter().for_each(|index| self.bench.pool.give(*index));
        }
    }

    fn publish(&mut self) {
        self.bench.driver.publish();
        self.available.append(&mut self.added);
        if self.rng.one_in(2) {
            let _ = self.bench.driver.needs_kick();
        }
    }

    /// The device takes chains, reads them, and writes what it will complete them with.
    fn pop(&mut self, max: usize) {
        let Bench { device, buf, .. } = &mut self.bench;
        let chains = device.pop(buf, max);
        assert_eq!(chains.fault(), None);
        let (count, most) = (chains.len(), max.min(self.available.len()));
        for index in 0..count {
            let mut request = self.available.pop_front().unwrap();
            let readable = chains.readable(index);
            assert_eq!(readable.len() as usize, request.readable.len());
            let mut bytes = vec![0; request.readable.len()];
            assert_eq!(readable.reader().read(&mut bytes), bytes.len());
            assert_eq!(bytes, request.readable);
            let room = request.writable_len();
            assert_eq!(u64::from(chains.writable(index).len()), room);
            let len = if room == 0 { 0 } else { self.rng.below(room + 1) };
            request.written = self.rng.bytes(len as usize);
            let written = chains.writable(index).writer().write(&request.written);
            assert_eq!(written, request.written.len());
            request.token = chains.token(index);
            self.pops += 1;
            request.popped_as = self.pops;
            self.popped.push_back(request);
        }
        // It is all, or much.
        assert!(count == most || (count > 0 && self.bench.buf.is_full()), "{:?}", self.config);
    }

    /// Completes one chain: any, or with `IN_ORDER` the oldest.
    fn complete(&mut self) {
        if self.popped.is_empty() {
            return;
        }
        let any = self.rng.below(self.popped.len() as u64) as usize;
        let index = if self.config.features.in_order { 0 } else { any };
        self.complete_one(index);
    }

    fn complete_one(&mut self, index: usize) {
        let request = self.popped.remove(index).unwrap();
        self.bench.device.complete(request.token, request.written.len() as u32);
        self.finish(request);
    }

    fn finish(&mut self, request: Request) {
        self.newest_done = self.newest_done.max(request.popped_as);
        self.done.push_back(request);
    }

    /// Completes what a transmitq would: the oldest chains, as long as they are read-only.
    fn complete_all(&mut self) {
        let count = self.popped.iter().take_while(|r| r.writable.is_empty()).count();
        let requests: Vec<_> = self.popped.drain(..count).collect();
        let tokens: Vec<_> = requests.iter().map(|r| r.token).collect();
        self.bench.device.complete_all(&tokens);
        requests.into_iter().for_each(|request| self.finish(request));
    }

    fn publish_used(&mut self) {
        self.bench.device.publish();
        self.used.append(&mut self.done);
        if self.rng.one_in(2) {
            let _ = self.bench.device.needs_call();
        }
    }

    fn poll(&mut self, max: usize) {
        let mut out = vec![Used::default(); max];
        let count = self.bench.driver.poll_burst(&mut out).unwrap();
        assert_eq!(count, max.min(self.used.len()), "{:?}", self.config);
        for used in &out[..count] {
            let request = self.used.pop_front().unwrap();
            assert_eq!(used.cookie, request.cookie);
            assert_eq!(used.len as usize, request.written.len());
            let mut left = request.written.len();
            let mut bytes = Vec::new();
            for (index, len) in &request.writable {
                let mut part = vec![0; left.min(*len as usize)];
                assert_eq!(self.bench.pool.read(*index, 0, &mut part), part.len());
                left -= part.len();
                bytes.extend(part);
            }
            assert_eq!(bytes, request.written);
            self.log.push((used.cookie, bytes));
            self.forget(&request);
        }
    }

    fn forget(&mut self, request: &Request) {
        request.buffers.iter().for_each(|index| self.bench.pool.give(*index));
        self.free += request.entries;
    }

    /// Notification state has no influence on frames; what the calls return is known, though.
    fn toggle_notifications(&mut self) {
        let Bench { driver, device, .. } = &mut self.bench;
        match self.rng.below(4) {
            0 => driver.disable_calls(),
            1 => assert_eq!(driver.enable_calls(), !self.used.is_empty()),
            2 => device.disable_kicks(),
            _ => assert_eq!(device.enable_kicks(), !self.available.is_empty()),
        }
        assert_eq!(device.has_available(), !self.available.is_empty());
        assert_eq!(driver.has_used(), !self.used.is_empty());
    }

    /// Hands back some of the newest chains that were popped after all completed ones.
    fn unpop(&mut self) {
        let all = self.popped.iter().filter(|r| r.popped_as > self.newest_done).count();
        let count = self.rng.below(all as u64 + 1) as usize;
        let back: Vec<_> = self.popped.drain(self.popped.len() - count..).collect();
        let tokens: Vec<_> = back.iter().map(|r| r.token).collect();
        self.bench.device.unpop(&tokens);
        back.into_iter().rev().for_each(|request| self.available.push_front(request));
    }

    /// A new device goes on where the old one stopped.
    fn stop_and_resume(&mut self) {
        // A position tells nothing about chains completed out of order: close the gaps.
        while self.popped.front().is_some_and(|r| r.popped_as < self.newest_done) {
            self.complete_one(0);
        }
        self.publish_used();
        while let Some(request) = self.popped.pop_back() {
            self.available.push_front(request);
        }
        let Bench { map, driver, device, .. } = &mut self.bench;
        let placeholder = driver.queue_config().activate(map).unwrap();
        let mut config = std::mem::replace(device, placeholder).stop();
        let base = config.position.to_vhost_base();
        assert_eq!(RingPosition::from_vhost_base(config.layout, base), config.position);
        if self.rng.one_in(2) {
            // QEMU sends both halves, others only the lower one: the same after a stop.
            config.position = RingPosition::from_vhost_base(config.layout, base & 0xffff);
        }
        *device = config.activate(map).unwrap();
    }

    /// The device stops, the driver takes everything back, both start anew.
    fn ring_reset(&mut self) {
        let mut back = Vec::new();
        self.bench.driver.reset(|cookie| back.push(cookie)).unwrap();
        self.bench.device = self.bench.driver.queue_config().activate(&self.bench.map).unwrap();
        back.sort_unstable();
        let mut outstanding = Vec::new();
        for queue in [
            std::mem::take(&mut self.added),
            std::mem::take(&mut self.available),
            std::mem::take(&mut self.popped),
            std::mem::take(&mut self.done),
            std::mem::take(&mut self.used),
        ] {
            for request in queue {
                outstanding.push(request.cookie);
                self.forget(&request);
            }
        }
        outstanding.sort_unstable();
        assert_eq!(back, outstanding);
    }

    /// Everything that is on its way arrives.
    fn drain(&mut self) {
        self.publish();
        while !self.available.is_empty() {
            self.pop(usize::from(self.config.size));
        }
        while !self.popped.is_empty() {
            self.complete();
        }
        self.publish_used();
        self.poll(usize::from(self.config.size));
        assert_eq!(self.bench.driver.outstanding(), 0);
        assert_eq!(self.bench.driver.free(), self.config.size);
    }
}

fn run(config: DriverConfig, seed: u64, steps: u32) -> Log {
    let mut model = Model::new(config, seed);
    for _ in 0..steps {
        model.step();
    }
    model.drain();
    model.log
}

/// Every feature combination and some seeds; all of `layouts` must agree.
fn run_all(layouts: &[Layout], size: u16, steps: u32) {
    for features in all_features() {
        for seed in 0..4 {
            let logs: Vec<_> = layouts
                .iter()
                .map(|layout| {
                    let config = DriverConfig::new(*layout, size);
                    run(config.with_features(features, TABLE_LEN), seed, steps)
                })
                .collect();
            assert!(logs.iter().all(|log| *log == logs[0]), "{size} {features:?} {seed}");
            assert!(!logs[0].is_empty());
        }
    }
}

#[test]
fn both_layouts_give_the_same_frames_size_1() {
    run_all(&LAYOUTS, 1, 2000);
}

#[test]
fn both_layouts_give_the_same_frames_size_2() {
    run_all(&LAYOUTS, 2, 2000);
}

#[test]
fn both_layouts_give_the_same_frames_size_16() {
    run_all(&LAYOUTS, 16, 2000);
}

#[test]
fn both_layouts_give_the_same_frames_size_256() {
    run_all(&LAYOUTS, 256, 1000);
}

#[test]
fn packed_sizes_need_not_be_powers_of_two() {
    for size in [3, 7, 100] {
        run_all(&[Layout::Packed], size, 1500);
    }
}

#[test]
fn the_largest_queue_fills_and_empties() {
    for layout in LAYOUTS {
        let mut model = Model::new(DriverConfig::new(layout, 32768), 1);
        for _ in 0..2 {
            while model.free > 8 {
                model.add();
            }
            model.drain();
        }
    }
}

#[test]
fn indexes_wrap_in_the_middle_of_the_script() {
    let start = |layout, size: u16| match layout {
        Layout::Split => RingPosition::Split { avail: 0xfff0, used: 0xfff0 },
        Layout::Packed => {
            let at = size - 1;
            RingPosition::Packed { avail: at, avail_wrap: false, used: at, used_wrap: false }
        }
    };
    for features in all_features() {
        let logs: Vec<_> = LAYOUTS
            .iter()
            .map(|layout| {
                let config =
                    DriverConfig { position: start(*layout, 8), ..DriverConfig::new(*layout, 8) };
                run(config.with_features(features, TABLE_LEN), 99, 1000)
            })
            .collect();
        assert_eq!(logs[0], logs[1], "{features:?}");
    }
}

/// A device that vanishes without a word: its successor gets what it had not completed again.
#[test]
fn a_device_that_crashed_is_followed_by_one_that_goes_on() {
    for layout in LAYOUTS {
        for crash in 0..100 {
            let mut model = Model::new(DriverConfig::new(layout, 8), crash);
            for _ in 0..crash {
                model.add();
                model.publish();
                model.pop(1);
                model.complete();
                model.publish_used();
                model.poll(1);
            }
            (0..3).for_each(|_| model.add());
            model.publish();
            model.pop(3);
            if !model.popped.is_empty() {
                model.complete_one(0);
            }
            model.publish_used();
            model.poll(8);
            let Bench { map, driver, device, .. } = &mut model.bench;
            *device = driver.resume_config().activate(map).unwrap();
            while let Some(request) = model.popped.pop_back() {
                model.available.push_front(request);
            }
            model.drain();
        }
    }
}
