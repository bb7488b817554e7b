//! A guest with several queue pairs in one process: pairs come and go and change their workers, the
//! guest's own table and steering take turns, flows are spread over workers. After every turn of a
//! worker each flow has gone on without a gap. One seed, one run; `TESTKIT_SEED=n` repeats it.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "test code")]
#![forbid(unsafe_code)]

use packet::{HashKind, ReceiveHash};
use port::QueueId;
use switch::{PortConfig, PortHandle, ReceiveTable, Switch, SwitchConfig, Turn, Workers};
use testkit::{Guest, GuestSettings, Ledger, Rng};
use virtq::{Layout, RingFeatures};

const SEEDS: u64 = 12;
const STEPS: u32 = 400;
const FLOWS: usize = 12;
const WORKERS: usize = 3;

fn seeds() -> Vec<u64> {
    match std::env::var("TESTKIT_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..SEEDS).collect(),
    }
}

/// Frame `number` of a flow, to the guest or from it.
fn frame(flow: usize, number: u32, to_guest: bool) -> Vec<u8> {
    let (guest, peer) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let (to, from) = if to_guest { (guest, peer) } else { (peer, guest) };
    let mut frame = [&to[..], &from, &[8, 0, 0x45, 0, 0, 86, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    let ports = [1000 + flow as u16, 53];
    let (ends, ports) = if to_guest { ([2, 1], [53, ports[0]]) } else { ([1, 2], ports) };
    frame.extend([10, 0, 0, ends[0], 10, 0, 0, ends[1]]);
    frame.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    frame.extend([0, 66, 0, 0]);
    frame.extend(number.to_be_bytes());
    // Longer than a frame's private head: the body is in the sender's memory, or in a parcel.
    frame.resize(100 + flow * 40, flow as u8);
    frame
}

/// Flow and number.
fn read(bytes: &[u8], to_guest: bool) -> (usize, u32) {
    let at = if to_guest { 36 } else { 34 };
    let flow = usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]) - 1000);
    assert!(bytes[46..].iter().all(|byte| usize::from(*byte) == flow), "content of flow {flow}");
    assert_eq!(bytes.len(), 100 + flow * 40);
    (flow, u32::from_be_bytes(bytes[42..46].try_into().unwrap()))
}

/// The numbers of each flow in one direction.
#[derive(Default)]
struct Flows {
    sent: [u32; FLOWS],
    arrived: [u32; FLOWS],
}

impl Flows {
    /// Takes what arrived in one turn: on each queue in order, on all together without a gap.
    fn take(&mut self, queues: &mut [Guest], to_guest: bool) {
        let mut numbers: [Vec<u32>; FLOWS] = Default::default();
        for queue in queues {
            let mut last = [None; FLOWS];
            for bytes in queue.receive().unwrap() {
                let (flow, number) = read(&bytes, to_guest);
                assert!(last[flow].is_none_or(|last| last < number), "flow {flow} in one queue");
                last[flow] = Some(number);
                numbers[flow].push(number);
            }
        }
        for (flow, mut numbers) in numbers.into_iter().enumerate() {
            numbers.sort_unstable();
            for number in numbers {
                assert_eq!(number, self.arrived[flow], "flow {flow}");
                self.arrived[flow] += 1;
            }
        }
    }
}

struct Run {
    switch: Switch,
    rng: Rng,
    guest: PortHandle,
    peer: PortHandle,
    /// The guest's pairs, and which are attached.
    pairs: Vec<Guest>,
    up: Vec<bool>,
    peers: [Guest; 1],
    to_guest: Flows,
    to_peer: Flows,
    /// On which pair the guest sends each flow.
    sends_on: [usize; FLOWS],
}

