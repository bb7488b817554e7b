//! Ports with several pairs: which pair a flow comes to, and that nothing is lost or overtaken
//! when pairs come and go.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use port::{DropReason, Fabric};
use switch::{PortConfig, PortHandle, ReceiveTable, Switch, SwitchConfig, Workers};

use crate::mock::{Behaviour, Wire, add, at, attach, attach_egress, drops, mac, settle, wait_for};

fn start(workers: usize) -> Switch {
    let workers = Workers::Unpinned(workers);
    Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap()
}

/// A UDP frame of 60 bytes from station `from` to station `to`, number `number` of its flow.
fn udp(from: u32, to: u32, ports: [u16; 2], number: u32) -> Vec<u8> {
    let mut frame =
        [&mac(to)[..], &mac(from), &[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    frame.extend([10, 0, 0, from as u8, 10, 0, 0, to as u8]);
    frame.extend(ports[0].to_be_bytes());
    frame.extend(ports[1].to_be_bytes());
    frame.extend([0, 26, 0, 0]);
    frame.extend(number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

/// Station 1 sends to station 2, as flow `flow`.
fn there(flow: u16, number: u32) -> Vec<u8> {
    udp(1, 2, [1000 + flow, 53], number)
}

/// The answer.
fn back(flow: u16, number: u32) -> Vec<u8> {
    udp(2, 1, [53, 1000 + flow], number)
}

/// Flow and number of a frame of station 2.
fn read(frame: &[u8]) -> (u16, u32) {
    let port = u16::from_be_bytes(frame[36..38].try_into().unwrap());
    (port - 1000, u32::from_be_bytes(frame[42..46].try_into().unwrap()))
}

/// Station 1 behind a port with so many pairs, and station 2 behind one with a single pair.
fn guest_and_peer(
    switch: &Switch,
    pairs: u16,
) -> (PortHandle, Vec<Arc<Wire>>, PortHandle, Arc<Wire>) {
    let guest = switch.add_port(&PortConfig { pairs, ..PortConfig::new("guest") }).unwrap();
    let wires: Vec<_> = (0..pairs).map(|pair| attach(switch, &guest, pair)).collect();
    let (peer, wire) = add(switch, &PortConfig::new("peer"));
    // Both stations are known: nothing is flooded.
    wires[0].send(&[udp(1, 2, [1, 1], 0)]);
    wire.send(&[udp(2, 1, [2, 2], 0)]);
    let _ = settle(switch, &[&wires[0], &wire]);
    for wire in &wires {
        drop(wire.take());
    }
    drop(wire.take());
    (guest, wires, peer, wire)
}

fn all(wires: &[Arc<Wire>], more: &Arc<Wire>) -> Vec<Arc<Wire>> {
    wires.iter().chain([more]).cloned().collect()
}

fn settled(switch: &Switch, wires: &[Arc<Wire>]) -> switch::SwitchStats {
    settle(switch, &wires.iter().collect::<Vec<_>>())
}

#[test]
fn answers_come_on_the_pair_that_asked() {
    for pairs in [2, 3, 128] {
        let switch = start(2);
        let (_guest, wires, _peer, peer) = guest_and_peer(&switch, pairs);
        let wires_of_all = all(&wires, &peer);
        let pair_of = |flow: u16| usize::from(flow * 7 % pairs);
        // Of two flows that two workers note in one set at once one may be left out: it is noted
        // with its next frame.
        for number in 0..2 {
            for flow in 0..200 {
                wires[pair_of(flow)].send(&[there(flow, number)]);
            }
            let _ = settled(&switch, &wires_of_all);
        }
        for flow in 0..200 {
            peer.send(&[back(flow, 0), back(flow, 1)]);
        }
        let _ = settled(&switch, &wires_of_all);
        let mut seen = 0;
        for (pair, wire) in wires.iter().enumerate() {
            for frame in wire.take() {
                let (flow, _) = read(&frame);
                assert_eq!(pair_of(flow), pair, "flow {flow} of {pairs} pairs");
                seen += 1;
            }
        }
        assert_eq!(seen, 400);
    }
}

#[test]
fn a_burst_of_one_pair_of_stations_is_noted_too() {
    // The short way of bursts that are like the one before.
    let switch = start(1);
    let (_guest, wires, _peer, peer) = guest_and_peer(&switch, 2);
    let wires_of_all = all(&wires, &peer);
    for round in 0..3 {
        for (pair, wire) in (0u16..).zip(&wires) {
            let burst: Vec<_> = (0..32).map(|n| there(round * 100 + pair * 50 + n, 0)).collect();
            wire.send(&burst);
            let _ = settled(&switch, &wires_of_all);
        }
    }
    for round in 0..3 {
        let flows = (0..100).filter(|n| n % 50 < 32).map(|n| round * 100 + n);
        peer.send(&flows.map(|flow| back(flow, 0)).collect::<Vec<_>>());
    }
    let _ = settled(&switch, &wires_of_all);
    for (pair, wire) in (0u16..).zip(&wires) {
        let flows: Vec<_> = wire.take().iter().map(|frame| read(frame).0).collect();
        assert_eq!(flows.len(), 96);
        assert!(flows.iter().all(|flow| flow % 100 / 50 == pair), "{flows:?}");
    }
}

#[test]
fn flows_that_never_sent_are_spread_over_all_pairs() {
    for pairs in [1, 2, 3, 128] {
        let switch = start(2);
        let (_guest, wires, _peer, peer) = guest_and_peer(&switch, pairs);
        let wires_of_all = all(&wires, &peer);
        for flow in 0..4000 {
            peer.send(&[back(flow, 0), back(flow, 1)]);
        }
        let _ = settled(&switch, &wires_of_all);
        let share = 8000 / usize::from(pairs);
        let mut at = HashMap::new();
        for (pair, wire) in wires.iter().enumerate() {
            let frames = wire.take();
            assert!((share / 3..=share * 2).contains(&frames.len()), "{pair}: {}", frames.len());
            for frame in frames {
                let flow = read(&frame).0;
                assert_eq!(*at.entry(flow).or_insert(pair), pair, "one flow, one pair");
            }
        }
        assert_eq!(at.len(), 4000);
    }
}

#[test]
fn a_flow_follows_its_sender_to_another_pair() {
    let switch = start(2);
    let (_guest, wires, _peer, peer) = guest_and_peer(&switch, 2);
    let wires_of_all = all(&wires, &peer);
    for pair in [0, 1, 0] {
        wait_for("the flow to move", || {
            wires[pair].send(&[there(5, 0)]);
            let _ = settled(&switch, &wires_of_all);
            peer.send(&[back(5, 0)]);
            let _ = settled(&switch, &wires_of_all);
            let here = !wires[pair].take().is_empty();
            let elsewhere = !wires[1 - pair].take().is_empty();
            assert!(here != elsewhere);
            here
        });
    }
}

#[test]
fn a_disabled_pair_gets_nothing_and_its_flows_come_back() {
    let switch = start(2);
    let (guest, wires, _peer, peer) = guest_and_peer(&switch, 3);
    let wires_of_all = all(&wires, &peer);
    wires[1].send(&(0..50).map(|flow| there(flow, 0)).collect::<Vec<_>>());
    let _ = settled(&switch, &wires_of_all);
    let answers: Vec<_> = (0..50).map(|flow| back(flow, 0)).collect();
    let counts = || {
        // Every worker knows what was changed.
        switch.quiesce();
        peer.send(&answers);
        let stats = settled(&switch, &wires_of_all);
        assert_eq!(stats.ports.iter().flat_map(|p| &p.queues).map(|q| q.dropped()).sum::<u64>(), 0);
        [0, 1, 2].map(|pair: usize| wires[pair].take().len())
    };
    assert_eq!(counts(), [0, 50, 0]);
    let egress = switch.detach_egress(at(guest.id, 1)).unwrap();
    let [first, second, third] = counts();
    assert_eq!((first + third, second), (50, 0));
    assert!(first > 10 && third > 10, "spread over those that are left");
    switch.attach_egress(at(guest.id, 1), egress);
    assert_eq!(counts(), [0, 50, 0]);
    assert!(switch.detach_egress(at(guest.id, 0)).is_some());
    assert!(switch.detach_egress(at(guest.id, 2)).is_some());
    assert_eq!(counts(), [0, 50, 0], "one is left");
}

/// All pairs of the guest write into one wire, so that what it received has one order.
#[test]
fn pairs_come_and_go_under_load_and_nothing_is_lost_or_overtaken() {
    const FLOWS: u16 = 16;
    let switch = start(2);
    let (guest, wires, peer, peers_wire) = guest_and_peer(&switch, 4);
    let one = Wire::new();
    for pair in 0..4 {
        attach_egress(&switch, &guest, pair, &one);
    }
    drop(wires);
    let stop = AtomicBool::new(false);
    let mut sent = 0u32;
    let mut next = HashMap::new();
    let mut check = |frames: Vec<Vec<u8>>| {
        for frame in frames {
            let (flow, number) = read(&frame);
            let expected = next.entry(flow).or_insert(0);
            assert_eq!(number, *expected, "flow {flow}");
            *expected += 1;
        }
    };
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                if peers_wire.waiting() < 1000 {
                    let burst: Vec<_> = (0..FLOWS).map(|flow| back(flow, sent)).collect();
                    peers_wire.send(&burst);
                    sent += 1;
                }
            }
            sent
        });
        for round in 0..300u16 {
            // At least one pair stays, as with `ethtool -L`.
            let pair = 1 + round % 3;
            let egress = switch.detach_egress(at(guest.id, pair)).unwrap();
            if round % 4 == 0 {
                // The sender's queue moves at the same time.
                let ingress = switch.detach_ingress(at(peer.id, 0)).unwrap();
                switch.attach_ingress(at(peer.id, 0), ingress);
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
            check(one.take());
            switch.attach_egress(at(guest.id, pair), egress);
        }
        stop.store(true, Ordering::Relaxed);
        sent = sender.join().unwrap();
    });
    let stats = settle(&switch, &[&peers_wire]);
    check(one.take());
    assert_eq!(drops(&stats, DropReason::PortDown), 0);
    assert_eq!(next.len(), usize::from(FLOWS));
    assert!(sent > 100 && next.values().all(|count| *count == sent), "{sent} sent, {next:?}");
    let used = stats.ports[0].queues.iter().filter(|queue| queue.tx_frames > 100).count();
    assert_eq!(used, 4, "{stats:#?}");
}

