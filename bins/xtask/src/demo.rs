//! The shortest way to see the switch work: two virtual machines and the host talk through it.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use conformance::environment::host;
use conformance::scratch::target_folder;
use conformance::{Environment, Guest, GuestSpec, HostTap, QemuVersion, Scratch, Switch};

use crate::steps::build;

const HOST: &str = "10.77.0.254";
const PINGS: u32 = 50;
const IPERF_SECONDS: u32 = 3;

pub(crate) fn run(embedded: bool) -> Result<()> {
    ensure!(
        embedded || host::is_root(),
        "the guests reach the host through a tap interface, and only root may make one. \
         Run `cargo xtask demo` as root, or `cargo xtask demo --embedded`, which needs no right"
    );
    build(&["--release", "-p", "causeway"])?;
    if embedded {
        return run_embedded();
    }
    let environment = Environment::open()?;
    let peers = environment.qemu(QemuVersion::V10).and_then(|_| environment.image());
    if let Err(error) = peers {
        println!("QEMU and its guest cannot be had: {error:#}");
        println!("Running the guests inside the process instead (--embedded).");
        return run_embedded();
    }
    let mut scratch = Scratch::new("demo")?;
    let result = run_guests(&environment, &scratch);
    if result.is_err() {
        println!("The logs are in {}", scratch.keep().display());
    }
    result
}

fn run_embedded() -> Result<()> {
    let program = target_folder().join("release/causeway");
    let status = std::process::Command::new(&program)
        .arg("demo")
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(status.success(), "causeway demo ended with {status}");
    Ok(())
}

fn run_guests(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let start = Instant::now();
    let tap = HostTap::named("d");
    let specs =
        [1, 2].map(|number| GuestSpec::new(number, scratch.path(&format!("g{number}.sock"))));
    let mut ports = Vec::from(
        specs
            .clone()
            .map(|spec| format!("vhost-user:name={},socket={}", spec.name, spec.socket.display())),
    );
    ports.push(tap.spec());
    println!("starting: causeway run --port {}", ports.join(" --port "));
    let switch = Switch::start(scratch.folder(), &ports)?;
    tap.configure(&format!("{HOST}/24"), 1500)?;
    println!("booting two QEMU guests (TCG)");
    let mut guests = Vec::new();
    for spec in &specs {
        guests.push(Guest::start(environment, spec, scratch.folder())?);
    }
    let [a, b] = &mut guests[..] else { anyhow::bail!("two guests were started") };
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2", "h0"])?;
    talk(a, b)?;
    println!("\ncauseway ctl stats");
    println!("{}", switch.ctl(&["stats"])?);
    let ledger = switch.check_ledger()?.ledger();
    println!(
        "ledger: {} frames came, {} went, of which {} dropped; {} are held",
        ledger.came, ledger.went, ledger.drops, ledger.held
    );
    for guest in guests {
        guest.power_off()?;
    }
    switch.stop()?;
    println!("done in {} s", start.elapsed().as_secs());
    Ok(())
}

fn talk(a: &mut Guest, b: &mut Guest) -> Result<()> {
    let second = b.address();
    for (name, address) in [("guest 2", second.as_str()), ("the host", HOST)] {
        a.wait_reachable(address)?;
        let lost = a.ping(address, PINGS, 50)?;
        println!("guest 1 -> {name}: {PINGS} pings, {lost} lost");
        ensure!(lost == 0, "pings to {name} are lost");
    }
    b.iperf_server()?;
    let bytes = a.iperf(&second, IPERF_SECONDS, 1)?;
    let megabits = bytes.saturating_mul(8).div_euclid(1_000_000).div_euclid(IPERF_SECONDS.into());
    println!("guest 1 -> guest 2: TCP, {bytes} bytes in {IPERF_SECONDS} s ({megabits} Mbit/s)");
    Ok(())
}
