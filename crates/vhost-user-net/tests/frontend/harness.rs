//! Ports on a control thread, connected by a wire.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use port::{PortId, PortState, QueueCounters, QueueTotals, StatusCell};
use tempfile::TempDir;
use vhost_user_net::{PortLinks, PortSettings, RingIndex, SocketMode, VhostUserPort};

use crate::fabric::Wire;

/// Two ports and what runs them.
pub(crate) struct Bench {
    pub(crate) dir: TempDir,
    pub(crate) wire: Arc<Wire>,
    pub(crate) status: Vec<StatusCell>,
    pub(crate) counters: Vec<Arc<QueueCounters>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Bench {
    pub(crate) fn new(mode: SocketMode) -> Self {
        Self::with(|settings| settings.mode = mode)
    }

    pub(crate) fn with(change: impl Fn(&mut PortSettings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let wire = Arc::new(Wire::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (mut status, mut counters, mut ports) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..2u16 {
            let cell = StatusCell::waiting("");
            let queue: Arc<QueueCounters> = Arc::default();
            let mut settings = PortSettings::server("g", dir.path().join(number.to_string()));
            change(&mut settings);
            let of_queue = Arc::clone(&queue);
            let links = PortLinks {
                id: PortId(number),
                fabric: wire.clone(),
                status: cell.clone(),
                counters: Box::new(move |_| Arc::clone(&of_queue)),
            };
            ports.push(VhostUserPort::new(settings, links).unwrap());
            status.push(cell);
            counters.push(queue);
        }
        let control = control_thread(ports, Arc::clone(&wire), Arc::clone(&stop));
        let threads = vec![wire.start(), control];
        Self { dir, wire, status, counters, stop, threads }
    }

    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.dir.path().join(number.to_string())
    }

    /// Waits until port `number` is in `state` with `text` in its reason.
    pub(crate) fn wait(&self, number: usize, state: PortState, text: &str) {
        wait_for(text, || {
            let now = self.status[number].read();
            now.state == state && now.reason.contains(text)
        });
    }

    /// What a port counted.
    pub(crate) fn totals(&self, number: usize) -> QueueTotals {
        let mut totals = self.counters[number].read_ends();
        self.counters[number].read_rx(&mut totals);
        totals
    }

    /// What both ports dropped.
    pub(crate) fn drops(&self) -> u64 {
        self.totals(0).dropped() + self.totals(1).dropped()
    }

    pub(crate) fn wait_error(&self, number: usize, text: &str) {
        wait_for(text, || {
            self.status[number].read().last_error.is_some_and(|(error, _)| error.contains(text))
        });
    }
}

fn control_thread(
    ports: Vec<VhostUserPort>,
    wire: Arc<Wire>,
    stop: Arc<AtomicBool>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new().unwrap();
        let ports: Vec<_> = ports.into_iter().map(|port| Arc::new(Mutex::new(port))).collect();
        for port in &ports {
            let _ = manager.add_subscriber(port.clone());
        }
        // ORDERING: Relaxed: the flag guards nothing but itself.
        while !stop.load(Ordering::Relaxed) {
            let _ = manager.run_with_timeout(5).unwrap();
            for ((at, side), fault) in wire.faults() {
                let ring = RingIndex(2 * at.pair + side as u16);
                ports[usize::from(at.port.0)].lock().unwrap().ring_fault(ring, &fault);
            }
        }
    })
}

impl Bench {
    /// Closes both ports and ends the threads.
    pub(crate) fn finish(&mut self) {
        // ORDERING: Relaxed: see above.
        self.stop.store(true, Ordering::Relaxed);
        self.wire.stop();
        for thread in self.threads.drain(..) {
            let result = thread.join();
            assert!(result.is_ok() || thread::panicking());
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.finish();
    }
}

pub(crate) fn wait_for(what: &str, mut test: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !test() {
        assert!(Instant::now() < end, "still waiting: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn mode_of(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}
