//! The two rings of a queue pair, as a guest's network driver uses them.
//!
//! ```text
//!  transmitq   slots with ready-made frames ─► add ─► publish, kick ─► used ─► free slots
//!  receiveq    buffers ─► add ─► publish, kick ─► used ─► frames of one or more buffers ─► buffers
//! ```
//!
//! **Trust.** The back end is believed no more than a guest believes its device: lengths and
//! buffer counts are checked before they are used.

use anyhow::{Context, bail};
use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue, Used};
use virtq::mem::ReadPiece;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::Memory;

/// Bytes of `virtio_net_hdr` with `VIRTIO_F_VERSION_1`.
pub(crate) const NET_HEADER: u32 = 12;
/// The one flag of the header that a driver sets (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
const NEEDS_CSUM: u8 = 1;
/// Used entries that are taken at once.
const BURST: usize = 64;
/// The most descriptors of a chain.
const PIECES: usize = 16;

/// How the chains of a ring are laid out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChainShape {
    /// Descriptors of a chain.
    pub(crate) descriptors: u16,
    /// Whether they are in an indirect table.
    pub(crate) indirect: bool,
}

/// One ring with its buffers and notifications.
#[derive(Debug)]
struct Ring {
    queue: DriverQueue,
    pool: BufferPool,
    shape: ChainShape,
    kick: EventFd,
    call: EventFd,
    kicks: u64,
    used: [Used; BURST],
}

impl Ring {
    fn new(memory: &mut Memory, plan: &RingPlan) -> anyhow::Result<Self> {
        let config = plan.config();
        let bytes = config.areas(virtq::mem::GuestPhysAddr(0))?.bytes;
        let base = memory.take_ring(bytes)?;
        let queue = DriverQueue::new(memory.map(), config, base)?;
        let buffers = u64::from(plan.buffer_bytes).saturating_mul(u64::from(plan.buffers));
        let at = memory.take_buffers(buffers)?;
        let pool = BufferPool::new(memory.map(), at, plan.buffer_bytes, plan.buffers)?;
        Ok(Self {
            queue,
            pool,
            shape: plan.shape,
            kick: EventFd::new(EFD_NONBLOCK).context("cannot create an eventfd")?,
            call: EventFd::new(EFD_NONBLOCK).context("cannot create an eventfd")?,
            kicks: 0,
            used: [Used::default(); BURST],
        })
    }

    /// Adds the first `len` bytes of buffer `slot` as one chain.
    #[inline]
    fn add(&mut self, slot: u32, len: u32, writable: bool) -> anyhow::Result<()> {
        let whole = self.pool.buffer(slot, len);
        if self.shape.descriptors == 1 && !self.shape.indirect {
            let result = match writable {
                true => self.queue.add_writable(&[whole], u64::from(slot)),
                false => self.queue.add_readable(&[whole], u64::from(slot)),
            };
            return Ok(result?);
        }
        let mut pieces = [whole; PIECES];
        let count = cut(whole, self.shape.descriptors, &mut pieces);
        let pieces = pieces.get(..count).unwrap_or_default();
        let (readable, writable): (&[Buffer], &[Buffer]) =
            if writable { (&[], pieces) } else { (pieces, &[]) };
        if self.shape.indirect {
            self.queue.add_indirect(readable, writable, u64::from(slot))?;
        } else {
            self.queue.add(readable, writable, u64::from(slot))?;
        }
        Ok(())
    }

    /// Whether another chain fits.
    #[inline]
    fn has_room(&self) -> bool {
        let needed = if self.shape.indirect { 1 } else { self.shape.descriptors };
        self.queue.free() >= needed
    }

    fn flush(&mut self) {
        self.queue.publish();
        if self.queue.needs_kick() {
            self.kicks = self.kicks.wrapping_add(1);
            // A full counter is a kick that nobody has taken yet: nothing is lost.
            let _ = self.kick.write(1);
        }
    }
}

