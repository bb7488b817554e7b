//! A tap goes on in other hands: from duplicates of its fds.

use std::sync::Arc;

use port::OffloadSet;
use uplink::interface::LinkState;
use uplink::tap::{Tap, from_parts, parts};

use super::{HOST_MAC, Namespace, PEER_MAC, carry};

/// The same tap, made of duplicates in another thread; the old one is let go.
pub(crate) fn other_hands(mut tap: Tap, offloads: OffloadSet) -> Tap {
    let queues = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    let parts = parts(&tap.link, queues).unwrap();
    let count = tap.queues.len();
    let new = std::thread::spawn(move || {
        let counters: Vec<_> = (0..count).map(|_| Arc::default()).collect();
        from_parts(parts, offloads, &counters).unwrap()
    });
    let new = new.join().unwrap();
    tap.link.leave();
    new
}

#[test]
fn datagrams_cross_taps_whose_owner_changes() {
    let (host, peer) = (Namespace::new(), Namespace::new());
    let (mut a, mut b) = (host.open("tap0", 1).unwrap(), peer.open("tap0", 1).unwrap());
    for (namespace, own, other) in [
        (&host, (HOST_MAC, "10.9.0.1"), (PEER_MAC, "10.9.0.2")),
        (&peer, (PEER_MAC, "10.9.0.2"), (HOST_MAC, "10.9.0.1")),
    ] {
        namespace.quiet();
        namespace.address("tap0", own.0, &format!("{}/24", own.1), 1500);
        namespace.neighbour("tap0", other.1, other.0);
    }
    let (from, to) = (host.udp("10.9.0.1:0"), peer.udp("10.9.0.2:5000"));
    for round in 0..10u8 {
        for number in 0..5u8 {
            let _ = from.send_to(&[round, number], "10.9.0.2:5000").unwrap();
        }
        // All five wait in the tap's queue.
        a = other_hands(a, OffloadSet::ALL);
        b = other_hands(b, OffloadSet::ALL);
        let mut carried = 0;
        while carried < 5 {
            carried += carry(&mut a, &mut b);
        }
        for number in 0..5u8 {
            let mut bytes = [0; 8];
            assert_eq!(to.recv(&mut bytes).unwrap(), 2);
            assert_eq!(bytes[..2], [round, number]);
        }
    }
    assert!(a.link.was_made());
    assert_eq!(a.link.check(), LinkState::Up);
    drop(a);
    let start = std::time::Instant::now();
    while host.has("tap0") {
        assert!(start.elapsed().as_secs() < 5, "the last owner's end is its end");
    }
}
