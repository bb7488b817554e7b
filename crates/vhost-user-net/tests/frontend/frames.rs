//! Frames from guest to guest: through restart, memory changes, broken rings and reconnection.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

use port::{DropReason, PortId, PortState, QueueFault, QueueId};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_net::SocketMode;
use virtio_net::features::{EVENT_IDX, IN_ORDER, MRG_RXBUF, RING_PACKED, RING_RESET, VERSION_1};
use virtq::ChainError;
use virtq::driver::Buffer;
use virtq::mem::GuestPhysAddr;

use crate::fabric::Side;
use crate::guest::{GUEST, Guest, USER, front_end};
use crate::harness::{Bench, wait_for};

const PROTOCOL: u64 = 1 << 30;
pub(crate) const SPLIT: u64 = VERSION_1 | PROTOCOL;
pub(crate) const PACKED: u64 = SPLIT | RING_PACKED;
const VARIANTS: [u64; 6] = [
    SPLIT,
    PACKED,
    SPLIT | EVENT_IDX | MRG_RXBUF,
    PACKED | EVENT_IDX | MRG_RXBUF,
    SPLIT | IN_ORDER,
    PACKED | IN_ORDER,
];

pub(crate) fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
    frame.extend(number.to_be_bytes());
    let len = 60 + usize::try_from(number * 37 % 1400).unwrap();
    frame.resize(len, u8::try_from(number % 251).unwrap());
    frame
}

fn pair(bench: &Bench, features: u64) -> (Guest, Guest) {
    let [mut a, mut b] = [0, 1]
        .map(|number| Guest::new(UnixStream::connect(bench.socket(number)).unwrap(), features));
    for guest in [&mut a, &mut b] {
        guest.fill();
        guest.start();
    }
    bench.wait(0, PortState::Up, "");
    bench.wait(1, PortState::Up, "");
    (a, b)
}

/// Sends frames `numbers` and checks that all of them arrive whole and in order.
pub(crate) fn exchange(from: &mut Guest, to: &mut Guest, numbers: std::ops::Range<u32>) {
    let mut next = numbers.start;
    for number in numbers.clone() {
        wait_for("room to send", || from.send(&frame(number)));
        while let Some(got) = to.receive() {
            assert_eq!(got, frame(next));
            next += 1;
        }
        // Not more than the receiver has buffers for.
        wait_for("the frame", || {
            let got = to.receive();
            if let Some(got) = &got {
                assert_eq!(*got, frame(next));
                next += 1;
            }
            got.is_some() || number - next.min(number) < 32
        });
    }
    wait_for("the last frame", || {
        if let Some(got) = to.receive() {
            assert_eq!(got, frame(next));
            next += 1;
        }
        next == numbers.end
    });
}

#[test]
fn frames_travel_both_ways_with_every_kind_of_ring() {
    for features in VARIANTS {
        let bench = Bench::new(SocketMode::Server);
        let (mut a, mut b) = pair(&bench, features);
        exchange(&mut a, &mut b, 0..300);
        exchange(&mut b, &mut a, 0..300);
    }
}

#[test]
fn what_waits_in_a_ring_is_served_without_a_kick() {
    let bench = Bench::new(SocketMode::Server);
    let (mut a, mut b) = pair(&bench, SPLIT);
    // The back end goes, the guest goes on sending, the front end finds a new back end.
    a.leave();
    bench.wait(0, PortState::Waiting, "waiting for the front end to connect to");
    for number in 0..10 {
        assert!(a.send(&frame(number)));
    }
    let _ = a.queues[1].kick.read();
    a.join(UnixStream::connect(bench.socket(0)).unwrap());
    a.start();
    let mut next = 0;
    wait_for("frames from before", || {
        if let Some(got) = b.receive() {
            assert_eq!(got, frame(next));
            next += 1;
        }
        next == 10
    });
}

#[test]
fn rings_stop_and_go_on_at_their_position() {
    for features in [SPLIT, PACKED] {
        let bench = Bench::new(SocketMode::Server);
        let (mut a, mut b) = pair(&bench, features);
        for round in 0..5 {
            exchange(&mut a, &mut b, round * 100..round * 100 + 77);
            let positions = a.stop();
            bench.wait(0, PortState::Waiting, "connected, the driver has not set up its rings");
            for (ring, position) in positions.into_iter().enumerate() {
                let low = u16::try_from(position & 0xffff).unwrap();
                if features == PACKED {
                    assert_eq!(position >> 16, u32::from(low), "available and used are equal");
                }
                a.start_ring(ring, low);
            }
            bench.wait(0, PortState::Up, "");
        }
    }
}

