//! A guest moves between two switches while it talks: precopy, with memory compared, cancelled,
//! failed and succeeded.
//!
//! ```text
//!   g2 ── switch a ── packet-mmap ══ veth ══ packet-mmap ── switch b
//!              │                                                │
//!         g1 (before) ──────────────── moves ────────────► g1 (after)
//! ```

mod postcopy;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::qmp::Qmp;
use conformance::{Environment, Guest, GuestSpec, Netns, Scratch, Switch, pairwise};
use libtest_mimic::Trial;
use serde_json::json;

use crate::iommu::{ACCESS_PLATFORM, put_behind};
use crate::{full, trial};

const DOWNTIME_MS: u64 = 100;
const FAST: u64 = 1 << 32;
const SLOW: u64 = 1 << 20;
const PINGS: u32 = 160;
const PING_INTERVAL_MS: u32 = 50;
/// What the issue allows to be lost.
const LOST_MAX: u32 = 5;
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
/// What the stream moves after the guest has moved, to show that it goes on.
const FRAMES_AFTER: u64 = 200;

#[derive(Clone, Copy, Debug)]
struct Case {
    packed: bool,
    queues: u16,
    /// It is behind a vIOMMU, which its kernel uses in this way.
    behind: Option<&'static str>,
}

pub(crate) fn trials() -> Vec<Trial> {
    let rows = if full() { pairwise::all(&[2, 2], |_| true) } else { vec![vec![0, 1], vec![1, 0]] };
    let cases = rows.iter().filter_map(|row| {
        let &[packed, queues] = row.as_slice() else { return None };
        let queues = if queues == 0 { 1 } else { 2 };
        Some(Case { packed: packed == 1, queues, behind: None })
    });
    let moves = cases.map(|case| {
        let ring = if case.packed { "packed" } else { "split" };
        trial(format!("migration/{ring}-q{}-under-load", case.queues), move |env, scratch| {
            under_load(env, scratch, case)
        })
    });
    let compared = [false, true].map(|packed| {
        let ring = if packed { "packed" } else { "split" };
        trial(format!("migration/{ring}-memory-is-equal"), move |env, scratch| {
            memory_is_equal(env, scratch, Case { packed, queues: 1, behind: None })
        })
    });
    // Linux has the used ring of a split queue in a page that it writes itself: packed queues tell
    // whether what is behind the vIOMMU is noted in the right place.
    let modes = [(false, "iommu.strict=0", "lazy"), (true, "iommu.strict=1", "strict")];
    let behind = modes.map(|(packed, mode, name)| {
        let ring = if packed { "packed" } else { "split" };
        trial(format!("migration/{ring}-iommu-{name}"), move |env, scratch| {
            memory_is_equal(env, scratch, Case { packed, queues: 1, behind: Some(mode) })
        })
    });
    let again = trial("migration/cancelled-failed-succeeded".to_owned(), tried_again);
    moves.chain(compared).chain(behind).chain([again]).chain(postcopy::trials()).collect()
}

/// Two switches with a link between them.
struct Bed<'a> {
    environment: &'a Environment,
    scratch: &'a Scratch,
    a: Switch,
    b: Switch,
    _link: (Netns, Netns),
    case: Case,
}

impl<'a> Bed<'a> {
    fn new(environment: &'a Environment, scratch: &'a Scratch, case: Case) -> Result<Self> {
        Self::with(environment, scratch, case, ("", &["g1"]))
    }

    /// With more keys of the guest that moves, and these guests' ports at its new place.
    fn with(
        environment: &'a Environment,
        scratch: &'a Scratch,
        case: Case,
        (keys, there): (&str, &[&str]),
    ) -> Result<Self> {
        let link = (Netns::new()?, Netns::new()?);
        link.0.connect("10.99.0.1/24", &link.1, "u0")?;
        let start = |name: &str, ifname: &str, place: &Netns, guests: &[&str]| {
            let folder = scratch.path(name);
            fs::create_dir_all(&folder)?;
            let port = |guest: &&str| {
                let keys = if *guest == "g1" { keys } else { "" };
                format!("vhost-user:name={guest},socket={}{keys}", folder.join(guest).display())
            };
            let uplink = format!("packet-mmap:name=u,ifname={ifname},netns={}", place.name());
            let ports: Vec<String> = guests.iter().map(port).chain([uplink]).collect();
            Switch::start(&folder, &ports)
        };
        let a = start("a", "eth0", &link.0, &["g1", "g2"])?;
        let b = start("b", "u0", &link.1, there)?;
        Ok(Self { environment, scratch, a, b, _link: link, case })
    }

    fn qmp(&self, name: &str) -> PathBuf {
        self.scratch.path(&format!("{name}.qmp"))
    }

    fn uri(&self, name: &str) -> String {
        format!("unix:{}", self.scratch.path(&format!("{name}.migrate")).display())
    }

