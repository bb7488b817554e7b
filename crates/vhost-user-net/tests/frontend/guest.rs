//! A guest: the `vhost` crate's front end, and our driver on shared memory.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_net::features::{RING_PACKED, layout, ring_features};
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const MEMORY: usize = 4 << 20;
pub(crate) const GUEST: u64 = 0x1_0000_0000;
/// Not where the memory really is in this process: addresses are translated, never used.
pub(crate) const USER: u64 = 0x7000_0000_0000;
const QUEUE: u16 = 64;
const BUFFER: u32 = 2048;
const HEADER: u32 = 12;

/// One queue of the guest.
pub(crate) struct Queue {
    pub(crate) driver: DriverQueue,
    pub(crate) pool: BufferPool,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    size: u16,
}

pub(crate) struct Guest {
    pub(crate) front: Frontend,
    pub(crate) queues: Vec<Queue>,
    pub(crate) file: File,
    features: u64,
    map: GuestMap,
}

pub(crate) fn front_end(stream: UnixStream) -> Frontend {
    let front = Frontend::from_stream(stream, 256);
    front.set_owner().unwrap();
    let _ = front.get_features().unwrap();
    front
}

fn nobody() -> Frontend {
    Frontend::from_stream(UnixStream::pair().unwrap().0, 0)
}

impl Guest {
    /// Negotiates, shares memory and fills the receiveq; rings are not started.
    pub(crate) fn new(stream: UnixStream, features: u64) -> Self {
        let mut guest = Self::alone(features);
        guest.join(stream);
        guest
    }

    /// As [`Self::new`], and the memory is not shared.
    pub(crate) fn arriving(stream: UnixStream, features: u64) -> Self {
        let mut guest = Self::alone(features);
        guest.negotiate(stream);
        guest
    }

