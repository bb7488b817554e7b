//! What goes wrong, and what is said about it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{DropReason, Egress, FrameBuf, Ingress, Offload, QueueFault};
use uplink::interface::LinkState;
use uplink::packet_mmap::{PacketMmapSettings, open};

use crate::namespace::Namespace;
use crate::{Two, numbered, plain, send, take, totals};

#[test]
fn a_deleted_interface_is_a_host_fault_on_both_ways() {
    let mut two = Two::new(1500);
    let _ = two.left_namespace.ip(&["link", "del", "left0"]);
    assert_eq!(two.right.link.check(), LinkState::Gone);
    let (ingress, egress) = &mut two.right.queues[0];
    let mut frames = FrameBuf::default();
    // As a worker does it that was woken.
    let start = Instant::now();
    let fault = loop {
        ingress.disarm();
        if let Some(fault) = ingress.receive(&mut frames).fault() {
            break fault.clone();
        }
        assert!(start.elapsed() < Duration::from_secs(2), "nothing was noticed");
    };
    assert_eq!(fault.to_string(), "receive from interface right0: it is gone");
    frames.clear();
    frames.slot().unwrap().fill_private(&numbered(0, 60));
    frames.keep();
    let fault = egress.send(&frames.batch(virtq::mem::SegStore::empty(), None), &[0]).unwrap_err();
    assert!(matches!(&fault, QueueFault::Host { what, .. } if what == "write to interface right0"));
    assert_eq!(totals(egress.counters()).drops[DropReason::UplinkError as usize], 1);
}

#[test]
fn an_interface_that_is_polled_only_is_noticed_too() {
    let mut two = Two::new(1500);
    let _ = two.left_namespace.ip(&["link", "del", "left0"]);
    let mut frames = FrameBuf::default();
    let ingress = &mut two.right.queues[0].0;
    let looks = (0..200_000).find(|_| ingress.receive(&mut frames).fault().is_some());
    assert!(looks.is_some());
}

#[test]
fn an_interface_that_was_down_carries_frames_again() {
    let mut two = Two::new(1500);
    let _ = two.left_namespace.ip(&["link", "set", "left0", "down"]);
    send(&mut two.left.queues[0].1, &plain([numbered(0, 60), numbered(1, 60)]));
    let counters = totals(two.left.queues[0].1.counters());
    assert_eq!(counters.drops[DropReason::UplinkError as usize], 2);
    let mut frames = FrameBuf::default();
    two.left.queues[0].0.disarm();
    assert_eq!(two.left.queues[0].0.receive(&mut frames).fault(), None);
    assert_eq!(two.left.link.check(), LinkState::Down);
    let _ = two.left_namespace.ip(&["link", "set", "left0", "up"]);
    send(&mut two.left.queues[0].1, &plain([numbered(2, 60)]));
    assert_eq!(take(&mut two.right.queues[0].0, 1), [numbered(2, 60)]);
    send(&mut two.right.queues[0].1, &plain([numbered(3, 60)]));
    assert_eq!(take(&mut two.left.queues[0].0, 1), [numbered(3, 60)]);
}

#[test]
fn what_the_kernel_refuses_is_counted_and_the_others_pass() {
    let mut two = Two::new(1500);
    let wrong = Offload { needs_csum: true, csum_start: 2000, ..Offload::default() };
    for refused in [vec![0], vec![63], vec![5, 6, 40], (0..64).collect()] {
        let before = totals(two.left.queues[0].1.counters());
        let frames: Vec<_> = (0..64)
            .map(|n| {
                let offload = if refused.contains(&n) { wrong } else { Offload::default() };
                // Some are above the MTU: those are counted once, however often the burst stops.
                let len = if n % 10 == 9 { 1600 } else { 60 + n };
                (numbered(n, len), if len > 1500 { Offload::default() } else { offload })
            })
            .collect();
        let good =
            |(bytes, offload): &&(Vec<u8>, Offload)| bytes.len() <= 1514 && !offload.needs_csum;
        let expected: Vec<_> = frames.iter().filter(good).map(|(bytes, _)| bytes.clone()).collect();
        send(&mut two.left.queues[0].1, &frames);
        let arrived = take(&mut two.right.queues[0].0, expected.len());
        assert!(arrived == expected, "{refused:?}: {} of {}", arrived.len(), expected.len());
        let after = totals(two.left.queues[0].1.counters());
        let drops = |reason| after.drops[reason as usize] - before.drops[reason as usize];
        assert_eq!(drops(DropReason::Oversize), 6);
        assert_eq!(drops(DropReason::UplinkError), 58 - expected.len() as u64);
        assert_eq!(after.tx_frames - before.tx_frames, expected.len() as u64);
    }
}

