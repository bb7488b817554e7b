//! Restarts that nobody may notice: the switch is killed under traffic, and front ends come and go
//! under a running switch.
//!
//! ```text
//!   guest 1 (split) ── switch ── guest 2 (packed)
//!     ping, iperf3       ╳ kill -9, start again: no help for the guests, TCP goes on
//! ```
//!
//! Each series is short by default, and has 20 rounds with `CAUSEWAY_FULL=1`.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::process::tied_command;
use conformance::virtio_user::USUAL_FRAME;
use conformance::{
    Environment, Guest, GuestSpec, Process, Scratch, Switch, Topology, VirtioUser, VirtioUserSpec,
    switch,
};
use libtest_mimic::Trial;

use crate::{full, trial};

/// How often QEMU looks for a back end.
const RECONNECT_MS: u32 = 100;
/// What a guest that came and went may leave with the allocator, however many do.
const GROWTH_KIB: u64 = 4096;
/// A machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let row = |name: &str, body: fn(&Environment, &Scratch) -> Result<()>| {
        trial(format!("restart/{name}"), body)
    };
    vec![
        row("qemu-guests-survive-kill-9-of-the-switch", qemu_survives),
        row("qemu-with-packed-rings-needs-the-record", qemu_needs_the_record),
        row("virtio-user-split-survives-kill-9", |env, s| user_survives(env, s, false, false)),
        row("virtio-user-packed-survives-kill-9", |env, s| user_survives(env, s, true, false)),
        row("virtio-user-in-order-survives-kill-9", |env, s| user_survives(env, s, true, true)),
        row("frames-survive-kill-9-split", |_, s| frames_survive(s, &[])),
        row("frames-survive-kill-9-packed", |_, s| frames_survive(s, &["--packed"])),
        row("frames-survive-kill-9-packed-in-order-chains", |_, s| {
            frames_survive(s, &["--packed", "--in-order", "--descriptors", "3"])
        }),
        row("frames-survive-kill-9-packed-in-flight-file", |_, s| {
            frames_survive(s, &["--packed", "--inflight"])
        }),
        row("frames-survive-kill-9-split-in-flight-file", |_, s| {
            frames_survive(s, &["--inflight"])
        }),
        row("guests-reboot-reload-and-die", front_ends_come_and_go),
    ]
}

/// Rounds of a series.
fn rounds(short: u32) -> u32 {
    if full() { 20 } else { short }
}

fn port(number: u8, scratch: &Scratch) -> String {
    let socket = scratch.path(&format!("g{number}.sock"));
    format!("vhost-user:name=g{number},socket={}", socket.display())
}

fn guest(env: &Environment, scratch: &Scratch, number: u8, packed: bool) -> Result<Guest> {
    let mut spec = GuestSpec::new(number, scratch.path(&format!("g{number}.sock")));
    spec.reconnect_ms = RECONNECT_MS;
    spec.properties = vec![format!("packed={}", if packed { "on" } else { "off" })];
    Guest::start(env, &spec, scratch.folder())
}

/// From a switch that listens to ports that are up.
fn recovery(switch: &Switch, names: &[&str]) -> Result<Duration> {
    let start = Instant::now();
    switch.wait_ports_up(names)?;
    Ok(start.elapsed())
}

