//! The whole decision against a naive map, in virtual time.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use packet::VlanId;
use port::{
    Batch, Counter, DropReason, Egress, FrameBuf, Notified, PortId, QueueCounters, QueueFault,
    StatusCell,
};
use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};
use virtq::mem::SegStore;

use super::{Env, Origin, Pipeline};
use crate::fdb::{Fdb, FdbLimits};
use crate::table::{EgressSlot, Port, Record, ShortLock, Table, Tables};
use crate::vlan::VlanRule;

type Out = Arc<Mutex<Vec<Vec<u8>>>>;

#[derive(Debug)]
struct Sink(Out, Arc<QueueCounters>);

impl Egress for Sink {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        for index in picked {
            let frame = &batch.frames()[usize::from(*index)];
            self.0.lock().unwrap().push(frame.head().to_vec());
            self.1.egress.sent(1, 60);
        }
        Ok(())
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.1
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// A switch without threads.
struct Bench {
    fdb: Fdb,
    table: Arc<Table>,
    outs: Vec<Out>,
    origins: Vec<Origin>,
    pipeline: Pipeline,
    flood_copies: Counter,
}

impl Bench {
    fn new(rules: &[VlanRule]) -> Self {
        let tables = Tables::default();
        let mut outs = Vec::new();
        let mut origins = Vec::new();
        let _ = tables.edit(|records| {
            for (id, rule) in (0u16..).zip(rules) {
                let counters: Arc<QueueCounters> = Arc::default();
                let out = Out::default();
                let slot = EgressSlot {
                    egress: Some(Box::new(Sink(Arc::clone(&out), Arc::clone(&counters)))),
                    counters: Some(Arc::clone(&counters)),
                    ..EgressSlot::default()
                };
                let port = Port {
                    id: PortId(id),
                    name: id.to_string(),
                    rule: rule.clone(),
                    status: StatusCell::waiting(""),
                    counters: Box::new([Arc::clone(&counters)]),
                    egress: Box::new([ShortLock::new(slot).into()]),
                    steering: Default::default(),
                    workers: Box::default(),
                    spread: false,
                    outward: false,
                    stations: Box::default(),
                };
                records.push(Some(Record {
                    port: Arc::new(port),
                    attached: BTreeSet::from([0]),
                    pairs_seen: 1,
                    quarantined: false,
                    guard: None,
                    taps: Vec::new(),
                    hashed: None,
                    elsewhere: port::PortTotals::default(),
                }));
                outs.push(out);
                origins.push(Origin::new(PortId(id), Some(0), counters));
            }
        });
        let (table, _) = tables.current();
        let mut pipeline = Pipeline::default();
        pipeline.fit(&table);
        let limits = FdbLimits { entries: 1000, per_port: 1000, age_secs: 300 };
        let flood_copies = Counter::default();
        Self { fdb: Fdb::new(limits, 0, 5), table, outs, origins, pipeline, flood_copies }
    }

    fn send(&mut self, port: usize, frames: &[Vec<u8>], now: u32) {
        for burst in frames.chunks(port::BURST_MAX) {
            let mut buffer = FrameBuf::default();
            for frame in burst {
                buffer.slot().unwrap().fill_private(frame);
                buffer.keep();
            }
            let origin = &mut self.origins[port];
            origin.counters.ingress.received(burst.len() as u64, 0);
            let env = Env {
                now_ns: 0,
                fdb: &self.fdb,
                table: &self.table,
                now,
                ticks: 0,
                forward_reserved: false,
                flood_copies: &self.flood_copies,
            };
            let mut batch = buffer.batch(SegStore::empty(), None);
            self.pipeline.forward(&env, origin, &mut batch);
            assert_eq!(origin.counters.ingress.passed(), origin.handed, "the books");
            self.pipeline.notify(&self.table, |_| ());
        }
    }

    fn take(&self) -> Vec<Vec<Vec<u8>>> {
        self.outs.iter().map(|out| std::mem::take(&mut *out.lock().unwrap())).collect()
    }

