//! The device behind `vhost-user-backend`'s daemon, with the `vhost` crate's front end as peer.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code"
)]

#[path = "../examples/vhost_user_daemon.rs"]
#[expect(dead_code, reason = "its main")]
mod vhost_user_daemon;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_net::features;
use virtq::Layout;
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 1 << 20;
const SIZE: u16 = 64;

struct Peer {
    frontend: Frontend,
    queues: [DriverQueue; 2],
    pool: BufferPool,
    kick: [EventFd; 2],
    call: [EventFd; 2],
}

fn connect(socket: &std::path::Path) -> Frontend {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match Frontend::connect(socket, 2) {
            Ok(frontend) => return frontend,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Peer {
    fn new(socket: &std::path::Path, ring: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap());
        let mut frontend = connect(socket);
        frontend.set_owner().unwrap();
        let vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let wanted = features::VERSION_1 | features::MRG_RXBUF | ring | vhost;
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered & wanted, wanted);
        assert_eq!(offered & (features::RING_PACKED | features::RING_RESET), 0);
        frontend.set_features(wanted).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
        frontend.set_protocol_features(VhostUserProtocolFeatures::MQ).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as u64;
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: host,
            mmap_offset: 0,
            mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
        };
        let _ = frontend.set_mem_table(&[info]).unwrap();
        let map = GuestMap::new(memory).unwrap();
        let config =
            DriverConfig::new(Layout::Split, SIZE).with_features(features::ring_features(ring), 0);
        let queues = [0x1000, 0x8000]
            .map(|base| DriverQueue::new(&map, config, GuestPhysAddr(base)).unwrap());
        let pool = BufferPool::new(&map, GuestPhysAddr(0x2_0000), 2048, 32).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let peer =
            Self { frontend, queues, pool, kick: [event(), event()], call: [event(), event()] };
        peer.start(host);
        peer
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
            self.frontend.set_vring_call(index, &self.call[index]).unwrap();
            self.frontend.set_vring_kick(index, &self.kick[index]).unwrap();
        }
    }

    /// Sends `count` frames and waits until they come back.
    fn exchange(&mut self, round: u8, count: u32) {
        let [receiveq, transmitq] = &mut self.queues;
        for index in 0..count {
            receiveq.add_writable(&[self.pool.buffer(index, 2048)], index.into()).unwrap();
            let frame = [&[0; 12], &[1; 6][..], &[2; 6], &[round; 50], &[index as u8]].concat();
            let buffer = 16 + index;
            assert_eq!(self.pool.write(buffer, 0, &frame), frame.len());
            let buffer = self.pool.buffer(buffer, frame.len() as u32);
            transmitq.add_readable(&[buffer], 0).unwrap();
        }
        receiveq.publish();
        let _ = receiveq.enable_calls();
        transmitq.publish();
        if transmitq.needs_kick() {
            self.kick[1].write(1).unwrap();
        }
        let end = Instant::now() + Duration::from_secs(10);
        for index in 0..count {
            let used = loop {
                match receiveq.poll_used().unwrap() {
                    Some(used) => break used,
                    None => assert!(Instant::now() < end, "frame {index} of round {round}"),
                }
            };
            let mut frame = [0; 75];
            assert_eq!(used.len, 75);
            assert_eq!(self.pool.read(used.cookie as u32, 0, &mut frame), 75);
            assert_eq!((&frame[12..18], &frame[18..24]), (&[2; 6][..], &[1; 6][..]));
            assert_eq!((frame[24], frame[74]), (round, index as u8));
        }
        while transmitq.outstanding() > 0 {
            let _ = transmitq.poll_used().unwrap();
            assert!(Instant::now() < end);
        }
        while self.call[0].read().is_err() {
            assert!(Instant::now() < end, "no call");
        }
    }
}

#[test]
fn the_daemon_serves_the_device() {
    for ring in [0, features::EVENT_IDX, features::IN_ORDER | features::INDIRECT_DESC] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("net.sock");
        let path = socket.clone();
        let daemon = std::thread::spawn(move || {
            vhost_user_daemon::serve(&path).map_err(|error| error.to_string())
        });
        let mut peer = Peer::new(&socket, ring);
        for index in 0..2 {
            peer.frontend.set_vring_enable(index, true).unwrap();
        }
        // The daemon forgets a kick that it sees before it has handled the enabling, which has no
        // answer of its own here; the answer to a later request says that it has.
        let _ = peer.frontend.get_features().unwrap();
        for round in 0..20 {
            peer.exchange(round, 1 + u32::from(round) % 16);
        }
        // The position survives the ring's stop, as a front end sees it.
        let sent: u32 = (0..20).map(|round| 1 + round % 16).sum();
        assert_eq!(peer.frontend.get_vring_base(1).unwrap(), sent);
        assert_eq!(peer.frontend.get_vring_base(0).unwrap(), sent);
        drop(peer);
        daemon.join().unwrap().unwrap();
    }
}
