//! The whole switch in one process: guests, random frames, ports that come and go. One seed, one
//! run; `TESTKIT_SEED=n` repeats the run of a seed.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "test code")]
#![expect(clippy::indexing_slicing, clippy::panic, reason = "test code")]
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{DropReason, QueueId};
use switch::{PortConfig, PortHandle, Switch, SwitchConfig, VlanRule, Workers};
use testkit::{
    Guest, GuestSettings, Ledger, Moved, Outcome, Rng, SwitchModel, TestFrame, VirtualClock,
    read_frame,
};
use virtq::{Layout, RingFeatures};

const SEEDS: u64 = 8;
/// Bytes of the net header before a frame in a receive buffer.
const HEADER: usize = 12;

fn seeds() -> Vec<u64> {
    match std::env::var("TESTKIT_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..SEEDS).collect(),
    }
}

/// A guest, its port and its books.
struct Station {
    name: String,
    guest: Guest,
    handle: PortHandle,
    up: bool,
}

impl Station {
    fn at(&self) -> QueueId {
        QueueId { port: self.handle.id, pair: 0 }
    }

    fn set_up(&mut self, switch: &Switch, up: bool) {
        let at = self.at();
        if up && !self.up {
            self.guest.attach(switch, at, &self.handle.counters(0).unwrap()).unwrap();
        } else if !up && self.up {
            assert!(self.guest.detach(switch, at));
        }
        self.up = up;
    }

    fn takes(&self, len: usize) -> bool {
        let settings = self.guest.settings();
        settings.mergeable || len + HEADER <= settings.rx_bytes as usize
    }
}

/// Stations with random rings behind ports with the given rules.
fn stations(switch: &Switch, rng: &mut Rng, rules: &[VlanRule]) -> Vec<Station> {
    let make = |(index, rule): (usize, &VlanRule)| {
        let name = format!("g{index}");
        let config = PortConfig { vlan: rule.clone(), ..PortConfig::new(&name) };
        let handle = switch.add_port(&config).unwrap();
        let guest = Guest::new(settings(rng)).unwrap();
        Station { name, guest, handle, up: false }
    };
    rules.iter().enumerate().map(make).collect()
}

fn settings(rng: &mut Rng) -> GuestSettings {
    let layout = *rng.pick(&[Layout::Split, Layout::Packed]).unwrap();
    let features =
        RingFeatures { event_idx: rng.one_in(2), indirect: rng.one_in(2), in_order: rng.one_in(2) };
    let mergeable = !rng.one_in(3);
    GuestSettings {
        features,
        mergeable,
        rx_bytes: if mergeable { *rng.pick(&[1526, 2048]).unwrap() } else { 9216 - 100 },
        ..GuestSettings::new(layout)
    }
}

fn mac(station: usize, number: u64) -> MacAddr {
    MacAddr([2, 0, 0, 0, station as u8, number as u8])
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "timeout: {what}");
        std::thread::yield_now();
    }
}

/// What happens at a moment of virtual time.
#[derive(Debug)]
enum Event {
    /// A station sends some frames.
    Burst(usize),
    /// A station comes or goes.
    Toggle(usize),
}

fn rules() -> Vec<VlanRule> {
    let keys: [(Option<u16>, &[u16]); 6] = [
        (None, &[]),
        (None, &[]),
        (Some(5), &[]),
        (Some(5), &[]),
        (None, &[5, 6]),
        (Some(6), &[5]),
    ];
    keys.iter().map(|(vlan, trunk)| VlanRule::from_keys(*vlan, trunk).unwrap()).collect()
}

/// Frames, one burst at a time: every delivery, every byte and every counter is foretold.
#[test]
fn every_frame_goes_where_the_model_says() {
    for seed in seeds() {
        println!("seed {seed}");
        let mut run = Run::new(seed);
        let mut clock = VirtualClock::default();
        for station in 0..run.stations.len() {
            run.toggle(station);
            clock.schedule(run.rng.below(1000), Event::Burst(station));
            clock.schedule(5_000 + run.rng.below(50_000), Event::Toggle(station));
        }
        while let Some(event) = clock.step() {
            match event {
                Event::Burst(station) => {
                    run.burst(station);
                    if clock.now_ns() < 200_000 {
                        clock.schedule(run.rng.below(5_000), Event::Burst(station));
                    }
                }
                Event::Toggle(station) => {
                    run.toggle(station);
                    if clock.now_ns() < 200_000 {
                        clock.schedule(1 + run.rng.below(40_000), Event::Toggle(station));
                    }
                }
            }
        }
        assert!(run.sent > 1000, "seed {seed}: only {} frames", run.sent);
    }
}