#[test]
fn a_broken_pair_leaves_its_flows_to_the_others() {
    let switch = start(1);
    let (_guest, wires, _peer, peer) = guest_and_peer(&switch, 2);
    let wires_of_all = all(&wires, &peer);
    wires[1].behave(Behaviour::EgressFaults);
    wires[1].send(&[there(1, 0)]);
    let _ = settled(&switch, &wires_of_all);
    peer.send(&[back(1, 0)]);
    let stats = settled(&switch, &wires_of_all);
    assert_eq!(drops(&stats, DropReason::PortDown), 1, "the frame that met the fault");
    peer.send(&[back(1, 1), back(1, 2)]);
    let stats = settled(&switch, &wires_of_all);
    assert_eq!(drops(&stats, DropReason::PortDown), 1);
    assert_eq!(wires[0].take().len(), 2);
}

/// The same with workers: the pairs of the sender move from one to the other all the time.
#[test]
fn pairs_move_between_workers_under_load_and_nothing_is_lost_or_overtaken() {
    let switch = start(2);
    let (guest, wires, _peer, peer) = guest_and_peer(&switch, 4);
    let wires_of_all = all(&wires, &peer);
    let stop = AtomicBool::new(false);
    let mut sent = 0u32;
    let mut next = HashMap::new();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                if wires.iter().all(|wire| wire.waiting() < 500) {
                    // Each flow stays on its pair.
                    for (pair, wire) in (0u16..).zip(&wires) {
                        wire.send(&[there(pair * 2, sent), there(pair * 2 + 1, sent)]);
                    }
                    sent += 1;
                }
            }
            sent
        });
        for round in 0..400u16 {
            let queue = at(guest.id, round % 4);
            let to = usize::from(round / 4 % 2);
            if let Some(moved) = switch.move_pair(queue, to) {
                assert_eq!((moved.queue, moved.from, moved.to), (queue, 1 - to, to));
            }
            let places = switch.placement();
            let place = places.iter().find(|place| place.queue == queue).unwrap();
            assert_eq!((place.worker, place.pinned), (Some(to), false));
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        stop.store(true, Ordering::Relaxed);
        sent = sender.join().unwrap();
    });
    let stats = settled(&switch, &wires_of_all);
    for frame in peer.take() {
        let flow = u16::from_be_bytes(frame[34..36].try_into().unwrap());
        let expected = next.entry(flow).or_insert(0);
        assert_eq!(u32::from_be_bytes(frame[42..46].try_into().unwrap()), *expected);
        *expected += 1;
    }
    assert!(next.len() == 8 && next.values().all(|count| *count == sent), "{sent}: {next:?}");
    assert!(stats.workers.iter().all(|worker| worker.frames > 0), "{:?}", stats.workers);
    assert_eq!(switch.move_pair(at(guest.id, 0), 2), None, "there is no third worker");
    assert_eq!(switch.move_pair(at(guest.id, 9), 0), None, "there is no such pair");
}