    fn drops(&self) -> BTreeMap<&'static str, u64> {
        let mut sum = BTreeMap::new();
        for origin in &self.origins {
            let totals = origin.counters.read_ends();
            for (reason, count) in DropReason::ALL.iter().zip(totals.drops) {
                *sum.entry(reason.name()).or_default() += count;
            }
        }
        sum.retain(|_, count| *count > 0);
        sum
    }
}

/// A port's rule, in the model's own words.
#[derive(Debug, Clone)]
struct Rule {
    vlan: Option<u16>,
    trunk: BTreeSet<u16>,
}

#[derive(Debug, Clone)]
struct Sent {
    port: usize,
    to: u8,
    from: u8,
    tag: Option<u16>,
    /// A second tag, behind the first.
    inner: Option<u16>,
    /// Ends behind the first tag.
    cut: bool,
    count: usize,
    wait: u32,
}

/// Written straight from the design's table.
struct Model {
    rules: Vec<Rule>,
    map: BTreeMap<(u16, u8), (usize, u32)>,
    drops: BTreeMap<&'static str, u64>,
}

impl Model {
    fn drop(&mut self, reason: &'static str) -> Vec<(usize, Option<u16>)> {
        *self.drops.entry(reason).or_default() += 1;
        Vec::new()
    }

    /// The VLAN of a frame that may come in; its source is learned.
    fn admit(&mut self, sent: &Sent, now: u32) -> Result<u16, &'static str> {
        let rule = &self.rules[sent.port];
        let id = sent.tag.map_or(0, |tag| tag & 0xfff);
        let any = rule.vlan.is_none() && rule.trunk.is_empty();
        let access = rule.vlan.is_some() && rule.trunk.is_empty();
        let vlan = match (id, rule.vlan) {
            _ if sent.cut => return Err("runt"),
            (0, _) if any => 0,
            (0, Some(_)) if sent.inner.is_some() => return Err("vlan_tagged"),
            (0, Some(native)) => native,
            (0, None) => return Err("vlan_untagged"),
            (4095, _) if !access => return Err("vlan_not_allowed"),
            _ if any => id,
            _ if access => return Err("vlan_tagged"),
            (id, native) if rule.trunk.contains(&id) || native == Some(id) => id,
            _ => return Err("vlan_not_allowed"),
        };
        if station(sent.from)[0] & 1 == 1 || station(sent.from) == [0; 6] {
            return Err("bad_source");
        }
        if station(sent.to)[..5] == [1, 0x80, 0xc2, 0, 0] {
            return Err("reserved_mac");
        }
        let _ = self.map.insert((vlan, sent.from), (sent.port, now));
        Ok(vlan)
    }

    /// Where the frame goes, and with which tag.
    fn decide(&mut self, sent: &Sent, vlan: u16) -> Vec<(usize, Option<u16>)> {
        let member = |rule: &Rule| {
            (rule.vlan.is_none() && rule.trunk.is_empty())
                || rule.vlan == Some(vlan)
                || rule.trunk.contains(&vlan)
        };
        let priority = sent.tag.unwrap_or(0) & 0xf000;
        let form = |rule: &Rule| match rule {
            _ if rule.vlan == Some(vlan) && rule.trunk.is_empty() => None,
            _ if rule.vlan == Some(vlan) && sent.inner.is_none() => None,
            _ if vlan == 0 => sent.tag,
            _ => Some(priority | vlan),
        };
        let group = station(sent.to)[0] & 1 == 1;
        match self.map.get(&(vlan, sent.to)).filter(|_| !group) {
            Some((port, _)) if *port == sent.port => self.drop("same_port"),
            Some((port, _)) => vec![(*port, form(&self.rules[*port]))],
            None => {
                let others = self.rules.iter().enumerate();
                let others = others.filter(|(port, rule)| *port != sent.port && member(rule));
                let to: Vec<_> = others.map(|(port, rule)| (port, form(rule))).collect();
                if to.is_empty() { self.drop("no_destination") } else { to }
            }
        }
    }
}

fn station(number: u8) -> [u8; 6] {
    match number {
        0 => [0xff; 6],
        1 => [0; 6],
        2 => [1, 0, 0x5e, 0, 0, 1],
        3 => [1, 0x80, 0xc2, 0, 0, 0],
        number => [2, 0, 0, 0, 0, number],
    }
}