#[test]
fn what_was_changed_is_restored() {
    let (near, far) = (Namespace::new(), Namespace::new());
    near.pair("near0", &far, "far0", 1500);
    let shown = || near.ip(&["-d", "link", "show", "near0"]);
    let _ = near.ip(&["link", "set", "near0", "down"]);
    let port = near.open("near0", 2).unwrap();
    assert!(shown().contains("promiscuity 1") && shown().contains(",UP"), "{}", shown());
    drop(port);
    // A process that another test starts holds our sockets too, until it runs its program.
    let restored = || shown().contains("promiscuity 0") && !shown().contains(",UP");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !restored() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(restored(), "{}", shown());
}

#[test]
fn what_cannot_be_opened_is_named() {
    let namespace = Namespace::new();
    let error = |name: &str| namespace.open(name, 1).unwrap_err().to_string();
    let missing = format!("interface none0 does not exist in network namespace {}", namespace.0);
    assert_eq!(error("none0"), missing);
    let _ = namespace.ip(&["tuntap", "add", "tun0", "mode", "tun"]);
    assert_eq!(
        error("tun0"),
        "interface tun0 carries no Ethernet frames (its hardware type is 65534)"
    );
    assert!(error("a/b").starts_with("interface name \"a/b\" must have"));
    let settings = PacketMmapSettings {
        ifname: "x".to_owned(),
        netns: Some("cw-none".to_owned()),
        ..PacketMmapSettings::default()
    };
    assert_eq!(
        open(&settings, &[Arc::default()]).unwrap_err().to_string(),
        "network namespace cw-none cannot be opened: No such file or directory (os error 2)"
    );
}

#[test]
fn a_missing_right_is_named() {
    let (near, far) = (Namespace::new(), Namespace::new());
    near.pair("near0", &far, "far0", 1500);
    let settings = PacketMmapSettings { netns: None, ..near.settings("near0", 1) };
    let error = near.inside(move || {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).unwrap();
        open(&settings, &[Arc::default()]).unwrap_err().to_string()
    });
    assert_eq!(
        error,
        "no permission to open a socket on near0: CAP_NET_RAW is needed (root has it)"
    );
}

/// A large UDP frame as of old, which the kernel has no virtio-net header for any more; SCTP that
/// is to be segmented is another such one.
fn nameless() -> Vec<u8> {
    let mut bytes = vec![1, 3, 42, 0];
    for word in [1480_u16, 34, 6, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, 9, 8, 0, 0x45, 0]);
    bytes.extend(3028_u16.to_be_bytes());
    bytes.extend([0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 7, 0, 7]);
    bytes.extend(3008_u16.to_be_bytes());
    bytes.resize(12 + 14 + 3028, 0);
    bytes
}

#[test]
fn frames_that_the_kernel_cannot_describe_are_stepped_over_and_counted() {
    use uplink::tap;
    let namespace = Namespace::new();
    let settings = tap::TapSettings {
        ifname: "tap0".to_owned(),
        queues: 1,
        netns: Some(namespace.0.clone()),
        offloads: port::OffloadSet::ALL,
    };
    let mut tap = tap::open(&settings, &[Arc::default()]).unwrap();
    let mut port = namespace.open("tap0", 1).unwrap();
    let queues = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    let file = tap::parts(&tap.link, queues).unwrap().fds.pop().unwrap();
    let plain = |number: usize| [vec![0; 12], numbered(number, 60)].concat();
    // More than a lap of the ring, so that what is left in a header was once a frame's.
    for round in 0..150 {
        let wanted: Vec<_> = (0..3).map(|at| numbered(3 * round + at, 60)).collect();
        for at in 0..3 {
            let _ = rustix::io::write(&file, &nameless()).unwrap();
            let _ = rustix::io::write(&file, &plain(3 * round + at)).unwrap();
        }
        assert!(take(&mut port.queues[0].0, 3) == wanted, "round {round}");
    }
    let drops = port.kernel[0].kernel_drops();
    assert_eq!((drops.given_up, drops.ring_full), (450, 0));
    assert_eq!(port.kernel[0].packets(), 900);
    let totals = totals(port.queues[0].0.counters());
    assert_eq!(totals.drops[DropReason::BadOffload as usize], 450);
    assert_eq!((totals.rx_frames, totals.dropped()), (900, 450));
}
