//! A guest's memory, written by hand: the driver of the unit tests, that does what no driver would.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::config::{Layout, QueueConfig, QueueError, RingFeatures, RingPosition};
use crate::mem::{GuestMap, GuestPhysAddr};
use crate::{ChainBuf, ChainError, Token, Virtq};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

const DESC: u64 = 0;
const DRIVER: u64 = 0x10_0000;
const DEVICE: u64 = 0x18_0000;
/// Buffers and tables are free from here to the end of the second region.
pub(crate) const DATA: u64 = 0x20_0000;
/// Where the second region starts, right behind the first in the guest.
pub(crate) const SECOND: u64 = 0x30_0000;
pub(crate) const END: u64 = 0x40_0000;

/// What a pop found: readable and writable bytes of each chain, and the fault.
pub(crate) type Found = (Vec<(u32, u32)>, Option<ChainError>);

pub(crate) struct Guest {
    mem: Arc<GuestMemoryMmap>,
    pub(crate) map: GuestMap,
    pub(crate) config: QueueConfig,
    pub(crate) tokens: Vec<Token>,
    pub(crate) buf: ChainBuf,
}

impl Guest {
    pub(crate) fn new(layout: Layout, size: u16) -> Self {
        let ranges =
            [(GuestAddress(0), SECOND as usize), (GuestAddress(SECOND), (END - SECOND) as usize)];
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let config = QueueConfig {
            layout,
            size,
            desc: GuestPhysAddr(DESC),
            driver: GuestPhysAddr(DRIVER),
            device: GuestPhysAddr(DEVICE),
            features: RingFeatures { event_idx: true, indirect: true, in_order: false },
            position: RingPosition::start(layout),
        };
        let map = GuestMap::new(mem.clone()).unwrap();
        Self { mem, map, config, tokens: Vec::new(), buf: ChainBuf::default() }
    }

    pub(crate) fn split(size: u16) -> Self {
        Self::new(Layout::Split, size)
    }

    pub(crate) fn packed(size: u16) -> Self {
        Self::new(Layout::Packed, size)
    }

    pub(crate) fn start(&self) -> Virtq {
        self.try_start().unwrap()
    }

    pub(crate) fn try_start(&self) -> Result<Virtq, QueueError> {
        self.config.activate(&self.map)
    }

    /// Pops and remembers the tokens.
    pub(crate) fn pop(&mut self, queue: &mut Virtq, max: usize) -> Found {
        let chains = queue.pop(&mut self.buf, max);
        let all = 0..chains.len();
        self.tokens = all.clone().map(|i| chains.token(i)).collect();
        let lens = all.map(|i| (chains.readable(i).len(), chains.writable(i).len())).collect();
        (lens, chains.fault())
    }

    /// Pops one chain, reads all of its readable bytes.
    pub(crate) fn pop_bytes(&mut self, queue: &mut Virtq) -> Vec<u8> {
        let chains = queue.pop(&mut self.buf, 1);
        assert_eq!((chains.len(), chains.fault()), (1, None));
        let mut out = vec![0; chains.readable(0).len() as usize];
        assert_eq!(chains.readable(0).reader().read(&mut out), out.len());
        self.tokens = vec![chains.token(0)];
        out
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// All of the memory.
    pub(crate) fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; END as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    pub(crate) fn u16(&self, at: u64) -> u16 {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    fn u32(&self, at: u64) -> u32 {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    /// A descriptor at `at`; `a` and `b` are its last two fields.
    pub(crate) fn raw(&self, at: u64, (addr, len): (u64, u32), a: u16, b: u16) {
        let meta = u64::from(len) | u64::from(a) << 32 | u64::from(b) << 48;
        self.write(at, &addr.to_le_bytes());
        self.write(at + 8, &meta.to_le_bytes());
    }

    /// A descriptor of the split table.
    pub(crate) fn desc(&self, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        self.raw(DESC + u64::from(index) * 16, buffer, flags, next);
    }

    /// A packed descriptor, available in the lap with `wrap`.
    pub(crate) fn slot(&self, index: u16, buffer: (u64, u32), (id, flags): (u16, u16), wrap: bool) {
        let state = if wrap { 1 << 7 } else { 1 << 15 };
        self.raw(DESC + u64::from(index) * 16, buffer, id, flags | state);
    }

    /// A packed descriptor: length, id, flags.
    pub(crate) fn slot_now(&self, index: u16) -> (u32, u16, u16) {
        let at = DESC + u64::from(index) * 16;
        (self.u32(at + 8), self.u16(at + 12), self.u16(at + 14))
    }

    /// Makes `heads` available from entry `at` on.
    pub(crate) fn avail(&self, at: u16, heads: &[u16]) {
        let mut index = at;
        for head in heads {
            let slot = u64::from(index % self.config.size);
            self.write(DRIVER + 4 + slot * 2, &head.to_le_bytes());
            index = index.wrapping_add(1);
        }
        self.set_avail_idx(index);
    }

    pub(crate) fn set_avail_idx(&self, index: u16) {
        self.write(DRIVER + 2, &index.to_le_bytes());
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.write(DRIVER, &flags.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.write(DRIVER + 4 + u64::from(self.config.size) * 2, &event.to_le_bytes());
    }

    /// Packed: the driver event suppression area.
    pub(crate) fn set_driver_event(&self, index: u16, wrap: bool, flags: u16) {
        let position = index | u16::from(wrap) << 15;
        self.write(DRIVER, &position.to_le_bytes());
        self.write(DRIVER + 2, &flags.to_le_bytes());
    }

    /// Packed: the device event suppression area: position and flags.
    pub(crate) fn device_event(&self) -> (u16, u16) {
        (self.u16(DEVICE), self.u16(DEVICE + 2))
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.u16(DEVICE)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.u16(DEVICE + 2)
    }

    pub(crate) fn set_used_idx(&self, index: u16) {
        self.write(DEVICE + 2, &index.to_le_bytes());
    }

    /// Split: the used entry at a slot.
    pub(crate) fn used(&self, slot: u16) -> (u32, u32) {
        let at = DEVICE + 4 + u64::from(slot) * 8;
        (self.u32(at), self.u32(at + 4))
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.u16(DEVICE + 4 + u64::from(self.config.size) * 8)
    }
}