fn qemu_survives(env: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [port(1, scratch), port(2, scratch)];
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let mut split = guest(env, scratch, 1, false)?;
    let mut packed = guest(env, scratch, 2, true)?;
    split.wait_up()?;
    packed.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    split.wait_reachable(&packed.address())?;
    let boots = [boot_time(&mut split)?, boot_time(&mut packed)?];
    packed.iperf_server()?;
    // In both directions, and for longer than the test lasts.
    let client = format!("iperf3 -c {} -t 600 --bidir >/tmp/iperf 2>&1 &", packed.address());
    let _ = split.run(&client)?;
    let _ = split.run(&format!("ping -i 0.01 {} >/tmp/ping 2>&1 &", packed.address()))?;
    let mut slowest = Duration::ZERO;
    for round in 0..rounds(3) {
        // Another moment of the traffic each time.
        thread::sleep(Duration::from_millis(
            u64::from(round).saturating_mul(37).saturating_add(400),
        ));
        switch.kill();
        switch = Switch::start(scratch.folder(), &ports)?;
        slowest = slowest.max(recovery(&switch, &["g1", "g2"])?);
        moves_on(&switch, ["g1", "g2"]).with_context(|| format!("round {round}"))?;
    }
    println!("slowest recovery: {slowest:?} after listening, with reconnect-ms={RECONNECT_MS}");
    let _ = split.run("killall iperf3 ping; true")?;
    let _ = packed.run("killall iperf3; true")?;
    for (guest, boot) in [&mut split, &mut packed].into_iter().zip(boots) {
        ensure!(boot_time(guest)? == boot, "a guest has rebooted");
        let said = guest.run("dmesg | grep -iE 'timed? ?out|virtio.*(err|id )' || true")?;
        ensure!(said.is_empty(), "a guest complains: {said}");
    }
    let address = packed.address();
    ensure!(split.ping(&address, 50, 20)? == 0, "pings are lost after the last restart");
    let _ = switch.check_ledger()?;
    split.power_off()?;
    packed.power_off()?;
    switch.stop()
}

/// When the guest's kernel was started, as it says itself.
fn boot_time(guest: &mut Guest) -> Result<String> {
    guest.run("cat /proc/sys/kernel/random/boot_id")
}

/// Both guests send and receive, in rings of which neither is stuck: more frames than a ring has.
fn moves_on(switch: &Switch, names: [&str; 2]) -> Result<()> {
    const MORE_THAN_A_RING: u64 = 600;
    let start = Instant::now();
    loop {
        let stats = switch.stats()?;
        let moved = |name: &str| -> Result<u64> {
            let port = stats.port(name)?;
            Ok(port.rx_frames().min(port.tx_frames()))
        };
        let least = moved(names[0])?.min(moved(names[1])?);
        if least > MORE_THAN_A_RING {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "a ring is stuck: {}", switch.counters());
        thread::sleep(Duration::from_millis(20));
    }
}

/// The twin: without the record a packed ring does not go on, which shows that it was the record.
fn qemu_needs_the_record(env: &Environment, scratch: &Scratch) -> Result<()> {
    let spec = port(2, scratch);
    let arguments = ["--port", &spec, "--state-dir", "off"];
    let switch = Switch::start_with(scratch.folder(), &arguments)?;
    let mut packed = guest(env, scratch, 2, true)?;
    packed.wait_up()?;
    switch.wait_ports_up(&["g2"])?;
    // Some frames, so that the stale position is a wrong one.
    let _ = packed.run("ping -c 3 -i 0.1 -W 1 10.77.0.99 >/dev/null || true")?;
    switch.kill();
    let switch = Switch::start_with(scratch.folder(), &arguments)?;
    let start = Instant::now();
    while switch.stats()?.port("g2")?.state != "broken" {
        let _ = packed.run("ping -c 1 -W 1 10.77.0.99 >/dev/null || true")?;
        let late = start.elapsed() > PATIENCE;
        ensure!(!late, "the ring goes on without a record: {}", switch.counters());
    }
    // As the README says: a reset by the guest's driver helps.
    packed.rebind_driver()?;
    switch.wait_ports_up(&["g2"])?;
    packed.power_off()?;
    switch.stop()
}

