//! A front end that breaks every rule of the protocol: it loses its session, others keep theirs,
//! and no descriptor stays behind.
#![expect(clippy::arithmetic_side_effects, clippy::unwrap_used, reason = "test code")]
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use port::Fabric;
use switch::{PortConfig, Switch, SwitchConfig};
use testkit::{FrontEnd, Rng, SharedMemory};
use vhost_user_net::{PortLinks, PortSettings, VhostUserPort};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const MB: u64 = 1 << 20;

/// Tests count the descriptors of the whole process, so each has it for itself.
static ALONE: Mutex<()> = Mutex::new(());

/// A switch with two vhost-user ports and the thread that serves their sessions.
struct Rig {
    _alone: MutexGuard<'static, ()>,
    folder: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // Two fds that the process needs once.
        assert!(!virtio_net::notify::can_block());
        let folder = tempfile::tempdir().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let switch = Arc::new(Switch::start(&SwitchConfig::default()).unwrap());
        let mut ports = Vec::new();
        for name in ["good", "bad"] {
            let handle = switch.add_port(&PortConfig::new(name)).unwrap();
            let fabric: Arc<dyn Fabric> = switch.clone();
            let (id, status) = (handle.id, handle.status.clone());
            let counters = Box::new(move |pair| handle.counters(pair).unwrap_or_default());
            let links = PortLinks { id, fabric, status, counters };
            let mut settings = PortSettings::server(name, folder.path().join(name));
            settings.queues = 1;
            ports.push(VhostUserPort::new(settings, links).unwrap());
        }
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut manager = EventManager::<VhostUserPort>::new().unwrap();
            for port in ports {
                let _ = manager.add_subscriber(port);
            }
            while !asked.load(Ordering::Relaxed) {
                let _ = manager.run_with_timeout(10);
            }
        });
        Self { _alone: alone, folder, stop, thread: Some(thread) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn u64_body(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_le_bytes(), value.to_le_bytes()].concat()
}

/// Connects and answers for the session: `GET_FEATURES` works.
fn connect(path: &Path) -> FrontEnd {
    let mut front_end = FrontEnd::connect(path).unwrap();
    assert!(features(&mut front_end) & VERSION_1 != 0);
    front_end
}

fn features(front_end: &mut FrontEnd) -> u64 {
    let body = front_end.ask(GET_FEATURES, &[]).unwrap();
    u64::from_le_bytes(body.try_into().unwrap())
}

