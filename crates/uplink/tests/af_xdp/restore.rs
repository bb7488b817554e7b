//! What is set on an interface and undone, and what is left when it closes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{DropReason, Offload, QueueCounters};
use uplink::af_xdp::{AfXdpSettings, MACS_MAX, Mode, Obtained, Steer, Umems, from_parts, open};

use super::handover::{other_hands, put, taken_apart};
use super::namespace::open_with;
use super::{Namespace, frame, pair, send, totals};

/// They were counted as sent, and become drops when the port sends again.
#[test]
fn frames_that_the_kernel_never_took_count_as_dropped_in_the_end() {
    let (namespace, [mut left, right]) = pair(1, 9000, |_| {});
    let counters: Arc<QueueCounters> = Arc::clone(port::Egress::counters(&left.queues[0].1));
    let burst: Vec<_> = (0..10).map(|i| frame(60 + i, 1, false)).collect();
    let bytes = burst.iter().map(|frame| frame.len() as u64).sum::<u64>();
    let shown = || {
        let totals = totals(&counters);
        assert_eq!(totals.dropped(), totals.drops[DropReason::UplinkError as usize]);
        (totals.tx_frames, totals.tx_bytes, totals.dropped())
    };
    send(&mut left.queues[0].1, &burst, Offload::default());
    put(&mut left.queues[0].1, &burst);
    assert_eq!(shown(), (20, 2 * bytes, 0));
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    drop(left);
    assert_eq!(shown(), (20, 2 * bytes, 0), "no counter falls");
    let start = Instant::now();
    let mut left = loop {
        // Another test that starts a program holds our fds for a moment too.
        match open(&namespace.settings("left0"), &Umems::default(), &[Arc::clone(&counters)]) {
            Ok(open) => break open,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{error}"),
        }
    };
    send(&mut left.queues[0].1, &burst, Offload::default());
    assert_eq!(shown(), (20, 2 * bytes, 10));
    drop(right);
}

/// Nor when the kernel drops some of them and does not say that it took them.
#[test]
fn frames_that_the_kernel_drops_in_the_end_count_once() {
    for (nudges, mode) in [(0, Mode::Copy), (0, Mode::Generic), (3, Mode::Copy)] {
        let (namespace, [mut left, right]) = pair(1, 9000, |settings| settings.mode = mode);
        let counters: Arc<QueueCounters> = Arc::clone(port::Egress::counters(&left.queues[0].1));
        let burst: Vec<_> = (0..10).map(|i| frame(60 + 100 * i, 1, false)).collect();
        let bytes = burst.iter().map(|frame| frame.len() as u64).sum::<u64>();
        send(&mut left.queues[0].1, &burst, Offload::default());
        put(&mut left.queues[0].1, &burst);
        // There is no carrier any more.
        let _ = namespace.ip(&["link", "set", "right0", "down"]);
        (0..nudges).for_each(|_| left.control.nudge());
        drop(left);
        drop(right);
        // They are shown when others were sent.
        counters.egress.sent_but_lost(DropReason::UplinkError, 100, 100_000);
        let totals = totals(&counters);
        let shown = (totals.dropped(), totals.tx_frames, totals.tx_bytes);
        assert_eq!(shown, (10, 110, 100_000 + bytes), "{nudges} {mode:?}");
    }
}

#[test]
fn a_driver_leaves_tags_in_frames_while_the_uplink_is_open() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let takes_tags = || {
        let text = namespace.exec("ethtool", &["-k", "left0"]);
        let line = text.lines().find(|line| line.starts_with("rx-vlan-offload:")).unwrap();
        line.contains(" on")
    };
    assert!(takes_tags());
    let uplink = namespace.open("left0").unwrap();
    assert!(!takes_tags());
    drop(uplink);
    assert!(takes_tags(), "as it was found");
    let _ = namespace.exec("ethtool", &["-K", "left0", "rxvlan", "off"]);
    drop(super::opening::reopened(&namespace));
    assert!(!takes_tags(), "as it was found");
}

