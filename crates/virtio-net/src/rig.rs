//! A guest for the unit tests: flat memory, one queue, and the driver of virtq.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use port::{DropReason, QueueCounters, QueueTotals};
use rustix::event::{EventfdFlags, eventfd};
use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{Layout, RingFeatures};

use crate::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts, features};

pub(crate) const BOTH: [Layout; 2] = [Layout::Split, Layout::Packed];
const MEMORY: usize = 16 << 20;
const DATA: u64 = 4 << 20;

/// One queue of a guest and its memory.
pub(crate) struct Guest {
    pub(crate) map: GuestMap,
    pub(crate) queue: DriverQueue,
    memory: BufferPool,
    end: u32,
    cookies: u64,
    chains: HashMap<u64, Vec<Buffer>>,
}

impl Guest {
    pub(crate) fn new(layout: Layout, size: u16, features: RingFeatures) -> Self {
        let map = GuestMap::private(MEMORY).unwrap();
        let config = DriverConfig::new(layout, size).with_features(features, 4);
        let queue = DriverQueue::new(&map, config, GuestPhysAddr(0)).unwrap();
        let bytes = (MEMORY as u64 - DATA) as u32;
        let memory = BufferPool::new(&map, GuestPhysAddr(DATA), bytes, 1).unwrap();
        Self { map, queue, memory, end: 0, cookies: 0, chains: HashMap::new() }
    }

    pub(crate) fn plain(layout: Layout, size: u16) -> Self {
        Self::new(layout, size, RingFeatures::default())
    }

    fn place(&mut self, len: u32) -> Buffer {
        // An odd distance, so that buffers start everywhere in a cache line.
        let at = self.end;
        self.end += len + 7;
        Buffer { addr: GuestPhysAddr(DATA + u64::from(at)), len }
    }

    fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u64 {
        self.cookies += 1;
        self.queue.add(readable, writable, self.cookies).unwrap();
        let _ = self.chains.insert(self.cookies, writable.to_vec());
        self.cookies
    }

    /// Offers `bytes` in buffers of the sizes `cuts`; the last one takes the rest.
    pub(crate) fn offer(&mut self, bytes: &[u8], cuts: &[usize]) {
        let buffers = self.write(bytes, cuts);
        let _ = self.add(&buffers, &[]);
        self.queue.publish();
    }

