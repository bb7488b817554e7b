//! The `vhost` crate's front end against our back end, message by message.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use port::PortState;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_net::SocketMode;
use vhost_user_net::session::{FEATURES, PROTOCOL_FEATURES};
use virtio_net::features::VERSION_1;
use vmm_sys_util::eventfd::EventFd;

use crate::guest::{Guest, MEMORY, front_end};
use crate::harness::Bench;

#[test]
fn what_is_offered_is_what_the_constants_say() {
    let bench = Bench::new(SocketMode::Server);
    let mut front = front_end(UnixStream::connect(bench.socket(0)).unwrap());
    assert_eq!(front.get_features().unwrap(), FEATURES);
    let offered = front.get_protocol_features().unwrap();
    assert_eq!(offered.bits(), PROTOCOL_FEATURES);
    front.set_protocol_features(offered).unwrap();
    assert_eq!(front.get_queue_num().unwrap(), 128);
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    front.set_features(VERSION_1).unwrap();
    let channel = EventFd::new(0).unwrap();
    front.set_backend_request_fd(&channel).unwrap();
    front.reset_device().unwrap();
    front.reset_owner().unwrap();
}

#[test]
fn refusals_arrive_as_errors_and_the_connection_lives() {
    let bench = Bench::with(|settings| settings.queue_size = 64);
    let mut guest = Guest::new(UnixStream::connect(bench.socket(0)).unwrap(), VERSION_1 | 1 << 30);
    assert!(guest.front.set_vring_num(0, 65).is_err());
    bench.wait_error(0, "ring 0 with 65 entries, 1 to 64 are allowed");
    let wrong = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        userspace_addr: 0x1000,
        memory_size: u64::try_from(MEMORY).unwrap() + 4096,
        ..guest.region()
    };
    assert!(guest.front.add_mem_region(&wrong).is_err());
    bench.wait_error(0, "0x401000 are needed");
    assert!(guest.front.remove_mem_region(&wrong).is_err());
    guest.fill();
    guest.start();
    bench.wait(0, PortState::Up, "");
}

#[test]
fn a_ring_that_its_memory_completes_is_refused_by_its_status() {
    let bench = Bench::new(SocketMode::Server);
    let mut guest = Guest::new(UnixStream::connect(bench.socket(0)).unwrap(), VERSION_1 | 1 << 30);
    guest.fill();
    let other =
        VhostUserMemoryRegionInfo { guest_phys_addr: 0, userspace_addr: 0x1000, ..guest.region() };
    let _ = guest.front.set_mem_table(&[other]).unwrap();
    guest.start();
    for ring in 0..2 {
        let _ = guest.front.get_vring_base(ring).unwrap();
        guest.front.set_vring_num(ring, 3).unwrap();
        guest.front.set_vring_kick(ring, &guest.queues[ring].kick).unwrap();
    }
    bench.wait(0, PortState::Waiting, "ring 0 is not within the memory");
    guest.share();
    bench.wait(0, PortState::Waiting, "ring 0 cannot be started: ");
    bench.wait_error(0, "ring 1: ");
}

#[test]
fn a_message_that_cannot_be_refused_ends_the_connection_and_nothing_else() {
    let bench = Bench::new(SocketMode::Server);
    let mut bad = front_end(UnixStream::connect(bench.socket(0)).unwrap());
    let good = front_end(UnixStream::connect(bench.socket(1)).unwrap());
    let _ = bad.get_protocol_features().unwrap();
    bad.set_protocol_features(VhostUserProtocolFeatures::MQ).unwrap();
    bad.set_vring_num(0, 0).unwrap();
    bench.wait_error(0, "ring 0 with 0 entries");
    bench.wait(0, PortState::Waiting, "waiting for the front end to connect to");
    assert!(bad.get_features().is_err());
    assert_eq!(good.get_features().unwrap(), FEATURES);
    let again = front_end(UnixStream::connect(bench.socket(0)).unwrap());
    assert_eq!(again.get_features().unwrap(), FEATURES);
    assert!(again.as_raw_fd() > 0);
}
