//! A QEMU guest with two virtual CPUs and two queue pairs, and a server on each CPU: each server's
//! flows come to the queue of its CPU, so both carry their half; none is reordered, and changing
//! the number of queues under load loses nothing.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::switch::PortStats;
use conformance::{Environment, Guest, GuestSpec, Scratch, Switch};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::switch::guest_port;
use crate::trial;

/// Flows to each of the two servers.
const FLOWS: u64 = 4;
const SECONDS: u32 = 2;
/// The second server listens behind iperf3's own port.
const PORTS: [u16; 2] = [5201, 5202];

pub(crate) fn trials() -> Vec<Trial> {
    let row = |ring: &'static str| {
        trial(format!("multiqueue/two-vcpus-{ring}"), move |environment, scratch| {
            two_queues(environment, scratch, ring)
        })
    };
    vec![row("split"), row("packed")]
}

fn two_queues(environment: &Environment, scratch: &Scratch, ring: &str) -> Result<()> {
    let ports = ["g1", "g2"].map(|name| guest_port(name, scratch));
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut wide = GuestSpec::new(1, scratch.path("g1.sock"));
    wide.queues = 2;
    wide.properties.push(format!("packed={}", if ring == "packed" { "on" } else { "off" }));
    let mut a = Guest::start(environment, &wide, scratch.folder())?;
    let mut b =
        Guest::start(environment, &GuestSpec::new(2, scratch.path("g2.sock")), scratch.folder())?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    let _ = a.run("ethtool -L eth0 combined 2")?;
    b.wait_reachable(&a.address())?;
    for (cpu, port) in PORTS.iter().enumerate() {
        let mask = 1u32.wrapping_shl(u32::try_from(cpu)?);
        let _ = a.run(&format!("taskset {mask} iperf3 -s -D -p {port}"))?;
    }
    thread::sleep(Duration::from_millis(300));
    both_carry(&switch, &mut a, &mut b)?;
    queues_change(&switch, &mut a, &mut b)?;
    let _ = switch.check_ledger()?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

/// Eight flows over two queues.
fn both_carry(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    for tcp in [false, true] {
        let before = frames_of(switch.stats()?.port("g1")?);
        let out_of_order = flows(b, &a.address(), tcp)?;
        ensure!(out_of_order == 0, "{out_of_order} datagrams of eight flows are reordered");
        let share = frames_of(switch.stats()?.port("g1")?).since(before);
        ensure!(share.is_even(), "tcp {tcp}: not both queues carried over 30 %: {share:?}");
    }
    Ok(())
}

/// One queue, two, one: what arrives at the switch arrives at the guest.
fn queues_change(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    let address = a.address();
    let line = format!("iperf3 -u -c {address} -t 6 -P 8 -b 1M -l 1000 >/tmp/u 2>&1 &");
    let _ = b.run(&line)?;
    thread::sleep(Duration::from_millis(500));
    let before = switch.stats()?;
    for queues in [1, 2, 1, 2] {
        let _ = a.run(&format!("ethtool -L eth0 combined {queues}"))?;
        thread::sleep(Duration::from_millis(700));
    }
    let after = switch.stats()?;
    let moved = after.port("g1")?.tx_frames().saturating_sub(before.port("g1")?.tx_frames());
    ensure!(moved > 100, "only {moved} frames went to the guest meanwhile");
    for reason in ["port_down", "ring_disabled"] {
        let lost = |stats: &conformance::switch::Stats| -> Result<u64> {
            let queues = &stats.port("g1")?.queues;
            Ok(queues.iter().filter_map(|queue| queue.drops.get(reason)).sum())
        };
        let lost = lost(&after)?.saturating_sub(lost(&before)?);
        ensure!(lost == 0, "{lost} frames are dropped as {reason}");
    }
    // The client ends by itself.
    thread::sleep(Duration::from_secs(2));
    b.wait_reachable(&address)
}

/// Frames to both queues of the guest.
#[derive(Debug, Clone, Copy)]
struct Both([u64; 2]);

impl Both {
    fn since(self, before: Self) -> Self {
        let [a, b] = self.0;
        let [a0, b0] = before.0;
        Self([a.saturating_sub(a0), b.saturating_sub(b0)])
    }

    /// Whether each has over 30 % of all.
    fn is_even(self) -> bool {
        let all: u64 = self.0.iter().sum();
        self.0.iter().all(|part| part.saturating_mul(10) > all.saturating_mul(3))
    }
}

fn frames_of(port: &PortStats) -> Both {
    let frames = |pair: usize| port.queues.get(pair).map_or(0, |queue| queue.tx_frames);
    Both([frames(0), frames(1)])
}

/// Flows to both servers at once; how many datagrams came out of order (of TCP nobody says).
fn flows(client: &mut Guest, address: &str, tcp: bool) -> Result<u64> {
    let kind = if tcp { "" } else { "-u -b 2M -l 1000" };
    let [first, second] = PORTS
        .map(|port| format!("iperf3 -J -c {address} -p {port} -t {SECONDS} -P {FLOWS} {kind}"));
    let line = format!("{first} >/tmp/first & {second} >/tmp/second; wait; cat /tmp/first");
    let first = client.run_within(&line, Duration::from_secs(60))?;
    let second = client.run("cat /tmp/second")?;
    let mut sum = 0u64;
    for shown in [first, second] {
        let json: Value =
            serde_json::from_str(&shown).with_context(|| format!("iperf3 says: {shown}"))?;
        let streams = json.pointer("/end/streams").and_then(Value::as_array);
        let streams = streams.with_context(|| format!("iperf3 says: {shown}"))?;
        ensure!(streams.len() as u64 == FLOWS, "iperf3 says: {shown}");
        let count = |stream: &Value| stream.pointer("/udp/out_of_order").and_then(Value::as_u64);
        for stream in streams.iter().filter(|_| !tcp) {
            let count = count(stream).with_context(|| format!("iperf3 says: {shown}"))?;
            sum = sum.saturating_add(count);
        }
    }
    Ok(sum)
}
