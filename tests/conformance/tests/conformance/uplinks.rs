//! Guests and containers behind each kind of uplink: ping, TCP, and DHCP from a real server.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::process::output;
use conformance::{Environment, Guest, Netns, Process, Scratch, Switch};
use libtest_mimic::Trial;

use crate::switch::{guest, guest_port};
use crate::trial;

const SERVER: &str = "10.77.0.254";
const CONTAINER: &str = "10.77.0.253";
const KINDS: [&str; 3] = ["tap", "af-xdp", "packet-mmap"];
/// Far below what TCG does, far above what a connection moves whose checksums are wrong.
const LEAST_TCP_BYTES: u64 = 4_000_000;
const RUN_TIMEOUT: Duration = Duration::from_secs(40);

pub(crate) fn trials() -> Vec<Trial> {
    let guests = KINDS.map(|kind| {
        trial(format!("uplinks/guest-through-{kind}"), move |env, scratch| {
            guest_through(env, scratch, kind)
        })
    });
    let containers = KINDS.map(|kind| {
        trial(format!("uplinks/containers-through-{kind}-and-packet-mmap"), move |env, scratch| {
            containers(env, scratch, kind)
        })
    });
    let old = trial("uplinks/packet-mmap-on-linux-6.1".to_owned(), on_an_old_kernel);
    let injected = trial("uplinks/what-is-injected-arrives".to_owned(), injected);
    guests.into_iter().chain(containers).chain([old, injected]).collect()
}

/// An uplink `u0` of `kind` in `place`, beyond which `peer` has an address.
fn uplink(kind: &str, place: &Netns, peer: &Netns, address: &str) -> Result<String> {
    if kind != "tap" {
        peer.connect(address, place, "u0")?;
        return Ok(format!("{kind}:name=u0,ifname=u0,netns={}", place.name()));
    }
    let _ = peer.ip(&["tuntap", "add", "eth0", "mode", "tap"])?;
    peer.configure("eth0", address)?;
    Ok(format!("tap:name=u0,ifname=eth0,netns={}", peer.name()))
}

fn guest_through(environment: &Environment, scratch: &Scratch, kind: &str) -> Result<()> {
    let (place, peer) = (Netns::new()?, Netns::new()?);
    let port = uplink(kind, &place, &peer, &format!("{SERVER}/24"))?;
    let switch = Switch::start(scratch.folder(), &[guest_port("g1", scratch), port])?;
    let _dhcp = dhcp_server(environment, scratch, &peer)?;
    let _iperf = iperf_server(environment, scratch, &peer)?;
    let mut guest = guest(environment, scratch, 1)?;
    guest.wait_up()?;
    switch.wait_ports_up(&["g1", "u0"])?;
    lease(&mut guest)?;
    guest.wait_reachable(SERVER)?;
    let lost = guest.ping(SERVER, 50, 50)?;
    ensure!(lost == 0, "{lost} of 50 pings through {kind} are lost");
    let _ = guest.run(&format!("ping -c 3 -s 1472 {SERVER}"))?;
    for way in ["", "-R"] {
        let line = format!("iperf3 -J -c {SERVER} -t 3 {way}");
        let bytes = received(&guest.run_within(&line, RUN_TIMEOUT)?)?;
        ensure!(bytes > LEAST_TCP_BYTES, "iperf3 {way} moved only {bytes} bytes in 3 s");
    }
    let _ = switch.check_ledger()?;
    guest.power_off()?;
    switch.stop()
}

/// `causeway-guest --inject`, which `bench uplinks` measures with: what it sends into the far side
/// of an uplink, and is not dropped on the way, comes to its own port.
fn injected(_environment: &Environment, scratch: &Scratch) -> Result<()> {
    let (place, peer) = (Netns::new()?, Netns::new()?);
    let port = uplink("packet-mmap", &place, &peer, &format!("{SERVER}/24"))?;
    let switch = Switch::start(scratch.folder(), &[guest_port("g1", scratch), port])?;
    let mut command = Command::new(conformance::switch::guest_program()?);
    let _ = command.args(["--receive", "--inject", "eth0", "--size", "600", "--seconds", "1"]);
    let _ = command.args(["--json", "--busy", "--socket"]).arg(scratch.path("g1.sock"));
    let shown = output(&mut peer.command(&command)?, RUN_TIMEOUT)?;
    let said: serde_json::Value =
        serde_json::from_str(&shown).with_context(|| format!("causeway-guest says: {shown}"))?;
    let number = |name: &str| said.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let (sent, came) = (number("tx_frames"), number("rx_frames"));
    ensure!(came > 100 && came <= sent.saturating_add(100), "{came} of {sent} frames came");
    // The kernel of the far side may say something of its own.
    ensure!(number("rx_bytes") > came.saturating_mul(590), "{shown}");
    let _ = switch.check_ledger()?;
    switch.stop()
}