/// Cuts a buffer into `count` pieces, the first one just behind the net header.
#[inline]
fn cut(whole: Buffer, count: u16, pieces: &mut [Buffer; PIECES]) -> usize {
    let mut at = whole.addr;
    let mut left = whole.len;
    let mut used = 0usize;
    let share = left.checked_div(u32::from(count)).unwrap_or(left).max(1);
    for (index, piece) in pieces.iter_mut().enumerate().take(usize::from(count)) {
        let last = index.saturating_add(1) == usize::from(count);
        let first = index == 0 && count > 1;
        let len = if last { left } else { left.min(if first { NET_HEADER } else { share }) };
        if len == 0 {
            break;
        }
        *piece = Buffer { addr: at, len };
        at.0 = at.0.wrapping_add(u64::from(len));
        left = left.saturating_sub(len);
        used = used.saturating_add(1);
    }
    used
}

/// What a ring is made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingPlan {
    pub(crate) layout: virtq::Layout,
    pub(crate) size: u16,
    pub(crate) features: virtq::RingFeatures,
    pub(crate) shape: ChainShape,
    pub(crate) buffers: u32,
    pub(crate) buffer_bytes: u32,
}

impl RingPlan {
    fn config(&self) -> DriverConfig {
        let table_len = if self.shape.indirect { self.shape.descriptors } else { 0 };
        DriverConfig::new(self.layout, self.size).with_features(self.features, table_len)
    }

    /// Bytes of ring memory that the plan needs.
    pub(crate) fn ring_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.config().areas(virtq::mem::GuestPhysAddr(0))?.bytes.next_multiple_of(4096))
    }

    /// Bytes of buffer memory that the plan needs.
    pub(crate) fn pool_bytes(&self) -> u64 {
        u64::from(self.buffers).saturating_mul(u64::from(self.buffer_bytes)).next_multiple_of(4096)
    }
}

/// A transmitq. A slot is a buffer with a net header and a frame.
#[derive(Debug)]
pub(crate) struct TxRing {
    ring: Ring,
}

impl TxRing {
    pub(crate) fn new(memory: &mut Memory, plan: &RingPlan) -> anyhow::Result<Self> {
        let mut ring = Ring::new(memory, plan)?;
        ring.queue.disable_calls();
        Ok(Self { ring })
    }

    /// The buffers, to prepare them; each one starts with [`NET_HEADER`] zero bytes.
    pub(crate) fn pool(&self) -> &BufferPool {
        &self.ring.pool
    }

    /// Takes a slot, if one is free and the ring has room.
    #[inline]
    pub(crate) fn take(&mut self) -> anyhow::Result<Option<u32>> {
        if self.ring.pool.free() == 0 || !self.ring.has_room() {
            let _ = self.reclaim()?;
        }
        Ok(if self.ring.has_room() { self.ring.pool.take() } else { None })
    }

    /// Makes slot `slot` with a frame of `len` bytes available at the next flush.
    #[inline]
    pub(crate) fn send(&mut self, slot: u32, len: u32) -> anyhow::Result<()> {
        self.ring.add(slot, len.saturating_add(NET_HEADER), false)
    }

