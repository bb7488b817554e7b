//! Every reason for which the switch itself drops a frame, by name.

use port::{DropReason, Fabric};
use switch::{FdbLimits, PortConfig, Switch, SwitchConfig, VlanRule};

use crate::mock::{
    BROADCAST, Behaviour, add, at, check_law, drops, frame, mac, plain_ports, settle, tagged,
    wait_for,
};

/// Sends frames from the first of two ports, checks that all are dropped for one reason.
fn all_dropped(reason: DropReason, frames: &[Vec<u8>]) {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    let wires = [&ports[0].1, &ports[1].1];
    wires[0].send(frames);
    let stats = settle(&switch, &wires);
    assert_eq!(drops(&stats, reason), frames.len() as u64, "{stats:#?}");
    let index = reason as usize;
    assert_eq!(stats.ports[0].queues[0].drops[index], frames.len() as u64, "at the ingress");
    assert!(wires[1].take().is_empty());
    let learned = switch.fdb().len();
    assert_eq!(learned, 0, "nothing is learned from a dropped frame");
}

#[test]
fn runt() {
    all_dropped(DropReason::Runt, &[vec![], vec![2; 13], vec![0; 1]]);
}

#[test]
fn bad_source() {
    let group = [3, 0, 0, 0, 0, 1];
    let sources = [[0; 6], BROADCAST, group];
    all_dropped(DropReason::BadSource, &sources.map(|source| frame(mac(2), source, 0)));
}

#[test]
fn reserved_mac() {
    let reserved = |last| frame([1, 0x80, 0xc2, 0, 0, last], mac(1), 0);
    all_dropped(DropReason::ReservedMac, &[reserved(0), reserved(0), reserved(15)]);

    let config = SwitchConfig { forward_reserved: true, ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    let ports = plain_ports(&switch, 2);
    ports[0].1.send(&[reserved(0)]);
    let _ = settle(&switch, &[&ports[0].1]);
    assert_eq!(ports[1].1.take().len(), 1, "forwarded if told to");
    let other = frame([1, 0x80, 0xc2, 0, 0, 16], mac(1), 0);
    ports[0].1.send(&[other]);
    let _ = settle(&switch, &[&ports[0].1]);
    assert_eq!(ports[1].1.take().len(), 1);
}

#[test]
fn same_port() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    let wires = [&ports[0].1, &ports[1].1];
    wires[0].send(&[frame(BROADCAST, mac(1), 0), frame(BROADCAST, mac(2), 0)]);
    wires[0].send(&vec![frame(mac(1), mac(2), 0); 3]);
    let stats = settle(&switch, &wires);
    assert_eq!(drops(&stats, DropReason::SamePort), 3);
}

#[test]
fn no_destination() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 1);
    ports[0].1.send(&vec![frame(BROADCAST, mac(1), 0); 3]);
    let stats = settle(&switch, &[&ports[0].1]);
    assert_eq!(drops(&stats, DropReason::NoDestination), 3);
}

#[test]
fn vlan_reasons() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let rule = |vlan, trunk: &[u16]| VlanRule::from_keys(vlan, trunk).unwrap();
    let port = |name: &str, vlan| PortConfig { vlan, ..PortConfig::new(name) };
    let (_, access) = add(&switch, &port("access", rule(Some(5), &[])));
    let (_, trunk) = add(&switch, &port("trunk", rule(None, &[5, 6])));
    let (_, any) = add(&switch, &port("any", VlanRule::Any));
    let base = frame(BROADCAST, mac(1), 0);
    access.send(&[tagged(base.clone(), 5), tagged(base.clone(), 6)]);
    trunk.send(&[base.clone(), tagged(base.clone(), 0x2000), tagged(base.clone(), 7)]);
    any.send(&[tagged(base, 4095)]);
    let stats = settle(&switch, &[&access, &trunk, &any]);
    assert_eq!(drops(&stats, DropReason::VlanTagged), 2);
    assert_eq!(drops(&stats, DropReason::VlanUntagged), 2);
    assert_eq!(drops(&stats, DropReason::VlanNotAllowed), 2);
}

#[test]
fn port_down() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    let wires = [&ports[0].1, &ports[1].1];
    wires[1].send(&[frame(BROADCAST, mac(2), 0)]);
    let _ = settle(&switch, &wires);
    drop(switch.detach_egress(at(ports[1].0.id, 0)));
    switch.quiesce();
    wires[0].send(&vec![frame(mac(2), mac(1), 0); 3]);
    let stats = settle(&switch, &wires);
    assert_eq!(stats.ports[0].queues[0].drops[DropReason::PortDown as usize], 3);
}

#[test]
fn what_an_egress_drops_is_counted_there() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    let wires = [&ports[0].1, &ports[1].1];
    wires[1].behave(Behaviour::NoRoom);
    wires[0].send(&vec![frame(BROADCAST, mac(1), 0); 3]);
    let stats = settle(&switch, &wires);
    assert_eq!(stats.ports[1].queues[0].drops[DropReason::NoBuffer as usize], 3);
}

#[test]
fn panicked() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 2);
    ports[0].1.behave(Behaviour::IngressPanicsLate);
    ports[0].1.send(&vec![frame(BROADCAST, mac(1), 0); 3]);
    wait_for("the panic", || switch.events().next().is_some());
    let stats = switch.stats();
    assert_eq!(drops(&stats, DropReason::Panicked), 3);
    check_law(&stats);
}

/// A guest that invents addresses fills its own share only.
#[test]
fn an_inventive_guest_pushes_nobody_out() {
    let fdb = FdbLimits { entries: 100, per_port: 50, age_secs: 300 };
    let switch = Switch::start(&SwitchConfig { fdb, ..SwitchConfig::default() }).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires[1].send(&[frame(BROADCAST, mac(2), 0)]);
    let _ = settle(&switch, &wires);
    let invented: Vec<_> = (0..1000).map(|n| frame(mac(2), mac(10_000 + n), n)).collect();
    wires[0].send(&invented);
    let _ = settle(&switch, &wires);
    wires[2].send(&[frame(mac(2), mac(3), 0)]);
    let stats = settle(&switch, &wires);
    assert_eq!((stats.fdb_entries, stats.fdb_refused), (52, 950));
    assert_eq!(wires[1].take().len(), 1001, "all frames arrive");
    let known = |station| switch.fdb().iter().any(|entry| entry.mac.0 == mac(station));
    assert!(known(2) && known(3));
}
