//! A guest with drivers: both ring formats, sequence numbers in its frames, on a thread of its
//! own, so that it goes on whatever the switch does.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use testkit::{FrontEnd, SharedMemory};
use virtio_net::features::{EVENT_IDX, MRG_RXBUF, RING_PACKED, VERSION_1, layout, ring_features};
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::bed::{Bed, eventually};

const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const PROTOCOL: u64 = 1 << 30;
/// `REPLY_ACK`, `DEVICE_STATE`.
const PROTOCOL_FEATURES: u64 = 1 << 3 | 1 << 19;
const MEMORY: u64 = 4 << 20;
const QUEUE: u16 = 64;
const BUFFER: u32 = 2048;
const HEADER: u32 = 12;
/// Where the number stands in a frame.
const NUMBER: usize = 14;

/// The features of guests to try.
pub(crate) const SPLIT: u64 = VERSION_1 | PROTOCOL | EVENT_IDX | MRG_RXBUF;
pub(crate) const PACKED: u64 = SPLIT | RING_PACKED;

struct Queue {
    driver: DriverQueue,
    pool: BufferPool,
    kick: OwnedFd,
    call: OwnedFd,
}

/// The guest's side of a port.
pub(crate) struct Driver {
    front_end: FrontEnd,
    memory: SharedMemory,
    features: u64,
    queues: Vec<Queue>,
    mac: u8,
}

impl Driver {
    /// Connects and starts both rings.
    pub(crate) fn join(bed: &Bed, socket: &str, features: u64, mac: u8) -> Self {
        Self::join_after(bed, socket, (features, mac), |_| ())
    }

    /// The same, with something that its front end says before the rings start.
    pub(crate) fn join_after(
        bed: &Bed,
        socket: &str,
        (features, mac): (u64, u8),
        say: impl FnOnce(&mut FrontEnd),
    ) -> Self {
        let memory = SharedMemory::new(MEMORY).unwrap();
        let file = std::fs::File::from(memory.as_fd().try_clone_to_owned().unwrap());
        let bytes = usize::try_from(MEMORY).unwrap();
        let ranges = [(GuestAddress(0), bytes, Some(FileOffset::new(file, 0)))];
        let mapped = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let map = GuestMap::new(Arc::new(mapped)).unwrap();
        let queues = (0..2).map(|ring| queue(&map, features, ring)).collect();
        let front_end = FrontEnd::connect(&bed.path(socket)).unwrap();
        let mut driver = Self { front_end, memory, features, queues, mac };
        driver.fill();
        driver.start(say);
        driver
    }

    /// Stops both rings.
    pub(crate) fn stop(&mut self) -> &mut FrontEnd {
        for ring in [0u32, 1] {
            let body = [ring.to_le_bytes(), [0; 4]].concat();
            let _ = self.front_end.ask(GET_VRING_BASE, &body).unwrap();
        }
        &mut self.front_end
    }

    fn start(&mut self, say: impl FnOnce(&mut FrontEnd)) {
        let (front, memory) = (&mut self.front_end, &self.memory);
        front.send(SET_OWNER, &[], &[]).unwrap();
        front.send(SET_FEATURES, &self.features.to_le_bytes(), &[]).unwrap();
        front.send(SET_PROTOCOL_FEATURES, &PROTOCOL_FEATURES.to_le_bytes(), &[]).unwrap();
        let table = SharedMemory::table(0, memory.bytes());
        front.send(SET_MEM_TABLE, &table, &[memory.as_fd()]).unwrap();
        say(front);
        let base = if self.features & RING_PACKED == 0 { 0 } else { 0x8000 };
        let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
        for (ring, queue) in (0u32..).zip(&self.queues) {
            let areas = queue.driver.areas();
            let mut addresses = words([ring, 0]);
            for address in [areas.desc.0, areas.device.0, areas.driver.0, 0] {
                addresses.extend_from_slice(&address.to_le_bytes());
            }
            front.send(SET_VRING_NUM, &words([ring, QUEUE.into()]), &[]).unwrap();
            front.send(SET_VRING_BASE, &words([ring, base]), &[]).unwrap();
            front.send(SET_VRING_ADDR, &addresses, &[]).unwrap();
            let number = u64::from(ring).to_le_bytes();
            front.send(SET_VRING_CALL, &number, &[queue.call.as_fd()]).unwrap();
            front.send(SET_VRING_KICK, &number, &[queue.kick.as_fd()]).unwrap();
            front.send(SET_VRING_ENABLE, &words([ring, 1]), &[]).unwrap();
        }
    }

    /// Offers all free buffers of the receiveq.
    fn fill(&mut self) {
        let queue = &mut self.queues[0];
        while queue.driver.free() > 0 {
            let Some(index) = queue.pool.take() else { break };
            let buffer = queue.pool.buffer(index, BUFFER);
            queue.driver.add_writable(&[buffer], index.into()).unwrap();
        }
        queue.driver.publish();
    }