    /// Makes slot `slot` available, into which a frame was read with its header, `len` bytes in
    /// all. The bytes of the frame; none, and the slot is free again, if that is no whole frame.
    #[inline]
    pub(crate) fn send_read(&mut self, slot: u32, len: usize) -> anyhow::Result<Option<u64>> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let frame = len.saturating_sub(NET_HEADER);
        let pool = &self.ring.pool;
        // A frame that fills the slot has lost its end.
        if frame == 0 || len >= pool.buffer_bytes() {
            self.put_back(slot);
            return Ok(None);
        }
        let mut flags = [0];
        let _ = pool.read(slot, 0, &mut flags);
        if flags[0] & !NEEDS_CSUM != 0 {
            // A tap says DATA_VALID too, which a driver must not.
            let _ = pool.write(slot, 0, &[flags[0] & NEEDS_CSUM]);
        }
        self.ring.add(slot, len, false)?;
        Ok(Some(u64::from(frame)))
    }

    /// Gives back a slot that was taken and not sent.
    pub(crate) fn put_back(&mut self, slot: u32) {
        self.ring.pool.give(slot);
    }

    /// Shows the device what was sent, and kicks it if it wants that.
    pub(crate) fn flush(&mut self) {
        self.ring.flush();
    }

    /// Takes back what the device has read; returns how many.
    pub(crate) fn reclaim(&mut self) -> anyhow::Result<usize> {
        let mut total = 0usize;
        loop {
            let count = self.ring.queue.poll_burst(&mut self.ring.used)?;
            for used in self.ring.used.iter().take(count) {
                self.ring.pool.give(u32::try_from(used.cookie).unwrap_or(u32::MAX));
            }
            total = total.saturating_add(count);
            if count < BURST {
                return Ok(total);
            }
        }
    }

    /// Whether nothing can be sent until the device has read something.
    pub(crate) fn is_full(&self) -> bool {
        self.ring.pool.free() == 0 || !self.ring.has_room()
    }

    /// Frames that the device has not read yet.
    pub(crate) fn outstanding(&self) -> u16 {
        self.ring.queue.outstanding()
    }
}

/// One received frame: a list of buffers, the first one with the net header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a> {
    pool: &'a BufferPool,
    parts: &'a [(u32, u32)],
    /// Bytes of the frame.
    pub(crate) len: u32,
}

impl Received<'_> {
    /// Copies the frame's first bytes to `out`; returns how many.
    #[inline]
    pub(crate) fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0usize;
        let mut skip = NET_HEADER;
        for (slot, len) in self.parts {
            let Some(rest) = out.get_mut(done..).filter(|r| !r.is_empty()) else { break };
            let here = (len.saturating_sub(skip) as usize).min(rest.len());
            let target = rest.get_mut(..here).unwrap_or_default();
            done = done.saturating_add(self.pool.read(*slot, skip, target));
            skip = 0;
        }
        done
    }
}

impl<'a> Received<'a> {
    /// Header and frame where they are.
    #[inline]
    pub(crate) fn pieces(&self) -> impl Iterator<Item = ReadPiece<'a>> + Clone + use<'a> {
        let pool = self.pool;
        let piece = |(slot, len): &(u32, u32)| pool.readable(*slot).reader().next_piece(*len);
        self.parts.iter().filter_map(piece)
    }
}

/// A receiveq.
#[derive(Debug)]
pub(crate) struct RxRing {
    ring: Ring,
    mergeable: bool,
    /// Buffers of the frame that is being put together.
    parts: Vec<(u32, u32)>,
    /// Buffers that it still lacks.
    missing: u16,
}

impl RxRing {
    /// A receiveq with all its buffers added; [`Self::refill`] shows them to the device.
    pub(crate) fn new(
        memory: &mut Memory,
        plan: &RingPlan,
        mergeable: bool,
    ) -> anyhow::Result<Self> {
        let mut ring = Ring::new(memory, plan)?;
        ring.queue.disable_calls();
        let parts = Vec::with_capacity(usize::from(plan.size));
        let mut rx = Self { ring, mergeable, parts, missing: 0 };
        let _ = rx.refill()?;
        Ok(rx)
    }

    /// Gives free buffers to the device; returns how many.
    pub(crate) fn refill(&mut self) -> anyhow::Result<usize> {
        let mut count = 0usize;
        while self.ring.has_room() {
            let Some(slot) = self.ring.pool.take() else { break };
            self.ring.add(slot, self.ring.pool.buffer_bytes(), true)?;
            count = count.saturating_add(1);
        }
        if count > 0 {
            self.ring.flush();
        }
        Ok(count)
    }