    /// The guest that moves, at its old place or waiting at its new one.
    fn mover(&self, place: &str, arguments: &[&str]) -> Result<Guest> {
        let folder = if place == "before" { &self.a } else { &self.b }.folder();
        let packed = if self.case.packed { "packed=on" } else { "packed=off" };
        let mut spec = GuestSpec::new(1, folder.join("g1"));
        spec.name = format!("g1-{place}");
        spec.queues = self.case.queues;
        spec.properties = vec![packed.to_owned(), "ctrl_guest_offloads=off".to_owned()];
        spec.arguments = Qmp::arguments(&self.qmp(place)).to_vec();
        if let Some(mode) = self.case.behind {
            put_behind(&mut spec, mode);
        }
        spec.arguments.extend(arguments.iter().map(|word| (*word).to_owned()));
        Guest::start(self.environment, &spec, self.scratch.folder())
    }

    fn waiting(&self, place: &str, more: &[&str]) -> Result<Guest> {
        let uri = self.uri(place);
        let guest = self.mover(place, &[&["-incoming", &uri], more].concat())?;
        let socket = self.scratch.path(&format!("{place}.migrate"));
        let start = Instant::now();
        while !socket.exists() {
            ensure!(start.elapsed() < MIGRATION_TIMEOUT, "the new place never listened");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(guest)
    }

    fn peer(&self) -> Result<Guest> {
        let spec = GuestSpec::new(2, self.a.folder().join("g2"));
        let mut peer = Guest::start(self.environment, &spec, self.scratch.folder())?;
        peer.wait_up()?;
        peer.iperf_server()?;
        Ok(peer)
    }

    /// Whether the first switch logs what it writes into the guest.
    fn is_logging(&self) -> Result<bool> {
        let shown: serde_json::Value = serde_json::from_str(&self.a.ctl(&["--json", "ports"])?)?;
        let ports = shown.get("ports").and_then(|ports| ports.as_array()).context("no ports")?;
        let port = ports.iter().find(|port| port.get("name") == Some(&json!("g1")));
        let log = port.and_then(|port| port.pointer("/front_end/dirty_log"));
        log.and_then(serde_json::Value::as_bool).with_context(|| format!("ports: {shown}"))
    }

    fn frames_at_b(&self) -> Result<u64> {
        Ok(self.b.stats()?.port("g1")?.rx_frames())
    }

    fn stop(self) -> Result<()> {
        let _ = (self.a.check_ledger()?, self.b.check_ledger()?);
        self.a.stop()?;
        self.b.stop()
    }
}

/// The guest sends all the time that the peer pings it.
fn busy(guest: &mut Guest, peer: &str) -> Result<()> {
    guest.wait_reachable(peer)?;
    guest.run(&format!("(iperf3 -c {peer} -t 300 >/tmp/iperf 2>&1 &)")).map(drop)
}

fn under_load(environment: &Environment, scratch: &Scratch, case: Case) -> Result<()> {
    let bed = Bed::new(environment, scratch, case)?;
    let (mut old, mut peer) = (bed.mover("before", &[])?, bed.peer()?);
    old.wait_up()?;
    if case.queues > 1 {
        let _ = old.run(&format!("ethtool -L eth0 combined {}", case.queues))?;
    }
    bed.a.wait_ports_up(&["g1", "g2", "u"])?;
    busy(&mut old, &peer.address())?;
    let mut new = bed.waiting("after", &[])?;
    let mut qmp = Qmp::connect(&bed.qmp("before"))?;
    qmp.set_migration(DOWNTIME_MS, FAST)?;
    let address = old.address();
    let pings = std::thread::spawn(move || {
        let lost = peer.ping(&address, PINGS, PING_INTERVAL_MS);
        (peer, lost)
    });
    std::thread::sleep(Duration::from_secs(2));
    qmp.migrate(&bed.uri("after"))?;
    let migrated = qmp.wait_migration(&["completed"], MIGRATION_TIMEOUT)?;
    bed.b.wait_ports_up(&["g1"])?;
    let (mut peer, lost) = pings.join().ok().context("the pinging thread panicked")?;
    let lost = lost?;
    println!(
        "downtime {} ms of {} ms, {lost} of {PINGS} pings at {PING_INTERVAL_MS} ms lost",
        migrated.downtime_ms, migrated.total_ms
    );
    ensure!(lost <= LOST_MAX, "{lost} pings lost, downtime {} ms", migrated.downtime_ms);
    // The stream that began before goes on behind the other switch.
    let before = bed.frames_at_b()?;
    let _ = new.run("sleep 2")?;
    let frames = bed.frames_at_b()?.saturating_sub(before);
    ensure!(frames > FRAMES_AFTER, "the stream stopped: {frames} frames; {}", bed.b.counters());
    let _ = new.run("killall iperf3; sleep 1")?;
    let lost = peer.ping(&new.address(), 20, PING_INTERVAL_MS)?;
    ensure!(lost == 0, "{lost} of 20 pings lost after it all");
    let _ = qmp.ask("quit", &json!({}));
    new.power_off()?;
    peer.power_off()?;
    bed.stop()
}

/// The guest's memory, as its QEMU shares it with the back end.
fn memory_of(guest: &Guest) -> Result<File> {
    let folder = PathBuf::from(format!("/proc/{}/fd", guest.id()));
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = fs::read_link(&path).unwrap_or_default();
        if name.to_string_lossy().contains("memory-backend-memfd") {
            return Ok(File::open(path)?);
        }
    }
    anyhow::bail!("no memory in {}", folder.display())
}