/// DPDK's virtio-user, which listens: the switch connects to it again and again.
fn user_survives(env: &Environment, scratch: &Scratch, packed: bool, in_order: bool) -> Result<()> {
    let names = ["v0", "v1"];
    let port = |(index, name): (usize, &str)| {
        let (socket, mac) = (scratch.path(name), VirtioUserSpec::mac(index));
        format!("vhost-user:name={name},socket={},mode=client,mac={mac}", socket.display())
    };
    let ports: Vec<String> = names.into_iter().enumerate().map(port).collect();
    let spec = VirtioUserSpec {
        sockets: names.map(|name| scratch.path(name)).to_vec(),
        topology: Topology::Loop,
        server: true,
        packed,
        mrg_rxbuf: !in_order,
        in_order,
        vectorized: in_order,
        queues: 1,
        largest_frame: USUAL_FRAME,
        small_pages: false,
    };
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let mut user = VirtioUser::start(env, &spec, scratch.folder())?;
    user.wait_up()?;
    switch.wait_ports_up(&names)?;
    let mut slowest = Duration::ZERO;
    for round in 0..rounds(3) {
        user.circulate(64, 4)?;
        moves_on(&switch, names).with_context(|| format!("before round {round}"))?;
        switch.kill();
        switch = Switch::start(scratch.folder(), &ports)?;
        slowest = slowest.max(recovery(&switch, &names)?);
        let _ = user.stop_forwarding()?;
    }
    println!("slowest recovery: {slowest:?} after the start");
    user.circulate(64, 4)?;
    moves_on(&switch, names)?;
    let _ = user.stop_forwarding()?;
    let _ = switch.check_ledger()?;
    user.quit()?;
    switch.stop()
}

/// What a generator and its receiver saw, as far as the series looks at it.
#[derive(Debug, serde::Deserialize)]
struct Seen {
    tx_frames: u64,
    lost: u64,
    out_of_order: u64,
    duplicated: u64,
    corrupt: u64,
}

/// Frames with sequence numbers and checked contents, while the switch is killed: at most a burst
/// of each queue is lost or comes again with each kill, and none is changed.
fn frames_survive(scratch: &Scratch, rings: &[&str]) -> Result<()> {
    /// The most frames of a burst of the switch, at a transmitq and at a receiveq.
    const BURST: u64 = 64;
    let names = ["p0", "p1"];
    let port =
        |name: &str| format!("vhost-user:name={name},socket={}", scratch.path(name).display());
    let ports = names.map(port);
    let mut arguments: Vec<&str> = ports.iter().flat_map(|spec| ["--port", spec]).collect();
    if rings.contains(&"--inflight") {
        // Then it is not the record that helps.
        arguments.extend(["--state-dir", "off"]);
    }
    let mut switch = Switch::start_with(scratch.folder(), &arguments)?;
    let mut command = tied_command(switch::guest_program()?);
    for name in names {
        let _ = command.arg("--socket").arg(scratch.path(name));
    }
    let _ = command.args(["--generate", "--verify", "--json", "--reconnect"]).args(rings);
    // Fewer on the way than a ring holds, so that no queue overflows.
    let _ = command.args(["--window", "60", "--burst", "16", "--size", "64", "--size-max", "1000"]);
    let mut guest = Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))?;
    switch.wait_ports_up(&names)?;
    let kills = rounds(5);
    let mut slowest = Duration::ZERO;
    for round in 0..kills {
        let start = Instant::now();
        while switch.stats()?.port("p1")?.tx_frames() < 2000 {
            let stuck = || format!("round {round}: {}\n{}", switch.counters(), guest.tail());
            ensure!(start.elapsed() < PATIENCE, "{}", stuck());
            thread::sleep(Duration::from_millis(3));
        }
        switch.kill();
        switch = Switch::start_with(scratch.folder(), &arguments)?;
        slowest = slowest.max(recovery(&switch, &names)?);
    }
    thread::sleep(Duration::from_millis(200));
    // With --verify it fails where frames are lost or doubled, which is judged here.
    let _ = guest.stop()?;
    let said = guest.output_from(0)?;
    let json = said.lines().find(|line| line.starts_with('{'));
    let seen: Seen = serde_json::from_str(json.with_context(|| format!("no totals: {said}"))?)?;
    println!("{kills} kills: {seen:?}, slowest recovery {slowest:?}");
    let most = BURST.saturating_mul(u64::from(kills));
    ensure!(seen.corrupt == 0, "frames were changed: {seen:?}");
    ensure!(seen.lost <= most && seen.duplicated <= most, "more than a burst a kill: {seen:?}");
    ensure!(seen.out_of_order <= most, "frames overtook others: {seen:?}");
    ensure!(seen.tx_frames > u64::from(kills).saturating_mul(2000), "little traffic: {seen:?}");
    switch.stop()
}

