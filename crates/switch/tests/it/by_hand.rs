//! Workers without threads: frames move in the caller's turns, and control never waits for one.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use port::Fabric;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use switch::{PollMode, PortConfig, Switch, SwitchConfig, Turn, Workers};

use crate::mock::{BROADCAST, at, check_law, frame, mac, plain_ports};

fn start(workers: usize, poll: PollMode) -> Switch {
    let workers = Workers::Manual(workers);
    Switch::start(&SwitchConfig { workers, poll, ..SwitchConfig::default() }).unwrap()
}

/// Takes turns until all queues are armed.
fn until_quiet(switch: &Switch, worker: usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while switch.turn(worker) != Some(Turn::Quiet) {
        assert!(Instant::now() < end, "the queues are never armed");
    }
}

/// A queue that is armed is woken in one turn and served in the next.
fn until_worked(switch: &Switch) {
    let turns: Vec<_> =
        (0..2).map_while(|_| switch.turn(0).filter(|t| *t != Turn::Worked)).collect();
    assert!(turns.len() < 2, "{turns:?}");
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).unwrap() > 0
}

#[test]
fn frames_move_in_turns_and_only_then() {
    for mode in [PollMode::Adaptive, PollMode::Busy, PollMode::Interrupt] {
        let switch = start(1, mode);
        let ports = plain_ports(&switch, 2);
        ports[0].1.send(&[frame(BROADCAST, mac(1), 0)]);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(ports[0].1.waiting(), 1, "nobody takes a turn");
        assert_eq!(switch.turn(0), Some(Turn::Worked));
        assert_eq!(ports[1].1.take().len(), 1);
        // The answer finds the station that was learned.
        ports[1].1.send(&[frame(mac(1), mac(2), 1)]);
        until_worked(&switch);
        assert_eq!(ports[0].1.take().len(), 1);
        assert_ne!(switch.turn(0), Some(Turn::Worked));
        assert_eq!(switch.turn(1), None, "there is one worker");
        let stats = switch.stats();
        assert_eq!((stats.held, stats.workers[0].frames, stats.workers[0].sleeps), (0, 2, 0));
        check_law(&stats);
    }
    let threads = Switch::start(&SwitchConfig::default()).unwrap();
    assert_eq!((threads.turn(0), threads.turn_fd(0).is_some()), (None, false));
}

#[test]
fn a_quiet_worker_is_woken_by_its_fd() {
    for mode in [PollMode::Adaptive, PollMode::Interrupt] {
        let switch = start(1, mode);
        let ports = plain_ports(&switch, 2);
        let fd = switch.turn_fd(0).unwrap();
        for _ in 0..3 {
            until_quiet(&switch, 0);
            assert!(ports.iter().all(|(_, wire)| wire.is_armed()));
            assert!(!is_readable(fd), "nothing happened");
            ports[1].1.send(&[frame(BROADCAST, mac(1), 0)]);
            assert!(is_readable(fd), "a kick is seen");
            until_worked(&switch);
            assert_eq!(ports[0].1.take().len(), 1);
        }
        // A message of control is a reason for a turn too.
        until_quiet(&switch, 0);
        let _port = switch.add_port(&PortConfig::new("late")).unwrap();
        assert!(is_readable(fd), "a message is seen");
    }
    let busy = start(1, PollMode::Busy);
    let _ports = plain_ports(&busy, 1);
    for _ in 0..100 {
        assert_eq!(busy.turn(0), Some(Turn::Idle), "never quiet");
    }
}

/// On one thread: nobody else could take the turn that control would wait for.
#[test]
fn control_does_not_wait_for_a_turn() {
    let switch = start(2, PollMode::Busy);
    let ports = plain_ports(&switch, 4);
    for (port, wire) in &ports[..2] {
        wire.preload(&[frame(BROADCAST, mac(1), 0)]);
        let ingress = switch.detach_ingress(at(port.id, 0)).unwrap();
        assert!(!wire.is_armed());
        switch.attach_ingress(at(port.id, 0), ingress);
        assert!(switch.detach_egress(at(port.id, 0)).is_some());
    }
    for (port, wire) in &ports {
        assert!(switch.remove_port(port.id));
        assert!(!wire.inside.load(Ordering::SeqCst));
    }
    // Without queues there is nothing to look at, even for who is busy by rule.
    assert_eq!((switch.turn(0), switch.turn(1)), (Some(Turn::Quiet), Some(Turn::Quiet)));
    assert!(switch.placement().is_empty());
    check_law(&switch.stats());
    drop(switch);
    assert!(ports.iter().all(|(_, wire)| std::sync::Arc::strong_count(wire) == 1), "all is gone");
}

#[test]
fn two_workers_take_turns_on_two_threads_while_control_works() {
    const FRAMES: u32 = 2000;
    let switch = start(2, PollMode::Adaptive);
    let ports = plain_ports(&switch, 2);
    std::thread::scope(|scope| {
        let workers = [0, 1].map(|worker| {
            let switch = &switch;
            scope.spawn(move || {
                let mut worked = 0u64;
                let end = Instant::now() + Duration::from_secs(10);
                while switch.stats().workers.iter().map(|w| w.frames).sum::<u64>()
                    < u64::from(2 * FRAMES)
                {
                    worked += u64::from(switch.turn(worker) == Some(Turn::Worked));
                    assert!(Instant::now() < end, "frames are missing");
                }
                worked
            })
        });
        for number in 0..FRAMES {
            ports[0].1.send(&[frame(mac(1), mac(0), number)]);
            ports[1].1.send(&[frame(mac(0), mac(1), number)]);
            if number % 100 == 0 {
                let ingress = switch.detach_ingress(at(ports[0].0.id, 0)).unwrap();
                switch.attach_ingress(at(ports[0].0.id, 0), ingress);
            }
        }
        let worked = workers.map(|worker| worker.join().unwrap());
        assert!(worked.iter().all(|turns| *turns > 0), "both have worked: {worked:?}");
    });
    let stats = switch.stats();
    assert_eq!(stats.held, 0);
    check_law(&stats);
}
