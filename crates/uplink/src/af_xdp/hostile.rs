//! A queue over rings that anybody can write: for tests and for the fuzzer, which plays the kernel.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::expect_used,
    reason = "test code"
)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use port::{Egress, FrameBuf, Ingress, QueueCounters};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::xdp::XdpRingOffset;
use virtq::mem::SegStore;

use crate::sys::map::map_fd;
use crate::sys::xdp::{Consumer, Desc, Producer};

use super::egress::{AfXdpEgress, Outgoing};
use super::ingress::{AfXdpIngress, Incoming};
use super::layout::{Area, RX_FRAMES, TX_FRAMES, umem_bytes};
use super::socket::{Ours, Socket};

const PRODUCER: u64 = 0;
const CONSUMER: u64 = 64;
const FLAGS: u64 = 128;
const ENTRIES: u64 = 256;
/// Bytes of a ring in the file: more than the largest one takes.
const RING_BYTES: u64 = 128 * 1024;

/// The rings, in the order in which they stand in the file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    Fill,
    Rx,
    Tx,
    Completion,
}

impl Which {
    fn from_byte(byte: u8) -> Self {
        match byte & 3 {
            0 => Self::Fill,
            1 => Self::Rx,
            2 => Self::Tx,
            _ => Self::Completion,
        }
    }

    fn at(self) -> u64 {
        let number: u64 = match self {
            Self::Fill => 0,
            Self::Rx => 1,
            Self::Tx => 2,
            Self::Completion => 3,
        };
        number.wrapping_mul(RING_BYTES)
    }
}

/// A queue, and the file that its rings are in.
#[derive(Debug)]
pub(super) struct Hostile {
    file: File,
    pub(super) ingress: AfXdpIngress,
    pub(super) egress: AfXdpEgress,
}

fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("rings", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, bytes).expect("room");
    fd
}

impl Hostile {
    pub(super) fn new() -> Self {
        let rings = memory(RING_BYTES * 4);
        let umem = map_fd(memory(umem_bytes(1)).as_fd(), umem_bytes(1) as usize, 0, false);
        let umem = umem.expect("a mapping");
        let at = XdpRingOffset {
            producer: PRODUCER,
            consumer: CONSUMER,
            desc: ENTRIES,
            flags: Some(FLAGS),
        };
        let fd = rings.as_fd();
        let fill = Producer::map(fd, Which::Fill.at(), &at, RX_FRAMES).expect("a ring");
        let rx = Consumer::map(fd, Which::Rx.at(), &at, RX_FRAMES).expect("a ring");
        let tx = Producer::map(fd, Which::Tx.at(), &at, TX_FRAMES).expect("a ring");
        let completion = Consumer::map(fd, Which::Completion.at(), &at, TX_FRAMES);
        let completion = completion.expect("a ring");
        let counters: Arc<QueueCounters> = Arc::default();
        // No socket: calls fail, and rings move only as the test says.
        let socket = Arc::new(Socket::of(Arc::new(memory(0)), Arc::new(AtomicBool::new(false))));
        let incoming = Incoming {
            socket: Arc::clone(&socket),
            counters: Arc::clone(&counters),
            rx,
            fill,
            busy_poll: false,
            unfinished: true,
            marked: true,
        };
        let mtu = Arc::new(AtomicU32::new(9000));
        let outgoing = Outgoing {
            socket,
            counters,
            mtu,
            carrier: Arc::new(AtomicBool::new(true)),
            tx,
            completion,
            metadata: true,
            zero_copy: false,
            spread: true,
            large: None,
        };
        let ours = Ours::all();
        Self {
            ingress: AfXdpIngress::new(incoming, &umem, (0, ours.taken)).expect("an ingress"),
            egress: AfXdpEgress::new(outgoing, &umem, (0, ours.free)).expect("an egress"),
            file: rings.into(),
        }
    }

    /// Sets how far the kernel is in a ring.
    pub(super) fn set_kernel(&self, which: Which, value: u32) {
        let at = match which {
            Which::Fill | Which::Tx => CONSUMER,
            Which::Rx | Which::Completion => PRODUCER,
        };
        self.write(which.at() + at, &value.to_ne_bytes());
    }

