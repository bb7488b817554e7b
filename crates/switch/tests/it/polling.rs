//! Sleeping, waking, and idle queues beside busy ones, in all poll modes.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use switch::{PollMode, PortConfig, Switch, SwitchConfig, Workers};

use crate::mock::{BROADCAST, add, frame, mac, number, plain_ports, settle, wait_for};

/// Frames of a busy queue that may go before the next look at the cold ones: some bursts, and what
/// is served in 20 us.
const BETWEEN_LOOKS: u32 = 5000;

fn config(poll: PollMode) -> SwitchConfig {
    SwitchConfig { poll, workers: Workers::Unpinned(1), ..SwitchConfig::default() }
}

#[test]
fn quiet_workers_sleep_and_wake_for_every_frame() {
    for poll in [PollMode::Adaptive, PollMode::Interrupt] {
        let switch = Switch::start(&config(poll)).unwrap();
        let ports = plain_ports(&switch, 3);
        let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
        for round in 0..50 {
            wait_for("all queues to be armed", || wires.iter().all(|wire| wire.is_armed()));
            let wire = wires[round % 3];
            wire.send(&[frame(BROADCAST, mac(1), 0)]);
            wait_for("the frame", || wires[(round + 1) % 3].take().len() == 1);
            wait_for("its copy", || wires[(round + 2) % 3].take().len() == 1);
        }
        wait_for("all queues to be armed", || wires.iter().all(|wire| wire.is_armed()));
        let before = switch.stats().workers[0].sleeps;
        std::thread::sleep(Duration::from_millis(100));
        let slept = switch.stats().workers[0].sleeps - before;
        assert!(slept <= 3, "{poll:?}: {slept} wake-ups while nothing happened");
        assert!(before >= 50, "{poll:?}: it slept between the frames");
        let _ = settle(&switch, &wires);
    }
}

#[test]
fn a_busy_worker_never_sleeps() {
    let switch = Switch::start(&config(PollMode::Busy)).unwrap();
    // Without queues there is nothing to poll.
    std::thread::sleep(Duration::from_millis(20));
    assert!(switch.stats().workers[0].busy_ns < 10_000_000);
    let ports = plain_ports(&switch, 2);
    // It has answered, so it has seen its queues: it is awake from then on.
    let (another, _) = add(&switch, &PortConfig::new("another"));
    assert!(switch.remove_port(another.id));
    let before = switch.stats().workers[0].sleeps;
    assert!(!ports[0].1.is_armed() && !ports[1].1.is_armed());
    ports[0].1.send(&[frame(BROADCAST, mac(1), 0)]);
    let stats = settle(&switch, &[&ports[0].1, &ports[1].1]);
    assert_eq!(stats.workers[0].sleeps, before);
}

/// Beside a queue that always has frames, the idle ones are armed, and yet seen when they wake.
#[test]
fn idle_queues_beside_a_busy_one_are_cold_and_wake() {
    for poll in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        let switch = Switch::start(&config(poll)).unwrap();
        let ports = plain_ports(&switch, 10);
        let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
        wires[1].send(&[frame(BROADCAST, mac(2), 0)]);
        let (stop, sent) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut overtaking = Vec::new();
        std::thread::scope(|scope| {
            let (busy, stop, sent) = (wires[0], &stop, &sent);
            let _ = scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if busy.waiting() < 500 {
                        let first = sent.fetch_add(100, Ordering::SeqCst);
                        let frames: Vec<_> =
                            (first..first + 100).map(|n| frame(mac(2), mac(1), n)).collect();
                        busy.send(&frames);
                    }
                }
            });
            for _ in 0..5 {
                let idle = || wires[2..].iter().all(|wire| wire.is_armed());
                wait_for("the idle queues to be cold", idle);
                wires[7].send(&[frame(BROADCAST, mac(7), 7)]);
                let (before, mut last) = (sent.load(Ordering::SeqCst), 0);
                let of_it = |frame: &Vec<u8>| frame[6..12] == mac(7);
                wait_for("the cold queue", || {
                    let came = wires[1].take();
                    let busy = came.iter().take_while(|frame| !of_it(frame)).last();
                    last = busy.map_or(last, |frame| number(frame));
                    came.iter().any(of_it)
                });
                overtaking.push(last.saturating_sub(before));
                wait_for("its copy", || wires[5].take().iter().any(of_it));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let few = overtaking.iter().all(|count| *count < BETWEEN_LOOKS);
        assert!(few, "{poll:?}: {overtaking:?} frames went first");
        let _ = settle(&switch, &wires);
    }
}

#[test]
fn queues_are_spread_over_the_workers() {
    let workers = Workers::Unpinned(3);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    let ports = plain_ports(&switch, 6);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    wires.iter().for_each(|wire| wire.send(&[frame(BROADCAST, mac(1), 0)]));
    let stats = settle(&switch, &wires);
    assert!(stats.workers.iter().all(|worker| worker.frames == 2), "{:?}", stats.workers);
}

#[test]
fn a_pinned_worker_says_its_cpu() {
    let cpu = (0..1024).find(|cpu| rustix::thread::sched_getaffinity(None).unwrap().is_set(*cpu));
    let workers = Workers::Cpus(vec![cpu.unwrap()]);
    let switch = Switch::start(&SwitchConfig { workers, ..SwitchConfig::default() }).unwrap();
    assert_eq!(switch.stats().workers[0].cpu, cpu);
}