    /// Without a connection.
    pub(crate) fn alone(features: u64) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, u64::try_from(MEMORY).unwrap()).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(GUEST), MEMORY, Some(offset))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let map = GuestMap::new(Arc::new(memory)).unwrap();
        let queues = (0..2u64).map(|ring| make_queue(&map, features, ring, QUEUE)).collect();
        Self { front: nobody(), queues, file, features, map }
    }

    pub(crate) fn map(&self) -> &GuestMap {
        &self.map
    }

    /// Closes the connection; rings and memory stay.
    pub(crate) fn leave(&mut self) {
        self.front = nobody();
    }

    /// Negotiates on a new connection and shares the memory.
    pub(crate) fn join(&mut self, stream: UnixStream) {
        self.negotiate(stream);
        self.share();
    }

    fn negotiate(&mut self, stream: UnixStream) {
        self.front = front_end(stream);
        let offered = self.front.get_protocol_features().unwrap();
        self.front.set_protocol_features(offered).unwrap();
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.front.set_features(self.features).unwrap();
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: u64::try_from(MEMORY).unwrap(),
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn share(&self) {
        let _ = self.front.set_mem_table(&[self.region()]).unwrap();
    }

    /// Starts and enables both rings at the beginning.
    pub(crate) fn start(&mut self) {
        for ring in 0..2 {
            self.start_anew(ring);
        }
    }

    /// Where a ring is, and where writes to its used ring are to be noted.
    pub(crate) fn say_addr(&self, ring: usize, log_addr: Option<u64>) {
        let queue = &self.queues[ring];
        let user = |addr: GuestPhysAddr| addr.0 - GUEST + USER;
        let areas = queue.driver.areas();
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: u32::from(log_addr.is_some()),
            desc_table_addr: user(areas.desc),
            used_ring_addr: user(areas.device),
            avail_ring_addr: user(areas.driver),
            log_addr,
        };
        self.front.set_vring_addr(ring, &config).unwrap();
    }

    pub(crate) fn start_ring(&mut self, ring: usize, base: u16) {
        let queue = &self.queues[ring];
        self.front.set_vring_num(ring, queue.size).unwrap();
        self.front.set_vring_base(ring, base).unwrap();
        self.say_addr(ring, None);
        self.front.set_vring_call(ring, &queue.call).unwrap();
        self.front.set_vring_err(ring, &queue.err).unwrap();
        self.front.set_vring_kick(ring, &queue.kick).unwrap();
        self.front.set_vring_enable(ring, true).unwrap();
    }

    /// What a guest and its front end do to reset one ring: it ends, its buffers come back, and
    /// the next one has `size` entries.
    pub(crate) fn reset_ring(&mut self, ring: usize, size: u16) {
        self.front.set_vring_enable(ring, false).unwrap();
        let _ = self.front.get_vring_base(ring).unwrap();
        let number = u64::try_from(ring).unwrap();
        self.queues[ring] = make_queue(&self.map, self.features, number, size);
    }

    /// Starts a ring at its beginning.
    pub(crate) fn start_anew(&mut self, ring: usize) {
        let base = if self.features & RING_PACKED == 0 { 0 } else { 0x8000 };
        self.start_ring(ring, base);
    }

    pub(crate) fn stop(&mut self) -> [u32; 2] {
        [0, 1].map(|ring| {
            self.front.set_vring_enable(ring, false).unwrap();
            self.front.get_vring_base(ring).unwrap()
        })
    }

    /// Offers all free buffers to the device.
    pub(crate) fn fill(&mut self) {
        let queue = &mut self.queues[0];
        while queue.driver.free() > 0 {
            let Some(index) = queue.pool.take() else { break };
            let buffer = queue.pool.buffer(index, BUFFER);
            queue.driver.add_writable(&[buffer], index.into()).unwrap();
        }
        queue.driver.publish();
    }

    /// Takes back what was sent. Returns whether that is all.
    pub(crate) fn reclaim(&mut self) -> bool {
        let queue = &mut self.queues[1];
        while let Some(used) = queue.driver.poll_used().unwrap() {
            queue.pool.give(u32::try_from(used.cookie).unwrap());
        }
        queue.driver.free() == queue.size
    }

    /// Puts a frame into the ring. False if there is no room.
    pub(crate) fn send(&mut self, frame: &[u8]) -> bool {
        let _ = self.reclaim();
        let queue = &mut self.queues[1];
        let Some(index) = queue.pool.take() else { return false };
        let len = HEADER + u32::try_from(frame.len()).unwrap();
        let _ = queue.pool.write(index, 0, &[0; 12]);
        let _ = queue.pool.write(index, HEADER, frame);
        let buffer = queue.pool.buffer(index, len);
        queue.driver.add_readable(&[buffer], index.into()).unwrap();
        queue.driver.publish();
        if queue.driver.needs_kick() {
            queue.kick.write(1).unwrap();
        }
        true
    }

    /// Takes the next received frame and offers its buffer again.
    pub(crate) fn receive(&mut self) -> Option<Vec<u8>> {
        let queue = &mut self.queues[0];
        let used = queue.driver.poll_used().unwrap()?;
        let index = u32::try_from(used.cookie).unwrap();
        let mut frame = vec![0; usize::try_from(used.len - HEADER).unwrap()];
        let _ = queue.pool.read(index, HEADER, &mut frame);
        queue.pool.give(index);
        self.fill();
        Some(frame)
    }
}

fn make_queue(map: &GuestMap, features: u64, ring: u64, size: u16) -> Queue {
    let base = GUEST + ring * 0x10_0000;
    let mut config = DriverConfig::new(layout(features), size);
    config = config.with_features(ring_features(features), 0);
    let driver = DriverQueue::new(map, config, GuestPhysAddr(base)).unwrap();
    let buffers = GuestPhysAddr(base + 0x8_0000);
    let pool = BufferPool::new(map, buffers, BUFFER, u32::from(size)).unwrap();
    let [kick, call, err] = [(); 3].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    Queue { driver, pool, kick, call, err, size }
}
