//! A driver that breaks its ring takes its own port out of service, visibly, until it is reset.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use testkit::{FrontEnd, SharedMemory};

use crate::bed::Bed;

const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const VERSION_1: u64 = 1 << 32;
const SIZE: u32 = 8;
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x2000;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A front end with two rings; the available index of the transmitq is `avail`.
fn front_end(bed: &Bed, avail: u16) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&bed.path("g0.sock")).unwrap();
    let memory = SharedMemory::new(1 << 20).unwrap();
    let file = File::from(memory.as_fd().try_clone_to_owned().unwrap());
    file.write_all_at(&avail.to_le_bytes(), DRIVER + 2).unwrap();
    front_end.send(SET_OWNER, &[], &[]).unwrap();
    front_end.send(SET_FEATURES, &VERSION_1.to_le_bytes(), &[]).unwrap();
    let table = SharedMemory::table(0, memory.bytes());
    front_end.send(SET_MEM_TABLE, &table, &[memory.as_fd()]).unwrap();
    for ring in [0, 1u32] {
        let base = u64::from(ring) << 16;
        let used =
            if ring == 1 { [0, DEVICE, DRIVER] } else { [base, base + DEVICE, base + DRIVER] };
        let mut addresses = words(&[ring, 0]);
        for address in used.into_iter().chain([0]) {
            addresses.extend_from_slice(&address.to_le_bytes());
        }
        front_end.send(SET_VRING_NUM, &words(&[ring, SIZE]), &[]).unwrap();
        front_end.send(SET_VRING_BASE, &words(&[ring, 0]), &[]).unwrap();
        front_end.send(SET_VRING_ADDR, &addresses, &[]).unwrap();
        let number = u64::from(ring).to_le_bytes();
        for request in [SET_VRING_CALL, SET_VRING_KICK] {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            front_end.send(request, &number, &[fd.as_fd()]).unwrap();
        }
    }
    front_end
}

#[test]
fn a_broken_ring_shows_and_a_reset_mends_the_port() {
    let bed = Bed::started(&["--port", "vhost-user:name=g0,socket=g0.sock"]);
    let _hostile = front_end(&bed, 100);
    let port = bed.wait_state("g0", "broken");
    let error = port["last_error"]["text"].as_str().unwrap();
    assert!(error.contains("100"), "{port}");
    assert_eq!(bed.ctl(&["port", "reset", "g0"]), "port g0 is in service again\n");
    assert_eq!(bed.port("g0")["state"], "waiting");
    let _good = front_end(&bed, 0);
    let port = bed.wait_state("g0", "up");
    assert_eq!(port["reason"], "");
    assert_eq!(port["queues"], 1);
    assert_eq!(port["placement"][0]["index"], 0);
    assert!(port["placement"][0]["cpu"].is_u64(), "{port}");
}

#[test]
fn a_driver_that_breaks_one_ring_after_the_other_does_not_fill_the_log() {
    let start = Instant::now();
    let bed = Bed::started(&["--port", "vhost-user:name=g0,socket=g0.sock"]);
    let before = bed.log().lines().count();
    for _ in 0..40 {
        let hostile = front_end(&bed, 100);
        let _ = bed.wait_state("g0", "broken");
        drop(hostile);
        let _ = bed.wait_state("g0", "waiting");
    }
    let log = bed.log();
    let lines = log.lines().count() - before;
    // 30 at once, then one a second, and before each how many were left out.
    let most = 30 + 2 * usize::try_from(start.elapsed().as_secs() + 1).unwrap();
    assert!(lines <= most, "{lines} lines:\n{log}");
    assert!(log.contains("the driver broke the ring"), "{log}");
}
