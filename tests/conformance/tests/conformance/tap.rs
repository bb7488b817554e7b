//! A guest reaches the host through a tap port, and a switch's ports come and go meanwhile.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use conformance::process::output;
use conformance::{Environment, Guest, GuestSpec, HostTap, Scratch, Switch};
use libtest_mimic::Trial;

use crate::trial;

const HOST: &str = "10.77.0.254";
const TCP_BYTES: usize = 8_000_000;

pub(crate) fn trials() -> Vec<Trial> {
    let row = |name: &str, body: fn(&Environment, &Scratch) -> Result<()>| {
        trial(format!("switch/{name}"), body)
    };
    vec![
        row("guest-reaches-host-through-tap", guest_to_host),
        row("ports-come-and-go-without-loss", ports_come_and_go),
        row("quiet-guests-cost-no-cpu", quiet_guests),
    ]
}

fn guest_port(name: &str, scratch: &Scratch) -> String {
    let socket = scratch.path(&format!("{name}.sock"));
    format!("vhost-user:name={name},socket={}", socket.display())
}

fn guest(environment: &Environment, scratch: &Scratch, number: u8) -> Result<Guest> {
    let socket = scratch.path(&format!("g{number}.sock"));
    Guest::start(environment, &GuestSpec::new(number, socket), scratch.folder())
}

fn guest_to_host(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let tap = HostTap::named("h");
    let switch = Switch::start(scratch.folder(), &[guest_port("g1", scratch), tap.spec()])?;
    tap.configure(&format!("{HOST}/24"), 1500)?;
    let mut guest = guest(environment, scratch, 1)?;
    guest.wait_up()?;
    switch.wait_ports_up(&["g1", "h0"])?;
    guest.wait_reachable(HOST)?;
    let lost = guest.ping(HOST, 50, 50)?;
    ensure!(lost == 0, "{lost} of 50 pings to the host are lost");
    let _ = guest.run(&format!("ping -c 3 -s 1472 {HOST}"))?;
    let listener = TcpListener::bind((HOST, 0))?;
    let port = listener.local_addr()?.port();
    let receiver = thread::spawn(move || -> Result<usize> {
        let (mut stream, _) = listener.accept()?;
        count(&mut stream)
    });
    let _ = guest.run(&format!("head -c {TCP_BYTES} /dev/zero | nc {HOST} {port}"))?;
    let received = receiver.join().ok().context("the receiver panicked")??;
    ensure!(received == TCP_BYTES, "{received} of {TCP_BYTES} bytes came to the host");
    let _ = switch.check_ledger()?;
    guest.power_off()?;
    switch.stop()
}

fn count(stream: &mut TcpStream) -> Result<usize> {
    let mut bytes: Vec<u8> = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream.read_to_end(&mut bytes)?)
}

/// Ports are added and removed under the feet of two guests that lose nothing.
fn ports_come_and_go(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let ports = [guest_port("g1", scratch), guest_port("g2", scratch)];
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut a = guest(environment, scratch, 1)?;
    let mut b = guest(environment, scratch, 2)?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    a.wait_reachable(&b.address())?;
    let to = b.address();
    let _ = a.run(&format!("ping -c 100 -i 0.05 -W 2 {to} >/tmp/pings &"))?;
    let start = Instant::now();
    let mut rounds = 0_u32;
    while start.elapsed() < Duration::from_secs(4) {
        let tap = HostTap::named("x");
        let _ = switch.ctl(&["port", "add", &tap.spec()])?;
        let _ = switch.ctl(&["port", "add", &guest_port("g3", scratch)])?;
        let _ = switch.ctl(&["port", "del", "h0"])?;
        let _ = switch.ctl(&["port", "del", "g3"])?;
        rounds = rounds.saturating_add(1);
    }
    ensure!(rounds > 3, "only {rounds} rounds of adding and removing ports in 4 s");
    let shown = a.run("wait; cat /tmp/pings")?;
    ensure!(shown.contains("100 packets received"), "pings are lost: {shown}");
    let _ = switch.check_ledger()?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
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
