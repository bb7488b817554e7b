//! A guest inside the test's process: memory, a driver for each ring, and the device's halves.
//!
//! ```text
//!  send ─► transmitq's driver ─► ring in private memory ─► Transmitq ─► switch
//!  receive ◄─ receiveq's driver ◄─ ring ◄─ Receiveq ◄─ switch
//! ```
//!
//! **Limits.** One queue pair. Frames of up to one transmit buffer.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use port::{Fabric, QueueCounters, QueueId};
use rustix::event::{EventfdFlags, eventfd};
use virtio_net::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts, features};
use virtq::driver::{BufferPool, DriverConfig, DriverError, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr, MapError};
use virtq::{Layout, QueueConfig, QueueError, RingFeatures};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Where the rings start in guest memory, and where the buffers do.
const RINGS: [u64; 2] = [0, 4 << 20];
const BUFFERS: [u64; 2] = [8 << 20, 24 << 20];
const MEMORY: usize = 40 << 20;
const POOL_BYTES: u64 = 16 << 20;
/// Bytes of `virtio_net_hdr`.
const HEADER: u32 = 12;
/// Entries of an indirect table.
const TABLE: u16 = 4;

/// A frame that arrived, behind its header.
pub type ReceivedFrame = ([u8; HEADER as usize], Vec<u8>);

/// What a guest's driver negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSettings {
    /// Ring format.
    pub layout: Layout,
    /// Ring features.
    pub features: RingFeatures,
    /// Entries of each ring.
    pub queue_size: u16,
    /// `MRG_RXBUF`
    pub mergeable: bool,
    /// Bytes of each receive buffer.
    pub rx_bytes: u32,
    /// Bytes of each transmit buffer.
    pub tx_bytes: u32,
    /// Largest frame that the device takes, without a tag's four bytes and the Ethernet header.
    pub mtu: u16,
    /// Feature bits of offloads: the driver's own affair, it gets what it negotiated.
    pub offloads: u64,
}

impl GuestSettings {
    /// Rings of 256 entries, mergeable buffers of 2048 bytes, frames of up to 9000.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            features: RingFeatures { event_idx: true, ..RingFeatures::default() },
            queue_size: 256,
            mergeable: true,
            rx_bytes: 2048,
            tx_bytes: 9216,
            mtu: 9000,
            offloads: 0,
        }
    }

    /// The feature bits that these settings stand for.
    pub fn bits(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        features::VERSION_1
            | self.offloads
            | bit(self.mergeable, features::MRG_RXBUF)
            | bit(self.layout == Layout::Packed, features::RING_PACKED)
            | bit(self.features.event_idx, features::EVENT_IDX)
            | bit(self.features.indirect, features::INDIRECT_DESC)
            | bit(self.features.in_order, features::IN_ORDER)
    }

    /// What the device's queues are told.
    pub fn options(&self) -> QueueOptions {
        features::queue_options(self.bits(), self.mtu)
    }
}

/// What can go wrong in a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// Its memory could not be made.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The device broke a rule, or the test asked for too much.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The device refused a ring.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A system call failed.
    #[error("eventfd: {0}")]
    System(#[from] rustix::io::Errno),
    /// Used buffers that make no frame.
    #[error("the device wrote {0} bytes, {1} buffers: no frame")]
    Malformed(u32, u16),
}

/// One ring from the driver's side.
#[derive(Debug)]
struct Ring {
    queue: DriverQueue,
    pool: BufferPool,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    /// What the device starts from.
    device: QueueConfig,
}

/// A guest.
#[derive(Debug)]
pub struct Guest {
    settings: GuestSettings,
    memory: Arc<GuestMemoryMmap<()>>,
    map: GuestMap,
    rx: Ring,
    tx: Ring,
    /// Buffers of a frame that is not complete yet.
    parts: Vec<(u32, u32)>,
    missing: u16,
    /// Its header.
    header: [u8; HEADER as usize],
}

impl Guest {
    /// Bytes of its memory.
    pub const BYTES: u64 = MEMORY as u64;
    /// What is below has the rings, what is above the buffers.
    pub const BUFFERS: u64 = BUFFERS[0];