#[test]
fn a_port_is_served_where_it_says() {
    let switch = start(3);
    let config = PortConfig { pairs: 5, workers: vec![2, 0], ..PortConfig::new("pinned") };
    let port = switch.add_port(&config).unwrap();
    for pair in 0..5 {
        let _ = attach(&switch, &port, pair);
    }
    let workers: Vec<_> = switch.placement().iter().map(|p| (p.worker, p.pinned)).collect();
    assert_eq!(workers, [2, 0, 2, 0, 2].map(|worker| (Some(worker), true)));
    let wrong = PortConfig { workers: vec![1, 3], ..PortConfig::new("wrong") };
    let error = switch.add_port(&wrong).unwrap_err();
    assert_eq!(error.to_string(), "there is no worker 3: 3 share the queues");
}

#[test]
fn a_loud_pair_moves_to_the_idle_worker_and_stays() {
    let workers = Workers::Manual(2);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let guest = switch.add_port(&PortConfig { pairs: 3, ..PortConfig::new("guest") }).unwrap();
    let wires: Vec<_> = (0..3).map(|pair| attach(&switch, &guest, pair)).collect();
    let (_peer, _wire) = add(&switch, &PortConfig::new("peer"));
    let place = |pair: u16| {
        let places = switch.placement();
        *places.iter().find(|place| place.queue == at(guest.id, pair)).unwrap()
    };
    assert_eq!([0, 1, 2].map(|pair| place(pair).worker), [Some(0), Some(1), Some(0)]);
    // Each look at these two takes 2 ms.
    for pair in [0, 2] {
        wires[pair].behave(Behaviour::Slow);
    }
    let mut moves = Vec::new();
    for interval in 0..8 {
        for round in 0..5 {
            for pair in [0, 2] {
                wires[pair].send(&[there(pair as u16, interval * 10 + round)]);
            }
            // One turn with work, and one that ends it.
            for worker in [0, 1, 0, 1] {
                let _ = switch.turn(worker);
            }
        }
        switch.measure();
        moves.extend(switch.rebalance());
    }
    assert_eq!(moves.len(), 1, "{moves:?}");
    assert_eq!((moves[0].queue, moves[0].from, moves[0].to), (at(guest.id, 0), 0, 1));
    assert_eq!([0, 1, 2].map(|pair| place(pair).worker), [Some(1), Some(1), Some(0)]);
    for pair in [0, 2] {
        let place = place(pair);
        assert!(place.share > 0.9 && place.busy > 0.1, "{place:?}");
    }
    assert!(place(1).share < 0.1);
}

