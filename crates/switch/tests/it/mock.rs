//! Mock halves of ports: frames in private memory, one eventfd as kick.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use port::{
    Batch, DropReason, Egress, Fabric, FrameBuf, Ingress, Notified, PortId, QueueCounters,
    QueueFault, QueueId,
};
use rustix::event::{EventfdFlags, eventfd};
use switch::{PortConfig, PortHandle, Switch, SwitchStats};
use virtq::mem::SegStore;

/// What the test's end of a pair sees.
pub(crate) struct Wire {
    to_send: Mutex<VecDeque<Vec<u8>>>,
    received: Mutex<Vec<Vec<u8>>>,
    kick: OwnedFd,
    armed: AtomicBool,
    pub(crate) released: AtomicU64,
    pub(crate) ingress_notified: AtomicU64,
    pub(crate) egress_notified: AtomicU64,
    /// Set while a worker holds frames of the ingress.
    pub(crate) inside: AtomicBool,
    pub(crate) behaviour: Mutex<Behaviour>,
}

/// What a half does besides its job.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Behaviour {
    #[default]
    Good,
    IngressPanics,
    /// After the frames were counted as received.
    IngressPanicsLate,
    IngressFaults,
    EgressPanics,
    /// After it has counted one frame as sent.
    EgressPanicsLate,
    EgressFaults,
    NotifyPanics,
    Slow,
    NoRoom,
    /// The egress keeps what it is given.
    Holds,
}

impl Wire {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            to_send: Mutex::default(),
            received: Mutex::default(),
            kick: eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
            armed: AtomicBool::new(false),
            released: AtomicU64::new(0),
            ingress_notified: AtomicU64::new(0),
            egress_notified: AtomicU64::new(0),
            inside: AtomicBool::new(false),
            behaviour: Mutex::default(),
        })
    }

    /// Sends frames, and kicks if the other side wants it: as a driver does.
    pub(crate) fn send(&self, frames: &[Vec<u8>]) {
        self.to_send.lock().unwrap().extend(frames.iter().cloned());
        if self.armed.load(Ordering::SeqCst) {
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Sends without a kick: what a queue holds when it is attached.
    pub(crate) fn preload(&self, frames: &[Vec<u8>]) {
        self.to_send.lock().unwrap().extend(frames.iter().cloned());
    }

    /// Everything that arrived since the last call.
    pub(crate) fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.received.lock().unwrap())
    }

    pub(crate) fn waiting(&self) -> usize {
        self.to_send.lock().unwrap().len()
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.armed.load(Ordering::SeqCst)
    }

    pub(crate) fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    fn does(&self, behaviour: Behaviour) -> bool {
        *self.behaviour.lock().unwrap() == behaviour
    }
}

pub(crate) struct MockIngress {
    pub(crate) wire: Arc<Wire>,
    counters: Arc<QueueCounters>,
}