    fn write(&mut self, bytes: &[u8], cuts: &[usize]) -> Vec<Buffer> {
        let mut rest = bytes;
        let mut buffers = Vec::new();
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, then) = rest.split_at(cut.min(rest.len()));
            if !now.is_empty() {
                let buffer = self.place(now.len() as u32);
                assert_eq!(self.memory.write(0, (buffer.addr.0 - DATA) as u32, now), now.len());
                buffers.push(buffer);
            }
            rest = then;
        }
        buffers
    }

    /// Offers an ordinary frame behind a header of zeros.
    pub(crate) fn transmit(&mut self, frame: &[u8]) {
        self.offer(&[&[0; 12], frame].concat(), &[]);
    }

    /// Offers a chain with both kinds of parts.
    pub(crate) fn offer_mixed(&mut self, readable: &[u8], writable: u32) {
        let readable = self.write(readable, &[]);
        let writable = self.place(writable);
        let _ = self.add(&readable, &[writable]);
        self.queue.publish();
    }

    /// Posts chains to be written, each of buffers of the given sizes.
    pub(crate) fn post(&mut self, count: usize, sizes: &[u32]) {
        for _ in 0..count {
            let buffers: Vec<Buffer> = sizes.iter().map(|len| self.place(*len)).collect();
            let _ = self.add(&[], &buffers);
        }
        self.queue.publish();
    }

    /// Posts a chain through an indirect table.
    pub(crate) fn post_indirect(&mut self, sizes: &[u32]) {
        let buffers: Vec<Buffer> = sizes.iter().map(|len| self.place(*len)).collect();
        self.cookies += 1;
        self.queue.add_indirect(&[], &buffers, self.cookies).unwrap();
        let _ = self.chains.insert(self.cookies, buffers);
        self.queue.publish();
    }

    /// Posts a chain whose buffer is nowhere in memory.
    pub(crate) fn post_broken(&mut self) {
        let nowhere = Buffer { addr: GuestPhysAddr(1 << 40), len: 2048 };
        let _ = self.add(&[], &[nowhere]);
        self.queue.publish();
    }

    /// Chains that came back: the bytes written into each.
    pub(crate) fn used(&mut self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(used) = self.queue.poll_used().unwrap() {
            let buffers = self.chains.remove(&used.cookie).unwrap();
            let mut left = used.len;
            let mut bytes = Vec::new();
            for buffer in buffers {
                let mut part = vec![0; left.min(buffer.len) as usize];
                let at = (buffer.addr.0 - DATA) as u32;
                assert_eq!(self.memory.read(0, at, &mut part), part.len());
                left -= part.len() as u32;
                bytes.extend(part);
            }
            all.push(bytes);
        }
        all
    }

    /// Frames that came, with their headers of `header_len` bytes; merges buffers.
    pub(crate) fn received(&mut self, header_len: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut frames = Vec::new();
        let mut chains = self.used().into_iter().filter(|bytes| !bytes.is_empty());
        while let Some(mut bytes) = chains.next() {
            let frame = bytes.split_off(header_len);
            let count = bytes.get(10..12).map_or(1, |n| u16::from_le_bytes([n[0], n[1]]));
            let more = (1..count).flat_map(|_| chains.next().expect("num_buffers is right"));
            let frame = frame.into_iter().chain(more).collect();
            frames.push((bytes, frame));
        }
        frames
    }
}

pub(crate) fn event() -> Arc<OwnedFd> {
    // Not to wait for what is not there: nobody else makes it so.
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
}

/// What stands in an eventfd of ours; 0 if nothing.
pub(crate) fn counter(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

/// Options after `VERSION_1` and `more` were negotiated.
pub(crate) fn options(more: u64) -> QueueOptions {
    QueueOptions { retries: 2, ..features::queue_options(features::VERSION_1 | more, 65535) }
}

pub(crate) fn transmitq(guest: &Guest, options: QueueOptions) -> Transmitq {
    Transmitq::new(TransmitqParts {
        watch: Default::default(),
        queue: guest.queue.queue_config().activate(&guest.map).unwrap(),
        kick: Some(event()),
        call: Some(event()),
        counters: Arc::default(),
        options,
    })
}

pub(crate) fn receiveq(guest: &Guest, options: QueueOptions) -> Receiveq {
    Receiveq::new(ReceiveqParts {
        watch: Default::default(),
        queue: guest.queue.queue_config().activate(&guest.map).unwrap(),
        kick: None,
        call: Some(event()),
        counters: Arc::default(),
        options,
    })
}

/// `len` bytes that tell frames and places apart.
pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + seed * 13) ^ (i >> 8)) as u8).collect()
}

/// The ledger: each counter that a test moves, all others stand still.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) rx: (u64, u64),
    pub(crate) tx: (u64, u64),
    pub(crate) drops: Vec<(DropReason, u64)>,
}

impl Ledger {
    pub(crate) fn check(&self, counters: &QueueCounters) {
        let mut totals = counters.read_ends();
        counters.read_rx(&mut totals);
        let mut drops = [0; DropReason::COUNT];
        for (reason, count) in &self.drops {
            drops[*reason as usize] = *count;
        }
        let expected = QueueTotals {
            rx_frames: self.rx.0,
            rx_bytes: self.rx.1,
            tx_frames: self.tx.0,
            tx_bytes: self.tx.1,
            drops,
            // Tests of notifications look at these.
            ..totals
        };
        assert_eq!(totals, expected);
    }
}