    /// A guest whose receiveq is full of buffers.
    ///
    /// # Errors
    ///
    /// [`GuestError`] if the settings make no queue.
    pub fn new(settings: GuestSettings) -> Result<Self, GuestError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|_| MapError::Private(MEMORY))?;
        Self::on(settings, Arc::new(memory))
    }

    /// The same in memory of the caller's: [`Self::BYTES`] bytes from address 0 on.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn on(
        settings: GuestSettings,
        memory: Arc<GuestMemoryMmap<()>>,
    ) -> Result<Self, GuestError> {
        let map = GuestMap::new(Arc::clone(&memory))?;
        let [rx_ring, tx_ring] = RINGS;
        let [rx_pool, tx_pool] = BUFFERS;
        let rx = Ring::new(&map, &settings, (rx_ring, rx_pool), settings.rx_bytes)?;
        let tx = Ring::new(&map, &settings, (tx_ring, tx_pool), settings.tx_bytes)?;
        let mut guest = Self {
            settings,
            memory,
            map,
            rx,
            tx,
            parts: Vec::new(),
            missing: 0,
            header: [0; HEADER as usize],
        };
        guest.refill()?;
        Ok(guest)
    }

    /// The guest's memory, as a VMM has it.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap<()>> {
        &self.memory
    }

    /// What was negotiated.
    pub fn settings(&self) -> &GuestSettings {
        &self.settings
    }

    /// The rings as a device sees them: the receiveq and the transmitq.
    pub fn queue_configs(&self) -> [QueueConfig; 2] {
        [self.rx.device, self.tx.device]
    }

    /// The eventfds of receiveq and transmitq: kick and call of each.
    pub fn event_fds(&self) -> [(Arc<OwnedFd>, Arc<OwnedFd>); 2] {
        [&self.rx, &self.tx].map(|ring| (Arc::clone(&ring.kick), Arc::clone(&ring.call)))
    }

    /// The device's receiveq, from where the last one stopped.
    ///
    /// # Errors
    ///
    /// [`GuestError::Queue`] if the ring is broken.
    pub fn receiveq(&self, counters: &Arc<QueueCounters>) -> Result<Receiveq, GuestError> {
        let queue = self.rx.device.activate(&self.map)?;
        Ok(Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue,
            kick: Some(Arc::clone(&self.rx.kick)),
            call: Some(Arc::clone(&self.rx.call)),
            counters: Arc::clone(counters),
            options: self.settings.options(),
        }))
    }

    /// The device's transmitq, from where the last one stopped.
    ///
    /// # Errors
    ///
    /// [`GuestError::Queue`] if the ring is broken.
    pub fn transmitq(&self, counters: &Arc<QueueCounters>) -> Result<Transmitq, GuestError> {
        let queue = self.tx.device.activate(&self.map)?;
        Ok(Transmitq::new(TransmitqParts {
            watch: Default::default(),
            queue,
            kick: Some(Arc::clone(&self.tx.kick)),
            call: Some(Arc::clone(&self.tx.call)),
            counters: Arc::clone(counters),
            options: self.settings.options(),
        }))
    }

    /// Attaches both halves to a switch.
    ///
    /// # Errors
    ///
    /// [`GuestError::Queue`] if a ring is broken.
    pub fn attach(
        &mut self,
        fabric: &dyn Fabric,
        at: QueueId,
        counters: &Arc<QueueCounters>,
    ) -> Result<(), GuestError> {
        fabric.attach_egress(at, Box::new(self.receiveq(counters)?));
        fabric.attach_ingress(at, Box::new(self.transmitq(counters)?));
        Ok(())
    }

    /// Detaches both halves; the rings keep their positions for the next [`Self::attach`].
    /// Returns whether both were there.
    pub fn detach(&mut self, fabric: &dyn Fabric, at: QueueId) -> bool {
        let ingress = fabric.detach_ingress(at).and_then(|b| b.into_any().downcast().ok());
        let egress = fabric.detach_egress(at).and_then(|b| b.into_any().downcast().ok());
        let both = ingress.is_some() && egress.is_some();
        if let Some(transmitq) = ingress {
            let transmitq: Box<Transmitq> = transmitq;
            self.tx.device = transmitq.into_parts().queue.stop();
        }
        if let Some(receiveq) = egress {
            let receiveq: Box<Receiveq> = receiveq;
            self.rx.device = receiveq.into_parts().queue.stop();
        }
        both
    }

    /// Offers a frame to the device, in `pieces` descriptors; false if the ring has no room. The
    /// device sees it after [`Self::flush`].
    ///
    /// # Errors
    ///
    /// [`GuestError::Driver`] if the device broke a rule.
    pub fn send(&mut self, frame: &[u8], pieces: u16) -> Result<bool, GuestError> {
        self.send_with(&[0; HEADER as usize], frame, pieces)
    }

    /// As [`Self::send`], with a `virtio_net_hdr` of the caller's.
    ///
    /// # Errors
    ///
    /// As [`Self::send`].
    pub fn send_with(
        &mut self,
        header: &[u8; HEADER as usize],
        frame: &[u8],
        pieces: u16,
    ) -> Result<bool, GuestError> {
        self.reclaim()?;
        if self.tx.queue.free() < pieces.max(1) {
            return Ok(false);
        }
        let Some(slot) = self.tx.pool.take() else { return Ok(false) };
        let _ = self.tx.pool.write(slot, 0, header);
        let written = self.tx.pool.write(slot, HEADER, frame);
        let len = u32::try_from(written).unwrap_or(0).saturating_add(HEADER);
        let buffers = cut(self.tx.pool.buffer(slot, len), pieces);
        if self.settings.features.indirect && buffers.len() <= usize::from(TABLE) {
            self.tx.queue.add_indirect(&buffers, &[], u64::from(slot))?;
        } else {
            self.tx.queue.add_readable(&buffers, u64::from(slot))?;
        }
        Ok(true)
    }

    /// Publishes what was sent and kicks if the device wants it; returns whether it did.
    pub fn flush(&mut self) -> bool {
        self.tx.flush()
    }

    /// Takes all frames that have arrived, and gives their buffers back.
    ///
    /// # Errors
    ///
    /// [`GuestError`] if the device broke a rule.
    pub fn receive(&mut self) -> Result<Vec<Vec<u8>>, GuestError> {
        Ok(self.receive_with()?.into_iter().map(|(_, frame)| frame).collect())
    }

    /// As [`Self::receive`], each frame with its `virtio_net_hdr`.
    ///
    /// # Errors
    ///
    /// As [`Self::receive`].
    pub fn receive_with(&mut self) -> Result<Vec<ReceivedFrame>, GuestError> {
        let mut frames = Vec::new();
        while let Some(used) = self.rx.queue.poll_used()? {
            let slot = u32::try_from(used.cookie).unwrap_or(u32::MAX);
            if self.missing == 0 {
                let _ = self.rx.pool.read(slot, 0, &mut self.header);
                let [.., lo, hi] = self.header;
                self.missing = u16::from_le_bytes([lo, hi]);
                if used.len < HEADER
                    || self.missing == 0
                    || (self.missing > 1 && !self.settings.mergeable)
                {
                    return Err(GuestError::Malformed(used.len, self.missing));
                }
            }
            self.parts.push((slot, used.len));
            self.missing = self.missing.saturating_sub(1);
            if self.missing == 0 {
                frames.push((self.header, self.take_frame()));
            }
        }
        self.refill()?;
        Ok(frames)
    }

    /// Whether the device has all sent frames behind it.
    ///
    /// # Errors
    ///
    /// [`GuestError::Driver`] if the device broke a rule.
    pub fn all_sent(&mut self) -> Result<bool, GuestError> {
        self.reclaim()?;
        Ok(self.tx.queue.outstanding() == 0)
    }

    /// Writes `bytes` over the transmitq's ring, from `offset` on: what a hostile driver does.
    ///
    /// # Errors
    ///
    /// [`GuestError::Driver`] if that is outside of the ring's memory.
    pub fn scribble(&self, offset: u32, bytes: &[u8]) -> Result<(), GuestError> {
        let [_, base] = RINGS;
        let len = u32::try_from(self.tx.queue.areas().bytes).unwrap_or(0);
        let ring = BufferPool::new(&self.map, GuestPhysAddr(base), len, 1)?;
        let _ = ring.write(0, offset, bytes);
        Ok(())
    }

    /// Bytes of the transmitq's ring.
    pub fn ring_bytes(&self) -> u64 {
        self.tx.queue.areas().bytes
    }

    /// Kicks the transmitq, wanted or not.
    pub fn kick(&self) {
        signal(&self.tx.kick);
    }

    /// Asks for a call when the next frame arrives; true if one is there already.
    pub fn enable_calls(&mut self) -> bool {
        self.rx.queue.enable_calls()
    }

    /// Takes the receiveq's call, if there is one.
    pub fn take_call(&self) -> bool {
        rustix::io::read(&self.rx.call, &mut [0; 8]).is_ok()
    }

    fn take_frame(&mut self) -> Vec<u8> {
        let mut frame = Vec::new();
        let mut skip = HEADER;
        for (slot, len) in self.parts.drain(..) {
            let mut part = vec![0; len.saturating_sub(skip) as usize];
            let _ = self.rx.pool.read(slot, skip, &mut part);
            frame.extend_from_slice(&part);
            self.rx.pool.give(slot);
            skip = 0;
        }
        frame
    }

    fn refill(&mut self) -> Result<(), GuestError> {
        let mut any = false;
        while self.rx.queue.free() > 0 {
            let Some(slot) = self.rx.pool.take() else { break };
            let buffer = self.rx.pool.buffer(slot, self.settings.rx_bytes);
            self.rx.queue.add_writable(&[buffer], u64::from(slot))?;
            any = true;
        }
        if any {
            let _ = self.rx.flush();
        }
        Ok(())
    }

    fn reclaim(&mut self) -> Result<(), GuestError> {
        while let Some(used) = self.tx.queue.poll_used()? {
            self.tx.pool.give(u32::try_from(used.cookie).unwrap_or(u32::MAX));
        }
        Ok(())
    }
}

