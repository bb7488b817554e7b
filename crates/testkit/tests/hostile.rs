//! A hostile guest beside a good pair: the good pair loses nothing.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "test code")]
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{Egress, Fabric, Ingress, PortState, QueueId};
use switch::{PortConfig, PortHandle, Switch, SwitchConfig, SwitchEvent, VlanRule, Workers};
use testkit::{
    Faults, FaultyEgress, FaultyIngress, Guest, GuestSettings, Ledger, Rng, TestFrame, read_frame,
};
use virtq::Layout;

const GOOD: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];
/// Frames on their way between the good guests: their rings never overflow.
const WINDOW: u64 = 64;

struct Good {
    guests: [Guest; 2],
    sent: u64,
    arrived: u64,
}

impl Good {
    fn new(switch: &Switch, layout: Layout) -> Self {
        let guests = ["good0", "good1"].map(|name| {
            let mut guest = Guest::new(GuestSettings::new(layout)).unwrap();
            let config = PortConfig { vlan: access(1), ..PortConfig::new(name) };
            let handle = switch.add_port(&config).unwrap();
            guest.attach(switch, queue(&handle), &handle.counters(0).unwrap()).unwrap();
            guest
        });
        Self { guests, sent: 0, arrived: 0 }
    }

    /// Sends from the first to the second as far as the window allows, and checks what arrives.
    fn turn(&mut self, rng: &mut Rng) {
        let [a, b] = &mut self.guests;
        while self.sent - self.arrived < WINDOW {
            let len = 60 + rng.index(1400);
            let (dst, src) = (GOOD[1], GOOD[0]);
            let frame = TestFrame { dst, src, tci: None, id: self.sent, len };
            if !a.send(&frame.bytes(), 1).unwrap() {
                break;
            }
            self.sent += 1;
        }
        let _ = a.flush();
        for bytes in b.receive().unwrap() {
            let frame = read_frame(&bytes).expect("content");
            assert_eq!(frame.id, self.arrived, "lost or out of order");
            self.arrived += 1;
        }
    }

    fn finish(&mut self, rng: &mut Rng) {
        let end = Instant::now() + Duration::from_secs(20);
        let total = self.sent + 1000;
        while self.arrived < total {
            assert!(Instant::now() < end, "{} of {total} arrived", self.arrived);
            self.turn(rng);
        }
        while self.arrived < self.sent {
            assert!(Instant::now() < end, "{} of {} arrived", self.arrived, self.sent);
            for bytes in self.guests[1].receive().unwrap() {
                assert_eq!(read_frame(&bytes).expect("content").id, self.arrived);
                self.arrived += 1;
            }
        }
    }
}

fn access(vlan: u16) -> VlanRule {
    VlanRule::from_keys(Some(vlan), &[]).unwrap()
}

fn queue(handle: &PortHandle) -> QueueId {
    QueueId { port: handle.id, pair: 0 }
}

fn switch() -> Switch {
    let workers = Workers::Unpinned(2);
    Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap()
}

/// Rings that the garbage has to break before a run counts.
const FAULTS: u32 = 8;

/// Garbage in its ring, again and again, from a guest that is set up anew after each fault.
#[test]
fn garbage_in_one_ring_costs_the_others_nothing() {
    for (seed, layout) in [(1, Layout::Split), (2, Layout::Packed), (3, Layout::Split)] {
        let mut rng = Rng::new(seed);
        let switch = switch();
        let mut good = Good::new(&switch, layout);
        let config = PortConfig { vlan: access(2), ..PortConfig::new("evil") };
        let handle = switch.add_port(&config).unwrap();
        let (mut faults, mut rounds) = (0, 0);
        let end = Instant::now() + Duration::from_secs(3);
        // However slow the machine: a run that broke nothing would show nothing.
        let patience = end + Duration::from_secs(30);
        while Instant::now() < end || (faults < FAULTS && Instant::now() < patience) {
            rounds += 1;
            let layout = *rng.pick(&[Layout::Split, Layout::Packed]).unwrap();
            let mut evil = Guest::new(GuestSettings::new(layout)).unwrap();
            evil.attach(&switch, queue(&handle), &handle.counters(0).unwrap()).unwrap();
            for _ in 0..50 {
                harm(&mut evil, &mut rng);
                good.turn(&mut rng);
            }
            assert!(evil.detach(&switch, queue(&handle)));
            while let Some(event) = switch.events().next() {
                let SwitchEvent::Faulted { queue: at, .. } = event else {
                    panic!("{event:?}");
                };
                assert_eq!(at.port, handle.id, "a good guest's queue faulted");
                faults += 1;
            }
        }
        good.finish(&mut rng);
        assert!(faults >= FAULTS, "only {faults} faults in {rounds} rounds");
        Ledger::balance(&switch.stats()).unwrap();
    }
}

