//! The hostile side by hand: its front end, its memory, and rings that hold what a case writes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::event::{EventfdFlags, eventfd};
use testkit::request::{
    SET_FEATURES, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE,
    SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM,
};
use testkit::{FrontEnd, SharedMemory};
use virtq::Layout;

use crate::world::{EVIL, Stage, eventually};

/// Entries of each ring.
pub(crate) const SIZE: u16 = 16;
pub(crate) const MEMORY: u64 = 4 << 20;
/// Where a ring's parts stand, from `RING * (ring + 1)` on.
const RING: u64 = 0x1_0000;
const DRIVER: u64 = 0x4000;
const DEVICE: u64 = 0x8000;
/// Where buffers are.
pub(crate) const BUFFERS: u64 = 1 << 20;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// Of packed rings.
pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const PROTOCOL: u64 = 1 << 30;
const MRG_RXBUF: u64 = 1 << 15;
/// Multiqueue, RARP, acknowledgements, MTU, back end requests, reset, memory slots, status, state.
pub(crate) const PROTOCOL_FEATURES: u64 =
    1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 13 | 1 << 15 | 1 << 16 | 1 << 19;

/// A descriptor; `next` is the identifier in a packed ring.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A descriptor of `len` bytes in the buffers.
pub(crate) fn desc(len: u32, flags: u16) -> Desc {
    Desc { addr: BUFFERS, len, flags, next: 1 }
}

pub(crate) struct Evil {
    pub(crate) front: FrontEnd,
    pub(crate) memory: SharedMemory,
    pub(crate) file: File,
    pub(crate) layout: Layout,
    /// Features beside those that each has.
    pub(crate) features: u64,
    /// Protocol features.
    pub(crate) protocol: u64,
    /// Kick and call of each ring.
    pub(crate) fds: Vec<[OwnedFd; 2]>,
    /// Chains offered on each ring.
    offered: [u16; 2],
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Where a ring's three areas are: descriptors, device, driver.
pub(crate) fn areas(ring: u32) -> [u64; 3] {
    let base = RING * (u64::from(ring) + 1);
    [base, base + DEVICE, base + DRIVER]
}

impl Evil {
    /// Connected, with nothing said.
    pub(crate) fn connect(stage: &Stage<'_>) -> Self {
        let memory = SharedMemory::new(MEMORY).unwrap();
        let file = File::from(memory.as_fd().try_clone_to_owned().unwrap());
        let mut front = None;
        // The one before may still be on its way out.
        eventually("the port listens to us", || {
            let mut new = FrontEnd::connect(stage.world.socket()).unwrap();
            let there = new.ask(testkit::request::GET_FEATURES, &[]).is_ok();
            front = there.then_some(new);
            there
        });
        Self {
            front: front.unwrap(),
            memory,
            file,
            layout: stage.layout,
            features: INDIRECT_DESC,
            protocol: PROTOCOL_FEATURES,
            fds: (0..2).map(|_| [event(), event()]).collect(),
            offered: [0; 2],
        }
    }

    /// Features are agreed.
    pub(crate) fn negotiated(stage: &Stage<'_>) -> Self {
        let mut evil = Self::connect(stage);
        evil.negotiate();
        evil
    }

    /// Uses another's memory as its own: `bytes` of it. The parts of the rings must be free there.
    pub(crate) fn adopt(&mut self, memory: &OwnedFd, bytes: u64) -> bool {
        let file = || memory.try_clone().unwrap();
        (self.file, self.memory) = (file().into(), SharedMemory::of(file(), bytes));
        self.table(&SharedMemory::table(0, bytes))
    }

    /// Features are agreed and the memory is shared.
    pub(crate) fn shared(stage: &Stage<'_>) -> Self {
        let mut evil = Self::negotiated(stage);
        assert!(evil.share());
        evil
    }

