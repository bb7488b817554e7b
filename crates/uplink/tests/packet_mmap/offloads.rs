//! Checksums and segmentation that a sender left to its network card.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use packet::{Checksum, Ipv4, Tcp, Udp};
use port::{FrameBuf, Gso, Ingress, Offload, OffloadSet};

use port::Egress;
use uplink::packet_mmap::PacketMmap;

use crate::namespace::Namespace;
use crate::{Two, send, take, take_whole, totals, until};

const MAC: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
const ADDRESS: [&str; 2] = ["10.9.0.1", "10.9.0.2"];

/// The transport checksum of a packet: 0 if it is right.
fn verify(packet: &[u8]) -> u16 {
    let ip = Ipv4::parse(packet).unwrap();
    let upper = &packet[ip.header_len()..usize::from(ip.total_len())];
    let mut sum = Checksum::default();
    sum.add(&packet[12..20]);
    sum.add(&(upper.len() as u32).to_be_bytes());
    sum.add(&[0, ip.protocol()]);
    sum.add(upper);
    sum.finish()
}

#[test]
fn unfinished_checksums_are_carried() {
    let (near, far) = (Namespace::new(), Namespace::new());
    near.pair("near0", &far, "far0", 9000);
    far.address("far0", (MAC[0], ADDRESS[0]), (MAC[1], ADDRESS[1]));
    let mut port = near.open("near0", 1).unwrap();
    let socket = far.udp("10.9.0.1:9");
    for len in [0, 1, 18, 85, 86, 87, 1000, 1472, 8000] {
        let sent: Vec<u8> = (0..len).map(|i: u32| (i * 7 + len) as u8).collect();
        let _ = socket.send_to(&sent, "10.9.0.2:7").unwrap();
        let (_, offload) = take_whole(&mut port.queues[0].0, 1).remove(0);
        assert!(offload.needs_csum && (offload.csum_start, offload.csum_offset) == (34, 6));
        let _ = socket.send_to(&sent, "10.9.0.2:7").unwrap();
        let frame = take(&mut port.queues[0].0, 1).remove(0);
        let ip = Ipv4::parse(&frame[14..]).unwrap();
        assert_eq!(Udp::parse(ip.payload()).unwrap().payload(), &sent[..]);
        assert_ne!(frame[40..42], [0, 0], "no checksum");
        assert_eq!(verify(&frame[14..]), 0, "{len} bytes");
    }
}

/// Carries frames both ways until `stop`.
fn carry(one: &mut PacketMmap, other: &mut PacketMmap, stop: &AtomicBool) {
    let mut frames = FrameBuf::default();
    while !stop.load(Ordering::Relaxed) {
        for turn in 0..2 {
            let (from, to) =
                if turn == 0 { (&mut *one, &mut *other) } else { (&mut *other, &mut *one) };
            let batch = from.queues[0].0.receive(&mut frames);
            assert_eq!(batch.fault(), None);
            let picked: Vec<u16> = (0..batch.len() as u16).collect();
            to.queues[0].1.send(&batch, &picked).unwrap();
            from.queues[0].0.release();
        }
    }
}

/// TCP between hosts whose veth ends leave checksums and segmentation to the card.
fn tcp(mtu: u32, cuts: bool) {
    const BYTES: usize = 8 << 20;
    let hosts = [Namespace::new(), Namespace::new()];
    let middle = Namespace::new();
    middle.pair("near0", &hosts[0], "host0", mtu);
    middle.pair("near1", &hosts[1], "host1", mtu);
    hosts[0].address("host0", (MAC[0], ADDRESS[0]), (MAC[1], ADDRESS[1]));
    hosts[1].address("host1", (MAC[1], ADDRESS[1]), (MAC[0], ADDRESS[0]));
    let mut ports = [middle.open("near0", 1).unwrap(), middle.open("near1", 1).unwrap()];
    if !cuts {
        // While it is open.
        let all = ["netns", "exec", &middle.0, "ethtool", "-K", "near1", "tso", "off"];
        let _ = crate::namespace::ip(&all);
        let _ = ports[1].link.check();
    }
    let stop = AtomicBool::new(false);
    let listener = hosts[1].inside(|| TcpListener::bind("10.9.0.2:80").unwrap());
    let [one, other] = &mut ports;
    std::thread::scope(|scope| {
        let carrier = scope.spawn(|| carry(one, other, &stop));
        let server = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            let _ = stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got[..1000]).unwrap();
            got
        });
        let sent: Vec<u8> = (0..BYTES).map(|i| (i * 31 + i / 256) as u8).collect();
        let address = "10.9.0.2:80".parse().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
        let mut stream = hosts[0].inside(connect);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back).unwrap();
        assert!(back == sent[..1000]);
        assert!(server.join().unwrap() == sent, "other bytes arrived");
        stop.store(true, Ordering::Relaxed);
        carrier.join().unwrap();
    });
    let counted = totals(ports[0].queues[0].0.counters());
    assert_eq!(counted.drops[port::DropReason::BadOffload as usize], 0);
    // Segments were not sent one by one.
    assert!((counted.rx_frames as usize) < BYTES / mtu as usize, "{counted:?}");
    // Nor cut, if the way out takes them whole.
    let sent = totals(ports[1].queues[0].1.counters());
    assert_eq!((sent.segments_added > 0, sent.dropped()), (!cuts, 0));
}

#[test]
fn tcp_with_the_offloads_of_a_veth_pair_passes() {
    tcp(1500, true);
}

#[test]
fn tcp_with_large_frames_passes() {
    tcp(9000, true);
}

