//! Learning, flooding, order, VLAN forms, many queues, many workers.

use std::collections::HashSet;
use std::sync::Arc;

use packet::{MacAddr, VlanId};
use port::{DropReason, Fabric};
use switch::{PortConfig, Switch, SwitchConfig, VlanRule, Workers};

use crate::mock::{
    BROADCAST, add, at, attach, check_law, drops, frame, mac, number, plain_ports, settle, tagged,
    wait_for,
};

fn config(workers: Workers) -> SwitchConfig {
    SwitchConfig { workers, ..SwitchConfig::default() }
}

#[test]
fn unknown_stations_are_flooded_and_known_ones_are_not() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[0].send(&[frame(mac(2), mac(1), 7)]);
    let stats = settle(&switch, &wires);
    assert_eq!(stats.flood_copies, 1);
    assert_eq!((wires[1].take().len(), wires[2].take().len()), (1, 1));
    assert!(wires[0].take().is_empty(), "never back to the ingress port");

    wires[1].send(&[frame(mac(1), mac(2), 8)]);
    let _ = settle(&switch, &wires);
    assert_eq!(wires[0].take(), [frame(mac(1), mac(2), 8)]);
    assert!(wires[2].take().is_empty());

    let burst: Vec<_> = (0..500).map(|n| frame(mac(2), mac(1), n)).collect();
    wires[0].send(&burst);
    let stats = settle(&switch, &wires);
    assert_eq!(wires[1].take(), burst, "in order, unchanged");
    assert_eq!(stats.flood_copies, 1);
    assert_eq!(stats.fdb_entries, 2);
}

#[test]
fn everybody_is_notified_after_a_burst() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    let count =
        |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::SeqCst);
    wires[0].send(&[frame(BROADCAST, mac(1), 0)]);
    wait_for("the receiver's call", || count(&wires[1].egress_notified) > 0);
    wait_for("the sender's call", || count(&wires[0].ingress_notified) > 0);
    assert_eq!(count(&wires[0].released), 1);
    assert_eq!(count(&wires[1].ingress_notified), 0);
}

#[test]
fn frames_of_many_destinations_keep_their_order() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 5);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    for (station, wire) in (0u32..).zip(&wires) {
        wire.send(&[frame(BROADCAST, mac(station), 0)]);
    }
    let _ = settle(&switch, &wires);
    wires.iter().for_each(|wire| drop(wire.take()));
    let burst: Vec<_> = (0..1000).map(|n| frame(mac(1 + n % 4), mac(0), n)).collect();
    wires[0].send(&burst);
    let stats = settle(&switch, &wires);
    for (station, wire) in (0u32..).zip(&wires).skip(1) {
        let got: Vec<_> = wire.take().iter().map(|frame| number(frame)).collect();
        let want: Vec<_> = (0..1000).filter(|n| 1 + n % 4 == station).collect();
        assert_eq!(got, want);
    }
    assert_eq!(stats.flood_copies, 5 * 3);
}

#[test]
fn vlans_are_pushed_and_popped() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let rule = |vlan, trunk: &[u16]| VlanRule::from_keys(vlan, trunk).unwrap();
    let port = |name: &str, vlan| PortConfig { vlan, ..PortConfig::new(name) };
    let (_, access) = add(&switch, &port("access", rule(Some(5), &[])));
    let (_, trunk) = add(&switch, &port("trunk", rule(None, &[5, 6])));
    let (_, native) = add(&switch, &port("native", rule(Some(5), &[6])));
    let (_, other) = add(&switch, &port("other", rule(Some(6), &[])));
    let (_, any) = add(&switch, &port("any", VlanRule::Any));
    let all = [&access, &trunk, &native, &other, &any];

    let plain = frame(BROADCAST, mac(1), 1);
    access.send(std::slice::from_ref(&plain));
    let _ = settle(&switch, &all);
    assert_eq!(trunk.take(), [tagged(plain.clone(), 5)]);
    assert_eq!(native.take(), std::slice::from_ref(&plain));
    assert_eq!(any.take(), [tagged(plain, 5)]);
    assert!(other.take().is_empty());

    let reply = frame(mac(1), mac(2), 2);
    trunk.send(&[tagged(reply.clone(), 0xa005), tagged(reply.clone(), 6)]);
    let _ = settle(&switch, &all);
    assert_eq!(access.take(), std::slice::from_ref(&reply), "one database per VLAN");
    assert_eq!(other.take(), std::slice::from_ref(&reply), "unknown in VLAN 6: flooded");
    assert_eq!(native.take(), [tagged(reply.clone(), 6)]);
    assert_eq!(any.take(), [tagged(reply, 6)]);
    assert_eq!(switch.fdb().len(), 3);

    // The short way, with tags: many frames of one pair.
    let burst: Vec<_> = (0..300).map(|n| tagged(frame(mac(1), mac(2), n), 0x6005)).collect();
    trunk.send(&burst);
    let _ = settle(&switch, &all);
    let got = access.take();
    assert_eq!(got.len(), 300);
    assert!(got.iter().all(|frame| frame.len() == 60));
    let burst: Vec<_> = (0..300).map(|n| frame(mac(2), mac(1), n)).collect();
    access.send(&burst);
    let _ = settle(&switch, &all);
    assert!(trunk.take().iter().zip(&burst).all(|(got, sent)| *got == tagged(sent.clone(), 5)));
}

