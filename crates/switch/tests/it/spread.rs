//! Flows that arrive on one queue are spread over the workers: all arrive, in their order, and are
//! accounted for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{DropReason, Fabric};
use switch::{PortConfig, PortError, PortHandle, Switch, SwitchConfig, Workers};

use crate::mock::{
    Behaviour, Wire, at, attach, attach_egress, attach_ingress, check_law, drops, mac, settle,
    wait_for,
};

/// A GRE frame of 90 bytes between two tunnel ends, around a UDP packet of a flow.
fn gre(flow: u16, number: u32) -> Vec<u8> {
    let mut frame = [&mac(2)[..], &mac(1), &[8, 0]].concat();
    frame.extend([0x45, 0, 0, 76, 0, 0, 0, 0, 64, 47, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    frame.extend([0, 0, 8, 0]);
    frame.extend([0x45, 0, 0, 52, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(flow.to_be_bytes());
    frame.extend([0, 53, 0, 32, 0, 0]);
    frame.extend(number.to_be_bytes());
    frame.resize(90, 0);
    frame
}

fn read(frame: &[u8]) -> (u16, u32) {
    let flow = u16::from_be_bytes(frame[58..60].try_into().unwrap());
    (flow, u32::from_be_bytes(frame[66..70].try_into().unwrap()))
}

fn uplink_and_peer(switch: &Switch) -> (PortHandle, Arc<Wire>, PortHandle, Arc<Wire>) {
    let spread = PortConfig { spread: true, ..PortConfig::new("uplink") };
    let uplink = switch.add_port(&spread).unwrap();
    let wire = attach(switch, &uplink, 0);
    let peer = switch.add_port(&PortConfig::new("peer")).unwrap();
    let peers_wire = attach(switch, &peer, 0);
    peers_wire.send(&[crate::mock::frame(mac(1), mac(2), 0)]);
    let _ = settle(switch, &[&wire, &peers_wire]);
    drop(wire.take());
    (uplink, wire, peer, peers_wire)
}

fn start(workers: usize) -> Switch {
    let workers = Workers::Unpinned(workers);
    Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap()
}

#[test]
fn flows_in_a_tunnel_are_spread_and_stay_in_order() {
    const FLOWS: u16 = 32;
    for workers in [1, 2, 3] {
        let switch = start(workers);
        let (uplink, wire, _peer, peer) = uplink_and_peer(&switch);
        let before = switch.stats();
        let mut next: HashMap<u16, u32> = HashMap::new();
        for round in 0..300 {
            wire.send(&(0..FLOWS).map(|flow| gre(flow, round)).collect::<Vec<_>>());
            // No more under way than lanes take.
            wait_for("the frames", || wire.waiting() < 200 && switch.stats().held < 400);
            if round % 50 == 49 && workers > 1 {
                // The queue changes its worker, and the lanes with it.
                let from = switch.placement()[0].worker.unwrap();
                let moved = switch.move_pair(at(uplink.id, 0), (from + 1) % workers).unwrap();
                assert_eq!(moved.from, from);
            }
        }
        let stats = settle(&switch, &[&wire, &peer]);
        for frame in peer.take() {
            let (flow, number) = read(&frame);
            let expected = next.entry(flow).or_insert(0);
            assert_eq!(number, *expected, "flow {flow}, {workers} workers");
            *expected += 1;
        }
        assert!(next.len() == 32 && next.values().all(|count| *count == 300), "{next:?}");
        assert_eq!(drops(&stats, DropReason::HandOverFull), 0);
        let share = |worker: usize| stats.workers[worker].frames - before.workers[worker].frames;
        for worker in 0..workers {
            assert!(share(worker) > 1000, "worker {worker} of {workers}: {:?}", stats.workers);
        }
    }
}

#[test]
fn detach_waits_until_no_frame_is_under_way() {
    let switch = start(2);
    let (uplink, wire, peer, peers_wire) = uplink_and_peer(&switch);
    for round in 0..50 {
        wire.send(&(0..64).map(|flow| gre(flow, round)).collect::<Vec<_>>());
        if round % 2 == 0 {
            wait_for("the worker to take them", || wire.waiting() == 0);
        }
        let ingress = switch.detach_ingress(at(uplink.id, 0)).unwrap();
        assert!(!wire.inside.load(Ordering::SeqCst));
        let stats = switch.stats();
        assert_eq!(stats.held, 0, "nothing is left in a lane");
        check_law(&stats);
        switch.attach_ingress(at(uplink.id, 0), ingress);
    }
    let stats = settle(&switch, &[&wire]);
    assert_eq!(peers_wire.take().len(), 50 * 64);
    // What is dropped at the other worker counts at the pair where it came from, also later.
    drop(switch.detach_egress(at(peer.id, 0)));
    wire.send(&(0..64).map(|flow| gre(flow, 0)).collect::<Vec<_>>());
    let _ = settle(&switch, &[&wire]);
    for _ in 0..2 {
        let stats = switch.stats();
        let down = DropReason::PortDown as usize;
        assert_eq!(stats.ports[0].queues[0].drops[down], 64);
        check_law(&stats);
        drop(switch.detach_ingress(at(uplink.id, 0)));
    }
    drop(stats);
}

#[test]
fn hand_over_full() {
    // Worker 1 takes no turn: its lane runs full, and nothing else is lost.
    let workers = Workers::Manual(2);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let spread = PortConfig { spread: true, ..PortConfig::new("uplink") };
    let uplink = switch.add_port(&spread).unwrap();
    let wire = attach(&switch, &uplink, 0);
    let peer = switch.add_port(&PortConfig::new("peer")).unwrap();
    let peers_wire = Wire::new();
    attach_egress(&switch, &peer, 0, &peers_wire);
    assert_eq!(switch.placement()[0].worker, Some(0));
    const BURSTS: u32 = 100;
    for number in 0..BURSTS {
        wire.send(&(0..64).map(|flow| gre(flow, number)).collect::<Vec<_>>());
        let _ = switch.turn(0);
    }
    let stats = switch.stats();
    let lost = drops(&stats, DropReason::HandOverFull);
    let own = peers_wire.take().len() as u64;
    assert!(lost > 0 && own > 0 && stats.held > 0, "{lost} lost, {own} own, {} held", stats.held);
    assert_eq!(own + lost + stats.held, u64::from(BURSTS) * 64);
    let _ = switch.turn(1);
    while switch.stats().held > 0 {
        let _ = switch.turn(1);
    }
    assert_eq!(peers_wire.take().len() as u64, stats.held, "what was in the lane arrives");
    // There is room again.
    wire.send(&(0..64).map(|flow| gre(flow, BURSTS)).collect::<Vec<_>>());
    for worker in [0, 1] {
        let _ = switch.turn(worker);
    }
    assert_eq!(peers_wire.take().len(), 64);
    assert_eq!(drops(&switch.stats(), DropReason::HandOverFull), lost);
    check_law(&switch.stats());
}

#[test]
fn a_sleeping_worker_is_woken_for_its_flows() {
    let switch = start(2);
    let (_uplink, wire, _peer, peer) = uplink_and_peer(&switch);
    for round in 0..20 {
        wait_for("the queues to be armed", || wire.is_armed() && peer.is_armed());
        std::thread::sleep(std::time::Duration::from_millis(2));
        wire.send(&(0..8).map(|flow| gre(flow, round)).collect::<Vec<_>>());
        let mut arrived = 0;
        wait_for("all frames", || {
            arrived += peer.take().len();
            arrived == 8
        });
    }
    check_law(&switch.stats());
    assert!(switch.stats().workers.iter().all(|worker| worker.sleeps > 1));
}

#[test]
fn a_panic_in_a_lane_loses_its_frames_and_counts_them() {
    let switch = start(2);
    let (uplink, wire, peer, peers_wire) = uplink_and_peer(&switch);
    peers_wire.behave(Behaviour::EgressPanics);
    wire.send(&(0..64).map(|flow| gre(flow, 0)).collect::<Vec<_>>());
    wait_for("the quarantine", || {
        switch.stats().ports.iter().any(|port| port.status.state.name() == "quarantined")
    });
    let _ = settle(&switch, &[&wire]);
    peers_wire.behave(Behaviour::Good);
    assert!(switch.reset_port(peer.id));
    attach_egress(&switch, &peer, 0, &peers_wire);
    drop(peers_wire.take());
    wire.send(&(0..64).map(|flow| gre(flow, 1)).collect::<Vec<_>>());
    let _ = settle(&switch, &[&wire]);
    assert_eq!(peers_wire.take().len(), 64);
    let other = Wire::new();
    drop(switch.detach_ingress(at(uplink.id, 0)));
    attach_ingress(&switch, &uplink, 0, &other);
}

#[test]
fn there_must_be_shared_workers() {
    let workers = Workers::PerQueue;
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let spread = PortConfig { spread: true, ..PortConfig::new("uplink") };
    assert_eq!(switch.add_port(&spread).unwrap_err(), PortError::Spread);
}
