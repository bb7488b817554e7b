//! What a tap's kernel leaves undone is what the settings allow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{FrameBuf, Ingress, OffloadSet};
use uplink::tap::{Tap, TapSettings, from_parts, open, parts};

use super::handover::other_hands;
use super::{HOST_MAC, Namespace, PEER_MAC};

/// Whether the checksum of the next datagram that arrives is left to us.
fn is_left(tap: &mut Tap) -> bool {
    let mut frames = FrameBuf::default();
    let start = Instant::now();
    loop {
        let ingress = &mut tap.queues[0].0;
        let batch = ingress.receive(&mut frames);
        let udp = batch.frames().iter().find(|frame| frame.head().get(23) == Some(&17));
        let left = udp.map(|frame| frame.offload.needs_csum);
        ingress.release();
        if let Some(left) = left {
            return left;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "no datagram arrived");
    }
}

#[test]
fn the_kernel_finishes_what_is_not_to_be_left_to_us() {
    let host = Namespace::new();
    host.quiet();
    let csum = OffloadSet { csum: true, ..OffloadSet::NONE };
    for offloads in [OffloadSet::ALL, csum, OffloadSet::NONE] {
        let settings = TapSettings { offloads, ..host.settings("tap0", 1) };
        let mut tap = open(&settings, &[Arc::default()]).unwrap();
        host.address("tap0", HOST_MAC, "10.9.0.1/24", 1500);
        host.neighbour("tap0", "10.9.0.2", PEER_MAC);
        let socket = host.udp("10.9.0.1:0");
        let send = || socket.send_to(&[1; 100], "10.9.0.2:7").unwrap();
        let _ = send();
        assert_eq!(is_left(&mut tap), offloads.csum, "{offloads:?}");
        // Whoever goes on with it has offloads of its own.
        tap = other_hands(tap, OffloadSet::NONE);
        let _ = send();
        assert!(!is_left(&mut tap), "{offloads:?}, and none later");
        tap = other_hands(tap, csum);
        let _ = send();
        assert!(is_left(&mut tap), "{offloads:?}, and checksums later");
    }
}

#[test]
fn who_goes_on_after_all_has_its_own_offloads() {
    let host = Namespace::new();
    host.quiet();
    let settings = TapSettings { offloads: OffloadSet::NONE, ..host.settings("tap0", 1) };
    let mut tap = open(&settings, &[Arc::default()]).unwrap();
    host.address("tap0", HOST_MAC, "10.9.0.1/24", 1500);
    host.neighbour("tap0", "10.9.0.2", PEER_MAC);
    let socket = host.udp("10.9.0.1:0");
    let send = || socket.send_to(&[1; 100], "10.9.0.2:7").unwrap();
    let queues = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    let parts = parts(&tap.link, queues).unwrap();
    let other = from_parts(parts, OffloadSet::ALL, &[Arc::default()]).unwrap();
    other.link.leave();
    let _ = send();
    assert!(is_left(&mut tap), "the other one's hold");
    tap.offloads().unwrap().set_again().unwrap();
    let _ = send();
    assert!(!is_left(&mut tap));
}