#[test]
fn flows_spread_over_the_attached_pairs() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let (_, sender) = add(&switch, &PortConfig::new("sender"));
    let many = switch.add_port(&PortConfig { pairs: 4, ..PortConfig::new("many") }).unwrap();
    let wires: Vec<_> = (0..4).map(|pair| attach(&switch, &many, pair)).collect();
    wires[0].send(&[frame(BROADCAST, mac(9), 0)]);
    let all: Vec<&Arc<_>> = wires.iter().chain([&sender]).collect();
    let _ = settle(&switch, &all);

    // 100 sources are 100 flows; each one has 10 frames.
    let send = || {
        let frames: Vec<_> = (0..1000).map(|n| frame(mac(9), mac(100 + n % 100), n)).collect();
        sender.send(&frames);
        let _ = settle(&switch, &all);
        wires.iter().map(|wire| wire.take()).collect::<Vec<_>>()
    };
    let got = send();
    let flows: Vec<HashSet<_>> =
        got.iter().map(|frames| frames.iter().map(|f| f[6..12].to_vec()).collect()).collect();
    assert_eq!(flows.iter().map(HashSet::len).sum::<usize>(), 100, "one flow, one queue");
    assert!(flows.iter().all(|flows| flows.len() > 5), "{flows:?}");
    for frames in &got {
        let numbers: Vec<_> = frames.iter().map(|frame| number(frame)).collect();
        assert!(numbers.is_sorted(), "order is kept");
    }

    for pair in [0, 2] {
        drop(switch.detach_egress(crate::mock::at(many.id, pair)).unwrap());
    }
    switch.quiesce();
    let got = send();
    assert!(got[0].is_empty() && got[2].is_empty(), "never a pair that is not attached");
    assert_eq!(got[1].len() + got[3].len(), 1000);
}

#[test]
fn two_workers_deliver_to_one_egress() {
    let switch = Switch::start(&config(Workers::Unpinned(2))).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[2].send(&[frame(BROADCAST, mac(3), 0)]);
    let _ = settle(&switch, &wires);
    for round in 0..50u32 {
        for (station, wire) in [(1, wires[0]), (2, wires[1])] {
            let frames = (0..100).map(|n| frame(mac(3), mac(station), round * 100 + n));
            wire.send(&frames.collect::<Vec<_>>());
        }
    }
    let stats = settle(&switch, &wires);
    let got = wires[2].take();
    assert_eq!(got.len(), 10_000);
    for station in [1, 2] {
        let of: Vec<_> = got.iter().filter(|frame| frame[6..12] == mac(station)).collect();
        assert!(of.iter().map(|frame| number(frame)).eq(0..5000), "each flow in order");
    }
    assert!(stats.workers.iter().all(|worker| worker.frames >= 5000), "{:?}", stats.workers);
}

#[test]
fn every_pair_may_have_a_worker_of_its_own() {
    let switch = Switch::start(&config(Workers::PerQueue)).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    assert_eq!(switch.stats().workers.len(), 3);
    wires[0].send(&[frame(BROADCAST, mac(1), 0)]);
    let _ = settle(&switch, &wires);
    drop(switch.detach_ingress(crate::mock::at(ports[0].0.id, 0)).unwrap());
    let stats = switch.stats();
    assert_eq!(stats.workers.len(), 2);
    assert_eq!(stats.flood_copies, 1, "counts outlive the worker");
    check_law(&stats);
}

#[test]
fn a_static_station_stays_where_it_is() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let station = (VlanId::NONE, MacAddr(mac(5)));
    let fixed = PortConfig { stations: vec![station], ..PortConfig::new("fixed") };
    let (_, home) = add(&switch, &fixed);
    let (_, thief) = add(&switch, &PortConfig::new("thief"));
    let (_, third) = add(&switch, &PortConfig::new("third"));
    thief.send(&[frame(BROADCAST, mac(5), 0)]);
    third.send(&[frame(mac(5), mac(6), 1)]);
    let _ = settle(&switch, &[&home, &thief, &third]);
    assert!(home.take().contains(&frame(mac(5), mac(6), 1)));
    assert!(!thief.take().contains(&frame(mac(5), mac(6), 1)));
    assert_eq!(switch.fdb_flush(None), 1, "only what was learned");
    let entries = switch.fdb();
    assert!(entries.len() == 1 && entries[0].fixed);
}