/// A session with `REPLY_ACK`.
fn negotiated(path: &Path) -> FrontEnd {
    let mut front_end = connect(path);
    front_end.send(SET_OWNER, &[], &[]).unwrap();
    let offered = front_end.ask(GET_PROTOCOL_FEATURES, &[]).unwrap();
    assert!(u64::from_le_bytes(offered.try_into().unwrap()) & REPLY_ACK != 0);
    front_end.send(SET_PROTOCOL_FEATURES, &u64_body(REPLY_ACK), &[]).unwrap();
    let bits = u64_body(VERSION_1 | PROTOCOL_FEATURES);
    assert!(front_end.acknowledged(SET_FEATURES, &bits, &[]).unwrap());
    front_end
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until no more descriptors are open than before: sessions end a little later.
fn expect_fds(most: usize, what: &str) {
    let end = Instant::now() + Duration::from_secs(5);
    while open_fds() > most {
        assert!(Instant::now() < end, "{what}: {} descriptors, {most} before", open_fds());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is sent: request, body, how many descriptors.
type Message = (&'static str, u32, Vec<u8>, usize);

fn wrong_messages() -> Vec<Message> {
    let table = SharedMemory::table;
    let vring_fd = |index: u64| u64_body(index).to_vec();
    vec![
        ("unknown request", 4711, vec![], 0),
        ("request zero", 0, vec![], 0),
        ("body too long", SET_FEATURES, vec![0; 64], 0),
        ("body too short", SET_FEATURES, vec![0; 4], 0),
        ("body missing", SET_VRING_NUM, vec![], 0),
        ("feature that was not offered", SET_FEATURES, u64_body(1 << 60).to_vec(), 0),
        ("descriptor where none belongs", SET_FEATURES, u64_body(VERSION_1).to_vec(), 1),
        ("memory without a descriptor", SET_MEM_TABLE, table(0, MB), 0),
        ("memory with two descriptors", SET_MEM_TABLE, table(0, MB), 2),
        ("file smaller than it claims", SET_MEM_TABLE, table(0, 64 * MB), 1),
        ("region that wraps", SET_MEM_TABLE, table(u64::MAX - 4095, MB), 1),
        ("region of size zero", SET_MEM_TABLE, table(0, 0), 1),
        ("ring size zero", SET_VRING_NUM, state(0, 0), 0),
        ("ring size above the limit", SET_VRING_NUM, state(0, 65536), 0),
        ("ring that does not exist", SET_VRING_NUM, state(77, 256), 0),
        ("ring addresses outside of memory", SET_VRING_ADDR, vec![0xee; 40], 0),
        ("kick of a ring that does not exist", SET_VRING_KICK, vring_fd(200), 1),
        ("kick without a descriptor", SET_VRING_KICK, vring_fd(0), 0),
        ("call with a descriptor too many", SET_VRING_CALL, vring_fd(0), 2),
        ("enable that is neither on nor off", SET_VRING_ENABLE, state(0, 7), 0),
    ]
}

/// Every wrong message is refused: by a reply that says so, or by the end of the session.
#[test]
fn a_wrong_message_costs_its_session_only() {
    let rig = Rig::new();
    let mut good = negotiated(&rig.path("good"));
    let memory = SharedMemory::new(MB).unwrap();
    drop(negotiated(&rig.path("bad")));
    std::thread::sleep(Duration::from_millis(50));
    let before = open_fds();
    for (what, request, body, count) in wrong_messages() {
        let mut bad = negotiated(&rig.path("bad"));
        let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| memory.as_fd()).collect();
        let accepted = bad.acknowledged(request, &body, &fds).unwrap_or(false);
        assert!(!accepted, "{what}: accepted");
        assert!(features(&mut good) & VERSION_1 != 0, "{what}");
        drop(bad);
        expect_fds(before, what);
        // The port serves the next front end.
        drop(connect(&rig.path("bad")));
        expect_fds(before, what);
    }
}

/// Headers that are wrong in themselves end the session: what follows cannot be understood.
#[test]
fn a_broken_header_ends_the_session() {
    let rig = Rig::new();
    let header = |flags: u32, size: u32| {
        [GET_FEATURES.to_le_bytes(), flags.to_le_bytes(), size.to_le_bytes()].concat()
    };
    for (what, bytes) in [
        ("version 2", header(2, 0)),
        ("version 0", header(0, 0)),
        ("a body of 4 GiB", header(1, u32::MAX)),
        ("a reply", header(5, 0)),
    ] {
        let mut bad = connect(&rig.path("bad"));
        let _ = bad.send_raw(&bytes, &[]).unwrap();
        assert!(bad.is_closed(), "{what}");
    }
    // Half a header and the end.
    let mut bad = connect(&rig.path("bad"));
    let _ = bad.send_raw(&header(1, 0)[..7], &[]).unwrap();
    drop(bad);
    drop(connect(&rig.path("bad")));
}

/// Random messages with random descriptors.
#[test]
fn noise_costs_its_session_only() {
    let rig = Rig::new();
    let mut good = negotiated(&rig.path("good"));
    let memory = SharedMemory::new(MB).unwrap();
    assert_eq!(memory.bytes(), MB);
    drop(negotiated(&rig.path("bad")));
    std::thread::sleep(Duration::from_millis(50));
    let before = open_fds();
    let mut rng = Rng::new(7);
    for round in 0..200 {
        let mut bad = negotiated(&rig.path("bad"));
        for _ in 0..20 {
            let mut body = vec![0; *rng.pick(&[0, 4, 8, 8, 12, 40, 40, 300]).unwrap()];
            rng.fill(&mut body);
            // Small numbers get past the first check.
            for byte in body.iter_mut().filter(|_| rng.one_in(2)) {
                *byte &= 1;
            }
            let fds: Vec<_> = (0..rng.below(3)).map(|_| memory.as_fd()).collect();
            let request = u32::try_from(rng.below(45)).unwrap();
            if bad.send(request, &body, &fds).is_err() {
                break;
            }
        }
        drop(bad);
        assert!(features(&mut good) & VERSION_1 != 0, "round {round}");
        expect_fds(before, "noise");
    }
}