    /// Both rings run, and hold nothing.
    pub(crate) fn up(stage: &Stage<'_>) -> Self {
        Self::up_with(stage, INDIRECT_DESC)
    }

    /// The same with other features.
    pub(crate) fn up_with(stage: &Stage<'_>, features: u64) -> Self {
        let mut evil = Self::connect(stage);
        evil.features = features;
        evil.negotiate();
        assert!(evil.share());
        for ring in 0..2 {
            evil.set_ring(ring);
        }
        eventually("the port is up", || stage.world.port(EVIL)["state"] == "up");
        evil
    }

    pub(crate) fn negotiate(&mut self) {
        let protocol = self.protocol.to_le_bytes();
        self.front.send(SET_OWNER, &[], &[]).unwrap();
        self.front.send(SET_PROTOCOL_FEATURES, &protocol, &[]).unwrap();
        let packed = if self.layout == Layout::Packed { PACKED } else { 0 };
        let bits = VERSION_1 | MRG_RXBUF | PROTOCOL | packed | self.features;
        assert!(self.ack(SET_FEATURES, &bits.to_le_bytes(), &[]));
    }

    pub(crate) fn share(&mut self) -> bool {
        let table = SharedMemory::table(0, MEMORY);
        self.table(&table)
    }

    /// A memory table with one fd, that of the memory.
    pub(crate) fn table(&mut self, table: &[u8]) -> bool {
        let memory = self.memory.as_fd();
        self.front.acknowledged(SET_MEM_TABLE, table, &[memory]).unwrap()
    }

    /// Whether a request is accepted.
    pub(crate) fn ack(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.front.acknowledged(request, body, fds).unwrap()
    }

    pub(crate) fn set_ring(&mut self, ring: u32) {
        assert!(self.ack(SET_VRING_NUM, &words(&[ring, SIZE.into()]), &[]));
        assert!(self.set_base(ring, self.fresh()));
        assert!(self.set_addr(ring, areas(ring)));
        assert!(self.set_fds(ring));
        assert!(self.ack(SET_VRING_ENABLE, &words(&[ring, 1]), &[]));
    }

    /// The same without a look at what the other side says: it may go away meanwhile.
    pub(crate) fn set_ring_blindly(&mut self, ring: u32) {
        let addresses = [words(&[ring, 0]), longs(&areas(ring)), longs(&[0])].concat();
        let (base, [kick, call]) = (self.fresh(), &self.fds[ring as usize]);
        let messages: [(u32, Vec<u8>, Option<&OwnedFd>); 6] = [
            (SET_VRING_NUM, words(&[ring, SIZE.into()]), None),
            (SET_VRING_BASE, words(&[ring, base]), None),
            (SET_VRING_ADDR, addresses, None),
            (SET_VRING_CALL, longs(&[ring.into()]), Some(call)),
            (SET_VRING_KICK, longs(&[ring.into()]), Some(kick)),
            (SET_VRING_ENABLE, words(&[ring, 1]), None),
        ];
        for (request, body, fd) in messages {
            let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
            let _ = self.front.send(request, &body, &fds);
        }
    }

    /// The position at which a ring begins.
    pub(crate) fn fresh(&self) -> u32 {
        if self.layout == Layout::Packed { 0x8000_8000 } else { 0 }
    }

    pub(crate) fn set_base(&mut self, ring: u32, base: u32) -> bool {
        self.ack(SET_VRING_BASE, &words(&[ring, base]), &[])
    }

    pub(crate) fn set_addr(&mut self, ring: u32, [desc, device, driver]: [u64; 3]) -> bool {
        let body = [words(&[ring, 0]), longs(&[desc, device, driver, 0])].concat();
        self.ack(SET_VRING_ADDR, &body, &[])
    }