    /// How far we are in a ring.
    pub(super) fn ours(&self, which: Which) -> u32 {
        let at = match which {
            Which::Fill | Which::Tx => PRODUCER,
            Which::Rx | Which::Completion => CONSUMER,
        };
        let mut word = [0; 4];
        self.file.read_exact_at(&mut word, which.at() + at).expect("a word");
        u32::from_ne_bytes(word)
    }

    pub(super) fn set_frame(&self, index: u32, desc: Desc) {
        let at = Which::Rx.at() + ENTRIES + u64::from(index % RX_FRAMES) * 16;
        let bytes = [&desc.addr.to_ne_bytes()[..], &desc.len.to_ne_bytes()].concat();
        self.write(at, &[&bytes[..], &desc.options.to_ne_bytes()].concat());
    }

    pub(super) fn set_sent(&self, index: u32, addr: u64) {
        let at = Which::Completion.at() + ENTRIES + u64::from(index % TX_FRAMES) * 8;
        self.write(at, &addr.to_ne_bytes());
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("room");
    }

    /// Takes a burst as a worker does, reads all of each frame, and gives it back. Frames, and
    /// whether the queue said that something is wrong.
    pub(super) fn receive(&mut self, frames: &mut FrameBuf) -> (usize, bool) {
        let batch = self.ingress.receive(frames);
        let (count, fault) = (batch.len(), batch.fault().is_some());
        for frame in batch.frames() {
            let mut bytes = vec![0; frame.body.len as usize];
            assert_eq!(
                batch.body(frame).read(&mut bytes),
                bytes.len(),
                "a frame within its chunks"
            );
        }
        drop(batch);
        self.ingress.release();
        let _ = self.ingress.notify();
        (count, fault)
    }

    /// Sends frames of that size; whether the queue said that something is wrong.
    pub(super) fn send(&mut self, frames: &mut FrameBuf, (count, len): (u16, usize)) -> bool {
        frames.clear();
        for _ in 0..count {
            let Some(frame) = frames.slot() else { break };
            frame.fill_private(&vec![2; len]);
            frames.keep();
        }
        let picked: Vec<u16> = (0..count).collect();
        let fault = self.egress.send(&frames.batch(SegStore::empty(), None), &picked).is_err();
        let _ = self.egress.notify();
        self.check_sent();
        fault
    }

    /// Everything that we ask the kernel to send is within our chunks to send.
    fn check_sent(&self) {
        let (area, end) = (Area::transmit(0), self.ours(Which::Tx));
        for back in 1..=TX_FRAMES.min(end) {
            let index = end.wrapping_sub(back) % TX_FRAMES;
            let mut bytes = [0; 16];
            let at = Which::Tx.at() + ENTRIES + u64::from(index) * 16;
            self.file.read_exact_at(&mut bytes, at).expect("an entry");
            let addr = u64::from_ne_bytes(*bytes.first_chunk().expect("eight bytes"));
            let len = u32::from_ne_bytes(*bytes[8..].first_chunk().expect("four bytes"));
            assert!(area.locate(Desc { addr, len, options: 0 }).is_some(), "{addr:#x} {len}");
        }
    }
}

/// Lets `bytes` play the kernel, for the fuzzer: whatever it writes into rings, no frame reaches
/// beyond its chunks, and nothing is sent that is not ours. How many frames came.
pub(super) fn play(mut bytes: &[u8]) -> usize {
    let mut queue = Hostile::new();
    let mut frames = FrameBuf::default();
    let mut came = 0;
    while let Some((step, rest)) = bytes.split_first_chunk::<8>() {
        bytes = rest;
        let [what, which, a, b, c, d, e, f] = *step;
        let word = u32::from_le_bytes([a, b, c, d]);
        match what % 6 {
            // A plausible distance, or any.
            0 => {
                let which = Which::from_byte(which);
                let near = queue.ours(which).wrapping_add(u32::from(a));
                queue.set_kernel(which, if e == 0 { word } else { near });
            }
            1 => {
                let addr = u64::from(word & 0x003f_ffff) | (u64::from(f & 0x80) << 56);
                let len = u32::from(e) << (f & 7);
                let options = u32::from(f >> 6 & 1);
                let index = queue.ours(Which::Rx).wrapping_add(u32::from(which));
                queue.set_frame(index, Desc { addr, len, options });
            }
            2 => {
                let index = queue.ours(Which::Completion).wrapping_add(u32::from(which));
                queue.set_sent(index, u64::from(word & 0x00ff_ffff));
            }
            3 => came += queue.receive(&mut frames).0,
            4 => drop(queue.send(&mut frames, (u16::from(which % 65), 14 + usize::from(a % 114)))),
            _ => drop(queue.ingress.arm()),
        }
    }
    came
}

