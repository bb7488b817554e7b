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
use conformance::virtio_user::USUAL_FRAME;
use conformance::{
    Environment, Guest, GuestSpec, Scratch, Switch, Topology, VirtioUser, VirtioUserSpec,
};
use libtest_mimic::Trial;

use crate::{full, trial};

/// How often QEMU looks for a back end.
const RECONNECT_MS: u32 = 100;
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
    let _ = packed.run("iperf3 -s -D >/dev/null")?;
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