/// The pages that differ.
fn differing(a: &File, b: &File) -> Result<Vec<u64>> {
    let (len, other) = (a.metadata()?.len(), b.metadata()?.len());
    ensure!(len == other && len > 0, "{len} and {other} bytes of memory");
    let (mut one, mut two) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut found = Vec::new();
    for start in (0..len).step_by(1 << 20) {
        a.read_exact_at(&mut one, start)?;
        b.read_exact_at(&mut two, start)?;
        let pages = one.chunks(PAGE).zip(two.chunks(PAGE)).enumerate();
        let page = start / 4096;
        found
            .extend(pages.filter(|(_, (x, y))| x != y).map(|(n, _)| page.saturating_add(n as u64)));
    }
    Ok(found)
}

/// The guest is not let go on at its new place before its memory was compared with that at the old
/// one: a page that a ring wrote and did not note is there as it was before.
fn memory_is_equal(environment: &Environment, scratch: &Scratch, case: Case) -> Result<()> {
    let bed = Bed::new(environment, scratch, case)?;
    let (mut old, mut peer) = (bed.mover("before", &[])?, bed.peer()?);
    old.wait_up()?;
    bed.a.wait_ports_up(&["g1", "g2", "u"])?;
    let behind = old.has_feature(ACCESS_PLATFORM)?;
    ensure!(behind == case.behind.is_some(), "behind a vIOMMU: {behind}");
    busy(&mut old, &peer.address())?;
    let _ = peer.run(&format!("(ping -i 0.01 -s 1000 {} >/dev/null 2>&1 &)", old.address()))?;
    let mut new = bed.waiting("after", &["-S"])?;
    let mut qmp = Qmp::connect(&bed.qmp("before"))?;
    qmp.set_migration(DOWNTIME_MS, FAST)?;
    qmp.migrate(&bed.uri("after"))?;
    let _ = qmp.wait_migration(&["completed"], MIGRATION_TIMEOUT)?;
    let pages = differing(&memory_of(&old)?, &memory_of(&new)?)?;
    ensure!(pages.is_empty(), "{} pages differ: {:x?}", pages.len(), pages);
    let _ = Qmp::connect(&bed.qmp("after"))?.ask("cont", &json!({}))?;
    bed.b.wait_ports_up(&["g1"])?;
    new.wait_reachable(&peer.address())?;
    let _ = qmp.ask("quit", &json!({}));
    new.power_off()?;
    peer.power_off()?;
    bed.stop()
}

/// A migration that is cancelled, one whose target dies, and then one that succeeds.
fn tried_again(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let bed = Bed::new(environment, scratch, Case { packed: false, queues: 1, behind: None })?;
    let (mut old, mut peer) = (bed.mover("before", &[])?, bed.peer()?);
    old.wait_up()?;
    bed.a.wait_ports_up(&["g1", "g2", "u"])?;
    busy(&mut old, &peer.address())?;
    let mut qmp = Qmp::connect(&bed.qmp("before"))?;
    ensure!(!bed.is_logging()?, "logging before it began");
    for (place, cancel) in [("cancelled", true), ("failed", false)] {
        let target = bed.waiting(place, &[])?;
        let _ = Qmp::connect(&bed.qmp(place))?;
        qmp.set_migration(DOWNTIME_MS, SLOW)?;
        qmp.migrate(&bed.uri(place))?;
        let _ = qmp.wait_migration(&["active"], MIGRATION_TIMEOUT)?;
        std::thread::sleep(Duration::from_millis(500));
        ensure!(bed.is_logging()?, "no logging while it is on its way");
        if cancel {
            let _ = qmp.ask("migrate_cancel", &json!({}))?;
        }
        drop(target);
        let _ = qmp.wait_migration(&[place], MIGRATION_TIMEOUT)?;
        let lost = peer.ping(&old.address(), 20, PING_INTERVAL_MS)?;
        ensure!(lost == 0, "{lost} of 20 pings lost after it was {place}");
        ensure!(!bed.is_logging()?, "dirty logging was left on after it was {place}");
    }
    let mut new = bed.waiting("after", &[])?;
    qmp.set_migration(DOWNTIME_MS, FAST)?;
    qmp.migrate(&bed.uri("after"))?;
    let _ = qmp.wait_migration(&["completed"], MIGRATION_TIMEOUT)?;
    bed.b.wait_ports_up(&["g1"])?;
    new.wait_reachable(&peer.address())?;
    let _ = qmp.ask("quit", &json!({}));
    new.power_off()?;
    peer.power_off()?;
    bed.stop()
}