#[test]
fn the_guests_own_table_decides_and_only_among_attached_pairs() {
    use packet::{HashKind, ReceiveHash};
    let switch = start(1);
    let (guest, wires, _peer, peer) = guest_and_peer(&switch, 4);
    let wires_of_all = all(&wires, &peer);
    // Steering would bring everything to pair 0.
    wires[0].send(&(0..200).map(|flow| there(flow, 0)).collect::<Vec<_>>());
    let _ = settled(&switch, &wires_of_all);
    let hash = ReceiveHash::new(&[0x6d; 40], HashKind::UdpV4.bit()).unwrap();
    let entries = [3, 1, 1, 2];
    let table = || ReceiveTable::new(hash.clone(), entries, 2).unwrap();
    assert!(switch.set_receive_table(guest.id, Some(table())));
    let answers: Vec<_> = (0..200).map(|flow| back(flow, 0)).collect();
    let arrived = |frames: &[Vec<u8>]| {
        switch.quiesce();
        peer.send(frames);
        let stats = settled(&switch, &wires_of_all);
        assert_eq!(drops(&stats, DropReason::PortDown), 0);
        [0, 1, 2, 3].map(|pair: usize| wires[pair].take())
    };
    for (pair, frames) in (0u16..).zip(arrived(&answers)) {
        assert_eq!(frames.is_empty(), pair == 0);
        for frame in frames {
            let (value, _) = hash.of(&frame).unwrap();
            assert_eq!(entries[value as usize % 4], pair);
        }
    }
    let mut arp = back(1, 0);
    arp[13] = 6;
    assert_eq!(arrived(&[arp])[2].len(), 1, "what has no hash");
    assert!(switch.detach_egress(at(guest.id, 1)).is_some());
    let [first, second, third, fourth] = arrived(&answers).map(|frames| frames.len());
    assert_eq!((first + third + fourth, second), (200, 0));
    assert!(switch.set_receive_table(guest.id, None));
    assert_eq!(arrived(&answers)[0].len(), 200, "steering again");
    assert!(!switch.set_receive_table(port::PortId(99), None));
}
