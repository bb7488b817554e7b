//! Real taps in network namespaces of their own. Needs root; says so if it is missing.
#![expect(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test code"
)]

mod handover;
mod namespace;
mod offloads;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use namespace::Namespace;
use port::{DropReason, Egress, FrameBuf, Ingress, QueueCounters, QueueFault, QueueTotals};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uplink::interface::{Finder, Link, LinkState};
use uplink::tap::{Tap, TapSettings, open};

const HOST_MAC: &str = "02:00:00:00:00:01";
const PEER_MAC: &str = "02:00:00:00:00:02";

fn totals(counters: &QueueCounters) -> QueueTotals {
    let mut totals = counters.read_ends();
    counters.read_rx(&mut totals);
    totals
}

/// Carries what arrives at `from` to `to` until it carried a frame.
fn carry(from: &mut Tap, to: &mut Tap) -> usize {
    let mut frames = FrameBuf::default();
    let start = Instant::now();
    let (ingress, egress) = (&mut from.queues[0].0, &mut to.queues[0].1);
    loop {
        let batch = ingress.receive(&mut frames);
        assert_eq!(batch.fault(), None);
        let count = batch.len();
        let picked: Vec<u16> = (0..count as u16).collect();
        egress.send(&batch, &picked).unwrap();
        ingress.release();
        if count > 0 {
            return count;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "no frame arrived");
    }
}

#[test]
fn a_made_interface_is_up_while_it_is_open_and_gone_afterwards() {
    let namespace = Namespace::new();
    let tap = namespace.open("made0", 1).unwrap();
    assert!(tap.link.was_made());
    assert_eq!(tap.link.check(), LinkState::Up);
    let _ = namespace.ip(&["link", "set", "made0", "down"]);
    assert_eq!(tap.link.check(), LinkState::Down);
    drop(tap);
    soon("it is gone", || !namespace.has("made0"));
}

/// Waits until it is so. Programs that other tests start hold our fds for a moment: from fork to
/// exec.
fn soon(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(5), "not so: {what}");
    }
}

/// Follows the interface until it is in `state`.
fn wait_state(link: &mut Link, state: LinkState) {
    let start = Instant::now();
    while link.check() != state {
        let mut fds = [PollFd::from_borrowed_fd(link.event_fd(), PollFlags::IN)];
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        // What brings the state must also be told.
        assert_ne!(poll(&mut fds, Some(&second)), Ok(0), "not told before {state:?}");
        let _ = link.follow();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", link.check());
    }
}

#[test]
fn an_interface_is_followed_through_names_and_states() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "old0", "mode", "tap"]);
    let mut tap = namespace.open("old0", 1).unwrap();
    let link = &mut tap.link;
    while link.follow() {}
    let _ = namespace.ip(&["link", "set", "old0", "down"]);
    wait_state(link, LinkState::Down);
    let _ = namespace.ip(&["link", "set", "old0", "name", "new0"]);
    let _ = namespace.ip(&["link", "set", "new0", "up", "mtu", "4000"]);
    wait_state(link, LinkState::Up);
    let finder = Finder::new("old0", Some(namespace.name())).unwrap();
    assert_eq!((link.name(), finder.found()), ("new0".to_owned(), false));
    assert_eq!(link.mtu().load(Ordering::Relaxed), 4000);
    assert_eq!(link.driver(), ("tun".to_owned(), "tap".to_owned()));
    // The same index does not make it the same interface.
    let index = link.index().to_string();
    while link.follow() {}
    let _ = namespace.ip(&["link", "del", "new0"]);
    let _ = namespace.ip(&["link", "add", "old0", "index", &index, "type", "bridge"]);
    assert!(link.follow());
    assert_eq!((link.check(), finder.found()), (LinkState::Gone, true));
}

/// A macvtap `mv0` on `below0`, whose other end `peer0` is in `peer`.
fn macvtap(namespace: &Namespace, peer: &Namespace, address: &str) {
    let pair = ["link", "add", "below0", "type", "veth", "peer", "name", "peer0", "netns"];
    let _ = namespace.ip(&[&pair[..], &[peer.name()]].concat());
    let _ = namespace.ip(&["link", "set", "below0", "up"]);
    let _ = namespace
        .ip(&["link", "add", "mv0", "link", "below0", "type", "macvtap", "mode", "passthru"]);
    peer.quiet();
    peer.address("peer0", PEER_MAC, address, 1500);
    let _ = peer.ip(&["link", "set", "peer0", "up"]);
}

