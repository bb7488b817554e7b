//! What the switch does between ports of several kinds: taps, VLANs, ports that come and go.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
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
        row("guests-meet-through-access-and-trunk-vlans", vlans),
        row("a-guest-uses-no-address-but-its-own", antispoof),
    ]
}

pub(crate) fn guest_port(name: &str, scratch: &Scratch) -> String {
    let socket = scratch.path(&format!("{name}.sock"));
    format!("vhost-user:name={name},socket={}", socket.display())
}

pub(crate) fn guest(environment: &Environment, scratch: &Scratch, number: u8) -> Result<Guest> {
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
    // What it started with needs no right; the tap that comes later does.
    let specs = ports.iter().flat_map(|spec| ["--port", spec]);
    let arguments: Vec<&str> = specs.chain(["--allow-kind", "tap"]).collect();
    let switch = Switch::start_with(scratch.folder(), &arguments)?;
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

/// An access port of VLAN 10 meets a trunk on which the guest itself tags; another VLAN does not.
fn vlans(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let access = format!("{},vlan=10", guest_port("g1", scratch));
    let trunk = format!("{},trunk=10+20", guest_port("g2", scratch));
    let switch = Switch::start(scratch.folder(), &[access, trunk])?;
    let mut a = guest(environment, scratch, 1)?;
    let mut b = guest(environment, scratch, 2)?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    let _ = b.run("ip addr flush dev eth0")?;
    for vlan in [10, 20] {
        let link = format!("ip link add link eth0 name eth0.{vlan} type vlan id {vlan}");
        let _ = b.run(&format!("{link} && ip link set eth0.{vlan} up"))?;
    }
    let address = b.address();
    let _ = b.run(&format!("ip addr add {address}/24 dev eth0.10"))?;
    a.wait_reachable(&address)?;
    let lost = a.ping(&address, 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings within VLAN 10 are lost");
    let moved = format!("ip addr flush dev eth0.10 && ip addr add {address}/24 dev eth0.20");
    let _ = b.run(&moved)?;
    let lost = a.ping(&address, 2, 200)?;
    ensure!(lost == 2, "a ping went from VLAN 10 to VLAN 20");
    let stats = switch.check_ledger()?;
    let drops = |reason: &str| -> Result<u64> {
        let queues = &stats.port("g2")?.queues;
        Ok(queues.iter().filter_map(|queue| queue.drops.get(reason)).sum())
    };
    // The trunk has no native VLAN, and the guest's bare eth0 spoke of itself before.
    ensure!(drops("vlan_untagged")? > 0, "no untagged frame was dropped: {stats:#?}");
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

/// A guest whose port knows its addresses (`antispoof=on,ip=`) can use no others, an IPv4 address
/// or a MAC, in ARP or in the frames themselves. Its own go on.
fn antispoof(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let own = "mac=52:54:00:00:00:01,antispoof=on,ip=10.77.0.1+fd00:77::1";
    let guarded = format!("{},{own}", guest_port("g1", scratch));
    let switch = Switch::start(scratch.folder(), &[guarded, guest_port("g2", scratch)])?;
    let mut a = guest(environment, scratch, 1)?;
    let mut b = guest(environment, scratch, 2)?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    let to = b.address();
    a.wait_reachable(&to)?;
    let spoofed = || -> Result<u64> {
        let stats = switch.stats()?;
        let queues = &stats.port("g1")?.queues;
        Ok(queues.iter().filter_map(|queue| queue.drops.get("spoofed")).sum())
    };
    let lost = a.ping(&to, 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings with its own address are lost");
    // Whoever it says it is in what it does: nothing of that arrives.
    let lies = [
        (
            "another IPv4 address",
            "ip addr add 10.77.0.99/24 dev eth0 && \
          ping -c 3 -W 1 -I 10.77.0.99 10.77.0.2; ip addr del 10.77.0.99/24 dev eth0",
        ),
        (
            "another MAC",
            "ip link set eth0 down && ip link set eth0 address 52:54:00:00:00:63 && \
          ip link set eth0 up && ip neigh flush dev eth0; ping -c 3 -W 1 10.77.0.2; \
          ip link set eth0 down && ip link set eth0 address 52:54:00:00:00:01 && \
          ip link set eth0 up",
        ),
    ];
    for (lie, commands) in lies {
        let before = spoofed()?;
        let shown = a.run(&format!("{{ {commands}; }} 2>&1 || true"))?;
        ensure!(shown.contains("0 packets received"), "{lie} is taken: {shown}");
        let dropped = spoofed()?.saturating_sub(before);
        ensure!(dropped > 0, "{lie}: nothing was dropped as spoofed: {shown}");
    }
    a.wait_reachable(&to)?;
    let lost = a.ping(&to, 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings with its own addresses again are lost");
    let learned = switch.ctl(&["fdb"])?;
    ensure!(!learned.contains("52:54:00:00:00:63"), "a lie was learned: {learned}");
    let _ = switch.check_ledger()?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}
