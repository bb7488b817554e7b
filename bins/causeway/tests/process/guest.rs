//! A guest by hand: a front end, memory, and two split rings whose frames can be counted.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use testkit::{FrontEnd, SharedMemory};

use crate::bed::{Bed, eventually};

const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const VERSION_1: u64 = 1 << 32;

/// Entries of each ring.
pub(crate) const SIZE: u16 = 64;
/// Where a ring's parts stand behind its start.
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const BUFFER: u64 = 2048;
/// Bytes of a frame, and of the header before it.
const FRAME: u32 = 60;
const HEADER: u32 = 12;

/// See the module's text. The receiveq's buffers are given once.
pub(crate) struct Guest {
    _front_end: FrontEnd,
    memory: File,
    /// Kick and call of receiveq and transmitq.
    fds: Vec<[OwnedFd; 2]>,
    sent: u16,
}

/// Receiveq and transmitq.
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];

impl Guest {
    pub(crate) fn join(bed: &Bed, socket: &str, number: u8) -> Self {
        let memory = SharedMemory::new(1 << 20).unwrap();
        let file = File::from(memory.as_fd().try_clone_to_owned().unwrap());
        let mut front_end = FrontEnd::connect(&bed.path(socket)).unwrap();
        front_end.send(SET_OWNER, &[], &[]).unwrap();
        front_end.send(SET_FEATURES, &VERSION_1.to_le_bytes(), &[]).unwrap();
        let table = SharedMemory::table(0, memory.bytes());
        front_end.send(SET_MEM_TABLE, &table, &[memory.as_fd()]).unwrap();
        let fd = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let fds = vec![[fd(), fd()], [fd(), fd()]];
        let guest = Self { _front_end: front_end, memory: file, fds, sent: 0 };
        guest.fill(number);
        guest.start()
    }

    /// Descriptors and buffers: whole buffers to receive, broadcasts to send.
    fn fill(&self, number: u8) {
        let mut frame = vec![0; (HEADER + FRAME) as usize];
        frame[HEADER as usize..][..6].fill(0xff);
        frame[HEADER as usize + 6..][..6].copy_from_slice(&[2, 0, 0, 0, 0, number]);
        for (ring, at) in RINGS.into_iter().enumerate() {
            for entry in 0..SIZE {
                let buffer = 0x4_0000 + (ring as u64 * u64::from(SIZE) + u64::from(entry)) * BUFFER;
                let (len, flags) = if ring == 0 { (2048, 2u16) } else { (HEADER + FRAME, 0) };
                let mut descriptor = buffer.to_le_bytes().to_vec();
                descriptor.extend_from_slice(&len.to_le_bytes());
                descriptor.extend_from_slice(&flags.to_le_bytes());
                self.write(at + u64::from(entry) * 16, &descriptor);
                self.write(at + DRIVER + 4 + u64::from(entry) * 2, &entry.to_le_bytes());
                self.write(buffer, &frame);
            }
        }
        self.write(RINGS[0] + DRIVER + 2, &SIZE.to_le_bytes());
    }

    fn start(mut self) -> Self {
        let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
        for (ring, at) in (0u32..).zip(RINGS) {
            let mut addresses = words([ring, 0]);
            for address in [at, at + DEVICE, at + DRIVER, 0] {
                addresses.extend_from_slice(&address.to_le_bytes());
            }
            let front_end = &mut self._front_end;
            front_end.send(SET_VRING_NUM, &words([ring, SIZE.into()]), &[]).unwrap();
            front_end.send(SET_VRING_BASE, &words([ring, 0]), &[]).unwrap();
            front_end.send(SET_VRING_ADDR, &addresses, &[]).unwrap();
            let number = u64::from(ring).to_le_bytes();
            let [kick, call] = &self.fds[ring as usize];
            front_end.send(SET_VRING_CALL, &number, &[call.as_fd()]).unwrap();
            front_end.send(SET_VRING_KICK, &number, &[kick.as_fd()]).unwrap();
        }
        self
    }

    /// Sends a burst of broadcasts, kicks, and waits until they are taken.
    pub(crate) fn send(&mut self, frames: u16) {
        self.sent = self.sent.wrapping_add(frames);
        self.write(RINGS[1] + DRIVER + 2, &self.sent.to_le_bytes());
        let _ = rustix::io::write(&self.fds[1][0], &1u64.to_ne_bytes()).unwrap();
        eventually("the frames are taken", || {
            let mut used = [0; 2];
            self.memory.read_exact_at(&mut used, RINGS[1] + DEVICE + 2).unwrap();
            u16::from_le_bytes(used) == self.sent
        });
    }

    /// Whether calls are wanted from now on.
    pub(crate) fn want_calls(&self, wanted: bool) {
        let flags = u16::from(!wanted);
        for at in RINGS {
            self.write(at + DRIVER, &flags.to_le_bytes());
        }
    }

    /// Calls since the last look: of the receiveq and of the transmitq.
    pub(crate) fn calls(&self) -> [u64; 2] {
        [0, 1].map(|ring| {
            let mut count = [0; 8];
            let read = rustix::io::read(&self.fds[ring][1], &mut count);
            read.map_or(0, |_| u64::from_ne_bytes(count))
        })
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }
}