/// A run and its oracle.
struct Run {
    switch: Switch,
    stations: Vec<Station>,
    model: SwitchModel,
    ledger: Ledger,
    rng: Rng,
    sent: u64,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let workers = Workers::Unpinned(1 + rng.index(2));
        let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
        let stations = stations(&switch, &mut rng, &rules());
        let ledger = Ledger::open(&switch.stats());
        Self { switch, stations, model: SwitchModel::new(rules()), ledger, rng, sent: 0 }
    }

    fn toggle(&mut self, index: usize) {
        let station = &mut self.stations[index];
        let up = !station.up;
        station.set_up(&self.switch, up);
        self.model.set_up(index, up);
    }

    fn frame(&mut self, from: usize) -> TestFrame {
        let rng = &mut self.rng;
        let others = [0, 1, 2, 3, 4, 5].map(|s| (s + from + 1) % self.stations.len());
        let to = *rng.pick(&others[..5]).unwrap();
        let dst = match rng.below(12) {
            0 => MacAddr::BROADCAST,
            1 => MacAddr([0x01, 0, 0x5e, 0, 0, 1]),
            2 => MacAddr([0x01, 0x80, 0xc2, 0, 0, rng.below(16) as u8]),
            _ => mac(to, rng.below(2)),
        };
        let src = match rng.below(40) {
            0 => MacAddr::ZERO,
            1 => MacAddr([3, 0, 0, 0, 0, 1]),
            // A station that moved here.
            2 => mac(to, 1),
            _ => mac(from, rng.below(2)),
        };
        let tci = match rng.below(3) {
            0 => Some(5 + u16::try_from(rng.below(3)).unwrap()),
            _ => None,
        };
        let len = *rng.pick(&[60, 61, 64, 127, 128, 129, 590, 1514, 1515, 4000, 9014]).unwrap();
        self.sent += 1;
        TestFrame { dst, src, tci, id: self.sent, len }
    }

    fn burst(&mut self, from: usize) {
        if !self.stations[from].up {
            return;
        }
        let count = 1 + self.rng.index(24);
        let frames: Vec<_> = (0..count).map(|_| self.frame(from)).collect();
        // A moved address is not known to the frames before it in one burst; send it alone.
        let moved = frames.iter().position(|f| f.src.0[4] as usize != from && f.src.0[0] == 2);
        let frames = match moved {
            Some(at) => vec![frames[at]],
            None => frames,
        };
        let mut moved = Moved::nothing();
        let mut expected: Vec<Vec<TestFrame>> = vec![Vec::new(); self.stations.len()];
        let name = self.stations[from].name.clone();
        for frame in &frames {
            let bytes = frame.bytes();
            let pieces = u16::try_from(1 + self.rng.index(4)).unwrap();
            assert!(self.stations[from].guest.send(&bytes, pieces).unwrap(), "no room");
            moved = moved.rx(&name, 1, bytes.len() as u64);
            match self.model.frame(from, frame) {
                Outcome::Dropped(reason) => moved = moved.dropped(&name, reason, 1),
                Outcome::Delivered(copies) => {
                    moved = moved.flood_copies(copies.len() as u64 - 1);
                    for (to, tci) in copies {
                        moved = self.deliver(moved, &mut expected, to, TestFrame { tci, ..*frame });
                    }
                }
            }
        }
        let _ = self.stations[from].guest.flush();
        wait_until("frames are read", || self.stations[from].guest.all_sent().unwrap());
        for (station, expected) in self.stations.iter_mut().zip(expected) {
            let frames = station.guest.receive().unwrap();
            let seen: Vec<_> = frames.iter().map(|f| read_frame(f).expect("content")).collect();
            assert_eq!(seen, expected, "{} got other frames from {name}", station.name);
        }
        if let Err(imbalance) = self.ledger.close(&self.switch.stats(), &moved) {
            panic!("{imbalance}");
        }
    }

    fn deliver(
        &self,
        moved: Moved,
        expected: &mut [Vec<TestFrame>],
        to: usize,
        frame: TestFrame,
    ) -> Moved {
        let station = &self.stations[to];
        let bytes = frame.bytes().len();
        if !station.takes(bytes) {
            return moved.dropped(&station.name, DropReason::TooLarge, 1);
        }
        expected[to].push(frame);
        moved.tx(&station.name, 1, bytes as u64)
    }
}

/// All stations send at once while ports come and go: order within a flow, content and the law.
#[test]
fn the_books_balance_whatever_happens_at_once() {
    for seed in seeds() {
        println!("seed {seed}");
        let mut rng = Rng::new(seed ^ 0xabcd);
        let workers = Workers::Unpinned(2);
        let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
        let mut all = stations(&switch, &mut rng, &[const { VlanRule::Any }; 4]);
        all.iter_mut().for_each(|station| station.set_up(&switch, true));
        let mut id = 0;
        // The newest id that station `to` got from station `from`.
        let mut newest = [[0u64; 4]; 4];
        let mut received = 0u64;
        for _ in 0..400 {
            let from = rng.index(4);
            for _ in 0..rng.below(40) {
                id += 1;
                let to = rng.index(5);
                let dst = if to == 4 { MacAddr::BROADCAST } else { mac(to, 0) };
                let len = 60 + rng.index(1455);
                let frame = TestFrame { dst, src: mac(from, 0), tci: None, id, len };
                if !all[from].guest.send(&frame.bytes(), 1).unwrap() {
                    break;
                }
            }
            let _ = all[from].guest.flush();
            if rng.one_in(20) {
                let up = !all[from].up;
                all[from].set_up(&switch, up);
            }
            received += collect(&mut all, &mut newest);
        }
        all.iter_mut().for_each(|station| station.set_up(&switch, true));
        for station in &mut all {
            wait_until("frames are read", || station.guest.all_sent().unwrap());
        }
        received += collect(&mut all, &mut newest);
        let stats = switch.stats();
        Ledger::balance(&stats).unwrap();
        let tx: u64 = stats.ports.iter().flat_map(|p| &p.queues).map(|q| q.tx_frames).sum();
        assert_eq!(received, tx, "seed {seed}: what guests got is what the switch says it sent");
        assert!(received > 500, "seed {seed}: only {received} frames");
    }
}

fn collect(all: &mut [Station], newest: &mut [[u64; 4]; 4]) -> u64 {
    let mut count = 0;
    for (to, station) in all.iter_mut().enumerate() {
        for bytes in station.guest.receive().unwrap() {
            let frame = read_frame(&bytes).expect("content");
            let from = frame.src.0[4] as usize;
            assert!(frame.id > newest[to][from], "{} after {}", frame.id, newest[to][from]);
            newest[to][from] = frame.id;
            assert_ne!(from, to, "a frame came back");
            count += 1;
        }
    }
    count
}