#[test]
fn macvtaps_of_one_index_in_two_namespaces_are_told_apart() {
    let (left, right) = (Namespace::new(), Namespace::new());
    let (a, b) = (Namespace::new(), Namespace::new());
    macvtap(&left, &a, "10.9.0.1/24");
    macvtap(&right, &b, "10.9.0.2/24");
    let (mut from, mut to) = (left.open("mv0", 1).unwrap(), right.open("mv0", 2).unwrap());
    assert_eq!(from.link.index(), to.link.index());
    assert_eq!((from.link.check(), to.queues.len()), (LinkState::Up, 2));
    // From the stack beyond one to the stack beyond the other.
    a.neighbour("peer0", "10.9.0.2", PEER_MAC);
    let (sender, receiver) = (a.udp("10.9.0.1:7"), b.udp("10.9.0.2:7"));
    let mut got = [0; 2000];
    for len in [0usize, 1, 700, 1472] {
        let sent = vec![len.to_le_bytes()[0]; len];
        let _ = sender.send_to(&sent, "10.9.0.2:7").unwrap();
        loop {
            let _ = carry(&mut from, &mut to);
            if let Ok(count) = receiver.recv(&mut got) {
                assert_eq!(&got[..count], &sent[..]);
                break;
            }
        }
    }
    drop(from);
    let shown = left.ip(&["link", "show", "mv0"]);
    assert!(!shown.contains(",UP"), "{shown}");
}

/// Frames that find the queue full are told, whichever side of the interface that is on.
#[test]
fn what_finds_the_queue_full_is_told_of_taps_and_macvtaps() {
    for name in ["tx_dropped", "rx_dropped"] {
        let (ours, peer) = (Namespace::new(), Namespace::new());
        ours.quiet();
        let (mut tap, from, device) = if name == "rx_dropped" {
            macvtap(&ours, &peer, "10.9.0.1/24");
            (ours.open("mv0", 1).unwrap(), &peer, "peer0")
        } else {
            let tap = ours.open("t0", 1).unwrap();
            ours.address("t0", PEER_MAC, "10.9.0.1/24", 1500);
            (tap, &ours, "t0")
        };
        from.neighbour(device, "10.9.0.2", HOST_MAC);
        let (mut frames, mut got) = (FrameBuf::default(), 0);
        let mut drain = |tap: &mut Tap, got: &mut usize| {
            while tap.queues[0].0.arm() {
                *got += tap.queues[0].0.receive(&mut frames).len();
            }
        };
        drain(&mut tap, &mut got);
        let (said, before) = tap.link.queue_drops().unwrap();
        assert_eq!(said, name);
        let mut got = 0;
        // A socket for each hundred: one may not have that many frames on their way.
        let senders: Vec<_> =
            (0..30).map(|i| from.udp(&format!("10.9.0.1:{}", 2000 + i))).collect();
        for sender in senders.iter().flat_map(|sender| std::iter::repeat_n(sender, 100)) {
            let _ = sender.send_to(b"hello", "10.9.0.2:7").unwrap();
        }
        drain(&mut tap, &mut got);
        let (_, dropped) = tap.link.queue_drops().unwrap();
        assert!(dropped > before, "{name}: nothing was dropped of 3000, {got} came");
        assert_eq!(got as u64 + dropped - before, 3000, "{name}");
    }
}

#[test]
fn a_namespace_that_was_removed_is_noticed() {
    let namespace = Namespace::new();
    let tap = namespace.open("t0", 1).unwrap();
    let finder = Finder::new("t0", Some(namespace.name())).unwrap();
    assert_eq!((tap.link.check(), finder.is_current()), (LinkState::Up, true));
    let name = namespace.name().to_owned();
    drop(namespace);
    assert!(!finder.is_current());
    assert_eq!(tap.link.check(), LinkState::NamespaceGone);
    // Another one of the same name is not the same.
    let _other = Namespace::named(&name);
    assert_eq!(tap.link.check(), LinkState::NamespaceGone);
}

