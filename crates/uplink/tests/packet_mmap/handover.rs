//! Packet sockets go on in other hands: from duplicates of their fds, with mappings of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{Egress, Ingress, Offload, OffloadSet};
use uplink::packet_mmap::{PacketMmap, from_parts, parts};

use super::namespace::Namespace;
use super::{FrameBuf, Two, numbered, plain, send, take, totals};

/// The same uplink, made of duplicates in another thread; the old one is let go.
pub(crate) fn other_hands(mut uplink: PacketMmap, offloads: OffloadSet) -> PacketMmap {
    let queues = uplink.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    let parts = parts(&uplink.link, &uplink.kernel, queues).unwrap();
    let count = uplink.queues.len();
    let new = std::thread::spawn(move || {
        let counters: Vec<_> = (0..count).map(|_| Arc::default()).collect();
        from_parts(parts, offloads, &counters).unwrap()
    });
    let new = new.join().unwrap();
    uplink.link.leave();
    new
}

/// Takes one burst without giving it back.
fn one_burst(from: &mut impl Ingress) -> Vec<Vec<u8>> {
    let mut buffer = FrameBuf::default();
    loop {
        let batch = from.receive(&mut buffer);
        if !batch.is_empty() {
            return batch.frames().iter().map(|frame| super::bytes_of(&batch, frame)).collect();
        }
    }
}

#[test]
fn what_is_in_the_rings_arrives_once_whoever_has_them() {
    let mut two = Two::new(9000);
    let mut number = 0;
    // More rounds than the receive ring has blocks, and more frames than the transmit ring slots.
    for round in 0..80 {
        let frames: Vec<_> =
            (0..100).map(|i| numbered(number + i, 60 + (i * 91 + round) % 8900)).collect();
        number += frames.len();
        for burst in frames.chunks(50) {
            send(&mut two.left.queues[0].1, &plain(burst.to_vec()));
        }
        // The first burst ends in the middle of a block.
        let mut got = one_burst(&mut two.right.queues[0].0);
        two.left = other_hands(two.left, OffloadSet::ALL);
        two.right = other_hands(two.right, OffloadSet::ALL);
        let rest = frames.len() - got.len();
        got.extend(take(&mut two.right.queues[0].0, rest));
        assert!(got == frames, "round {round}: {} frames", got.len());
        assert_eq!(totals(two.left.queues[0].1.counters()).dropped(), 0);
    }
}

#[test]
fn the_interface_is_left_to_the_last_owner() {
    let namespace = Namespace::new();
    namespace.pair("left0", &namespace, "right0", 1500);
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    let uplink = other_hands(namespace.open("left0", 2).unwrap(), OffloadSet::ALL);
    let state = || {
        let text = namespace.ip(&["-d", "link", "show", "left0"]);
        (text.contains("state UP"), text.contains("promiscuity 1"))
    };
    assert_eq!(state(), (true, true));
    assert_eq!((uplink.queues.len(), uplink.kernel.len()), (2, 2));
    drop(uplink);
    // Another test that starts a program holds our fds for a moment too.
    let start = Instant::now();
    while state() != (false, false) {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", state());
    }
}

#[test]
fn a_large_frame_that_is_half_cut_is_cut_on() {
    let mut two = Two::new(1500);
    let mut large = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    let payload = 60_000_usize;
    large.extend(((payload + 40) as u16).to_be_bytes());
    large.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    large.extend([0, 80, 0, 90, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    let first = large.len();
    large.extend((0..payload).map(|at| (at * 7 + at / 251) as u8));
    let offload = Offload {
        needs_csum: true,
        csum_start: 34,
        csum_offset: 16,
        gso: port::Gso::TcpV4,
        gso_size: 500,
        hdr_len: 54,
        ..Offload::default()
    };
    for _ in 0..2 {
        send(&mut two.left.queues[0].1, &[(large.clone(), offload)]);
        let segments = payload / 500;
        // Fewer than there are: the batch is full.
        let mut got = one_burst(&mut two.right.queues[0].0);
        assert!(got.len() < segments, "{}", got.len());
        two.right = other_hands(two.right, OffloadSet::ALL);
        got.extend(take(&mut two.right.queues[0].0, segments - got.len()));
        let joined: Vec<u8> = got.iter().flat_map(|frame| frame[first..].to_vec()).collect();
        assert!(joined == large[first..], "{} of {payload} bytes", joined.len());
    }
}