/// The kernel would drop what it has to cut there.
#[test]
fn tcp_to_a_device_without_segmentation_passes() {
    tcp(1500, false);
}

/// A TCP frame with that much payload, as a guest with segmentation offload sends it.
fn large(payload: usize) -> (Vec<u8>, Offload) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let len = 40 + payload as u16;
    frame.extend([0x45, 0]);
    frame.extend(len.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
    let sum = packet::checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend((20 + payload as u16).to_be_bytes());
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 100, 0, 0, 0, 1, 0x50, 0x18, 1, 2]);
    frame.extend((!packet::checksum(&pseudo)).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|i| (i * 31 + i / 256) as u8));
    let offload = Offload {
        needs_csum: true,
        gso: Gso::TcpV4,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        ..Offload::default()
    };
    (frame, offload)
}

#[test]
fn large_frames_of_guests_pass_whole() {
    let mut two = Two::new(1500);
    for payload in [1460, 1461, 3000, 64_000] {
        let (frame, offload) = large(payload);
        send(&mut two.left.queues[0].1, &[(frame.clone(), offload)]);
        let (arrived, left) = take_whole(&mut two.right.queues[0].0, 1).remove(0);
        assert!(arrived == frame, "{payload} bytes");
        let one = Offload { gso: Gso::None, hdr_len: 0, gso_size: 0, ..offload };
        assert_eq!(left, if payload > 1460 { offload } else { one });
    }
    // Not if the segments are above the MTU.
    let (frame, offload) = large(3000);
    send(&mut two.left.queues[0].1, &[(frame, Offload { gso_size: 1461, ..offload })]);
    let counted = totals(two.left.queues[0].1.counters());
    assert_eq!(counted.drops[port::DropReason::Oversize as usize], 1);
}

#[test]
fn large_frames_are_cut_for_who_takes_none() {
    for short_header in [false, true] {
        pass_and_cut(Two::with(1500, |settings| settings.short_header = short_header));
    }
}

/// What is not to be left to the kernel is done before; the offloads of who goes on hold.
#[test]
fn what_is_not_to_be_left_to_the_kernel_is_finished() {
    let csum = OffloadSet { csum: true, ..OffloadSet::NONE };
    let tso4 = OffloadSet { tso4: true, ..csum };
    for (offloads, whole, summed) in [
        (OffloadSet::NONE, false, true),
        (csum, false, false),
        (OffloadSet { tso6: true, uso: true, ..csum }, false, false),
        (tso4, true, false),
    ] {
        for taken_over in [false, true] {
            let first = if taken_over { OffloadSet::ALL } else { offloads };
            let mut two = Two::with(1500, |settings| settings.offloads = first);
            if taken_over {
                two.left = crate::handover::other_hands(two.left, offloads);
            }
            let (frame, offload) = large(3000);
            send(&mut two.left.queues[0].1, &[(frame, offload)]);
            let arrived = take_whole(&mut two.right.queues[0].0, if whole { 1 } else { 3 });
            assert_eq!(arrived.len(), if whole { 1 } else { 3 }, "{offloads:?}");
            assert!(arrived.iter().all(|(_, left)| left.needs_csum != summed), "{offloads:?}");
        }
    }
}

fn pass_and_cut(mut two: Two) {
    // Within a slot of the ring, and above; more segments than a burst; between ordinary frames.
    for payload in [1460, 1461, 1900, 2000, 3000, 20_000, 64_000] {
        let (frame, offload) = large(payload);
        let small = crate::numbered(payload, 100);
        let plain = (small.clone(), Offload::default());
        send(&mut two.left.queues[0].1, &[plain.clone(), (frame.clone(), offload), plain]);
        let count = payload.div_ceil(1460);
        let arrived = take(&mut two.right.queues[0].0, count + 2);
        assert_eq!(arrived.len(), count + 2, "{payload} bytes");
        assert!(arrived[0] == small && arrived[count + 1] == small, "order");
        let mut data: Vec<u8> = Vec::new();
        for segment in &arrived[1..=count] {
            let ip = Ipv4::parse(&segment[14..]).unwrap();
            assert!(ip.checksum_ok());
            assert_eq!(verify(&segment[14..]), 0, "{payload} bytes, at {}", data.len());
            let tcp = Tcp::parse(ip.payload()).unwrap();
            assert_eq!(tcp.sequence(), 100 + data.len() as u32);
            data.extend(tcp.payload());
        }
        assert!(data == frame[54..], "{payload} bytes");
    }
    assert_eq!(totals(two.left.queues[0].1.counters()).dropped(), 0);
    assert_eq!(totals(two.right.queues[0].0.counters()).dropped(), 0);
}

/// Whatever waits, a burst ends with the frame that reaches the bound of bytes.
#[test]
fn a_burst_of_large_frames_has_a_bound_of_bytes() {
    const COUNT: usize = 12;
    let mut two = Two::new(1500);
    let (frame, offload) = large(64_000);
    for _ in 0..COUNT {
        send(&mut two.left.queues[0].1, &[(frame.clone(), offload)]);
    }
    let mut bursts = Vec::new();
    until(&mut two.right.queues[0].0, |batch| {
        bursts.extend(Some(batch.len()).filter(|count| *count > 0));
        bursts.iter().sum::<usize>() == COUNT
    });
    assert_eq!(bursts.iter().sum::<usize>(), COUNT);
    let bound = usize::try_from(port::BURST_BYTES).unwrap().div_ceil(frame.len());
    assert!(bursts.iter().all(|count| *count <= bound), "{bursts:?}, {bound} are allowed");
}