    pub(crate) fn set_fds(&mut self, ring: u32) -> bool {
        let [kick, call] = &self.fds[ring as usize];
        let number = u64::from(ring).to_le_bytes();
        let call = self.front.acknowledged(SET_VRING_CALL, &number, &[call.as_fd()]).unwrap();
        call && self.front.acknowledged(SET_VRING_KICK, &number, &[kick.as_fd()]).unwrap()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    /// A descriptor as the layout has it.
    pub(crate) fn encode(&self, desc: Desc) -> Vec<u8> {
        let (third, fourth) = match self.layout {
            Layout::Split => (desc.flags, desc.next),
            Layout::Packed => (desc.next, desc.flags),
        };
        let mut bytes = desc.addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&desc.len.to_le_bytes());
        bytes.extend_from_slice(&third.to_le_bytes());
        bytes.extend_from_slice(&fourth.to_le_bytes());
        bytes
    }

    /// Makes descriptors available as they are: as the first of the table (split), or from where
    /// the ring stands, with the flags of this lap (packed).
    pub(crate) fn offer(&mut self, ring: u32, descs: &[Desc]) {
        let at = self.offered[ring as usize];
        let start = if self.layout == Layout::Packed { u64::from(at) } else { 0 };
        // The first one last: it makes the others visible.
        for (index, desc) in descs.iter().enumerate().rev() {
            let mut desc = *desc;
            if self.layout == Layout::Packed {
                desc.flags |= AVAIL;
            }
            self.raw_desc(ring, start + index as u64, desc);
        }
        match self.layout {
            Layout::Split => self.avail(ring, at, 0, at + 1),
            Layout::Packed => {}
        }
        let used = if self.layout == Layout::Packed { descs.len() as u16 } else { 1 };
        self.offered[ring as usize] = at + used;
        self.kick(ring);
    }

    /// The ring begins again, where it began.
    pub(crate) fn start_over(&mut self, ring: u32) {
        self.offered[ring as usize] = 0;
    }

    pub(crate) fn raw_desc(&self, ring: u32, index: u64, desc: Desc) {
        self.write(areas(ring)[0] + index * 16, &self.encode(desc));
    }

    /// An entry of the available ring, and its index.
    pub(crate) fn avail(&self, ring: u32, slot: u16, head: u16, index: u16) {
        let driver = areas(ring)[2];
        self.write(driver + 4 + u64::from(slot % SIZE) * 2, &head.to_le_bytes());
        self.write(driver + 2, &index.to_le_bytes());
    }

    pub(crate) fn kick(&self, ring: u32) {
        let _ = rustix::io::write(&self.fds[ring as usize][0], &1u64.to_ne_bytes());
    }

    /// Sends a frame, behind a header of zeros.
    pub(crate) fn frame(&mut self, frame: &[u8]) {
        self.headed(&[0; 12], frame);
    }

    /// Sends a frame behind this header.
    pub(crate) fn headed(&mut self, header: &[u8], frame: &[u8]) {
        self.write(BUFFERS, header);
        self.write(BUFFERS + header.len() as u64, frame);
        let len = (header.len() + frame.len()) as u32;
        self.offer(1, &[Desc { next: 0, ..desc(len, 0) }]);
    }

    /// Chains that the device has given back.
    pub(crate) fn used(&self, ring: u32) -> u16 {
        match self.layout {
            Layout::Split => {
                let mut index = [0; 2];
                self.file.read_exact_at(&mut index, areas(ring)[1] + 2).unwrap();
                u16::from_le_bytes(index)
            }
            Layout::Packed => {
                let is_used = |slot: &u64| {
                    let mut flags = [0; 2];
                    let at = areas(ring)[0] + slot * 16 + 14;
                    self.file.read_exact_at(&mut flags, at).unwrap();
                    u16::from_le_bytes(flags) & (AVAIL | USED) == AVAIL | USED
                };
                (0..u64::from(SIZE)).filter(is_used).count() as u16
            }
        }
    }

    pub(crate) fn wait_used(&self, ring: u32, count: u16) {
        eventually(&format!("{count} chains are used"), || self.used(ring) >= count);
    }
}
