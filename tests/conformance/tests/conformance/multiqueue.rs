//! A QEMU guest with two virtual CPUs and two queue pairs, and a server on each CPU: each server's
//! flows come to the queue of its CPU, so both carry their half; none is reordered, and changing
//! the number of queues under load loses nothing.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::switch::{PortStats, Stats};
use conformance::{Environment, Guest, GuestSpec, Scratch, Switch};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::switch::guest_port;
use crate::trial;

/// Flows to each of the two servers.
const FLOWS: u64 = 4;
const SECONDS: u32 = 2;
/// One of so many frames of TCP may be overtaken: a hundredth was on a machine that was overloaded,
/// a sixth when each frame took the next queue.
const OVERTAKEN_PART: u64 = 20;
/// The guest's queues while datagrams come for so long.
const CHANGES: [u32; 4] = [1, 2, 1, 2];
const CHANGING_SECONDS: u32 = 6;
/// Datagrams of one flow that one change may let overtake others: those of 32 ms, on their way.
const OVERTAKEN_MOST: u64 = 4;
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
        let _ = a.run(&format!("taskset {mask} iperf3 -s -D -J -p {port}"))?;
        a.wait_listening(*port)?;
    }
    both_carry(&switch, &mut a, &mut b)?;
    queues_change(&switch, &mut a, &mut b)?;
    // And nothing is left of the changes.
    both_carry(&switch, &mut a, &mut b)?;
    let _ = switch.check_ledger()?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

/// Eight flows over two queues.
fn both_carry(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    let address = a.address();
    for tcp in [false, true] {
        let (before, overtaken) = (switch.stats()?, reordered(b)?);
        let kind = if tcp { "".to_owned() } else { datagrams(2) };
        flows(b, &address, &format!("-t {SECONDS} {kind}"))?.check(tcp, 0)?;
        let overtaken = reordered(b)?.saturating_sub(overtaken);
        let after = switch.stats()?;
        let share = frames_of(after.port("g1")?).since(frames_of(before.port("g1")?));
        ensure!(share.is_even(), "tcp {tcp}: not both queues carried over 30 %: {share:?}");
        // Of datagrams none is overtaken. A TCP flow moves once or twice, to the pair on which it
        // is answered, and who sends again too early counts that, too.
        let all: u64 = share.0.iter().sum();
        let most = if tcp { all / OVERTAKEN_PART } else { 0 };
        ensure!(overtaken <= most, "tcp {tcp}: {overtaken} of {all} frames are overtaken");
    }
    Ok(())
}

/// One queue, two, one: what arrives at the switch arrives at the guest, and only what is on its
/// way while the number changes may be overtaken.
fn queues_change(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    let (before, full) = (switch.stats()?, socket_drops(a)?);
    let line = client(&a.address(), &format!("-t {CHANGING_SECONDS} {}", datagrams(1)));
    let _ = b.run(&format!("({line}) & echo $! >/tmp/clients"))?;
    thread::sleep(Duration::from_millis(500));
    for queues in CHANGES {
        let _ = a.run(&format!("ethtool -L eth0 combined {queues}"))?;
        thread::sleep(Duration::from_millis(700));
    }
    let _ = b.run("wait $(cat /tmp/clients)")?;
    let said = said(b)?;
    let changes = said.flows.saturating_mul(CHANGES.len() as u64);
    said.check(false, OVERTAKEN_MOST.saturating_mul(changes))?;
    let after = switch.stats()?;
    let moved = after.port("g1")?.tx_frames().saturating_sub(before.port("g1")?.tx_frames());
    ensure!(moved >= said.datagrams, "{moved} frames went to the guest, of {said:?}");
    for reason in ["port_down", "ring_disabled"] {
        let lost = drops(&after, Some(reason))?.saturating_sub(drops(&before, Some(reason))?);
        ensure!(lost == 0, "{lost} frames are dropped as {reason}");
    }
    let dropped = drops(&after, None)?.saturating_sub(drops(&before, None)?);
    let full = socket_drops(a)?.saturating_sub(full);
    let known = dropped.saturating_add(full);
    ensure!(said.lost <= known, "{said:?}, but {dropped} frames dropped, {full} by sockets");
    b.wait_reachable(&a.address())
}