impl Ring {
    fn new(
        map: &GuestMap,
        settings: &GuestSettings,
        (ring, pool): (u64, u64),
        bytes: u32,
    ) -> Result<Self, GuestError> {
        let config = DriverConfig::new(settings.layout, settings.queue_size)
            .with_features(settings.features, TABLE);
        let queue = DriverQueue::new(map, config, GuestPhysAddr(ring))?;
        let most = POOL_BYTES.checked_div(u64::from(bytes)).unwrap_or(1);
        let count = most.min(u64::from(settings.queue_size));
        let count = u32::try_from(count).unwrap_or(1);
        let pool = BufferPool::new(map, GuestPhysAddr(pool), bytes, count)?;
        let fd = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Arc::new);
        let device = queue.queue_config();
        Ok(Self { queue, pool, kick: fd()?, call: fd()?, device })
    }

    fn flush(&mut self) -> bool {
        self.queue.publish();
        let wanted = self.queue.needs_kick();
        if wanted {
            signal(&self.kick);
        }
        wanted
    }
}

fn signal(fd: &OwnedFd) {
    // It fails only when the counter is full, and then it is readable.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Cuts a buffer into up to `count` pieces of at least a byte.
fn cut(whole: virtq::driver::Buffer, count: u16) -> Vec<virtq::driver::Buffer> {
    let mut pieces = Vec::new();
    let mut rest = whole;
    for left in (1..=u32::from(count.max(1))).rev() {
        let share = rest.len.checked_div(left).unwrap_or(0).max(1).min(rest.len);
        let len = if left == 1 { rest.len } else { share };
        if len == 0 {
            break;
        }
        pieces.push(virtq::driver::Buffer { addr: rest.addr, len });
        rest.addr.0 = rest.addr.0.saturating_add(u64::from(len));
        rest.len = rest.len.saturating_sub(len);
    }
    pieces
}
