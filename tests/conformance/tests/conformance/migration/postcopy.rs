//! A guest runs at its new place before its memory is there; a guest beside it notices nothing.
//!
//! ```text
//!   g2 ── switch a ── packet-mmap ══ veth ══ packet-mmap ── switch b ── g3
//!              │                                                │
//!         g1 (before) ── a little of its memory, then itself ► g1 (after) ◄─ the rest, as needed
//! ```

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::guest::Pings;
use conformance::qmp::Qmp;
use conformance::switch::QueueStats;
use conformance::{Environment, Guest, GuestSpec, Scratch};
use libtest_mimic::Trial;
use serde_json::json;

use super::{Bed, Case, DOWNTIME_MS, MIGRATION_TIMEOUT, PING_INTERVAL_MS, PINGS, SLOW};
use crate::trial;

/// What the memory comes with when the guest has moved: slow enough to be waited for.
const REST_BYTES: u64 = 48 << 20;
/// Until the guest says where it is: it has to wait for its own pages for that. Switch a sends what
/// comes before to its old place, and counts it as `port_down`. Measured: 7 to 25, on a loaded
/// machine of two CPUs. One that is not reached before all its memory has come loses 51.
const LOST_MAX: u32 = 40;
/// The sum is right if every page came whole.
const BLOB: &str = "md5sum /tmp/blob";

pub(super) fn trials() -> Vec<Trial> {
    let rows = [false, true].map(|packed| {
        let ring = if packed { "packed" } else { "split" };
        trial(format!("migration/postcopy-{ring}"), move |env, scratch| moved(env, scratch, packed))
    });
    rows.into()
}

fn allow(qmp: &mut Qmp) -> Result<()> {
    let on = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    qmp.ask("migrate-set-capabilities", &on).map(drop)
}

/// A guest that waits at the new place, whose memory may come later.
fn waiting(bed: &Bed<'_>) -> Result<Guest> {
    let guest = bed.mover("after", &["-incoming", "defer"])?;
    let mut qmp = Qmp::connect(&bed.qmp("after"))?;
    allow(&mut qmp)?;
    let _ = qmp.ask("migrate-incoming", &json!({"uri": bed.uri("after")}))?;
    Ok(guest)
}

/// Frames that a port of the new place dropped for a reason.
fn dropped(bed: &Bed<'_>, port: &str, reason: &str) -> Result<u64> {
    let stats = bed.b.stats()?;
    let count = |queue: &QueueStats| queue.drops.get(reason).copied();
    Ok(stats.port(port)?.queues.iter().filter_map(count).sum())
}

/// What the guest beside it may not lose. Before its driver had buffers it did.
fn dropped_beside(bed: &Bed<'_>) -> Result<[u64; 3]> {
    let of = |reason| dropped(bed, "g3", reason);
    Ok([of("no_buffer")?, of("port_down")?, of("deferral_full")?])
}

/// What everybody counted, when answers are missing that no switch dropped.
fn show(bed: &Bed<'_>, missing: u32, guests: [&mut Guest; 2]) -> Result<()> {
    if missing == 0 {
        return Ok(());
    }
    for guest in guests {
        println!("{}", guest.run("grep eth0 /proc/net/dev; grep Icmp: /proc/net/snmp")?);
    }
    println!("a: {}; b: {}", bed.a.counters(), bed.b.counters());
    Ok(())
}

/// How long answers took for the guest beside it.
fn show_times(alone: &Pings, calm: &Pings) {
    for (when, pings) in [("before", alone), ("meanwhile", calm)] {
        let [half, most, last] = [50, 99, 100].map(|percent| pings.quantile_ms(percent));
        println!("beside it, {when}: p50 {half:.2} ms, p99 {most:.2} ms, longest {last:.2} ms");
    }
}