#[test]
fn memory_changes_under_traffic_lose_nothing() {
    let bench = Bench::new(SocketMode::Server);
    let (mut a, mut b) = pair(&bench, PACKED);
    for round in 0..30u32 {
        for number in 0..8 {
            assert!(a.send(&frame(round * 8 + number)));
        }
        let more = VhostUserMemoryRegionInfo {
            guest_phys_addr: 2 * GUEST,
            userspace_addr: 2 * USER,
            ..a.region()
        };
        match round % 3 {
            0 => drop(a.front.add_mem_region(&more).unwrap()),
            1 => a.front.remove_mem_region(&more).unwrap(),
            _ => a.share(),
        }
        let mut next = round * 8;
        wait_for("all frames of the round", || {
            if let Some(got) = b.receive() {
                assert_eq!(got, frame(next));
                next += 1;
            }
            next == round * 8 + 8
        });
    }
}

#[test]
fn a_broken_ring_is_reported_and_comes_back_after_a_reset() {
    for features in [SPLIT, PACKED] {
        let bench = Bench::new(SocketMode::Server);
        let (mut a, mut b) = pair(&bench, features);
        exchange(&mut a, &mut b, 0..5);
        let outside = Buffer { addr: GuestPhysAddr(1), len: 100 };
        a.queues[1].driver.add_readable(&[outside], 0).unwrap();
        a.queues[1].driver.publish();
        bench.wait(0, PortState::Broken, "ring 1 is broken");
        bench.wait_error(0, "the driver broke the ring");
        assert_eq!(a.queues[1].err.read().unwrap(), 1);
        assert_eq!(bench.status[1].read().state, PortState::Up);
        let _ = a.stop();
        for queue in &mut a.queues {
            let mut lost = Vec::new();
            queue.driver.reset(|cookie| lost.push(u32::try_from(cookie).unwrap())).unwrap();
            while queue.pool.take().is_some() {}
            (0..64).for_each(|index| queue.pool.give(index));
        }
        a.fill();
        a.start();
        bench.wait(0, PortState::Up, "");
        exchange(&mut a, &mut b, 0..50);
    }
}

#[test]
fn rings_are_reset_one_by_one_and_resized_while_the_others_run() {
    for features in [SPLIT, PACKED, SPLIT | EVENT_IDX | MRG_RXBUF, PACKED | EVENT_IDX | IN_ORDER] {
        let features = features | RING_RESET;
        let bench = Bench::with(|settings| settings.ring_reset = true);
        let (mut a, mut b) = pair(&bench, features);
        exchange(&mut a, &mut b, 0..100);
        exchange(&mut b, &mut a, 0..100);
        let mut sent = 100;
        // Room for what is on the way at once, in the receiveq.
        for (transmitq, receiveq) in [(128, 256), (16, 128), (64, 64)] {
            // The guest stops to send, and goes on receiving meanwhile.
            a.reset_ring(1, transmitq);
            bench.wait(0, PortState::Waiting, "connected, the driver has not set up its rings");
            exchange(&mut b, &mut a, sent..sent + 100);
            a.start_anew(1);
            bench.wait(0, PortState::Up, "");
            exchange(&mut a, &mut b, sent..sent + 100);
            // It has no buffers for a while, and goes on sending.
            a.reset_ring(0, receiveq);
            exchange(&mut a, &mut b, sent + 100..sent + 200);
            a.fill();
            a.start_anew(0);
            bench.wait(0, PortState::Up, "");
            exchange(&mut b, &mut a, sent + 100..sent + 200);
            sent += 200;
        }
        for counters in &bench.counters {
            // What is delivered is counted a moment after the guest sees it.
            wait_for("the last frame's count", || counters.read_ends().tx_frames >= 700);
            let mut totals = counters.read_ends();
            counters.read_rx(&mut totals);
            assert_eq!((totals.rx_frames, totals.tx_frames, totals.dropped()), (700, 700, 0));
        }
    }
}