#[cfg(test)]
mod tests {
    use port::FrameBuf;

    use super::{Hostile, Which, play};
    use crate::af_xdp::layout::{Area, CHUNK, RX_FRAMES, TX_FRAMES};
    use crate::sys::xdp::Desc;

    fn frame(chunk: u32, skip: u32, len: u32) -> Desc {
        Desc { addr: Area::receive(0).address(chunk, skip), len, options: 0 }
    }

    #[test]
    fn frames_within_chunks_are_taken_and_their_chunks_given_back() {
        let mut queue = Hostile::new();
        let mut frames = FrameBuf::default();
        assert_eq!(queue.ours(Which::Fill), RX_FRAMES, "all chunks are the kernel's");
        for index in 0..10 {
            queue.set_frame(index, frame(index, 256, 60 + index * 100));
        }
        queue.set_kernel(Which::Rx, 10);
        queue.set_kernel(Which::Fill, 10);
        assert_eq!(queue.receive(&mut frames), (10, false));
        assert_eq!((queue.ours(Which::Rx), queue.ours(Which::Fill)), (10, RX_FRAMES + 10));
        // While the kernel has not taken the others, there is no room to give chunks back: later.
        queue.set_frame(10, frame(20, 256, 60));
        queue.set_kernel(Which::Rx, 11);
        assert_eq!(queue.receive(&mut frames), (1, false));
        assert_eq!(queue.ours(Which::Fill), RX_FRAMES + 10);
        queue.set_kernel(Which::Fill, 11);
        assert_eq!(queue.receive(&mut frames), (0, false));
        assert_eq!(queue.ours(Which::Fill), RX_FRAMES + 11);
    }

    #[test]
    fn what_is_not_within_a_chunk_is_a_fault_and_is_not_read() {
        let area = Area::receive(0);
        let outside = area.address(area.chunks(), 0);
        for (addr, len) in [
            (outside, 60),
            (u64::MAX, 60),
            (0, CHUNK + 1),
            (u64::from(CHUNK) - 10, 11),
            (0, u32::MAX),
        ] {
            let mut queue = Hostile::new();
            queue.set_frame(0, frame(0, 0, 60));
            queue.set_frame(1, Desc { addr, len, options: 0 });
            queue.set_kernel(Which::Rx, 2);
            assert_eq!(queue.receive(&mut FrameBuf::default()), (1, true), "{addr:#x} {len}");
        }
    }

    #[test]
    fn positions_that_cannot_be_are_an_empty_ring() {
        let mut frames = FrameBuf::default();
        for far in [RX_FRAMES + 1, u32::MAX / 2, u32::MAX] {
            let mut queue = Hostile::new();
            queue.set_kernel(Which::Rx, far);
            queue.set_kernel(Which::Completion, far);
            queue.set_kernel(Which::Tx, far);
            assert_eq!(queue.receive(&mut frames), (0, false));
            assert!(!queue.send(&mut frames, (64, 60)));
        }
    }

    #[test]
    fn a_chunk_that_was_not_on_its_way_is_a_fault() {
        let mut frames = FrameBuf::default();
        let mut queue = Hostile::new();
        assert!(!queue.send(&mut frames, (2, 60)));
        let area = Area::transmit(0);
        // Of the frames that arrive, and beyond the end.
        for addr in [0, area.address(TX_FRAMES, 0)] {
            let mut queue = Hostile::new();
            queue.set_sent(0, addr);
            queue.set_kernel(Which::Completion, 1);
            assert!(queue.send(&mut frames, (1, 60)), "{addr:#x}");
        }
        // More than there are.
        for index in 0..3 {
            queue.set_sent(index, area.address(index, 0));
        }
        queue.set_kernel(Which::Completion, 3);
        assert!(queue.send(&mut frames, (1, 60)));
    }

    #[test]
    fn any_bytes_can_play_the_kernel() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut came = 0;
        for _ in 0..60 {
            let mut bytes = Vec::new();
            for _ in 0..2000 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                bytes.extend(seed.to_le_bytes());
            }
            came += play(&bytes);
        }
        assert!(came > 0, "frames came too");
    }
}
