//! What is known of a guest, from one switch to another: what it may bring along, and what not.

use packet::{MacAddr, VlanId};
use port::{Fabric, FlowPlace, PortSnapshot, PortTotals, Restored, Station};
use switch::{FdbLimits, PortConfig, PortLimits, Sources, Switch, SwitchConfig, VlanRule};

use crate::mock::{BROADCAST, add, frame, settle};

fn switch(per_port: u32) -> Switch {
    let fdb = FdbLimits { per_port, ..FdbLimits::default() };
    Switch::start(&SwitchConfig { fdb, ..SwitchConfig::default() }).unwrap()
}

fn mac(n: u32) -> MacAddr {
    MacAddr(crate::mock::mac(n))
}

fn station(vlan: u16, n: u32) -> Station {
    Station { vlan: VlanId::new(vlan).unwrap(), mac: mac(n), age_secs: 1 }
}

fn snapshot(stations: &[Station]) -> PortSnapshot {
    PortSnapshot { stations: stations.to_vec(), ..PortSnapshot::default() }
}

/// Addresses in the database that are behind a port.
fn behind(switch: &Switch, port: port::PortId) -> Vec<MacAddr> {
    let entries = switch.fdb().into_iter().filter(|entry| entry.port == port);
    let mut all: Vec<_> = entries.map(|entry| entry.mac).collect();
    all.sort();
    all
}

#[test]
fn stations_and_counters_go_along() {
    let (old, new) = (switch(100), switch(100));
    let fixed = vec![(VlanId::NONE, mac(9))];
    let with_static = PortConfig { stations: fixed, ..PortConfig::new("from") };
    let (from, wire) = add(&old, &with_static);
    let (_, _other) = add(&old, &PortConfig::new("other"));
    wire.send(&[frame(BROADCAST, mac(1).0, 0), frame(BROADCAST, mac(2).0, 1)]);
    let _ = settle(&old, &[&wire]);
    let known = old.snapshot(from.id);
    assert_eq!(known.stations.iter().map(|one| one.mac).collect::<Vec<_>>(), [mac(1), mac(2)]);
    assert_eq!((known.totals.rx_frames, known.totals.rx_bytes), (2, 120));

    let (to, _wire) = add(&new, &PortConfig::new("to"));
    let restored = new.restore(to.id, &known);
    assert_eq!(restored, Restored { stations: 2, refused: 0, flows: 0 });
    assert_eq!(behind(&new, to.id), [mac(1), mac(2)]);
    let stats = new.stats();
    assert_eq!(stats.ports[0].elsewhere, known.totals);
    assert_eq!((stats.ports[0].queues[0].rx_frames, stats.held), (0, 0));
    // Twice is once, and the next switch hears of all that was before.
    let _ = new.restore(to.id, &known);
    assert_eq!(new.snapshot(to.id).totals, known.totals);
    assert_eq!(new.elsewhere(to.id), known.totals);
}

#[test]
fn a_port_gets_no_station_that_it_may_not_have() {
    let new = switch(3);
    let vlan = VlanRule::from_keys(Some(7), &[]).unwrap();
    let (tagged, _wire) = add(&new, &PortConfig { vlan, ..PortConfig::new("access") });
    let strange = snapshot(&[station(7, 1), station(8, 2), station(0, 3)]);
    assert_eq!(new.restore(tagged.id, &strange).refused, 2);
    assert_eq!(behind(&new, tagged.id), [mac(1)]);

    let sources = Some(Sources::new(mac(5), []));
    let limits = PortLimits { sources, ..PortLimits::default() };
    let (guarded, _wire) = add(&new, &PortConfig { limits, ..PortConfig::new("guarded") });
    let strange = snapshot(&[station(0, 4), station(0, 5)]);
    assert_eq!(new.restore(guarded.id, &strange), Restored { stations: 1, refused: 1, flows: 0 });
    assert_eq!(behind(&new, guarded.id), [mac(5)]);

    // Its share of the database, and what is too old.
    let (many, _wire) = add(&new, &PortConfig::new("many"));
    let all: Vec<_> = (10..20).map(|n| station(0, n)).collect();
    assert_eq!(
        new.restore(many.id, &snapshot(&all)),
        Restored { stations: 3, refused: 7, flows: 0 }
    );
    let (old, _wire) = add(&new, &PortConfig::new("old"));
    let silent = Station { age_secs: 300, ..station(0, 30) };
    assert_eq!(new.restore(old.id, &snapshot(&[silent])).refused, 1);
    // A station that was behind another port has moved.
    assert_eq!(new.restore(old.id, &snapshot(&[station(0, 5)])).stations, 1);
    assert_eq!(behind(&new, old.id), [mac(5)]);
    assert!(behind(&new, guarded.id).is_empty());
}

#[test]
fn flows_of_pairs_that_a_port_does_not_have_stay_behind() {
    let new = switch(100);
    let totals = PortTotals { drops: 1, ..PortTotals::default() };
    let flow = |hash, pair| FlowPlace { hash, pair, age_ms: 5 };
    let flows = vec![flow(1, 0), flow(2, 1), flow(3, 2), flow(4, u16::MAX)];
    let known = PortSnapshot { flows, totals, stations: Vec::new() };
    let (single, _wire) = add(&new, &PortConfig::new("single"));
    assert_eq!(new.restore(single.id, &known).flows, 0);
    let (several, _wire) = add(&new, &PortConfig { pairs: 2, ..PortConfig::new("several") });
    assert_eq!(new.restore(several.id, &known).flows, 2);
    let mut kept = new.snapshot(several.id).flows;
    kept.sort_by_key(|flow| flow.hash);
    let places: Vec<_> = kept.iter().map(|flow| (flow.hash, flow.pair)).collect();
    assert_eq!(places, [(1, 0), (2, 1)]);
    assert!(kept.iter().all(|flow| flow.age_ms < 10_000), "{kept:?}");
    // Nothing of a port that is not there.
    let gone = port::PortId(99);
    assert_eq!(new.restore(gone, &known), Restored::default());
    assert_eq!(new.snapshot(gone), PortSnapshot::default());
}