/// What was dropped on the way to the guest, for a reason or for any.
fn drops(stats: &Stats, reason: Option<&str>) -> Result<u64> {
    let drops = stats.port("g1")?.queues.iter().flat_map(|queue| &queue.drops);
    let asked = drops.filter(|(name, _)| reason.is_none_or(|reason| *name == reason));
    Ok(asked.map(|(_, count)| count).sum())
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

/// How often the guest's TCP found out that segments of its own were not lost, but overtaken.
fn reordered(sender: &mut Guest) -> Result<u64> {
    let names = ["TCPSACKReorder", "TCPRenoReorder", "TCPTSReorder"];
    counted(sender, "netstat", ("TcpExt:", &names))
}

/// Datagrams for which a socket of the guest had no room.
fn socket_drops(guest: &mut Guest) -> Result<u64> {
    counted(guest, "snmp", ("Udp:", &["RcvbufErrors"]))
}

/// The sum of these counters of a protocol in a file of `/proc/net`.
fn counted(guest: &mut Guest, file: &str, (protocol, wanted): (&str, &[&str])) -> Result<u64> {
    let text = guest.run(&format!("grep ^{protocol} /proc/net/{file}"))?;
    let mut lines = text.lines().map(str::split_whitespace);
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let fields: Vec<_> = names.zip(values).filter(|(name, _)| wanted.contains(name)).collect();
    ensure!(fields.len() == wanted.len(), "no {wanted:?} in {text}");
    fields.iter().map(|(_, value)| Ok(value.parse::<u64>()?)).sum()
}

/// What the servers have seen of the datagrams of all flows.
#[derive(Debug, Default)]
struct Said {
    flows: u64,
    datagrams: u64,
    lost: u64,
    overtaken: u64,
}

impl Said {
    /// Whether all flows are there, and at most so many datagrams were overtaken.
    fn check(&self, tcp: bool, most: u64) -> Result<()> {
        let all = FLOWS.saturating_mul(PORTS.len() as u64);
        ensure!(self.flows == all, "{self:?} of {all} flows");
        ensure!(tcp || self.datagrams > 100, "{self:?}: too few");
        ensure!(self.overtaken <= most, "{self:?}: more than {most} datagrams are overtaken");
        Ok(())
    }
}

/// So many Mbit/s of datagrams in each flow.
fn datagrams(mbits: u32) -> String {
    format!("-u -b {mbits}M -l 1000")
}

/// A line of shell: flows to both servers at once.
fn client(address: &str, kind: &str) -> String {
    // Only the server knows what came out of order.
    let to = |port| format!("iperf3 -J -i 0 --get-server-output -c {address} -p {port} {kind}");
    let [first, second] = PORTS.map(|port| format!("{} -P {FLOWS} >/tmp/{port}", to(port)));
    format!("{first} & {second}; wait")
}

fn flows(from: &mut Guest, address: &str, kind: &str) -> Result<Said> {
    let _ = from.run_within(&client(address, kind), Duration::from_secs(60))?;
    said(from)
}

/// What the servers told the clients that ran last.
fn said(client: &mut Guest) -> Result<Said> {
    let mut said = Said::default();
    for port in PORTS {
        let shown = client.run(&format!("cat /tmp/{port}"))?;
        let json: Value =
            serde_json::from_str(&shown).with_context(|| format!("iperf3 says: {shown}"))?;
        let streams = json.pointer("/server_output_json/end/streams").and_then(Value::as_array);
        for stream in streams.with_context(|| format!("iperf3 says: {shown}"))? {
            said.flows = said.flows.saturating_add(1);
            let Some(udp) = stream.get("udp") else { continue };
            let of = |name| {
                let count = udp.get(name).and_then(Value::as_u64);
                count.with_context(|| format!("no {name}: {shown}"))
            };
            said.datagrams = said.datagrams.saturating_add(of("packets")?);
            said.lost = said.lost.saturating_add(of("lost_packets")?);
            said.overtaken = said.overtaken.saturating_add(of("out_of_order")?);
        }
    }
    Ok(said)
}
