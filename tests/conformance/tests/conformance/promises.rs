//! What the README promises in numbers: idle CPU, start-up time, memory, TCP between guests, exit
//! codes.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use conformance::process::{output, tied_command};
use conformance::switch::PortStats;
use conformance::{Environment, Process, Scratch, Switch, switch};
use libtest_mimic::Trial;

use crate::switch::{guest, guest_port};
use crate::trial;

/// From the start of the program to sockets that accept.
const START_LIMIT: Duration = Duration::from_millis(100);
/// Besides the guest's own memory.
const KIB_PER_PORT: u64 = 2048;
const IDLE_PORTS: u64 = 64;
const CONNECTED_PORTS: u64 = 16;
/// One TCP stream between two guests under TCG, on an otherwise idle machine.
const TCP_MBIT: u64 = 250;
const TCP_RUNS: u32 = 3;
const TCP_SECONDS: u32 = 2;

pub(crate) fn trials() -> Vec<Trial> {
    let row = |name: &str, body: fn(&Environment, &Scratch) -> Result<()>| {
        trial(format!("promises/{name}"), body)
    };
    vec![
        row("quiet-guests-cost-no-cpu", quiet_guests),
        row("listens-within-100-ms", listens_soon),
        row("an-idle-port-costs-less-than-2-mib", idle_port_memory),
        row("a-connected-port-costs-less-than-2-mib", connected_port_memory),
        row("tcp-between-guests-is-above-250-mbit", tcp_between_guests),
        row("wrong-use-is-one-line-and-status-2", wrong_use),
    ]
}

/// Not the slowest of several starts counts: the machine may be busy with others.
fn listens_soon(_: &Environment, scratch: &Scratch) -> Result<()> {
    let socket = scratch.path("g1.sock");
    let mut best = Duration::MAX;
    for round in 0..5 {
        let control = scratch.path(&format!("control{round}"));
        let mut command = tied_command(switch::program()?);
        let _ = command.args(["run", "--port", &guest_port("g1", scratch), "--control"]);
        let start = Instant::now();
        let log = scratch.path("log");
        let mut process = Process::spawn("causeway", command.arg(control), &log)?;
        while UnixStream::connect(&socket).is_err() {
            ensure!(start.elapsed() < Duration::from_secs(5), "no socket\n{}", process.tail());
            thread::sleep(Duration::from_millis(1));
        }
        best = best.min(start.elapsed());
        ensure!(process.stop()?.success(), "causeway failed\n{}", process.tail());
    }
    ensure!(best < START_LIMIT, "the best of five starts took {best:?}");
    Ok(())
}

fn idle_port_memory(_: &Environment, scratch: &Scratch) -> Result<()> {
    let resident = |ports: u64| -> Result<u64> {
        let specs: Vec<String> =
            (0..ports).map(|port| guest_port(&format!("p{port}"), scratch)).collect();
        let switch = Switch::start(scratch.folder(), &specs)?;
        let kib = resident_kib(switch.id())?;
        switch.stop()?;
        Ok(kib)
    };
    let (few, many) = (resident(1)?, resident(IDLE_PORTS.saturating_add(1))?);
    let each = many.saturating_sub(few).div_euclid(IDLE_PORTS);
    ensure!(each < KIB_PER_PORT, "an idle port costs {each} KiB ({few} KiB with one port)");
    Ok(())
}

/// What a port costs that has moved frames of all sizes and is still served.
fn connected_port_memory(_: &Environment, scratch: &Scratch) -> Result<()> {
    let one = connected_kib(scratch, 1)?;
    let many = connected_kib(scratch, CONNECTED_PORTS.saturating_add(1))?;
    let each = many.saturating_sub(one).div_euclid(CONNECTED_PORTS);
    ensure!(each < KIB_PER_PORT, "a connected port costs {each} KiB ({one} KiB with one port)");
    Ok(())
}