impl Ingress for MockIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        assert!(!self.wire.does(Behaviour::IngressPanics), "ingress panics");
        let most = frames.begin();
        let mut queue = self.wire.to_send.lock().unwrap();
        let (mut count, mut bytes) = (0, 0);
        while count < most
            && let Some(frame) = queue.pop_front()
        {
            frames.slot().unwrap().fill_private(&frame);
            frames.keep();
            count += 1;
            bytes += frame.len();
        }
        // Under the lock: who sees that nothing waits sees the frames as held.
        if count > 0 {
            self.wire.inside.store(true, Ordering::SeqCst);
            self.counters.ingress.received(count as u64, bytes as u64);
        }
        drop(queue);
        let late = count > 0 && self.wire.does(Behaviour::IngressPanicsLate);
        assert!(!late, "ingress panics late");
        if self.wire.does(Behaviour::Slow) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let fault = self.wire.does(Behaviour::IngressFaults).then(fault);
        frames.batch(SegStore::empty(), fault)
    }

    fn release(&mut self) {
        let _ = self.wire.released.fetch_add(1, Ordering::SeqCst);
        self.wire.inside.store(false, Ordering::SeqCst);
    }

    fn notify(&mut self) -> Notified {
        assert!(!self.wire.does(Behaviour::NotifyPanics), "notify panics");
        let _ = self.wire.ingress_notified.fetch_add(1, Ordering::SeqCst);
        self.counters.ingress.calls.count(Notified::Called);
        Notified::Called
    }

    fn arm(&mut self) -> bool {
        self.wire.armed.store(true, Ordering::SeqCst);
        self.wire.waiting() > 0
    }

    fn disarm(&mut self) {
        // As of a guest: nobody reads the kick.
        self.wire.armed.store(false, Ordering::SeqCst);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wire.kick.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

pub(crate) struct MockEgress {
    pub(crate) wire: Arc<Wire>,
    counters: Arc<QueueCounters>,
    held: u64,
}

impl Egress for MockEgress {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        assert!(!self.wire.does(Behaviour::EgressPanics), "egress panics");
        let counters = &self.counters.egress;
        if self.wire.does(Behaviour::EgressFaults) {
            counters.dropped(DropReason::PortDown, picked.len() as u64);
            return Err(fault());
        }
        if self.wire.does(Behaviour::Holds) {
            self.held = self.held.wrapping_add(picked.len() as u64);
            return Ok(());
        }
        if self.wire.does(Behaviour::NoRoom) {
            counters.dropped(DropReason::NoBuffer, picked.len() as u64);
            return Ok(());
        }
        let mut received = self.wire.received.lock().unwrap();
        for index in picked {
            let frame = &batch.frames()[usize::from(*index)];
            received.push(frame.head().to_vec());
            counters.sent(1, u64::from(frame.len()));
            if self.wire.does(Behaviour::EgressPanicsLate) {
                drop(received);
                panic!("egress panics late");
            }
        }
        Ok(())
    }

    fn held(&self) -> u64 {
        self.held
    }

    fn resume(&mut self) -> Result<(), QueueFault> {
        assert!(!self.wire.does(Behaviour::EgressPanics), "egress panics");
        if self.wire.does(Behaviour::EgressFaults) {
            self.counters.egress.dropped(DropReason::PortDown, std::mem::take(&mut self.held));
            return Err(fault());
        }
        self.counters.egress.sent(std::mem::take(&mut self.held), 0);
        Ok(())
    }

    fn notify(&mut self) -> Notified {
        let _ = self.wire.egress_notified.fetch_add(1, Ordering::SeqCst);
        self.counters.egress.calls.count(Notified::Suppressed);
        Notified::Suppressed
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

fn fault() -> QueueFault {
    QueueFault::Host { what: "mock".into(), error: "told to".into() }
}

pub(crate) fn at(port: PortId, pair: u16) -> QueueId {
    QueueId { port, pair }
}

/// Attaches both halves of a pair.
pub(crate) fn attach(switch: &Switch, port: &PortHandle, pair: u16) -> Arc<Wire> {
    let wire = Wire::new();
    attach_egress(switch, port, pair, &wire);
    attach_ingress(switch, port, pair, &wire);
    wire
}

pub(crate) fn attach_ingress(switch: &Switch, port: &PortHandle, pair: u16, wire: &Arc<Wire>) {
    let counters = port.counters(pair).unwrap();
    let ingress = MockIngress { wire: Arc::clone(wire), counters };
    switch.attach_ingress(at(port.id, pair), Box::new(ingress));
}

pub(crate) fn new_egress(port: &PortHandle, pair: u16, wire: &Arc<Wire>) -> MockEgress {
    MockEgress { wire: Arc::clone(wire), counters: port.counters(pair).unwrap(), held: 0 }
}

/// Returns when every worker knows of it: a frame that is flooded from now on arrives here too.
pub(crate) fn attach_egress(switch: &Switch, port: &PortHandle, pair: u16, wire: &Arc<Wire>) {
    switch.attach_egress(at(port.id, pair), Box::new(new_egress(port, pair, wire)));
    switch.quiesce();
}

/// A port with one attached pair.
pub(crate) fn add(switch: &Switch, config: &PortConfig) -> (PortHandle, Arc<Wire>) {
    let port = switch.add_port(config).unwrap();
    let wire = attach(switch, &port, 0);
    (port, wire)
}

/// `count` ports named p0, p1, ... without VLAN rules.
pub(crate) fn plain_ports(switch: &Switch, count: usize) -> Vec<(PortHandle, Arc<Wire>)> {
    (0..count).map(|n| add(switch, &PortConfig::new(format!("p{n}")))).collect()
}

pub(crate) fn mac(station: u32) -> [u8; 6] {
    let [a, b, c, d] = station.to_be_bytes();
    [2, 0, a, b, c, d]
}

pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame of 60 bytes with `number` as its payload.
pub(crate) fn frame(destination: [u8; 6], source: [u8; 6], number: u32) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[16..20].copy_from_slice(&number.to_be_bytes());
    frame
}

/// The same with an 802.1Q tag.
pub(crate) fn tagged(mut frame: Vec<u8>, tci: u16) -> Vec<u8> {
    let [hi, lo] = tci.to_be_bytes();
    drop(frame.splice(12..12, [0x81, 0, hi, lo]));
    frame
}

/// The number in a frame, tagged or not.
pub(crate) fn number(frame: &[u8]) -> u32 {
    let start = if frame[12..14] == [0x81, 0] { 20 } else { 16 };
    u32::from_be_bytes(frame[start..start + 4].try_into().unwrap())
}

/// Waits until `condition` holds; fails after 10 seconds.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(10), "timed out waiting for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits until all wires are sent and the turns that sent them are over (captures are told after
/// the books), then checks the law exactly.
pub(crate) fn settle(switch: &Switch, wires: &[&Arc<Wire>]) -> SwitchStats {
    wait_for("the wires", || wires.iter().all(|wire| wire.waiting() == 0));
    wait_for("the frames on their way", || switch.stats().held == 0);
    switch.quiesce();
    let stats = switch.stats();
    check_law(&stats);
    stats
}

/// The law of a quiet switch.
pub(crate) fn check_law(stats: &SwitchStats) {
    let queues = stats.ports.iter().flat_map(|port| &port.queues);
    let (mut began, mut ended) = (stats.flood_copies + stats.originated, 0);
    for totals in queues.chain([&stats.removed_ports]) {
        began += totals.rx_frames + totals.segments_added;
        ended += totals.tx_frames + totals.dropped() + totals.merged;
    }
    assert_eq!(began, ended, "{stats:#?}");
}

/// Drops by reason, of all ports.
pub(crate) fn drops(stats: &SwitchStats, reason: DropReason) -> u64 {
    let queues = stats.ports.iter().flat_map(|port| &port.queues);
    queues.chain([&stats.removed_ports]).map(|totals| totals.drops[reason as usize]).sum()
}