fn moved(environment: &Environment, scratch: &Scratch, packed: bool) -> Result<()> {
    let case = Case { packed, queues: 1, behind: None };
    let bed = Bed::with(environment, scratch, case, (",postcopy=on", &["g1", "g3"]))?;
    let (mut old, mut peer) = (bed.mover("before", &[])?, bed.peer()?);
    let beside = GuestSpec::new(3, bed.b.folder().join("g3"));
    let mut beside = Guest::start(environment, &beside, scratch.folder())?;
    old.wait_up()?;
    beside.wait_up()?;
    bed.a.wait_ports_up(&["g1", "g2", "u"])?;
    bed.b.wait_ports_up(&["g3", "u"])?;
    let _ = old.run("dd if=/dev/urandom of=/tmp/blob bs=1M count=48 2>/dev/null")?;
    let before = old.run(BLOB)?;
    let peers = [old.address(), beside.address()];
    for address in &peers {
        peer.wait_reachable(address)?;
    }
    let alone = beside.pings(&peer.address(), PINGS, PING_INTERVAL_MS)?;
    ensure!(alone.lost == 0, "{} pings lost before anything moves", alone.lost);
    let mut new = waiting(&bed)?;
    let dropped_before = dropped_beside(&bed)?;
    let mut qmp = Qmp::connect(&bed.qmp("before"))?;
    allow(&mut qmp)?;
    qmp.set_migration(DOWNTIME_MS, SLOW)?;
    let _ = qmp.ask("migrate-set-parameters", &json!({"max-postcopy-bandwidth": REST_BYTES}))?;
    let at_peer = peer.address();
    let pings = std::thread::spawn(move || {
        let lost = peer.ping(&peers[0], PINGS, PING_INTERVAL_MS);
        (peer, lost)
    });
    let calm = std::thread::spawn(move || {
        let pings = beside.pings(&at_peer, PINGS, PING_INTERVAL_MS);
        (beside, pings)
    });
    std::thread::sleep(Duration::from_secs(1));
    qmp.migrate(&bed.uri("after"))?;
    let _ = qmp.wait_migration(&["active"], MIGRATION_TIMEOUT)?;
    let _ = qmp.ask("migrate-start-postcopy", &json!({}))?;
    let migrated = qmp.wait_migration(&["completed"], MIGRATION_TIMEOUT)?;
    bed.b.wait_ports_up(&["g1"])?;
    let (mut peer, lost) = pings.join().ok().context("the pinging thread panicked")?;
    let (mut beside, calm) = calm.join().ok().context("the other pinging thread panicked")?;
    let (lost, calm) = (lost?, calm?);
    println!(
        "downtime {} ms of {} ms, {lost} of {PINGS} pings at {PING_INTERVAL_MS} ms lost, {} \
         beside it",
        migrated.downtime_ms, migrated.total_ms, calm.lost
    );
    show_times(&alone, &calm);
    show(&bed, calm.lost, [&mut peer, &mut beside])?;
    let (a, b) = (bed.a.counters(), bed.b.counters());
    ensure!(lost <= LOST_MAX, "{lost} pings lost; a: {a}; b: {b}");
    // What reached its new place reached the guest, and the one beside it got all that was its.
    ensure!(dropped(&bed, "g1", "deferral_full")? == 0, "no room at its new place; b: {b}");
    ensure!(dropped_beside(&bed)? == dropped_before, "a frame beside it was lost; b: {b}");
    ensure!(calm.lost == 0, "{} pings of the guest beside it lost; a: {a}; b: {b}", calm.lost);
    ensure!(new.run(BLOB)? == before, "its memory is not what it was");
    new.wait_reachable(&peer.address())?;
    let lost = peer.ping(&new.address(), 20, PING_INTERVAL_MS)?;
    let (a, b) = (bed.a.counters(), bed.b.counters());
    ensure!(lost == 0, "{lost} of 20 pings lost after it all; a: {a}; b: {b}");
    let bytes = new.iperf(&peer.address(), 3, 1)?;
    ensure!(bytes > 1 << 20, "{bytes} bytes of TCP in 3 s");
    let _ = qmp.ask("quit", &json!({}));
    for guest in [new, peer, beside] {
        guest.power_off()?;
    }
    bed.stop()
}
