//! Runs the example, with the `vhost` crate's front end as both guests.
#![forbid(unsafe_code)]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code"
)]

#[path = "../examples/two_port_switch.rs"]
#[expect(dead_code, reason = "its main")]
mod two_port_switch;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost::vhost_user::Frontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_net::features;
use virtq::Layout;
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 1 << 20;
const SIZE: u16 = 64;
const FRAME: u32 = 72;

/// A guest behind a front end without protocol features: its rings are enabled from the start.
struct Guest {
    frontend: Frontend,
    queues: [DriverQueue; 2],
    pool: BufferPool,
    kicks: [EventFd; 2],
}

fn patience() -> impl Fn(&str) {
    let end = Instant::now() + Duration::from_secs(10);
    move |what| {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Guest {
    fn boot(socket: &Path) -> Self {
        let wait = patience();
        let frontend = loop {
            match Frontend::connect(socket, 2) {
                Ok(frontend) => break frontend,
                Err(error) => wait(&error.to_string()),
            }
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap());
        frontend.set_owner().unwrap();
        let wanted = features::VERSION_1 | features::MRG_RXBUF;
        assert_eq!(frontend.get_features().unwrap() & wanted, wanted);
        frontend.set_features(wanted).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let host = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: host,
            mmap_offset: 0,
            mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
        };
        let _ = frontend.set_mem_table(&[info]).unwrap();
        let map = GuestMap::new(memory).unwrap();
        let config = DriverConfig::new(Layout::Split, SIZE);
        let queues = [0x1000, 0x8000]
            .map(|base| DriverQueue::new(&map, config, GuestPhysAddr(base)).unwrap());
        let pool = BufferPool::new(&map, GuestPhysAddr(0x2_0000), 2048, 2).unwrap();
        let kicks = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
        let guest = Self { frontend, queues, pool, kicks };
        guest.start(host);
        guest
    }

    fn start(&self, host: u64) {
        for (index, queue) in self.queues.iter().enumerate() {
            let areas = queue.areas();
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: host + areas.desc.0,
                used_ring_addr: host + areas.device.0,
                avail_ring_addr: host + areas.driver.0,
                log_addr: None,
            };
            self.frontend.set_vring_num(index, SIZE).unwrap();
            self.frontend.set_vring_base(index, 0).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
        }
    }

    fn post(&mut self) {
        self.queues[0].add_writable(&[self.pool.buffer(0, 2048)], 0).unwrap();
        self.queues[0].publish();
    }

    fn send(&mut self, frame: &[u8]) {
        let bytes = [&[0; 12], frame].concat();
        assert_eq!(self.pool.write(1, 0, &bytes), bytes.len());
        self.queues[1].add_readable(&[self.pool.buffer(1, FRAME)], 0).unwrap();
        self.queues[1].publish();
        if self.queues[1].needs_kick() {
            self.kicks[1].write(1).unwrap();
        }
        let wait = patience();
        while self.queues[1].poll_used().unwrap().is_none() {
            wait("the frame was not taken");
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let used = self.queues[0].poll_used().unwrap()?;
        let mut frame = vec![0; used.len as usize - 12];
        assert_eq!(self.pool.read(0, 12, &mut frame), frame.len());
        Some(frame)
    }
}

#[test]
fn two_guests_talk_through_the_example() {
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["s0", "s1"].map(|name| folder.path().join(name));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| two_port_switch::serve(&sockets, &stop).unwrap());
        let mut guests = [&sockets[0], &sockets[1]].map(|socket| Guest::boot(socket));
        let wait = patience();
        for round in 0..40 {
            let (from, to) = (round % 2, 1 - round % 2);
            let mac = |number: usize| [2, 0, 0, 0, 0, u8::try_from(number).unwrap()];
            let text = [u8::try_from(round).unwrap(); 46];
            let frame = [&mac(to)[..], &mac(from), &[0x88, 0xb5], &text].concat();
            guests[to].post();
            // Until the other guest's receiveq runs, its frames are lost.
            let received = loop {
                guests[from].send(&frame);
                if let Some(received) = guests[to].receive() {
                    break received;
                }
                assert!(round == 0, "lost between running guests");
                wait("nothing arrives");
            };
            assert_eq!(received, frame);
        }
        stop.store(true, Ordering::Relaxed);
        drop(guests);
        served.join().unwrap();
    });
}