#[test]
fn without_patience_a_queue_in_use_is_refused_at_once() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let mut held = namespace.open("left0").unwrap();
    // Only the socket stays: the last of the parts but for the one that large frames go by.
    let mut fds = taken_apart(&mut held).fds;
    drop(fds.pop());
    let socket = fds.pop().unwrap();
    drop(fds);
    drop(held);
    let settings = AfXdpSettings { patience: Duration::ZERO, ..namespace.settings("left0") };
    let start = Instant::now();
    let error = loop {
        let error = open_with(&settings).unwrap_err().to_string();
        // The program of the one before may stay for a moment.
        if !error.contains("BPF link") {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
    };
    assert_eq!(error, "queue 0 of interface left0 is in use by another AF_XDP socket");
    drop(socket);
    drop(super::opening::reopened(&namespace));
}

#[test]
fn a_map_of_stations_that_was_full_takes_others_again() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let settings = AfXdpSettings { steer: Steer::Mac, ..namespace.settings("left0") };
    let mut uplink = open_with(&settings).unwrap();
    let stations = |from: u32, count: u32| -> Vec<MacAddr> {
        let mac = |number: u32| {
            let [a, b, c, d] = number.to_be_bytes();
            MacAddr([2, 0, a, b, c, d])
        };
        (from..from + count).map(mac).collect()
    };
    uplink.control.set_macs(&stations(0, MACS_MAX)).unwrap();
    assert!(uplink.control.set_macs(&stations(1000, MACS_MAX + 1)).is_err());
    // All others at once, into a map that has no room for both.
    uplink.control.set_macs(&stations(1_000_000, MACS_MAX)).unwrap();
    uplink.control.set_macs(&stations(0, 3)).unwrap();
}

#[test]
fn a_driver_that_workers_poll_is_held_back_while_the_uplink_is_open() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let set = |file: &str, value: &str| {
        let path = format!("/sys/class/net/left0/{file}");
        let _ = namespace.exec("sh", &["-c", &format!("echo {value} > {path}")]);
    };
    let held = || {
        ["napi_defer_hard_irqs", "gro_flush_timeout"].map(|file| {
            let text = namespace.exec("cat", &[&format!("/sys/class/net/left0/{file}")]);
            text.trim().parse::<u64>().unwrap()
        })
    };
    assert_eq!(held(), [0, 0]);
    let settings = AfXdpSettings { busy_poll: true, ..namespace.settings("left0") };
    let uplink = open_with(&settings).unwrap();
    assert_eq!(uplink.control.mode(), Obtained::Copy, "only a driver can be polled");
    assert_eq!(held(), [2, 100_000]);
    // It goes on in other hands, and who takes parts and fails changes nothing.
    let mut uplink = other_hands(uplink);
    assert_eq!(held(), [2, 100_000]);
    let mut parts = taken_apart(&mut uplink);
    let last = parts.fds.pop();
    drop(from_parts(parts, &Umems::default(), &[Arc::default()]).unwrap_err());
    drop(last);
    assert_eq!(held(), [2, 100_000]);
    drop(uplink);
    assert_eq!(held(), [0, 0], "as it was found");
    // A predecessor that was killed left both.
    set("napi_defer_hard_irqs", "2");
    set("gro_flush_timeout", "100000");
    let uplink = super::opening::reopened_with(&settings);
    assert_eq!(held(), [2, 100_000]);
    drop(uplink);
    assert_eq!(held(), [0, 0], "as the predecessor found it");
    // What somebody else has set stays as it is.
    set("gro_flush_timeout", "7000");
    let uplink = super::opening::reopened_with(&settings);
    assert_eq!(held(), [2, 7000]);
    drop(uplink);
    assert_eq!(held(), [0, 7000]);
}

#[test]
fn nothing_is_held_back_where_no_driver_is_polled() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let timeout = || namespace.exec("cat", &["/sys/class/net/left0/gro_flush_timeout"]);
    for (busy_poll, mode) in [(true, Mode::Generic), (false, Mode::Copy)] {
        let settings = AfXdpSettings { busy_poll, mode, ..namespace.settings("left0") };
        let uplink = super::opening::reopened_with(&settings);
        assert_eq!(timeout().trim(), "0", "{mode:?}");
        drop(uplink);
    }
}