    /// Takes a burst of frames and gives their buffers back; returns how many frames there were.
    #[inline]
    pub(crate) fn receive(
        &mut self,
        sink: impl FnMut(Received<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        self.receive_most(BURST, sink)
    }

    /// As [`Self::receive`], of so many buffers at most.
    #[inline]
    pub(crate) fn receive_most(
        &mut self,
        most: usize,
        mut sink: impl FnMut(Received<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        let used = self.ring.used.get_mut(..most.min(BURST)).unwrap_or_default();
        let count = self.ring.queue.poll_burst(used)?;
        if count == 0 {
            return Ok(0);
        }
        let mut frames = 0usize;
        for index in 0..count {
            let used = self.ring.used.get(index).copied().unwrap_or_default();
            let slot = u32::try_from(used.cookie).unwrap_or(u32::MAX);
            self.add_part(slot, used.len)?;
            if self.missing > 0 {
                continue;
            }
            let total = self.parts.iter().fold(0u32, |sum, (_, len)| sum.saturating_add(*len));
            let len = total.saturating_sub(NET_HEADER);
            let result = sink(Received { pool: &self.ring.pool, parts: &self.parts, len });
            for (slot, _) in self.parts.drain(..) {
                self.ring.pool.give(slot);
            }
            result?;
            frames = frames.saturating_add(1);
        }
        let _ = self.refill()?;
        Ok(frames)
    }

    fn add_part(&mut self, slot: u32, len: u32) -> anyhow::Result<()> {
        if self.parts.is_empty() {
            if len < NET_HEADER {
                bail!("the back end used a receive buffer with {len} bytes, less than its header");
            }
            let mut count = [0; 2];
            let _ = self.ring.pool.read(slot, 10, &mut count);
            let count = if self.mergeable { u16::from_le_bytes(count) } else { 1 };
            if count == 0 || count > self.ring.queue.size() {
                bail!("the back end spread a frame over {count} buffers");
            }
            self.missing = count;
        }
        self.parts.push((slot, len));
        self.missing = self.missing.saturating_sub(1);
        Ok(())
    }
}

/// What both kinds of ring have for the event loop.
macro_rules! common {
    ($ring:ty) => {
        impl $ring {
            /// Asks for a call; true if there is something to take already.
            pub(crate) fn arm(&mut self) -> bool {
                self.ring.queue.enable_calls()
            }

            /// Takes the call and asks for no more; returns whether there was one.
            pub(crate) fn disarm(&mut self) -> bool {
                self.ring.queue.disable_calls();
                self.ring.call.read().is_ok()
            }

            /// The queue, to set the device up.
            pub(crate) fn queue(&self) -> &DriverQueue {
                &self.ring.queue
            }

            /// Driver to device.
            pub(crate) fn kick(&self) -> &EventFd {
                &self.ring.kick
            }

            /// Device to driver.
            pub(crate) fn call(&self) -> &EventFd {
                &self.ring.call
            }

            /// Kicks that were sent.
            pub(crate) fn kicks(&self) -> u64 {
                self.ring.kicks
            }
        }
    };
}
common!(TxRing);
common!(RxRing);

#[cfg(test)]
mod tests {
    use virtq::driver::Buffer;
    use virtq::mem::GuestPhysAddr;

    use super::{PIECES, cut};

    #[test]
    fn pieces_cover_the_buffer_and_the_first_is_the_header() {
        let whole = Buffer { addr: GuestPhysAddr(4096), len: 1012 };
        for count in 1..=16 {
            let mut pieces = [whole; PIECES];
            let used = cut(whole, count, &mut pieces);
            assert_eq!(used, usize::from(count));
            let mut at = whole.addr.0;
            for piece in &pieces[..used] {
                assert_eq!(piece.addr.0, at);
                assert!(piece.len > 0);
                at += u64::from(piece.len);
            }
            assert_eq!(at, 4096 + 1012);
            assert!(count == 1 || pieces[0].len == 12);
        }
    }
}