fn bytes(sent: &Sent, tag: Option<u16>, number: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(station(sent.to));
    frame.extend(station(sent.from));
    if let Some(tag) = tag {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    if sent.cut {
        return frame;
    }
    if let Some(inner) = sent.inner {
        frame.extend([0x81, 0]);
        frame.extend(inner.to_be_bytes());
    }
    frame.extend([0x08, 0x00]);
    frame.extend(number.to_be_bytes());
    frame
}

fn rule() -> impl Strategy<Value = Rule> {
    let vlan = prop_oneof![Just(None), (1..4u16).prop_map(Some)];
    let trunk = prop_oneof![Just(BTreeSet::new()), proptest::collection::btree_set(1..4u16, 0..3)];
    (vlan, trunk).prop_map(|(vlan, trunk)| Rule { vlan, trunk })
}

fn sent() -> impl Strategy<Value = Sent> {
    let id = prop_oneof![6 => 0..4u16, 1 => Just(4095)];
    let tag = prop_oneof![
        3 => Just(None),
        2 => (id, any::<u16>()).prop_map(|(id, bits)| Some(bits & 0xf000 | id)),
    ];
    let behind = prop_oneof![
        4 => Just((None, false)),
        3 => (0..4u16).prop_map(|inner| (Some(inner), false)),
        1 => Just((None, true)),
    ];
    let number = || prop_oneof![8 => 4..10u8, 1 => 0..4u8];
    let wait = prop_oneof![4 => Just(0), 1 => 0..200u32];
    (0..5usize, number(), number(), (tag, behind), 1..5usize, wait).prop_map(
        |(port, to, from, (tag, behind), count, wait)| {
            let (inner, cut) = if tag.is_some() { behind } else { (None, false) };
            Sent { port, to, from, tag, inner, cut, count, wait }
        },
    )
}

proptest! {
    /// Bursts mix what several steps send from one port, so that the pair cache, the buckets and
    /// the tag forms meet in one burst.
    #[test]
    fn the_switch_decides_as_the_model(
        rules in proptest::collection::vec(rule(), 5),
        plain: bool,
        steps in proptest::collection::vec(sent(), 1..80),
        merge in proptest::collection::vec(any::<bool>(), 12),
    ) {
        let none = Rule { vlan: None, trunk: BTreeSet::new() };
        let rules = if plain { vec![none; 5] } else { rules };
        let trunk = |rule: &Rule| rule.trunk.iter().copied().collect::<Vec<_>>();
        let real: Vec<_> =
            rules.iter().map(|r| VlanRule::from_keys(r.vlan, &trunk(r)).unwrap()).collect();
        let mut bench = Bench::new(&real);
        let mut model = Model { rules, map: BTreeMap::new(), drops: BTreeMap::new() };
        let (mut now, mut number, mut copies) = (0, 0, 0);
        let mut steps = steps.as_slice();
        while let [first, ..] = steps {
            let joins = |(index, sent): &(usize, &Sent)| {
                *index == 0 || *index < 12 && merge[*index] && sent.port == first.port
            };
            let len = steps.iter().enumerate().take_while(joins).count();
            let (burst, rest) = steps.split_at(len);
            steps = rest;
            let frames = burst.iter().flat_map(|sent| std::iter::repeat_n(sent, sent.count));
            let (mut frames_in, mut admitted) = (Vec::new(), Vec::new());
            for sent in frames {
                admitted.push((sent, number, model.admit(sent, now)));
                frames_in.push(bytes(sent, sent.tag, number));
                number += 1;
            }
            let mut want: Vec<Vec<Vec<u8>>> = vec![Vec::new(); 5];
            for (sent, number, vlan) in admitted {
                let to = match vlan {
                    Ok(vlan) => model.decide(sent, vlan),
                    Err(reason) => model.drop(reason),
                };
                copies += to.len().saturating_sub(1) as u64;
                for (port, tag) in to {
                    want[port].push(bytes(sent, tag, number));
                }
            }
            bench.send(first.port, &frames_in, now);
            prop_assert_eq!(bench.take(), want);
            prop_assert_eq!(bench.flood_copies.get(), copies);
            prop_assert_eq!(bench.drops(), model.drops.clone());
            now += burst.iter().map(|sent| sent.wait).sum::<u32>();
            let _ = bench.fdb.age(now);
            model.map.retain(|_, (_, seen)| now - *seen < 300);
        }
        let entries = bench.fdb.entries(now);
        prop_assert_eq!(entries.len(), model.map.len());
        for entry in entries {
            let number = entry.mac.0[5];
            let (port, seen) = model.map[&(entry.vlan.get(), number)];
            prop_assert_eq!((usize::from(entry.port.0), now - entry.age_secs), (port, seen));
        }
    }
}

fn plain(to: u8, from: u8, tag: Option<u16>) -> Sent {
    Sent { port: 0, to, from, tag, inner: None, cut: false, count: 1, wait: 0 }
}

/// Every way out gets its own form of a frame, whatever the one before made of it.
#[test]
fn two_tags_survive_ways_out_in_any_order() {
    let access = VlanRule::from_keys(Some(5), &[]).unwrap();
    let trunk = VlanRule::from_keys(None, &[5, 6]).unwrap();
    let native = VlanRule::from_keys(Some(5), &[6]).unwrap();
    let sent = Sent { inner: Some(6), ..plain(0, 4, Some(5)) };
    let (popped, whole) = (bytes(&sent, None, 1), bytes(&sent, Some(5), 1));
    let outs = [(&access, popped), (&trunk, whole.clone()), (&native, whole.clone())];
    for order in (0..27).map(|n| [n / 9, n / 3 % 3, n % 3]) {
        let rules = order.map(|n| outs[n].0.clone());
        let mut bench = Bench::new(&[std::slice::from_ref(&trunk), &rules[..]].concat());
        bench.send(0, &vec![whole.clone(); 3], 0);
        let want: Vec<_> = order.iter().map(|n| vec![outs[*n].1.clone(); 3]).collect();
        assert_eq!(bench.take()[1..], want, "{rules:?}");
    }
}

/// No frame of an access port gets into a VLAN that it names itself behind a priority tag, also
/// when frames that differ only there come before and after.
#[test]
fn a_priority_tag_opens_no_other_vlan() {
    let rules = [(Some(10), &[][..]), (Some(10), &[20]), (None, &[10, 20])];
    let rules = rules.map(|(vlan, trunk)| VlanRule::from_keys(vlan, trunk).unwrap());
    let sent = plain(6, 4, Some(0));
    let (fair, escape) = (sent.clone(), Sent { inner: Some(20), ..sent.clone() });
    let cut = Sent { cut: true, ..sent };
    let frames: Vec<_> =
        [&fair, &escape, &fair, &cut, &fair].map(|sent| bytes(sent, sent.tag, 1)).into();
    let mut bench = Bench::new(&rules);
    for from in [0, 1] {
        for _ in 0..2 {
            bench.send(from, &frames, 0);
            let (native, trunk) = (bytes(&fair, None, 1), bytes(&fair, Some(10), 1));
            let out = bench.take();
            assert_eq!(out[1 - from], vec![native; 3]);
            assert_eq!(out[2], vec![trunk; 3]);
        }
    }
    assert_eq!(bench.drops(), BTreeMap::from([("vlan_tagged", 4), ("runt", 4)]));
}

/// Nor behind a service tag (802.1ad): a receiver on Linux strips one of VLAN 0 and goes by what is
/// behind it, so on the way out of a native VLAN that would be the outer tag. What a trunk's other
/// end puts behind its own tag is payload.
#[test]
fn a_service_tag_opens_no_other_vlan() {
    let rules = [(Some(10), &[][..]), (Some(10), &[20]), (None, &[10, 20])];
    let rules = rules.map(|(vlan, trunk)| VlanRule::from_keys(vlan, trunk).unwrap());
    let fair = bytes(&plain(6, 4, None), None, 1);
    let with = |tags: &[u8]| [&fair[..12], tags, &fair[12..]].concat();
    let (service, customer) = ([0x88, 0xa8, 0, 0], [0x81, 0, 0, 20]);
    let escapes = [
        with(&service),
        with(&[service, customer].concat()),
        with(&[0x88, 0xa8, 0, 20]),
        with(&[[0x81, 0, 0, 0], service].concat()),
    ];
    let mut frames = vec![fair.clone()];
    escapes.iter().for_each(|escape| frames.extend([escape.clone(), fair.clone()]));
    let mut bench = Bench::new(&rules);
    for from in [0, 1] {
        bench.send(from, &frames, 0);
        let out = bench.take();
        assert_eq!(out[1 - from], vec![fair.clone(); 5]);
        assert_eq!(out[2], vec![with(&[0x81, 0, 0, 10]); 5]);
    }
    assert_eq!(bench.drops(), BTreeMap::from([("vlan_tagged", 8)]));
    // To a trunk without a VLAN of its own they are untagged.
    bench.send(2, &escapes, 0);
    assert_eq!(bench.drops(), BTreeMap::from([("vlan_tagged", 8), ("vlan_untagged", 4)]));
    assert!(bench.take().iter().all(Vec::is_empty));
    let inside = with(&[[0x81, 0, 0, 10], service].concat());
    bench.send(2, std::slice::from_ref(&inside), 0);
    assert_eq!(bench.take()[..2], [vec![with(&service)], vec![inside]]);
    // Where no VLAN is kept from anybody, they pass as they are.
    let mut bench = Bench::new(&[VlanRule::Any, VlanRule::Any]);
    bench.send(0, &escapes, 0);
    assert_eq!(bench.take()[1], escapes);
}

/// A tagged frame has 18 bytes, or popping the tag would leave less than a header.
#[test]
fn a_tag_without_a_frame_is_a_runt() {
    let trunk = VlanRule::from_keys(None, &[5]).unwrap();
    let access = VlanRule::from_keys(Some(5), &[]).unwrap();
    let mut bench = Bench::new(&[trunk, access.clone(), access]);
    let whole = bytes(&plain(0, 4, Some(5)), Some(5), 1);
    let frames: Vec<_> = (14..=whole.len()).rev().map(|len| whole[..len].to_vec()).collect();
    for _ in 0..2 {
        bench.send(0, &frames, 0);
        for out in &bench.take()[1..] {
            assert_eq!(out.len(), whole.len() - 17);
            assert!(out.iter().all(|frame| frame.len() >= 14));
        }
    }
    assert_eq!(bench.drops(), BTreeMap::from([("runt", 8)]));
}

/// The pair cache must notice everything that changes its decision.
#[test]
fn the_cached_pair_follows_moves_flushes_and_seconds() {
    let mut bench = Bench::new(&[VlanRule::Any, VlanRule::Any, VlanRule::Any]);
    let sent = |to, from| plain(to, from, None);
    let (there, back) = (bytes(&sent(6, 5), None, 0), bytes(&sent(5, 6), None, 0));
    let counts = |bench: &Bench| bench.take().iter().map(Vec::len).collect::<Vec<_>>();
    bench.send(1, std::slice::from_ref(&back), 0);
    for _ in 0..3 {
        bench.send(0, &vec![there.clone(); 64], 0);
    }
    assert_eq!(counts(&bench), [1, 192, 1]);
    bench.send(2, std::slice::from_ref(&back), 0);
    bench.send(0, &vec![there.clone(); 64], 0);
    assert_eq!(counts(&bench), [1, 0, 64], "the station moved to port 2");
    assert_eq!(bench.fdb.flush(Some(PortId(2))), 1);
    bench.send(0, &vec![there.clone(); 64], 0);
    assert_eq!(counts(&bench), [0, 64, 64], "flooded after the flush");
    bench.send(0, std::slice::from_ref(&there), 299);
    let _ = bench.fdb.age(300);
    let entries = bench.fdb.entries(300);
    assert!(entries.len() == 1 && entries[0].age_secs == 1, "refreshed through the cache");
    assert_eq!(entries[0].vlan, VlanId::NONE);
}
