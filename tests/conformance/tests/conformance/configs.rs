//! Every file of `qemu-configs/` starts a guest that talks through the switch.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use conformance::environment::host;
use conformance::scratch::repository;
use conformance::{Environment, Guest, GuestSpec, Scratch, Switch};
use libtest_mimic::Trial;

use crate::trial;

const RING_PACKED: usize = 34;
/// The folder of the sockets in the files.
const SOCKETS: &str = "/run/causeway";

type Check = fn(&Switch, &mut Guest, &mut Guest) -> Result<()>;

struct Config {
    name: &'static str,
    /// What the port of the switch needs besides name and socket.
    port: &'static str,
    /// What is special about this file.
    check: Check,
}

const CONFIGS: [Config; 6] = [
    Config { name: "single-queue", port: "", check: split },
    Config { name: "multiqueue", port: "", check: four_queues },
    Config { name: "packed", port: "", check: packed },
    Config { name: "server-side", port: ",mode=client", check: split },
    Config { name: "hugepages", port: "", check: split },
    Config { name: "reconnect", port: "", check: split },
];

pub(crate) fn trials() -> Vec<Trial> {
    let row = |config: Config| {
        trial(format!("configs/{}", config.name), move |environment, scratch| {
            run(environment, scratch, &config)
        })
    };
    CONFIGS.into_iter().map(row).collect()
}

fn run(environment: &Environment, scratch: &Scratch, config: &Config) -> Result<()> {
    if config.name == "hugepages" {
        host::hugepages()?;
    }
    let ports = ["g0", "g1"].map(|name| {
        let socket = scratch.path(&format!("{name}.sock"));
        format!("vhost-user:name={name},socket={}{}", socket.display(), config.port)
    });
    let mut switch = Switch::start(scratch.folder(), &ports)?;
    let mut guests = Vec::new();
    for number in [1, 2] {
        let file = adapt(config.name, number, scratch)?;
        let spec = GuestSpec::new(number, PathBuf::new());
        guests.push(Guest::start_config(environment, &file, &spec, scratch.folder())?);
    }
    let [a, b] = &mut guests[..] else { bail!("two guests were started") };
    a.wait_up()?;
    b.wait_up()?;
    talk(&switch, a, b)?;
    (config.check)(&switch, a, b)?;
    let _ = switch.check_ledger()?;
    if config.name == "reconnect" {
        switch.stop()?;
        switch = Switch::start(scratch.folder(), &ports)?;
        talk(&switch, a, b)?;
        let _ = switch.check_ledger()?;
    }
    for guest in guests {
        guest.power_off()?;
    }
    switch.stop()
}

/// The file with this test's folder for the sockets, and for the second guest its own names.
fn adapt(name: &str, number: u8, scratch: &Scratch) -> Result<PathBuf> {
    let source = repository().join("qemu-configs").join(format!("{name}.cfg"));
    let text = fs::read_to_string(&source).with_context(|| format!("no {}", source.display()))?;
    ensure!(text.contains(SOCKETS), "{} has no socket in {SOCKETS}", source.display());
    let socket = format!("g{}.sock", number.saturating_sub(1));
    let text = text
        .replace(SOCKETS, &scratch.folder().display().to_string())
        .replace("g0.sock", &socket)
        .replace("52:54:00:00:00:01", &format!("52:54:00:00:00:{number:02x}"));
    let target = scratch.path(&format!("{name}-{number}.cfg"));
    fs::write(&target, text)?;
    Ok(target)
}

fn talk(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    switch.wait_ports_up(&["g0", "g1"])?;
    a.wait_reachable(&b.address())?;
    let lost = a.ping(&b.address(), 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings are lost");
    Ok(())
}

fn split(_: &Switch, a: &mut Guest, _: &mut Guest) -> Result<()> {
    ensure!(!a.has_feature(RING_PACKED)?, "the guest is on packed rings");
    Ok(())
}

fn packed(_: &Switch, a: &mut Guest, _: &mut Guest) -> Result<()> {
    ensure!(a.has_feature(RING_PACKED)?, "the guest is on split rings");
    Ok(())
}

fn four_queues(switch: &Switch, a: &mut Guest, b: &mut Guest) -> Result<()> {
    b.iperf_server()?;
    ensure!(a.iperf(&b.address(), 2, 8)? > 0, "TCP moved nothing");
    let active = switch.stats()?.port("g0")?.active_queues();
    ensure!(active > 1, "only {active} queue pair carried frames");
    let shown = a.run("ethtool -l eth0")?;
    let combined = shown.lines().filter(|line| line.contains("Combined:") && line.contains('4'));
    ensure!(combined.count() == 2, "the guest does not use 4 queue pairs: {shown}");
    Ok(())
}