#[test]
fn promiscuous_mode_ends_with_the_link() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "p0", "mode", "tap"]);
    let mut tap = namespace.open("p0", 1).unwrap();
    let is_on = || namespace.ip(&["-d", "link", "show", "p0"]).contains("promiscuity 1");
    assert!(!is_on());
    namespace.inside(|| tap.link.set_promiscuous()).unwrap();
    assert!(is_on());
    drop(tap);
    soon("it is not promiscuous", || !is_on());
}

#[test]
fn a_persistent_interface_is_left_as_it_was_found() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "kept0", "mode", "tap"]);
    // What the kernel may leave to who holds it.
    let offloads = || {
        let of = ["netns", "exec", namespace.name(), "ethtool", "-k", "kept0"];
        let output = std::process::Command::new("ip").args(of).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        ["tcp-segmentation-offload: on", "tx-checksumming: on"].map(|word| text.contains(word))
    };
    assert_eq!(offloads(), [false; 2]);
    let tap = namespace.open("kept0", 1).unwrap();
    assert_eq!(offloads(), [true; 2]);
    assert!(!tap.link.was_made());
    assert!(namespace.ip(&["link", "show", "kept0"]).contains(",UP"));
    drop(tap);
    soon("its offloads are off", || offloads() == [false; 2]);
    assert!(!namespace.ip(&["link", "show", "kept0"]).contains(",UP"));
    let _ = namespace.ip(&["link", "set", "kept0", "up"]);
    drop(namespace.open("kept0", 1).unwrap());
    assert!(namespace.ip(&["link", "show", "kept0"]).contains(",UP"));
}

#[test]
fn frames_of_all_sizes_cross_two_taps_unchanged() {
    let (left, right) = (Namespace::new(), Namespace::new());
    let mut from = left.open("left0", 1).unwrap();
    let mut to = right.open("right0", 1).unwrap();
    left.address("left0", HOST_MAC, "10.9.0.1/24", 9000);
    right.address("right0", PEER_MAC, "10.9.0.2/24", 9000);
    left.neighbour("left0", "10.9.0.2", PEER_MAC);
    assert_eq!((from.link.check(), to.link.check()), (LinkState::Up, LinkState::Up));
    let sender = left.udp("10.9.0.1:7");
    let receiver = right.udp("10.9.0.2:7");
    let mut got = [0; 9000];
    for len in (0..200u32).chain([1458, 1472, 4000, 8972]) {
        let sent: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
        let _ = sender.send_to(&sent, "10.9.0.2:7").unwrap();
        loop {
            let _ = carry(&mut from, &mut to);
            // Router solicitations of the interface may be on the way too.
            if let Ok(count) = receiver.recv(&mut got) {
                assert_eq!(&got[..count], &sent[..], "{len} bytes");
                break;
            }
        }
    }
    let (rx, tx) = (totals(from.queues[0].0.counters()), totals(to.queues[0].1.counters()));
    assert_eq!((rx.rx_frames, rx.rx_bytes), (tx.tx_frames, tx.tx_bytes));
    assert!(rx.rx_frames >= 204);
    assert_eq!(rx.dropped() + tx.dropped(), 0);
}

#[test]
fn a_frame_above_the_mtu_is_dropped() {
    let (left, right) = (Namespace::new(), Namespace::new());
    let mut from = left.open("left0", 1).unwrap();
    let mut to = right.open("right0", 1).unwrap();
    left.address("left0", HOST_MAC, "10.9.0.1/24", 2000);
    left.neighbour("left0", "10.9.0.2", PEER_MAC);
    let sender = left.udp("10.9.0.1:7");
    for (payload, oversize) in [(1472, 0), (1473, 1)] {
        let before = totals(to.queues[0].1.counters()).tx_frames;
        let _ = sender.send_to(&vec![1; payload], "10.9.0.2:7").unwrap();
        let large = |t: &QueueTotals| t.tx_frames - before + t.drops[DropReason::Oversize as usize];
        while large(&totals(to.queues[0].1.counters())) == 0 {
            let _ = carry(&mut from, &mut to);
        }
        let drops = totals(to.queues[0].1.counters()).drops;
        assert_eq!(drops[DropReason::Oversize as usize], oversize);
    }
    let _ = right.ip(&["link", "set", "right0", "mtu", "2000"]);
    assert_eq!(to.link.check(), LinkState::Up);
    let _ = sender.send_to(&[1; 1473], "10.9.0.2:7").unwrap();
    let _ = carry(&mut from, &mut to);
    assert_eq!(totals(to.queues[0].1.counters()).drops[DropReason::Oversize as usize], 1);
}