fn settings(rng: &mut Rng) -> GuestSettings {
    let layout = *rng.pick(&[Layout::Split, Layout::Packed]).unwrap();
    let features =
        RingFeatures { event_idx: rng.one_in(2), indirect: rng.one_in(2), in_order: rng.one_in(2) };
    GuestSettings { features, ..GuestSettings::new(layout) }
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let workers = Workers::Manual(WORKERS);
        let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
        let count = *rng.pick(&[1, 2, 3, 5]).unwrap();
        let stations = |mac: [u8; 6]| vec![(packet::VlanId::NONE, packet::MacAddr(mac))];
        let config = PortConfig {
            pairs: count as u16,
            stations: stations([2, 0, 0, 0, 0, 1]),
            ..PortConfig::new("guest")
        };
        let guest = switch.add_port(&config).unwrap();
        let config = PortConfig {
            spread: rng.one_in(2),
            stations: stations([2, 0, 0, 0, 0, 2]),
            ..PortConfig::new("peer")
        };
        let peer = switch.add_port(&config).unwrap();
        let mut new = || Guest::new(settings(&mut rng)).unwrap();
        let pairs: Vec<_> = (0..count).map(|_| new()).collect();
        let peers = [new()];
        let mut run = Self {
            switch,
            guest,
            peer,
            up: vec![false; count],
            pairs,
            peers,
            to_guest: Flows::default(),
            to_peer: Flows::default(),
            sends_on: std::array::from_fn(|flow| flow % count),
            rng,
        };
        (0..count).for_each(|pair| run.toggle(pair));
        let at = QueueId { port: run.peer.id, pair: 0 };
        run.peers[0].attach(&run.switch, at, &run.peer.counters(0).unwrap()).unwrap();
        run
    }

    fn at(&self, pair: usize) -> QueueId {
        QueueId { port: self.guest.id, pair: pair as u16 }
    }

    fn toggle(&mut self, pair: usize) {
        let at = self.at(pair);
        if self.up[pair] {
            // One stays, as with `ethtool -L`; what the guest has sent there is taken first.
            if self.up.iter().filter(|up| **up).count() == 1 {
                return;
            }
            while !self.pairs[pair].all_sent().unwrap() {
                let _ = self.turn();
            }
            assert!(self.pairs[pair].detach(&self.switch, at));
        } else {
            let counters = self.guest.counters(at.pair).unwrap();
            self.pairs[pair].attach(&self.switch, at, &counters).unwrap();
        }
        self.up[pair] = !self.up[pair];
        // The guest sends on queues that it has enabled.
        let up = (0..self.up.len()).find(|pair| self.up[*pair]).unwrap_or(0);
        for pair in &mut self.sends_on {
            if !self.up[*pair] {
                *pair = up;
            }
        }
    }

    fn turn(&mut self) -> bool {
        let worker = self.rng.index(WORKERS);
        let worked = self.switch.turn(worker) == Some(Turn::Worked);
        self.to_guest.take(&mut self.pairs, true);
        self.to_peer.take(&mut self.peers, false);
        worked
    }

    fn send_to_guest(&mut self) {
        for _ in 0..1 + self.rng.index(40) {
            let flow = self.rng.index(FLOWS);
            let bytes = frame(flow, self.to_guest.sent[flow], true);
            if !self.peers[0].send(&bytes, 1).unwrap() {
                break;
            }
            self.to_guest.sent[flow] += 1;
        }
        let _ = self.peers[0].flush();
    }

    fn send_to_peer(&mut self) {
        for _ in 0..1 + self.rng.index(40) {
            let flow = self.rng.index(FLOWS);
            let bytes = frame(flow, self.to_peer.sent[flow], false);
            let pair = self.sends_on[flow];
            if !self.pairs[pair].send(&bytes, 1).unwrap() {
                break;
            }
            self.to_peer.sent[flow] += 1;
        }
        for (pair, up) in self.pairs.iter_mut().zip(&self.up) {
            let _ = *up && pair.flush();
        }
    }

    /// The guest says how it wants its frames spread, pairs that are not there included.
    fn set_table(&mut self) {
        let table = (!self.rng.one_in(3)).then(|| {
            let mut key = [0; 40];
            self.rng.fill(&mut key);
            let entries: Vec<u16> = (0..8).map(|_| self.rng.below(6) as u16).collect();
            let hash = ReceiveHash::new(&key, HashKind::ALL).unwrap();
            ReceiveTable::new(hash, entries, self.rng.below(6) as u16).unwrap()
        });
        assert!(self.switch.set_receive_table(self.guest.id, table));
    }

    fn step(&mut self) {
        match self.rng.below(16) {
            0..5 => self.send_to_guest(),
            5..9 => self.send_to_peer(),
            9 | 10 => {
                let pair = self.rng.index(self.pairs.len());
                self.toggle(pair);
            }
            11 | 12 => {
                let pair = self.rng.index(self.pairs.len());
                let _ = self.switch.move_pair(self.at(pair), self.rng.index(WORKERS));
            }
            13 => {
                let at = QueueId { port: self.peer.id, pair: 0 };
                let _ = self.switch.move_pair(at, self.rng.index(WORKERS));
            }
            14 => self.set_table(),
            _ => {
                self.switch.measure();
                let _ = self.switch.rebalance();
            }
        }
        for _ in 0..self.rng.below(8) {
            let _ = self.turn();
        }
    }
}

#[test]
fn no_flow_has_a_gap_whatever_happens_to_its_queues() {
    for seed in seeds() {
        println!("seed {seed}");
        let mut run = Run::new(seed);
        for _ in 0..STEPS {
            run.step();
        }
        for pair in 0..run.pairs.len() {
            if !run.up[pair] {
                run.toggle(pair);
            }
        }
        let mut idle = 0;
        while idle < 100 {
            idle = if run.turn() { 0 } else { idle + 1 };
        }
        for flows in [&run.to_guest, &run.to_peer] {
            assert_eq!(flows.sent, flows.arrived, "seed {seed}");
            assert!(flows.sent.iter().sum::<u32>() > 1000, "seed {seed}: {:?}", flows.sent);
        }
        let stats = run.switch.stats();
        Ledger::balance(&stats).unwrap();
        let drops: u64 = stats.ports.iter().flat_map(|p| &p.queues).map(|q| q.dropped()).sum();
        assert_eq!((drops, stats.held), (0, 0), "seed {seed}: {stats:#?}");
    }
}
