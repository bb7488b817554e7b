//! Hosts behind veth pairs: whole TCP connections, and checksums that somebody left undone.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use packet::Checksum;
use port::{Egress, FrameBuf, Ingress, Offload};
use uplink::af_xdp::{AfXdp, AfXdpSettings, Mode};

use crate::namespace::{Namespace, open_with};
use crate::{LEFT_MAC, RIGHT_MAC, handover, pair, send, take, totals};

/// Carries what is there from one uplink to another.
pub(crate) fn carry(from: &mut AfXdp, to: &mut AfXdp, frames: &mut FrameBuf) {
    let (ingress, egress) = (&mut from.queues[0].0, &mut to.queues[0].1);
    let batch = ingress.receive(frames);
    assert_eq!(batch.fault(), None);
    let picked: Vec<u16> = (0..batch.len() as u16).collect();
    egress.send(&batch, &picked).unwrap();
    drop(batch);
    ingress.release();
    let _ = ingress.notify();
    let _ = egress.notify();
}

/// Two hosts, each behind a veth whose other end is ours.
pub(crate) struct Hosts {
    pub(crate) left: Namespace,
    pub(crate) right: Namespace,
    _middle: Namespace,
    pub(crate) ends: [AfXdp; 2],
}

pub(crate) fn hosts(mtu: u32, mode: Mode) -> Hosts {
    let [left, middle, right] = std::array::from_fn(|_| Namespace::new());
    left.veth("host0", (&middle, "left0"), 1, mtu);
    right.veth("host0", (&middle, "right0"), 1, mtu);
    left.address("host0", LEFT_MAC, "10.9.0.1/24");
    right.address("host0", RIGHT_MAC, "10.9.0.2/24");
    left.neighbour("host0", "10.9.0.2", RIGHT_MAC);
    right.neighbour("host0", "10.9.0.1", LEFT_MAC);
    let ends = ["left0", "right0"]
        .map(|name| open_with(&AfXdpSettings { mode, ..middle.settings(name) }).unwrap());
    Hosts { left, right, _middle: middle, ends }
}

#[test]
fn tcp_with_unfinished_checksums_crosses_whole() {
    const BYTES: usize = 4 << 20;
    for mode in [Mode::Auto, Mode::Copy, Mode::Generic] {
        for mtu in [1500, 9000] {
            let Hosts { left, right, ends: [near, far], .. } = &mut hosts(mtu, mode);
            let shown = left.exec("ethtool", &["-k", "host0"]);
            assert!(shown.contains("tx-checksumming: on"), "{shown}");
            let listener = right.tcp("10.9.0.2:7");
            let sent: Vec<u8> = (0..BYTES).map(|i| (i * 7 + i / 251) as u8).collect();
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let _carrier = scope.spawn(|| {
                    let mut frames = FrameBuf::default();
                    while !stop.load(Ordering::Relaxed) {
                        carry(near, far, &mut frames);
                        carry(far, near, &mut frames);
                    }
                });
                let receiver = scope.spawn(move || {
                    let mut got = Vec::new();
                    let (mut stream, _) = listener.accept().unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                    let _ = stream.read_to_end(&mut got).unwrap();
                    got
                });
                let address = "10.9.0.2:7".parse().unwrap();
                let connected = left.inside(|| {
                    std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5))
                });
                let written = connected.and_then(|mut stream| stream.write_all(&sent));
                let got = receiver.join();
                stop.store(true, Ordering::Relaxed);
                written.unwrap();
                assert!(got.unwrap() == sent, "{mode:?}, MTU {mtu}");
            });
            for host in [left, right] {
                assert_eq!(host.snmp("Tcp", "InCsumErrors"), 0, "{mode:?}, MTU {mtu}");
            }
        }
    }
}

