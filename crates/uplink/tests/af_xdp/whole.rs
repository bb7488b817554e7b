//! Large frames that come whole, with what is to be cut, from the peer of a veth pair.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use port::{Batch, FrameBuf, Gso, Ingress, Offload};
use uplink::af_xdp::{AfXdp, AfXdpIngress, AfXdpSettings, Mode, Obtained, Steer};

use crate::handover::other_hands;
use crate::hosts::{Hosts, carry, hosts};
use crate::large::{CUT, datagram, payload, send};
use crate::{bytes_of, pair, totals};

/// Takes one burst that has frames, and looks at each.
fn look(ingress: &mut AfXdpIngress, mut at: impl FnMut(&Batch<'_>, usize)) -> usize {
    let (mut frames, start) = (FrameBuf::default(), Instant::now());
    loop {
        let batch = ingress.receive(&mut frames);
        assert_eq!(batch.fault(), None);
        let count = batch.len();
        (0..count).for_each(|index| at(&batch, index));
        drop(batch);
        ingress.release();
        let _ = ingress.notify();
        if count > 0 {
            return count;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "nothing came");
    }
}

#[test]
fn a_large_frame_comes_whole_with_its_intent() {
    for steer in [Steer::All, Steer::Mac] {
        let (_namespace, [mut left, mut right]) = pair(1, 1500, |settings| settings.steer = steer);
        right.control.set_macs(&[packet::MacAddr([2, 0, 0, 0, 0, 2])]).unwrap();
        assert_eq!(right.control.mode(), Obtained::Generic);
        for _ in 0..2 {
            // Sizes that stand nowhere in the frame.
            for (len, gso_size) in [(60_500, 1000), (30_000, 1472), (1400, 700), (900, 11)] {
                let sent = datagram(&payload(len, len));
                let cut = Offload { gso_size, ..CUT };
                send(&mut left.queues[0].1, &[(sent.clone(), cut)]);
                let count = look(&mut right.queues[0].0, |batch, index| {
                    assert_eq!(batch.frames()[index].offload, cut);
                    assert!(bytes_of(batch, index) == sent, "{len} bytes");
                });
                assert_eq!(count, 1);
            }
            // One that is whole, in a chunk that had a mark.
            let sent = datagram(&payload(1000, 3));
            let undone = Offload { gso: Gso::None, gso_size: 0, hdr_len: 0, ..CUT };
            send(&mut left.queues[0].1, &[(sent, undone)]);
            let _ = look(&mut right.queues[0].0, |batch, index| {
                assert_eq!(batch.frames()[index].offload, undone);
            });
            right = other_hands(right);
        }
        assert_eq!(totals(right.queues[0].0.counters()).dropped(), 0);
    }
}

/// What segments a host's TCP asks for, whose peer takes only small ones.
#[test]
fn tcp_segments_are_as_small_as_the_other_side_asks() {
    let Hosts { left, right, ends: [near, far], .. } = &mut hosts(1500, Mode::Auto);
    let route = ["route", "change", "10.9.0.0/24", "dev", "host0", "advmss", "700"];
    let _ = right.ip(&route);
    let listener = right.tcp("10.9.0.2:7");
    let stop = AtomicBool::new(false);
    let mut sizes = Vec::new();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let address = "10.9.0.2:7".parse().unwrap();
            let wait = Duration::from_secs(5);
            let stream =
                left.inside(|| std::net::TcpStream::connect_timeout(&address, wait)).unwrap();
            stream.set_write_timeout(Some(wait)).unwrap();
            let _ = (&stream).write_all(&[7; 1 << 18]);
            stop.store(true, Ordering::Relaxed);
        });
        let _reader = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        let mut frames = FrameBuf::default();
        while !stop.load(Ordering::Relaxed) {
            {
                let batch = near.queues[0].0.receive(&mut frames);
                let large = batch.frames().iter().filter(|frame| frame.offload.gso == Gso::TcpV4);
                sizes.extend(large.map(|frame| frame.offload.gso_size));
                let picked: Vec<u16> = (0..batch.len() as u16).collect();
                port::Egress::send(&mut far.queues[0].1, &batch, &picked).unwrap();
            }
            near.queues[0].0.release();
            let _ = port::Egress::notify(&mut far.queues[0].1);
            carry(far, near, &mut frames);
        }
        writer.join().unwrap();
    });
    // Without the timestamps' 12 bytes.
    assert!(!sizes.is_empty() && sizes.iter().all(|size| *size == 688), "{sizes:?}");
}

/// With several queues the kernel does not say to which one a frame belongs before it is cut.
#[test]
fn pairs_of_several_queues_are_asked_in_the_driver() {
    let (_namespace, ends) = pair(2, 1500, |_| {});
    assert!(ends.iter().all(|end: &AfXdp| end.control.mode() == Obtained::Copy));
    let (_namespace, ends) =
        pair(1, 1500, |settings: &mut AfXdpSettings| settings.mode = Mode::Copy);
    assert!(ends.iter().all(|end| end.control.mode() == Obtained::Copy));
}