#[test]
fn an_interface_that_is_down_drops_with_its_reason() {
    let (left, right) = (Namespace::new(), Namespace::new());
    let mut from = left.open("left0", 1).unwrap();
    let mut to = right.open("right0", 1).unwrap();
    left.address("left0", HOST_MAC, "10.9.0.1/24", 1500);
    left.neighbour("left0", "10.9.0.2", PEER_MAC);
    let _ = right.ip(&["link", "set", "right0", "down"]);
    let _ = left.udp("10.9.0.1:7").send_to(b"x", "10.9.0.2:7").unwrap();
    let count = carry(&mut from, &mut to) as u64;
    let drops = totals(to.queues[0].1.counters()).drops;
    assert_eq!(drops[DropReason::UplinkError as usize], count);
}

#[test]
fn the_wake_up_says_whether_frames_are_there() {
    let namespace = Namespace::new();
    namespace.quiet();
    let mut tap = namespace.open("wake0", 1).unwrap();
    namespace.address("wake0", HOST_MAC, "10.9.0.1/24", 1500);
    namespace.neighbour("wake0", "10.9.0.2", PEER_MAC);
    let ingress = &mut tap.queues[0].0;
    let mut frames = FrameBuf::default();
    while ingress.arm() {
        assert_eq!(ingress.receive(&mut frames).fault(), None);
    }
    let sender = namespace.udp("10.9.0.1:7");
    for _ in 0..70 {
        let _ = sender.send_to(b"hello", "10.9.0.2:7").unwrap();
    }
    assert!(ingress.arm());
    assert_eq!(ingress.receive(&mut frames).len(), 64);
    assert!(ingress.arm());
    assert_eq!(ingress.receive(&mut frames).len(), 6);
    assert!(!ingress.arm());
}

#[test]
fn a_burst_of_the_largest_frames_arrives_in_parts_and_whole() {
    const COUNT: u8 = 70;
    let namespace = Namespace::new();
    namespace.quiet();
    let mut tap = namespace.open("large0", 1).unwrap();
    namespace.address("large0", HOST_MAC, "10.9.0.1/24", 65_000);
    namespace.neighbour("large0", "10.9.0.2", PEER_MAC);
    for number in 0..COUNT {
        // A socket for each: one socket may not have that many bytes on their way.
        let sender = namespace.udp(&format!("10.9.0.1:{}", 2000 + u32::from(number)));
        let _ = sender.send_to(&vec![number; 60_000], "10.9.0.2:7").unwrap();
    }
    let ingress = &mut tap.queues[0].0;
    let mut frames = FrameBuf::default();
    let (mut numbers, mut bursts) = (Vec::new(), Vec::new());
    while ingress.arm() {
        let batch = ingress.receive(&mut frames);
        assert!(batch.fault().is_none());
        bursts.push(batch.len());
        for frame in batch.frames() {
            assert_eq!(frame.len(), 60_000 + 42);
            let mut body = vec![0; 60_000];
            let count = batch.body(frame).read(&mut body);
            // What is not in the head is payload.
            assert_eq!(count + frame.head().len(), 60_042);
            assert!(body[..count].iter().all(|byte| *byte == body[0]));
            numbers.push(body[0]);
        }
        ingress.release();
    }
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
    // The one that reaches the bound is the last: others wait for no more bytes than that.
    let bound = usize::try_from(port::BURST_BYTES).unwrap().div_ceil(60_042);
    assert_eq!((bursts[0], bursts.iter().max()), (bound, Some(&bound)), "{bursts:?}");
}