/// A guest whose address is configured moves to another host, and comes back. A guest beside it
/// cannot take its place.
#[test]
fn a_static_station_is_behind_an_uplink_while_its_port_has_no_queues() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let station = (VlanId::NONE, MacAddr(mac(5)));
    let fixed = PortConfig { stations: vec![station], ..PortConfig::new("fixed") };
    let (port, home) = add(&switch, &fixed);
    let (_, thief) = add(&switch, &PortConfig::new("thief"));
    let uplink = PortConfig { outward: true, ..PortConfig::new("uplink") };
    let (up, uplink) = add(&switch, &uplink);
    let (_, third) = add(&switch, &PortConfig::new("third"));
    let wires = [&home, &thief, &uplink, &third];
    let to_it = |number| frame(mac(5), mac(6), number);
    let mut sent = 0;
    let mut ask = || {
        sent += 1;
        third.send(&[to_it(sent)]);
        let _ = settle(&switch, &wires);
        wires.map(|wire| wire.take().contains(&to_it(sent)))
    };
    uplink.send(&[frame(BROADCAST, mac(5), 0)]);
    assert_eq!(ask(), [true, false, false, false], "it is here");
    let egress = switch.detach_egress(at(port.id, 0)).unwrap();
    thief.send(&[frame(BROADCAST, mac(5), 1)]);
    assert_eq!(ask(), [false; 4], "nobody has it");
    uplink.send(&[frame(BROADCAST, mac(5), 2)]);
    assert_eq!(ask(), [false, false, true, false], "it is elsewhere");
    thief.send(&[frame(BROADCAST, mac(5), 4)]);
    let _ = switch.fdb_flush(None);
    let _ = switch.age();
    thief.send(&[frame(BROADCAST, mac(5), 5)]);
    assert_eq!(ask(), [false, false, true, false], "and not the thief's");
    switch.attach_egress(at(port.id, 0), egress);
    assert_eq!(ask(), [true, false, false, false], "it is here again");
    uplink.send(&[frame(BROADCAST, mac(5), 3)]);
    assert_eq!(ask(), [true, false, false, false], "and stays");
    assert!(switch.fdb().iter().any(|entry| entry.fixed && entry.mac == station.1));
    // The uplink that has it goes; and then its own port.
    drop(switch.detach_egress(at(port.id, 0)));
    uplink.send(&[frame(BROADCAST, mac(5), 6)]);
    assert_eq!(ask(), [false, false, true, false]);
    assert!(switch.remove_port(up.id));
    thief.send(&[frame(BROADCAST, mac(5), 7)]);
    let where_it_is = |switch: &Switch| {
        let known = switch.fdb();
        known.iter().find(|entry| entry.mac == station.1).map(|entry| (entry.port, entry.fixed))
    };
    wait_for("the thief is heard", || thief.waiting() == 0);
    assert_eq!(where_it_is(&switch), Some((port.id, true)));
    assert!(switch.remove_port(port.id));
    assert_eq!(where_it_is(&switch), None);
}

/// A station that other hosts have is theirs in a process that takes over, too.
#[test]
fn a_successor_knows_who_has_a_static_station() {
    let station = (VlanId::NONE, MacAddr(mac(5)));
    let fixed = PortConfig { stations: vec![station], ..PortConfig::new("fixed") };
    let uplink = PortConfig { outward: true, ..PortConfig::new("uplink") };
    let old = Switch::start(&SwitchConfig::default()).unwrap();
    let _ = old.add_port(&fixed).unwrap();
    let (up, wire) = add(&old, &uplink);
    wire.send(&[frame(BROADCAST, mac(5), 0)]);
    let _ = settle(&old, &[&wire]);
    let known = old.fdb();
    assert!(known.len() == 1 && known[0].port == up.id && known[0].fixed);
    let new = Switch::start(&SwitchConfig::default()).unwrap();
    let _ = new.add_port(&fixed).unwrap();
    let _ = new.add_port(&uplink).unwrap();
    assert_eq!(new.restore_fdb(known.clone()), 0);
    assert_eq!(new.fdb(), known);
}

#[test]
fn frames_of_our_own_are_learned_and_flooded() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    let announcement = packet::rarp_announce(MacAddr(mac(1)));
    switch.originate(ports[0].0.id, &announcement);
    assert_eq!(
        (wires[1].take(), wires[2].take()),
        (vec![announcement.to_vec()], vec![announcement.to_vec()])
    );
    assert!(wires[0].take().is_empty());
    let stats = settle(&switch, &wires);
    assert_eq!((stats.originated, stats.flood_copies), (1, 1));
    assert_eq!(switch.fdb()[0].port, ports[0].0.id);

    for port in &ports[1..] {
        drop(switch.detach_egress(crate::mock::at(port.0.id, 0)));
    }
    switch.originate(ports[0].0.id, &announcement);
    let stats = settle(&switch, &wires);
    assert_eq!(stats.originated, 1, "nobody was there to take it");
    assert_eq!(drops(&stats, DropReason::NoDestination), 0);
}