/// Something that no driver should do.
fn harm(evil: &mut Guest, rng: &mut Rng) {
    let bytes = evil.ring_bytes();
    match rng.below(4) {
        // The whole ring.
        0 if rng.one_in(10) => {
            let mut garbage = vec![0; bytes as usize];
            rng.fill(&mut garbage);
            evil.scribble(0, &garbage).unwrap();
        }
        // A few fields of a plausible ring.
        1 => {
            for _ in 0..4 {
                let mut garbage = [0; 4];
                rng.fill(&mut garbage);
                evil.scribble(rng.below(bytes) as u32 & !3, &garbage).unwrap();
            }
        }
        // Proper frames that the garbage may spoil.
        _ => {
            let frame = [rng.next_u64() as u8 & 0xfe; 80];
            let _ = evil.send(&frame, 1 + rng.below(3) as u16);
            let _ = evil.flush();
        }
    }
    evil.kick();
}

/// Bugs in one port's halves: it is put in quarantine, the good pair does not notice, and every
/// frame that the panic took is in the books.
#[test]
fn a_panic_costs_its_port_only() {
    std::panic::set_hook(Box::new(|_| {}));
    for seed in 0..8 {
        let mut rng = Rng::new(seed);
        let switch = switch();
        let mut good = Good::new(&switch, Layout::Packed);
        let config = PortConfig { vlan: access(2), ..PortConfig::new("buggy") };
        let handle = switch.add_port(&config).unwrap();
        let peer = switch.add_port(&PortConfig { name: "peer".into(), ..config }).unwrap();
        let buggy = Guest::new(GuestSettings::new(Layout::Split)).unwrap();
        let mut other = Guest::new(GuestSettings::new(Layout::Split)).unwrap();
        other.attach(&switch, queue(&peer), &peer.counters(0).unwrap()).unwrap();
        let counters = handle.counters(0).unwrap();
        let often = Faults { panic: 200, nothing: 5, spurious: 5, ..Faults::default() };
        let ingress = FaultyIngress::new(buggy.transmitq(&counters).unwrap(), often, seed);
        let often = Faults { panic: 20, ..Faults::default() };
        let egress = FaultyEgress::new(buggy.receiveq(&counters).unwrap(), often, seed);
        let (ingress, egress): (Box<dyn Ingress>, Box<dyn Egress>) =
            (Box::new(ingress), Box::new(egress));
        switch.attach_egress(queue(&handle), egress);
        switch.attach_ingress(queue(&handle), ingress);
        let end = Instant::now() + Duration::from_secs(10);
        let mut id = 0;
        while handle.status.read().state != PortState::Quarantined {
            assert!(Instant::now() < end, "seed {seed}: no panic");
            id += 1;
            let (dst, src) = (MacAddr::BROADCAST, MacAddr([2, 9, 9, 9, 9, 9]));
            let frame = TestFrame { dst, src, tci: None, id, len: 60 };
            let _ = other.send(&frame.bytes(), 1).unwrap();
            let _ = other.flush();
            good.turn(&mut rng);
        }
        assert!(handle.status.read().reason.contains("injected panic"));
        // The event follows the status.
        let is_panic =
            |event| matches!(event, SwitchEvent::Panicked { queue, .. } if queue.port == handle.id);
        while !std::iter::from_fn(|| switch.events().next()).any(is_panic) {
            assert!(Instant::now() < end, "seed {seed}: no event");
            std::thread::yield_now();
        }
        good.finish(&mut rng);
        while !other.all_sent().unwrap() {
            assert!(Instant::now() < end, "seed {seed}: frames are stuck");
        }
        Ledger::balance(&switch.stats()).unwrap();
    }
}
