//! The ledger finds what it is there to find.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "test code")]

use std::path::Path;
use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{DropReason, QueueId};
use switch::{PortConfig, Switch, SwitchConfig};
use testkit::{Guest, GuestSettings, Ledger, Moved, TestFrame};
use virtq::Layout;

#[test]
fn a_counter_that_was_not_declared_is_found() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let handle = switch.add_port(&PortConfig::new("only")).unwrap();
    let mut guest = Guest::new(GuestSettings::new(Layout::Split)).unwrap();
    let at = QueueId { port: handle.id, pair: 0 };
    guest.attach(&switch, at, &handle.counters(0).unwrap()).unwrap();
    let mut ledger = Ledger::open(&switch.stats());
    ledger.close(&switch.stats(), &Moved::nothing()).unwrap();
    let mut send = || {
        let (dst, src) = (MacAddr::BROADCAST, MacAddr([2, 0, 0, 0, 0, 1]));
        let frame = TestFrame { dst, src, tci: None, id: 1, len: 60 };
        assert!(guest.send(&frame.bytes(), 1).unwrap());
        assert!(guest.flush(), "the switch sleeps, it wants a kick");
        while !guest.all_sent().unwrap() {
            std::thread::yield_now();
        }
    };
    wait_asleep();
    send();
    let rx = Moved::nothing().rx("only", 1, 60);
    let error = ledger.close(&switch.stats(), &rx).unwrap_err().to_string();
    assert_eq!(error, "only drops no_destination moved by 1, should by 0");
    wait_asleep();
    send();
    ledger.close(&switch.stats(), &rx.dropped("only", DropReason::NoDestination, 1)).unwrap();
    let error = ledger.close(&switch.stats(), &Moved::nothing().originated(1)).unwrap_err();
    assert_eq!(error.to_string(), "originated moved by 0, should by 1");
}

/// Waits until the worker has nothing to do and sleeps: it wants a kick then.
fn wait_asleep() {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let worker = tasks.find(|task| read(&task.join("comm")) == "worker-0\n").unwrap();
    // Its state, and how often it waited so far.
    let look = || {
        let status = read(&worker.join("status"));
        let told = |line: &&str| line.starts_with("State:") || line.starts_with("voluntary");
        status.lines().filter(told).collect::<String>()
    };
    let start = Instant::now();
    loop {
        let before = look();
        std::thread::sleep(Duration::from_millis(20));
        let state = look();
        if state == before && state.contains("S (sleeping)") {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{state}");
    }
}
