//! What a frame to or from a tap costs by each system call that can do it: one `write` of a buffer,
//! `writev` of its pieces, and `io_uring` in batches; the same for reading.
//!
//! `cargo run --release -p uplink --example tap_ways` (as root); medians of interleaved rounds.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "a measurement; io_uring takes addresses"
)]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};
use port::{Egress, FrameBuf, Offload};
use rustix::io::{read, readv, write, writev};
use uplink::{packet_mmap, tap};
use virtq::mem::Pool;

const IFNAME: &str = "cwways0";
const HEADER: usize = 12;
const BURST: usize = 32;
const ROUNDS: usize = 15;
const BURSTS: usize = 600;

/// A tap, a ring of system calls, and buffers.
struct Bench {
    fd: OwnedFd,
    ring: IoUring,
    buffers: Vec<Vec<u8>>,
}

fn frame(len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    // A type that nobody takes: the stack drops it at once.
    bytes.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    bytes.resize(len, 7);
    bytes
}

impl Bench {
    fn send(&mut self, way: &str, len: usize) {
        let frame = frame(len);
        let whole = [&[0; HEADER][..], &frame].concat();
        let (header, head, body) =
            (IoSlice::new(&whole[..HEADER]), &frame[..len.min(128)], &frame[len.min(128)..]);
        match way {
            "write" => (0..BURST).for_each(|_| {
                let _ = write(&self.fd, &whole);
            }),
            "writev of 2" => {
                let pieces = [header, IoSlice::new(&frame)];
                (0..BURST).for_each(|_| {
                    let _ = writev(&self.fd, &pieces);
                });
            }
            "writev of 3" => {
                let pieces = [header, IoSlice::new(head), IoSlice::new(body)];
                (0..BURST).for_each(|_| {
                    let _ = writev(&self.fd, &pieces);
                });
            }
            _ => {
                let bytes = u32::try_from(whole.len()).unwrap();
                for _ in 0..BURST {
                    let entry = opcode::Write::new(types::Fixed(0), whole.as_ptr(), bytes).build();
                    // SAFETY: `whole` lives until all entries are completed, below.
                    unsafe { self.ring.submission().push(&entry) }.unwrap();
                }
                let _ = self.ring.submit_and_wait(BURST).unwrap();
                assert_eq!(self.ring.completion().filter(|done| done.result() > 0).count(), BURST);
            }
        }
    }

    fn receive(&mut self, way: &str) -> usize {
        match way {
            "read" => {
                (0..BURST).filter(|at| read(&self.fd, &mut self.buffers[*at][..]).is_ok()).count()
            }
            "readv of 2" => {
                let one = |at: &usize| {
                    let (header, rest) = self.buffers[*at].split_at_mut(HEADER);
                    let mut pieces = [IoSliceMut::new(header), IoSliceMut::new(rest)];
                    readv(&self.fd, &mut pieces).is_ok()
                };
                (0..BURST).filter(one).count()
            }
            _ => {
                for buffer in &mut self.buffers {
                    let bytes = u32::try_from(buffer.len()).unwrap();
                    let entry =
                        opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), bytes).build();
                    // SAFETY: the buffers live until all entries are completed, below.
                    unsafe { self.ring.submission().push(&entry) }.unwrap();
                }
                let _ = self.ring.submit_and_wait(BURST).unwrap();
                self.ring.completion().filter(|done| done.result() > 0).count()
            }
        }
    }
}

fn main() {
    let settings = tap::TapSettings {
        ifname: IFNAME.to_owned(),
        queues: 1,
        netns: None,
        offloads: port::OffloadSet::ALL,
    };
    let mut tap = tap::open(&settings, &[Arc::default()]).unwrap();
    let queues = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    let fd = tap::parts(&tap.link, queues).unwrap().fds.pop().unwrap();
    let ring = IoUring::new(64).unwrap();
    ring.submitter().register_files(&[fd.as_raw_fd()]).unwrap();
    let mut bench = Bench { fd, ring, buffers: vec![vec![0; 2048]; BURST] };
    let settings =
        packet_mmap::PacketMmapSettings { ifname: IFNAME.to_owned(), ..Default::default() };
    let mut stack = packet_mmap::open(&settings, &[Arc::default()]).unwrap();
    for len in [64, 1500] {
        let ways = ["write", "writev of 2", "writev of 3", "io_uring of 32 writes"];
        let mut times = vec![Vec::new(); ways.len()];
        for _ in 0..ROUNDS {
            for (way, times) in ways.iter().zip(&mut times) {
                let start = Instant::now();
                (0..BURSTS).for_each(|_| bench.send(way, len));
                times.push(start.elapsed().as_nanos() as f64 / (BURSTS * BURST) as f64);
            }
        }
        show(&format!("{len} B to a tap"), &ways, times);
        let ways = ["read", "readv of 2", "io_uring of 32 reads"];
        let mut times = vec![Vec::new(); ways.len()];
        for _ in 0..ROUNDS {
            for (way, times) in ways.iter().zip(&mut times) {
                let (mut nanos, mut frames) = (0, 0);
                for _ in 0..BURSTS {
                    fill(&mut stack, len);
                    let start = Instant::now();
                    frames += bench.receive(way);
                    nanos += start.elapsed().as_nanos();
                }
                times.push(nanos as f64 / frames as f64);
            }
        }
        show(&format!("{len} B from a tap"), &ways, times);
    }
}

/// The stack sends a burst to the tap.
fn fill(stack: &mut packet_mmap::PacketMmap, len: usize) {
    let bytes = frame(len);
    let mut pool = Pool::new(1, 2048).unwrap();
    pool.slot_mut(0).unwrap()[..len].copy_from_slice(&bytes);
    let span = Pool::span(0, 0, u32::try_from(len).unwrap());
    let mut frames = FrameBuf::default();
    for _ in 0..BURST {
        let filled =
            frames.slot().unwrap().fill(pool.store().reader(span), span, Offload::default());
        assert!(filled);
        frames.keep();
    }
    let picked: Vec<u16> = (0..u16::try_from(BURST).unwrap()).collect();
    stack.queues[0].1.send(&frames.batch(pool.store(), None), &picked).unwrap();
}

fn show(what: &str, ways: &[&str], times: Vec<Vec<f64>>) {
    for (way, mut times) in ways.iter().zip(times) {
        times.sort_by(f64::total_cmp);
        println!("{what:<18} {way:<24} {:>6.0} ns a frame", times[times.len() / 2]);
    }
}