#[test]
fn a_deleted_interface_is_a_host_fault_on_both_ways() {
    let namespace = Namespace::new();
    let mut tap = namespace.open("lost0", 1).unwrap();
    let _ = namespace.ip(&["link", "del", "lost0"]);
    assert_eq!(tap.link.check(), LinkState::Gone);
    let mut frames = FrameBuf::default();
    let (ingress, egress) = &mut tap.queues[0];
    let fault = ingress.receive(&mut frames).fault().cloned().unwrap();
    assert!(matches!(&fault, QueueFault::Host { what, .. } if what == "read from interface lost0"));
    frames.clear();
    frames.slot().unwrap().fill_private(&[1; 60]);
    frames.keep();
    let fault = egress.send(&frames.batch(virtq::mem::SegStore::empty(), None), &[0]).unwrap_err();
    assert!(matches!(&fault, QueueFault::Host { what, .. } if what == "write to interface lost0"));
    assert_eq!(totals(egress.counters()).drops[DropReason::UplinkError as usize], 1);
}

#[test]
fn what_cannot_be_opened_is_named() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "one0", "mode", "tap"]);
    let _ = namespace.ip(&["tuntap", "add", "tun0", "mode", "tun"]);
    let _ = namespace.ip(&["link", "add", "br0", "type", "bridge"]);
    let error = |name, queues| namespace.open(name, queues).unwrap_err().to_string();
    assert_eq!(
        error("one0", 2),
        "interface one0 exists with one queue, 2 were asked for: use queues=1 or create it with \
         `ip tuntap add mode tap multi_queue`"
    );
    assert_eq!(error("tun0", 1), "interface tun0 exists and is not a tap");
    assert_eq!(error("br0", 2), "interface br0 exists and is not a tap");
    let _held = namespace.open("one0", 1).unwrap();
    assert_eq!(error("one0", 1), "interface one0 is in use by another process");
}

#[test]
fn queues_that_others_hold_are_not_a_wrong_number() {
    let namespace = Namespace::new();
    let all = namespace.settings("many0", 254);
    let _held = uplink::tap::open_raw(&all).unwrap();
    assert_eq!(
        namespace.open("many0", 4).unwrap_err().to_string(),
        "interface many0 has no 4 queues left: other processes hold some of its 256"
    );
}

#[test]
fn queues_are_those_that_were_asked_for() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "many0", "mode", "tap", "multi_queue"]);
    for queues in [1, 4] {
        let tap = namespace.open("many0", queues).unwrap();
        assert_eq!(tap.queues.len(), usize::from(queues));
        let wanted = format!("numqueues {queues} ");
        soon(&wanted, || namespace.ip(&["-d", "link", "show", "many0"]).contains(&wanted));
    }
}

#[test]
fn flows_arrive_on_several_queues() {
    let namespace = Namespace::new();
    namespace.quiet();
    let mut tap = namespace.open("many0", 4).unwrap();
    namespace.address("many0", HOST_MAC, "10.9.0.1/24", 1500);
    namespace.neighbour("many0", "10.9.0.2", PEER_MAC);
    for port in 2000..2064 {
        let sender = namespace.udp(&format!("10.9.0.1:{port}"));
        let _ = sender.send_to(b"hello", "10.9.0.2:7").unwrap();
    }
    let mut frames = FrameBuf::default();
    let counts: Vec<usize> =
        tap.queues.iter_mut().map(|(ingress, _)| ingress.receive(&mut frames).len()).collect();
    assert!(counts.iter().sum::<usize>() >= 64, "{counts:?}");
    assert!(counts.iter().filter(|n| **n > 0).count() >= 2, "{counts:?}");
}

#[test]
fn a_missing_right_is_named() {
    let namespace = Namespace::new();
    let settings: TapSettings = namespace.settings("none0", 1);
    let error = namespace.inside(move || {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).unwrap();
        let settings = TapSettings { netns: None, ..settings };
        open(&settings, &[Arc::default()]).unwrap_err().to_string()
    });
    assert_eq!(
        error,
        "no permission to attach to interface none0: CAP_NET_ADMIN is needed (root has it)"
    );
}