/// The switch itself runs in a guest, whose kernel is the 6.1 of Debian 12: between the guest's way
/// out and another interface, through which the guest's own stack talks to the world.
fn on_an_old_kernel(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let image = environment.image_with(&[conformance::switch::program()?], scratch.folder())?;
    let device = |id: &str| format!("virtio-net-pci,netdev={id},romfile=");
    let [out, one, other] = ["out", "one", "other"].map(device);
    let arguments = [
        ["-netdev", "user,id=out", "-device", &out],
        ["-netdev", "hubport,id=one,hubid=1", "-device", &one],
        ["-netdev", "hubport,id=other,hubid=1", "-device", &other],
    ];
    let mut guest = Guest::start_apart(environment, image, &arguments.concat(), scratch.folder())?;
    guest.wait_shell()?;
    let release = guest.run("uname -r")?;
    ensure!(release.starts_with("6.1."), "the guest's kernel is {release}");
    // The interfaces are down before: two sockets of one have to be in a group all the same.
    let ports = "--port packet-mmap:name=u,ifname=eth0,queues=2 \
                 --port packet-mmap:name=v,ifname=eth1";
    let more = "--control /tmp/c.sock --state-dir off --sandbox off";
    let _ = guest.run(&format!("causeway run {more} {ports} >/tmp/log 2>&1 &"))?;
    let listens = "for i in $(seq 100); do grep -q listening /tmp/log && break; sleep 0.1; done";
    let _ = guest.run(&format!("{listens}; grep listening /tmp/log || cat /tmp/log"))?;
    let _ = guest.run("ip addr add 10.0.2.15/24 dev eth2 && ip link set eth2 up")?;
    guest.wait_reachable("10.0.2.2")?;
    let lost = guest.ping("10.0.2.2", 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings are lost");
    let _ = guest.run("ping -c 2 -s 1472 10.0.2.2")?;
    let stats = guest.run("causeway ctl --control /tmp/c.sock --json stats")?;
    let refused: Vec<_> = stats.split("\"bad_offload\":").skip(1).collect();
    // Of every queue.
    let none = refused.len() >= 3 && refused.iter().all(|count| count.starts_with('0'));
    ensure!(none, "{stats}");
    guest.power_off()
}

/// Two namespaces reach each other through a switch that has an end of a veth pair of each.
fn containers(environment: &Environment, scratch: &Scratch, kind: &str) -> Result<()> {
    let (place, left, right) = (Netns::new()?, Netns::new()?, Netns::new()?);
    let one = uplink(kind, &place, &left, &format!("{SERVER}/24"))?;
    right.connect(&format!("{CONTAINER}/24"), &place, "u1")?;
    let two = format!("packet-mmap:name=u1,ifname=u1,netns={}", place.name());
    let switch = Switch::start(scratch.folder(), &[one, two])?;
    switch.wait_ports_up(&["u0", "u1"])?;
    let _iperf = iperf_server(environment, scratch, &left)?;
    for way in ["", "-R"] {
        let mut client = environment.server_program("iperf3")?;
        let _ = client.args(["-J", "-c", SERVER, "-t", "3"]);
        let _ = (!way.is_empty()).then(|| client.arg(way).get_args().len());
        let bytes = received(&output(&mut right.command(&client)?, RUN_TIMEOUT)?)?;
        ensure!(bytes > LEAST_TCP_BYTES, "iperf3 {way} moved only {bytes} bytes in 3 s");
    }
    let _ = switch.check_ledger()?;
    switch.stop()
}

fn received(shown: &str) -> Result<u64> {
    let json: serde_json::Value =
        serde_json::from_str(shown).with_context(|| format!("iperf3 says: {shown}"))?;
    let bytes = json.pointer("/end/sum_received/bytes").and_then(serde_json::Value::as_u64);
    bytes.with_context(|| format!("iperf3 says: {shown}"))
}

fn iperf_server(environment: &Environment, scratch: &Scratch, place: &Netns) -> Result<Process> {
    let mut command: Command = environment.server_program("iperf3")?;
    let _ = command.args(["-s", "--forceflush"]);
    let mut server = place.spawn("iperf3", &command, scratch.folder())?;
    let listens = |text: &str| text.contains("listening").then_some(());
    server.wait_for("that it listens", 0, Duration::from_secs(5), listens)?;
    Ok(server)
}

fn dhcp_server(environment: &Environment, scratch: &Scratch, place: &Netns) -> Result<Process> {
    let mut command = environment.server_program("dnsmasq")?;
    let leases = format!("--dhcp-leasefile={}", scratch.path("leases").display());
    let _ = command.args(["--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null"]);
    let _ = command.args(["--port=0", "--no-ping", "--user=root", "--interface=eth0", &leases]);
    let _ = command.arg("--dhcp-range=10.77.0.100,10.77.0.120,255.255.255.0,1h").arg("--no-hosts");
    let mut server = place.spawn("dnsmasq", &command, scratch.folder())?;
    let starts = |text: &str| text.contains("DHCP, IP range").then_some(());
    server.wait_for("its DHCP range", 0, Duration::from_secs(5), starts)?;
    Ok(server)
}

/// The guest gives its own address up and takes one of the server.
fn lease(guest: &mut Guest) -> Result<()> {
    let script = "[ $1 != bound ] || ip addr add $ip/24 dev eth0";
    let _ = guest.run("ip addr flush dev eth0")?;
    let _ = guest.run(&format!("echo '#!/bin/sh' >/tmp/s; echo '{script}' >>/tmp/s"))?;
    let shown = guest.run("chmod +x /tmp/s; udhcpc -i eth0 -f -q -n -t 10 -T 1 -s /tmp/s")?;
    let address = guest.run("ip -4 addr show eth0")?;
    ensure!(address.contains("10.77.0.1"), "no lease: {shown}\n{address}");
    Ok(())
}