/// A guest reboots, its driver is reloaded, its QEMU is killed: each time the switch has let go of
/// everything, and the port serves the next one.
fn front_ends_come_and_go(env: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [port(1, scratch), port(2, scratch)];
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut stays = guest(env, scratch, 1, false)?;
    stays.wait_up()?;
    switch.wait_ports_up(&["g1"])?;
    let quiet = Held::of(&switch)?;
    let mut memory = Vec::new();
    for round in 0..rounds(1) {
        let packed = !round.is_multiple_of(2);
        let mut comes = guest(env, scratch, 2, packed)?;
        comes.wait_up()?;
        comes.wait_reachable(&stays.address())?;
        let busy = Held::of(&switch)?;
        ensure!(busy.mappings > quiet.mappings, "{busy:?} is not more than {quiet:?}");
        for _ in 0..rounds(2).div_euclid(rounds(1)).max(1) {
            comes.rebind_driver()?;
            comes.wait_reachable(&stays.address())?;
            comes.reboot()?;
            comes.wait_reachable(&stays.address())?;
            busy.wait(&switch).context("a restart of the guest leaves something")?;
        }
        // Killed, not asked.
        drop(comes);
        let start = Instant::now();
        while switch.stats()?.port("g2")?.state != "waiting" {
            ensure!(start.elapsed() < PATIENCE, "the port does not wait: {}", switch.counters());
            thread::sleep(Duration::from_millis(20));
        }
        quiet.wait(&switch).context("something is left behind")?;
        memory.push(own_kib(&switch)?);
    }
    println!("own memory after each guest in KiB: {memory:?}");
    // The first ones find out how much the allocator keeps.
    let (first, last) = (memory.iter().take(4).max(), memory.last());
    let grown = last.zip(first).map_or(0, |(last, first)| last.saturating_sub(*first));
    ensure!(grown < GROWTH_KIB, "memory grew by {grown} KiB: {memory:?}");
    let _ = switch.check_ledger()?;
    stays.power_off()?;
    switch.stop()
}

/// What the switch has of its guests.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// Mappings of guests' memory.
    mappings: usize,
    fds: usize,
    threads: usize,
}

impl Held {
    /// What it has when nobody who asked it something is still there.
    pub(crate) fn of(switch: &Switch) -> Result<Self> {
        loop {
            let before = Self::now(switch)?;
            thread::sleep(Duration::from_millis(100));
            if Self::now(switch)? == before {
                return Ok(before);
            }
        }
    }

    fn now(switch: &Switch) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            Ok(std::fs::read_dir(format!("/proc/{}/{what}", switch.id()))?.count())
        };
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", switch.id()))?;
        let mappings = maps.lines().filter(|line| line.contains("memory-backend-memfd")).count();
        Ok(Self { mappings, fds: count("fd")?, threads: count("task")? })
    }

    /// Waits until it is this again: clients and closers may still be there for a moment.
    pub(crate) fn wait(&self, switch: &Switch) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = Self::now(switch)?;
            if now == *self {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "{now:?} is not {self:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Memory of its own that the switch has, in KiB: without that of guests and files.
fn own_kib(switch: &Switch) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", switch.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("no RssAnon")
}