    /// Sends frame `number` to station `to`. False if there is no room.
    pub(crate) fn send(&mut self, to: u8, number: u64) -> bool {
        let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, self.mac, 0x88, 0xb5];
        frame.extend(number.to_le_bytes());
        frame.resize(60 + usize::try_from(number * 37 % 1000).unwrap(), number.to_le_bytes()[0]);
        let queue = &mut self.queues[1];
        while let Some(used) = queue.driver.poll_used().unwrap() {
            queue.pool.give(u32::try_from(used.cookie).unwrap());
        }
        let Some(index) = queue.pool.take() else { return false };
        let _ = queue.pool.write(index, 0, &[0; HEADER as usize]);
        let _ = queue.pool.write(index, HEADER, &frame);
        let buffer = queue.pool.buffer(index, HEADER + u32::try_from(frame.len()).unwrap());
        queue.driver.add_readable(&[buffer], index.into()).unwrap();
        queue.driver.publish();
        if queue.driver.needs_kick() {
            let _ = rustix::io::write(&queue.kick, &1u64.to_ne_bytes()).unwrap();
        }
        true
    }

    /// The number in the next frame that came, and whether the rest of it is right.
    pub(crate) fn receive(&mut self) -> Option<(u64, bool)> {
        let queue = &mut self.queues[0];
        let used = queue.driver.poll_used().unwrap()?;
        let index = u32::try_from(used.cookie).unwrap();
        let mut frame = vec![0; usize::try_from(used.len - HEADER).unwrap()];
        let _ = queue.pool.read(index, HEADER, &mut frame);
        queue.pool.give(index);
        self.fill();
        let number = u64::from_le_bytes(frame[NUMBER..NUMBER + 8].try_into().unwrap());
        let whole = frame[NUMBER + 8..].iter().all(|byte| *byte == number.to_le_bytes()[0]);
        let len = 60 + usize::try_from(number * 37 % 1000).unwrap();
        Some((number, whole && frame.len() == len))
    }

    /// Sleeps until the switch calls, as a driver does.
    fn wait_call(&mut self) {
        let queue = &mut self.queues[0];
        if queue.driver.enable_calls() {
            return;
        }
        let called = |ms: u64| {
            let mut fds = [rustix::event::PollFd::new(&queue.call, rustix::event::PollFlags::IN)];
            let time = Duration::from_millis(ms).try_into().unwrap();
            rustix::event::poll(&mut fds, Some(&time)).unwrap() > 0
        };
        // A call that is lost shows as a wait for nothing; one may be on its way.
        if !called(100) && queue.driver.has_used() {
            assert!(called(5000), "a call was lost");
        }
        let _ = rustix::io::read(&queue.call, &mut [0; 8]);
        queue.driver.disable_calls();
    }
}

fn queue(map: &GuestMap, features: u64, ring: u64) -> Queue {
    let base = ring * 0x10_0000;
    let config =
        DriverConfig::new(layout(features), QUEUE).with_features(ring_features(features), 0);
    let driver = DriverQueue::new(map, config, GuestPhysAddr(base)).unwrap();
    let buffers = GuestPhysAddr(base + 0x8_0000);
    let pool = BufferPool::new(map, buffers, BUFFER, u32::from(QUEUE)).unwrap();
    let [kick, call] =
        [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
    Queue { driver, pool, kick, call }
}

/// What a [`Stream`] saw.
#[derive(Debug, Default)]
struct Seen {
    sent: AtomicU64,
    received: AtomicU64,
    /// Nanoseconds between two frames, at most, since it was asked last.
    gap_ns: AtomicU64,
    stop: AtomicBool,
}

/// Numbered frames from one guest to another: no more are under way than there are buffers for, so
/// none may be lost, whatever happens.
pub(crate) struct Stream {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    /// Sends from `from` to `to`, a frame every 100 us.
    pub(crate) fn start(from: Driver, to: Driver) -> Self {
        let seen = Arc::<Seen>::default();
        let (a, b) = (Arc::clone(&seen), Arc::clone(&seen));
        let threads = vec![
            std::thread::spawn(move || send(from, to.mac, &a)),
            std::thread::spawn(move || receive(to, &b)),
        ];
        let stream = Self { seen, threads };
        stream.goes_on("the first frames");
        stream
    }

    /// Waits until some more frames came.
    pub(crate) fn goes_on(&self, what: &str) {
        let received = || self.seen.received.load(Ordering::Relaxed);
        let before = received();
        eventually(what, || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a guest gave up");
            received() > before + 100
        });
    }

    /// The longest time between two frames since this was asked last.
    pub(crate) fn longest_gap(&self) -> Duration {
        Duration::from_nanos(self.seen.gap_ns.swap(0, Ordering::Relaxed))
    }

    /// Ends, and waits for the last frame. Returns how many there were.
    pub(crate) fn finish(self) -> u64 {
        self.seen.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        self.seen.sent.load(Ordering::Relaxed)
    }
}

fn send(mut from: Driver, to: u8, seen: &Seen) {
    // The switch learns where this one is by its frames, and the other one by this.
    let mut number = 0;
    let mut next = Instant::now();
    while !seen.stop.load(Ordering::Relaxed) {
        let under_way = number - seen.received.load(Ordering::Relaxed);
        if under_way < u64::from(QUEUE) / 2 && from.send(to, number) {
            number += 1;
            seen.sent.store(number, Ordering::Relaxed);
        }
        next += Duration::from_micros(100);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    eventually("the last frame", || seen.received.load(Ordering::Relaxed) == number);
}

fn receive(mut to: Driver, seen: &Seen) {
    let mut number = 0;
    let mut last = Instant::now();
    // Known from now on, so that nothing is flooded.
    assert!(to.send(0xff, 0));
    loop {
        if let Some((got, whole)) = to.receive() {
            assert!(whole, "frame {got} is damaged");
            assert_eq!(got, number, "a frame was lost, repeated or overtaken");
            number += 1;
            if number == u64::from(QUEUE) / 4 {
                // The first time another station was learned just then, which nobody waits for.
                assert!(to.send(0xff, 1));
            }
            let gap = u64::try_from(last.elapsed().as_nanos()).unwrap();
            let _ = seen.gap_ns.fetch_max(gap, Ordering::Relaxed);
            last = Instant::now();
            seen.received.store(number, Ordering::Relaxed);
        } else if seen.stop.load(Ordering::Relaxed) && number == seen.sent.load(Ordering::Relaxed) {
            return;
        } else {
            to.wait_call();
        }
    }
}
