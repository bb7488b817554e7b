//! Another process takes the switch over under traffic of real guests and through every uplink.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::process::tied_command;
use conformance::{Environment, Guest, GuestSpec, Looped, Process, Scratch, Switch};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::restart::Held;
use crate::switch::guest_port;
use crate::{full, trial};

/// What is between the switch and the world.
const KINDS: [&str; 3] = ["tap", "af-xdp", "packet-mmap"];
const PAUSE: Duration = Duration::from_millis(300);
const SLACK: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let guests = trial("takeover/qemu-split-and-packed".to_owned(), qemu);
    let uplinks = KINDS.map(|kind| {
        trial(format!("takeover/through-{kind}"), move |env, scratch| through(env, scratch, kind))
    });
    std::iter::once(guests).chain(uplinks).collect()
}

fn rounds() -> u32 {
    if full() { 20 } else { 3 }
}

/// A ping every 10 ms between a guest with split and one with packed rings, and TCP: no ping is
/// lost, and no guest complains.
fn qemu(env: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [guest_port("g1", scratch), guest_port("g2", scratch)];
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let start = |number: u8, packed: &str| {
        let mut spec = GuestSpec::new(number, scratch.path(&format!("g{number}.sock")));
        spec.properties = vec![format!("packed={packed}")];
        Guest::start(env, &spec, scratch.folder())
    };
    let (mut split, mut packed) = (start(1, "off")?, start(2, "on")?);
    split.wait_up()?;
    packed.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    split.wait_reachable(&packed.address())?;
    packed.iperf_server()?;
    let client = format!("iperf3 -c {} -t 600 >/tmp/iperf 2>&1 &", packed.address());
    let _ = split.run(&client)?;
    let _ = split.run(&format!("ping -i 0.01 -W 5 {} >/tmp/ping 2>&1 &", packed.address()))?;
    let mut held: Option<Held> = None;
    for round in 0..rounds() {
        std::thread::sleep(PAUSE);
        let before = switch.stats()?.port("g1")?.rx_frames();
        switch.take_over_with(&ports).with_context(|| format!("round {round}"))?;
        switch.wait_ports_up(&["g1", "g2"])?;
        let moved = |stats: conformance::switch::Stats| -> Result<bool> {
            let port = stats.port("g1")?;
            Ok(port.rx_frames() > before && port.tx_frames() > before / 4)
        };
        let end = std::time::Instant::now();
        while !moved(switch.stats()?)? {
            ensure!(end.elapsed() < SLACK, "nothing moves: {}", switch.counters());
            std::thread::sleep(Duration::from_millis(20));
        }
        // Each process has what the one before had, and nothing that was handed over and not taken.
        match &held {
            Some(held) => held.wait(&switch).with_context(|| format!("round {round}"))?,
            None => held = Some(Held::of(&switch)?),
        }
    }
    let _ = split.run("killall iperf3; killall -INT ping; sleep 1; true")?;
    let shown = split.run("tail -3 /tmp/ping")?;
    let lost = shown.split(',').find(|part| part.contains("packet loss"));
    ensure!(lost.is_some_and(|text| text.trim().starts_with("0%")), "pings are lost: {shown}");
    for guest in [&mut split, &mut packed] {
        let said = guest.run("dmesg | grep -iE 'timed? ?out|virtio.*(err|id )' || true")?;
        ensure!(said.is_empty(), "a guest complains: {said}");
    }
    let _ = packed.run("killall iperf3; true")?;
    let _ = switch.check_ledger()?;
    split.power_off()?;
    packed.power_off()?;
    switch.stop()
}

/// `causeway-guest` sends numbered frames out through an uplink and in through another one, so each
/// frame crosses both: none is lost, repeated or changed.
fn through(_: &Environment, scratch: &Scratch, kind: &str) -> Result<()> {
    let uplinks = Looped::new(kind)?;
    let guest = |name: &str, vlan: u16| format!("{},vlan={vlan}", guest_port(name, scratch));
    // Out by u0 of one VLAN, back by u1 of another: there is no other way.
    let [u0, u1] = uplinks.ports();
    let ports = [guest("g1", 10), guest("g2", 20), u0, u1];
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let program = conformance::switch::guest_program()?;
    let spawn = |name: &str, arguments: &[&str]| {
        let mut command = tied_command(&program);
        let _ = command.arg("--json").arg("--socket").arg(scratch.path(&format!("{name}.sock")));
        Process::spawn(name, command.args(arguments), &scratch.path(&format!("{name}.log")))
    };
    let mut receiver = spawn("g2", &["--receive", "--verify"])?;
    switch.wait_ports_up(&["g2", "u0", "u1"])?;
    let mut sender = spawn("g1", &["--generate", "--rate-pps", "2000", "--packed"])?;
    switch.wait_ports_up(&["g1"])?;
    for round in 0..rounds() {
        std::thread::sleep(PAUSE);
        switch.take_over_with(&ports).with_context(|| format!("round {round}"))?;
    }
    std::thread::sleep(PAUSE);
    let status = sender.stop()?;
    ensure!(status.success(), "the sender: {}", sender.tail());
    std::thread::sleep(PAUSE);
    let _ = receiver.stop()?;
    let (sent, got) = (said(&sender)?, said(&receiver)?);
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(u64::MAX);
    let wrong = ["lost", "duplicated", "corrupt", "out_of_order"].map(|key| number(&got, key));
    ensure!(wrong == [0; 4], "through {kind}: {got}; {}", switch.counters());
    let (sent, got) = (number(&sent, "tx_frames"), number(&got, "rx_frames"));
    ensure!(got == sent && sent > 100, "{got} of {sent} frames came; {}", switch.counters());
    let _ = switch.check_ledger()?;
    switch.stop()
}

/// What a guest printed at its end.
fn said(process: &Process) -> Result<Value> {
    let text = process.output_from(0)?;
    let line = text.lines().find(|line| line.starts_with('{')).context("no totals")?;
    serde_json::from_str(line).with_context(|| format!("{line} is no JSON"))
}