/// The switch's memory without its guests', while the first of `ports` ports floods frames of all
/// sizes to the others.
fn connected_kib(scratch: &Scratch, ports: u64) -> Result<u64> {
    let names: Vec<String> = (0..ports).map(|port| format!("p{port}")).collect();
    let specs: Vec<String> = names.iter().map(|name| guest_port(name, scratch)).collect();
    let switch = Switch::start(scratch.folder(), &specs)?;
    let mut command = tied_command(switch::guest_program()?);
    for name in &names {
        let _ = command.arg("--socket").arg(scratch.path(&format!("{name}.sock")));
    }
    let _ = command.args(["--generate", "--dst", "ff:ff:ff:ff:ff:ff", "--rate-pps", "2000"]);
    let _ = command.args(["--size", "64", "--size-max", "1514"]);
    let mut guest = Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log"))?;
    switch.wait_ports_up(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let start = Instant::now();
    while !switch.stats()?.ports.iter().all(has_moved) {
        let late = start.elapsed() > Duration::from_secs(20);
        ensure!(!late, "no traffic: {}\n{}", switch.counters(), guest.tail());
        thread::sleep(Duration::from_millis(50));
    }
    let kib = private_kib(switch.id())?;
    ensure!(guest.stop()?.success(), "causeway-guest failed\n{}", guest.tail());
    switch.stop()?;
    Ok(kib)
}

/// Whether every buffer of a port's ring of 256 was used more than once.
fn has_moved(port: &PortStats) -> bool {
    port.rx_frames().saturating_add(port.tx_frames()) > 1000
}

fn resident_kib(process: u32) -> Result<u64> {
    status_kib(process, "VmRSS:")
}

/// Resident memory but for what is shared: a guest's memory is a memfd of its front end.
fn private_kib(process: u32) -> Result<u64> {
    let shared = status_kib(process, "RssShmem:")?;
    ensure!(shared > 0, "no guest memory is mapped");
    Ok(resident_kib(process)?.saturating_sub(shared))
}

fn status_kib(process: u32, key: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("odd status: {text}"))
}

/// Not the slowest of several runs counts: the machine may be busy with others.
fn tcp_between_guests(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [guest_port("g1", scratch), guest_port("g2", scratch)];
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut a = guest(environment, scratch, 1)?;
    let mut b = guest(environment, scratch, 2)?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    a.wait_reachable(&b.address())?;
    b.iperf_server()?;
    let mut best = 0;
    for _ in 0..TCP_RUNS {
        let bytes = a.iperf(&b.address(), TCP_SECONDS, 1)?;
        let bits = bytes.saturating_mul(8);
        best = best.max(bits.div_euclid(1_000_000).div_euclid(TCP_SECONDS.into()));
        if best > TCP_MBIT {
            break;
        }
    }
    ensure!(best > TCP_MBIT, "the best of {TCP_RUNS} runs moved {best} Mbit/s");
    let _ = switch.check_ledger()?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

fn wrong_use(_: &Environment, _: &Scratch) -> Result<()> {
    let cases: [(&[&str], &str); 6] = [
        (&["run", "--port", "vhost-usr:name=a,socket=/s"], "vhost-usr"),
        (&["run", "--port", "vhost-user:name=a,sock=/s"], "sock"),
        (&["run", "--port", "vhost-user:name=a"], "socket"),
        (&["run", "--port", "vhost-user:name=a,socket=/s,vlan=4095"], "4095"),
        (&["run", "--poll", "sometimes"], "sometimes"),
        (&["run", "--workers", "zero"], "zero"),
    ];
    for (arguments, named) in cases {
        let done = Command::new(switch::program()?).args(arguments).output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.code() == Some(2), "{arguments:?}: {}\n{said}", done.status);
        let mut lines = said.lines().filter(|line| !line.trim().is_empty());
        let first = lines.next().unwrap_or_default();
        ensure!(first.contains(named), "{arguments:?} is not told about {named}: {said}");
        ensure!(lines.next().is_none(), "{arguments:?} is told more than one line: {said}");
    }
    Ok(())
}

/// Two booted, quiet guests with the default polling cost below 1 % of a CPU.
fn quiet_guests(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [guest_port("g1", scratch), guest_port("g2", scratch)];
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut a = guest(environment, scratch, 1)?;
    let mut b = guest(environment, scratch, 2)?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    a.wait_reachable(&b.address())?;
    thread::sleep(Duration::from_secs(1));
    let seconds = 6_u64;
    let before = cpu_ticks(switch.id())?;
    thread::sleep(Duration::from_secs(seconds));
    let used = cpu_ticks(switch.id())?.saturating_sub(before);
    let ticks_per_second: u64 =
        output(Command::new("getconf").arg("CLK_TCK"), Duration::from_secs(5))?.trim().parse()?;
    let total = ticks_per_second.saturating_mul(seconds);
    // One tick more than 1 %: the counter is that coarse.
    let limit = total.div_euclid(100).saturating_add(1);
    ensure!(used <= limit, "{used} of {total} CPU ticks used while nothing happens");
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

/// User and system time of a process, from fields 14 and 15 of its `stat`.
fn cpu_ticks(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let Some((_, fields)) = text.rsplit_once(") ") else { bail!("odd stat: {text}") };
    let fields: Vec<&str> = fields.split(' ').collect();
    // The field after the name is number 3.
    let at = |number: usize| -> Result<u64> {
        let field = fields.get(number.saturating_sub(3)).context("a short stat")?;
        Ok(field.parse()?)
    };
    Ok(at(14)?.saturating_add(at(15)?))
}