#[test]
fn datagrams_of_all_sizes_reach_a_host_with_right_checksums() {
    let Hosts { left, right, ends: [near, far], .. } = &mut hosts(9000, Mode::Auto);
    let (sender, receiver) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    let mut frames = FrameBuf::default();
    for len in (0..200u32).chain([1458, 1472, 1473, 4000, 8972]) {
        let sent: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
        let mut got = [0; 9000];
        let _ = sender.send_to(&sent, "10.9.0.2:7").unwrap();
        let mut tries = 0;
        let count = loop {
            carry(near, far, &mut frames);
            match receiver.recv(&mut got) {
                Ok(count) => break count,
                Err(_) => tries += 1,
            }
            assert!(tries < 20, "a datagram of {len} bytes is lost");
        };
        assert_eq!(&got[..count], &sent[..], "{len} bytes");
    }
    assert_eq!(right.snmp("Udp", "InCsumErrors"), 0);
    let (rx, tx) = (totals(near.queues[0].0.counters()), totals(far.queues[0].1.counters()));
    assert_eq!((rx.rx_frames, rx.rx_bytes), (tx.tx_frames, tx.tx_bytes));
    assert_eq!(rx.dropped() + tx.dropped(), 0);
}

/// A UDP datagram over IPv4 whose checksum is left undone, and its pseudo header.
fn undone(payload: usize) -> (Vec<u8>, Vec<u8>) {
    let len = (8 + payload) as u16;
    let mut pseudo = vec![10, 9, 0, 1, 10, 9, 0, 2, 0, 17];
    pseudo.extend(len.to_be_bytes());
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
    frame.extend((20 + len).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2, 0x12, 0x34, 0, 53]);
    frame.extend(len.to_be_bytes());
    frame.extend((!packet::checksum(&pseudo)).to_be_bytes());
    frame.extend((0..payload).map(|i| (i * 7 + payload) as u8));
    (frame, pseudo)
}

#[test]
fn what_a_guest_left_undone_is_finished() {
    let (_namespace, [left, mut right]) = pair(1, 9000, |_| {});
    let left = finished(left, &mut right);
    // As on a kernel before 6.11, where frames to send have no metadata.
    let left = handover::without_metadata(left);
    drop(finished(left, &mut right));
}

/// Frames from `left` arrive with whole checksums, whoever finishes them.
fn finished(mut left: AfXdp, right: &mut AfXdp) -> AfXdp {
    let offload =
        Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
    for payload in [20, 60, 100, 1400, 1942, 1943, 4000, 8900] {
        let (sent, mut pseudo) = undone(payload);
        send(&mut left.queues[0].1, std::slice::from_ref(&sent), offload);
        let got = take(&mut right.queues[0].0, 1).remove(0);
        assert_ne!(got[40..42], [0, 0], "{payload} bytes");
        pseudo.extend(&got[34..]);
        let mut sum = Checksum::default();
        sum.add(&pseudo);
        assert_eq!(sum.finish(), 0, "{payload} bytes");
        assert_eq!((&got[..40], &got[42..]), (&sent[..40], &sent[42..]));
    }
    assert_eq!(totals(left.queues[0].1.counters()).dropped(), 0);
    left
}

#[test]
fn a_host_takes_what_a_guest_left_undone() {
    let Hosts { right, ends: [_, far], .. } = &mut hosts(9000, Mode::Auto);
    let receiver = right.udp("10.9.0.2:53");
    let offload =
        Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
    for payload in [20, 100, 1400, 1942, 1943, 4000, 8900] {
        let (mut sent, _) = undone(payload);
        sent[5] = 2;
        let sum = packet::checksum(&sent[14..34]).to_be_bytes();
        sent[24..26].copy_from_slice(&sum);
        send(&mut far.queues[0].1, std::slice::from_ref(&sent), offload);
        let mut got = [0; 9000];
        let count = receiver.recv(&mut got).unwrap_or(0);
        assert!(got[..count] == sent[42..], "{payload} bytes");
    }
    assert_eq!(right.snmp("Udp", "InCsumErrors"), 0);
}