#[test]
fn a_ring_reset_is_negotiated_only_where_it_is_offered() {
    for offered in [false, true] {
        let bench = Bench::with(|settings| settings.ring_reset = offered);
        let front = front_end(UnixStream::connect(bench.socket(0)).unwrap());
        assert_eq!(front.get_features().unwrap() & RING_RESET != 0, offered);
        front.set_features(SPLIT | RING_RESET).unwrap();
        if offered {
            assert!(front.get_features().is_ok());
        } else {
            bench.wait_error(0, "SET_FEATURES with 0x10000000000, which was not offered");
        }
    }
}

#[test]
fn a_late_word_of_a_fault_changes_nothing() {
    let bench = Bench::new(SocketMode::Server);
    let (mut a, mut b) = pair(&bench, SPLIT);
    exchange(&mut a, &mut b, 0..5);
    for side in [Side::Receiveq, Side::Transmitq] {
        // What a switch does when a worker meets a fault.
        bench.status[0].set(PortState::Broken, "a fault of an earlier ring");
        let fault = QueueFault::Ring(ChainError::Head { head: 64, size: 64 });
        bench.wire.fault(QueueId { port: PortId(0), pair: 0 }, side, fault);
        bench.wait(0, PortState::Up, "");
    }
    assert!(a.queues.iter().all(|queue| queue.err.read().is_err()));
    exchange(&mut a, &mut b, 5..50);
    exchange(&mut b, &mut a, 0..50);
}

#[test]
fn a_disabled_transmitq_is_emptied_and_counted() {
    let bench = Bench::new(SocketMode::Server);
    let (mut a, mut b) = pair(&bench, SPLIT);
    a.front.set_vring_enable(1, false).unwrap();
    bench.wait(0, PortState::Waiting, "connected, ring 1 not enabled by the driver");
    for number in 0..5 {
        assert!(a.send(&frame(number)));
    }
    wait_for("the drops", || {
        bench.counters[0].read_ends().drops[DropReason::RingDisabled as usize] == 5
    });
    assert!(b.receive().is_none());
    a.front.set_vring_enable(1, true).unwrap();
    exchange(&mut a, &mut b, 0..5);
}

#[test]
fn a_front_end_comes_again_and_again() {
    let bench = Bench::new(SocketMode::Server);
    for _ in 0..5 {
        let (mut a, mut b) = pair(&bench, PACKED);
        exchange(&mut a, &mut b, 0..40);
        drop((a, b));
        for number in 0..2 {
            bench.wait(number, PortState::Waiting, "waiting for the front end to connect to");
        }
    }
}

#[test]
fn a_client_finds_front_ends_whenever_they_listen() {
    let bench = Bench::new(SocketMode::Client);
    bench.wait(0, PortState::Waiting, "waiting for the front end to listen on");
    bench.wait_error(0, "cannot connect");
    for _ in 0..3 {
        let [mut a, mut b] = [0, 1].map(|number| {
            let listener = UnixListener::bind(bench.socket(number)).unwrap();
            let (stream, _) = listener.accept().unwrap();
            std::fs::remove_file(bench.socket(number)).unwrap();
            Guest::new(stream, SPLIT)
        });
        for guest in [&mut a, &mut b] {
            guest.fill();
            guest.start();
        }
        exchange(&mut a, &mut b, 0..40);
    }
}

#[test]
fn a_migrated_guest_is_announced_to_the_other_side() {
    let bench = Bench::new(SocketMode::Server);
    let stream = UnixStream::connect(bench.socket(0)).unwrap();
    let mut raw = stream.try_clone().unwrap();
    let mut a = Guest::new(stream, SPLIT);
    let mut b = Guest::new(UnixStream::connect(bench.socket(1)).unwrap(), SPLIT);
    for guest in [&mut a, &mut b] {
        guest.fill();
        guest.start();
    }
    // The vhost crate's front end cannot send this one.
    let bytes = vhost_user_net::codec::Request::SendRarp([2, 0, 0, 0, 0, 7]).write(false);
    raw.write_all(&bytes).unwrap();
    let mut got = None;
    wait_for("the announcement", || {
        got = b.receive();
        got.is_some()
    });
    let got = got.unwrap();
    assert_eq!(got.len(), 60);
    assert_eq!(got[..6], [0xff; 6]);
    assert_eq!(got[6..14], [2, 0, 0, 0, 0, 7, 0x80, 0x35]);
}
