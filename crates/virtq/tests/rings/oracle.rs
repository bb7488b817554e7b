//! The device side of split rings against `virtio-queue`: both look at the same memory with random
//! descriptor tables, agree on every chain up to the first broken one, and leave the same used
//! ring.
//!
//! `virtio-queue` ends an iteration in silence where a chain is broken, and does not check buffer
//! addresses, the order of directions, or INDIRECT with NEXT: [`judge`] adds these.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueT};
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{ChainBuf, Chains, Layout, QueueConfig, RingFeatures, RingPosition, Virtq};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::bench::Rng;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const BUFFERS: u64 = 0x8400;
const SIZE: u16 = 16;
const USED_BYTES: usize = 6 + 8 * SIZE as usize;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Two adjacent regions, a gap, and a third.
const REGIONS: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), 0x1_0000),
    (GuestAddress(0x1_0000), 0x2_0000),
    (GuestAddress(0x4_0000), 0x1000),
];

type Memory = GuestMemoryMmap<()>;

#[derive(Debug, Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Trial {
    memory: Arc<Memory>,
    rng: Rng,
    /// One mistake in so many fields.
    mistakes: u64,
}

impl Trial {
    fn put(&self, table: u64, index: u16, desc: Desc) {
        let at = table + u64::from(index) * 16;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    fn oops(&mut self) -> bool {
        self.mistakes > 0 && self.rng.one_in(self.mistakes)
    }

    /// A buffer in place `place`; places do not overlap, one lies across two regions.
    fn buffer(&mut self, place: u64) -> (u64, u32) {
        let addr = BUFFERS + place * 0x800;
        let len = 1 + self.rng.below(0x800) as u32;
        if !self.oops() {
            return (addr, len);
        }
        match self.rng.below(5) {
            0 => (0x3_8000, len),
            1 => (0x3_0000 - 1, 2 + len),
            2 => (u64::MAX - 8, 4 + len),
            3 => (addr, u32::MAX),
            _ => (0x4_0fff, 1 + len % 2),
        }
    }

    /// A chain over `count` descriptors of `table`, which has `len`, from `first` on.
    /// The first `readable` ones are for the device to read.
    fn chain(&mut self, table: u64, (first, count): (u16, u16), readable: u16, len: u16) {
        let place = if table == DESC { 0 } else { u64::from(SIZE) + (table - TABLES) / 0x100 };
        for step in 0..count {
            let index = first + step;
            let (addr, bytes) = self.buffer(place + u64::from(index));
            let mut flags = if step < readable { 0 } else { WRITE };
            let mut next = self.rng.next() as u16;
            if step + 1 < count {
                flags |= NEXT;
                next = index + 1;
            }
            if self.oops() {
                flags ^= [NEXT, WRITE, INDIRECT][self.rng.below(3) as usize];
            }
            if self.oops() {
                next = self.rng.below(u64::from(len) + 3) as u16;
            }
            self.put(table, index, Desc { addr, len: bytes, flags, next });
        }
    }

    /// Fills the descriptor table with chains; returns their heads.
    fn fill(&mut self) -> Vec<u16> {
        let mut heads = Vec::new();
        let mut at = 0u16;
        while at < SIZE {
            let count = 1 + self.rng.below(u64::from(SIZE - at).min(5)) as u16;
            heads.push(at);
            let indirect = self.rng.one_in(3);
            let any = self.rng.below(u64::from(count) + 1) as u16;
            self.chain(DESC, (at, count), if indirect { count } else { any }, SIZE);
            if indirect {
                let table = TABLES + u64::from(at) * 0x100;
                let entries = 1 + self.rng.below(6) as u16;
                let readable = self.rng.below(u64::from(entries) + 1) as u16;
                self.chain(table, (0, entries), readable, entries);
                let mut len = u32::from(entries) * 16;
                let mut flags = INDIRECT;
                if self.oops() {
                    len = [0, 8, len + 4][self.rng.below(3) as usize];
                }
                if self.oops() {
                    flags |= NEXT;
                }
                let last = at + count - 1;
                self.put(DESC, last, Desc { addr: table, len, flags, next: 0 });
            }
            at += count;
        }
        heads
    }

    /// Makes `heads` available from index `start` on.
    fn offer(&mut self, heads: &[u16], start: u16) {
        for (position, head) in (0u16..).zip(heads) {
            let head = if self.oops() { self.rng.below(20) as u16 } else { *head };
            let slot = start.wrapping_add(position) % SIZE;
            let at = GuestAddress(AVAIL + 4 + u64::from(slot) * 2);
            self.memory.write_obj(head, at).unwrap();
        }
        let index = start.wrapping_add(heads.len() as u16);
        self.memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn used_ring(&self) -> Vec<u8> {
        let mut bytes = vec![0; USED_BYTES];
        self.memory.read_slice(&mut bytes, GuestAddress(USED)).unwrap();
        bytes
    }

    /// Puts a used ring as at the start, which makes the two sides start alike.
    fn clear_used_ring(&self, start: u16) {
        self.memory.write_slice(&[0; USED_BYTES], GuestAddress(USED)).unwrap();
        self.memory.write_obj(start, GuestAddress(USED + 2)).unwrap();
    }

    fn ours(&self, start: u16, event_idx: bool) -> Virtq {
        let map = GuestMap::new(Arc::clone(&self.memory)).unwrap();
        let config = QueueConfig {
            layout: Layout::Split,
            size: SIZE,
            desc: GuestPhysAddr(DESC),
            driver: GuestPhysAddr(AVAIL),
            device: GuestPhysAddr(USED),
            features: RingFeatures { event_idx, indirect: true, in_order: false },
            position: RingPosition::Split { avail: start, used: start },
        };
        config.activate(&map).unwrap()
    }

    fn theirs(&self, start: u16, event_idx: bool) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(DESC as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        queue.set_ready(true);
        assert!(queue.is_valid(self.memory.as_ref()));
        queue
    }
}

fn trial(memory: &Arc<Memory>, seed: u64, mistakes: u64) -> Trial {
    Trial { memory: Arc::clone(memory), rng: Rng(seed), mistakes }
}

fn memory() -> Arc<Memory> {
    let memory = Memory::from_ranges(&REGIONS).unwrap();
    let mut rng = Rng(1);
    for (base, len) in REGIONS {
        memory.write_slice(&rng.bytes(len), base).unwrap();
    }
    Arc::new(memory)
}

/// A valid chain as the oracle sees it.
#[derive(Debug, Default)]
struct Verdict {
    head: u16,
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

/// The chain if it is valid by the oracle and by the rules that the oracle leaves out.
fn judge(memory: &Memory, chain: DescriptorChain<&Memory>) -> Option<Verdict> {
    let mut verdict = Verdict { head: chain.head_index(), ..Verdict::default() };
    if indirect_has_next(memory, verdict.head) {
        return None;
    }
    let mut ended = false;
    let mut count = 0;
    for desc in chain {
        let (addr, len) = (desc.addr(), desc.len());
        let mapped = len == 0
            || addr.0.checked_add(u64::from(len)).is_some()
                && memory.get_slices(addr, len as usize).all(|slice| slice.is_ok());
        if !mapped || (!desc.is_write_only() && !verdict.writable.is_empty()) {
            return None;
        }
        let part = if desc.is_write_only() { &mut verdict.writable } else { &mut verdict.readable };
        part.push((addr.0, len));
        ended = !desc.has_next();
        count += 1;
    }
    (ended && count <= SIZE).then_some(verdict)
}

/// Whether the walk from `head` meets a descriptor with INDIRECT and NEXT.
fn indirect_has_next(memory: &Memory, head: u16) -> bool {
    let mut at = head;
    for _ in 0..SIZE {
        if at >= SIZE {
            return false;
        }
        let desc = GuestAddress(DESC + u64::from(at) * 16 + 12);
        let flags: u16 = memory.read_obj(desc).unwrap();
        if flags & INDIRECT != 0 {
            return flags & NEXT != 0;
        }
        if flags & NEXT == 0 {
            return false;
        }
        at = memory.read_obj(GuestAddress(desc.0 + 2)).unwrap();
    }
    false
}

/// Our chain `index` reads and writes exactly the bytes of `verdict`.
fn compare(memory: &Memory, chains: &Chains<'_>, index: usize, verdict: &Verdict, rng: &mut Rng) {
    let mut want = Vec::new();
    for (addr, len) in &verdict.readable {
        let mut part = vec![0; *len as usize];
        memory.read_slice(&mut part, GuestAddress(*addr)).unwrap();
        want.extend(part);
    }
    let readable = chains.readable(index);
    let mut got = vec![0; want.len()];
    assert_eq!(readable.len() as usize, want.len());
    assert_eq!(readable.reader().read(&mut got), want.len());
    assert!(got == want, "the readable bytes differ");

    let room: usize = verdict.writable.iter().map(|(_, len)| *len as usize).sum();
    let writable = chains.writable(index);
    assert_eq!(writable.len() as usize, room);
    let data = rng.bytes(room);
    assert_eq!(writable.writer().write(&data), room);
    let mut rest = data.as_slice();
    for (addr, len) in &verdict.writable {
        let (want, after) = rest.split_at(*len as usize);
        let mut part = vec![0; *len as usize];
        memory.read_slice(&mut part, GuestAddress(*addr)).unwrap();
        assert!(part == want, "the written bytes differ");
        rest = after;
    }
}

/// One random table through both; how many chains were valid, and whether one was broken.
fn run(memory: &Arc<Memory>, seed: u64, mistakes: u64) -> (usize, bool) {
    let mut t = trial(memory, seed, mistakes);
    let start = t.rng.next() as u16;
    let heads = t.fill();
    t.offer(&heads, start);
    t.clear_used_ring(start);
    let mut ours = t.ours(start, false);
    let mut theirs = t.theirs(start, false);
    let mut verdicts = Vec::new();
    let mut broken = false;
    while let Some(chain) = theirs.pop_descriptor_chain(t.memory.as_ref()) {
        let Some(verdict) = judge(&t.memory, chain) else {
            broken = true;
            break;
        };
        verdicts.push(verdict);
    }
    let mut buf = ChainBuf::default();
    let chains = ours.pop(&mut buf, usize::from(SIZE));
    assert_eq!(chains.fault().is_some(), broken, "seed {seed}: {:?}", chains.fault());
    assert_eq!(chains.len(), verdicts.len(), "seed {seed}: {:?}", chains.fault());
    let mut used = Vec::new();
    for (index, verdict) in verdicts.iter().enumerate() {
        compare(&t.memory, &chains, index, verdict, &mut t.rng);
        used.push((chains.token(index), verdict.head, t.rng.next() as u32));
    }
    if broken {
        assert!(ours.pop(&mut buf, 1).is_empty(), "a broken queue gives nothing more");
    }
    // Completed in any order.
    for index in (1..used.len()).rev() {
        used.swap(index, t.rng.below(index as u64 + 1) as usize);
    }
    for (token, _, len) in &used {
        ours.complete(*token, *len);
    }
    ours.publish();
    let our_ring = t.used_ring();
    t.clear_used_ring(start);
    for (_, head, len) in &used {
        theirs.add_used(t.memory.as_ref(), *head, *len).unwrap();
    }
    assert_eq!(our_ring, t.used_ring(), "seed {seed}");
    (verdicts.len(), broken)
}

#[test]
fn valid_tables_give_the_same_chains_and_used_rings() {
    let memory = memory();
    let mut chains = 0;
    for seed in 0..1500 {
        let (valid, broken) = run(&memory, seed, 0);
        assert!(!broken && valid > 0, "seed {seed}");
        chains += valid;
    }
    assert!(chains > 5000, "{chains}");
}

#[test]
fn random_mistakes_end_both_at_the_same_chain() {
    let memory = memory();
    let (mut chains, mut faults) = (0, 0);
    for seed in 0..6000 {
        let (valid, broken) = run(&memory, 1_000_000 + seed, 20 + seed % 60);
        chains += valid;
        faults += usize::from(broken);
    }
    assert!(chains > 5000 && faults > 1000, "{chains} chains, {faults} faults");
}

#[test]
fn events_are_read_and_written_alike() {
    let memory = memory();
    for seed in 0..500 {
        let mut t = trial(&memory, seed, 0);
        let start = t.rng.next() as u16;
        t.clear_used_ring(start);
        let mut ours = t.ours(start, true);
        let mut theirs = t.theirs(start, true);
        let mut buf = ChainBuf::default();
        let mut at = start;
        let heads = t.fill();
        for round in 0..10 {
            t.offer(&heads, at);
            let event = at.wrapping_add(t.rng.below(20) as u16).wrapping_sub(4);
            let event_at = GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE));
            t.memory.write_obj(event, event_at).unwrap();
            let some = 1 + t.rng.below(heads.len() as u64) as usize;
            let chains = ours.pop(&mut buf, some);
            assert_eq!(chains.fault(), None);
            let tokens: Vec<_> = (0..chains.len()).map(|index| chains.token(index)).collect();
            assert_eq!(tokens.len(), some);
            let before = t.used_ring();
            tokens.iter().for_each(|token| ours.complete(*token, 0));
            ours.publish();
            // ORDERING: the fence that the interface asks for.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let wanted = ours.needs_call();
            let more = ours.enable_kicks();
            let our_ring = t.used_ring();

            t.memory.write_slice(&before, GuestAddress(USED)).unwrap();
            for _ in 0..some {
                let chain = theirs.pop_descriptor_chain(t.memory.as_ref()).unwrap();
                theirs.add_used(t.memory.as_ref(), chain.head_index(), 0).unwrap();
            }
            // What was before the start is not known, so our first look may be a call too much.
            let too_many = round == 0 && wanted;
            let theirs_wanted = theirs.needs_notification(t.memory.as_ref()).unwrap();
            assert!(wanted == theirs_wanted || too_many, "seed {seed}, round {round}");
            assert_eq!(more, theirs.enable_notification(t.memory.as_ref()).unwrap());
            assert_eq!(our_ring, t.used_ring(), "seed {seed}");
            at = at.wrapping_add(some as u16);
        }
    }
}
