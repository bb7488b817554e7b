//! Random traffic over random switches: the law holds, whatever happens.

use port::Fabric;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use switch::{PortConfig, Switch, SwitchConfig, VlanRule, Workers};

use crate::mock::{BROADCAST, Behaviour, add, at, attach_egress, frame, mac, settle, tagged};

#[derive(Debug, Clone)]
enum Step {
    /// Port, destination, source, tag, frames.
    Send(usize, u32, u32, Option<u16>, usize),
    Flush,
    EgressAway(usize),
    EgressBack(usize),
    Remove(usize),
    Full(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let tag = prop_oneof![Just(None), (0u16..4).prop_map(Some)];
    prop_oneof![
        20 => (0..5usize, 0..8u32, 0..8u32, tag, 1..100usize)
            .prop_map(|(port, to, from, tag, count)| Step::Send(port, to, from, tag, count)),
        1 => Just(Step::Flush),
        1 => (0..5usize).prop_map(Step::EgressAway),
        1 => (0..5usize).prop_map(Step::EgressBack),
        1 => (0..5usize).prop_map(Step::Remove),
        1 => (0..5usize).prop_map(Step::Full),
    ]
}

fn rule(kind: u8) -> VlanRule {
    match kind % 4 {
        0 => VlanRule::from_keys(Some(1), &[]).unwrap(),
        1 => VlanRule::from_keys(None, &[1, 2]).unwrap(),
        2 => VlanRule::from_keys(Some(2), &[1]).unwrap(),
        _ => VlanRule::Any,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_frame_is_accounted_for(
        rules in proptest::array::uniform5(any::<u8>()),
        steps in proptest::collection::vec(step(), 1..60),
        workers in 1..3usize,
    ) {
        let workers = Workers::Unpinned(workers);
        let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
        let port = |(n, kind): (usize, &u8)| {
            add(&switch, &PortConfig { vlan: rule(*kind), ..PortConfig::new(n.to_string()) })
        };
        let mut ports: Vec<_> = rules.iter().enumerate().map(port).map(Some).collect();
        for step in steps {
            let (Step::Send(n, ..) | Step::EgressAway(n) | Step::EgressBack(n) | Step::Remove(n)
                | Step::Full(n)) = step else {
                let _ = switch.fdb_flush(None);
                continue;
            };
            let Some((port, wire)) = &ports[n] else { continue };
            match step {
                Step::Send(_, to, from, tag, count) => {
                    let to = if to == 0 { BROADCAST } else { mac(to) };
                    let frame = frame(to, mac(from), 0);
                    let frame = tag.map_or(frame.clone(), |tag| tagged(frame, tag));
                    wire.send(&vec![frame; count]);
                }
                Step::EgressAway(_) => drop(switch.detach_egress(at(port.id, 0))),
                Step::EgressBack(_) => attach_egress(&switch, port, 0, wire),
                Step::Full(_) => wire.behave(Behaviour::NoRoom),
                Step::Remove(_) => {
                    assert!(switch.remove_port(port.id));
                    ports[n] = None;
                }
                Step::Flush => {}
            }
        }
        let wires: Vec<_> = ports.iter().flatten().map(|(_, wire)| wire).collect();
        let _ = settle(&switch, &wires);
    }
}
