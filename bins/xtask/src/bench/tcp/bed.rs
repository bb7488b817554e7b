//! Two stacks and what lies between them: one run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use conformance::environment::host::{hugepages, install, ip};
use conformance::process::{Process, output, tied_command};
use conformance::{Environment, Guest, GuestSpec, Netns, OvsDpdk, Scratch, Side, Switch, switch};

use crate::bench::regime::round_trip_ns;

const PATIENCE: Duration = Duration::from_secs(20);
const SLACK: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(10);
/// Neighbours find each other, and a peer's switch learns.
const SETTLE: Duration = Duration::from_millis(500);
const ADDRESSES: [&str; 2] = ["10.79.0.1", "10.79.0.2"];

/// What lies between two stacks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// The switch with two uplinks of this kind.
    Uplinks(&'static str),
    /// A bridge of the kernel; between stacks that send frames above the MTU, or none.
    Bridge { large: bool },
    /// The switch between an uplink, whose stack sends, and a `causeway-guest`.
    ToGuest(ToGuest),
    /// OVS' userspace datapath with two veth ends.
    OvsVeth,
    /// The switch between two `causeway-guest`s.
    Guests { packed: bool, options: &'static str, streams: u16 },
    /// OVS-DPDK between the same.
    OvsGuests { packed: bool, tso: bool },
    /// The switch between two virtual machines.
    Qemu { packed: bool },
    /// OVS-DPDK between the same.
    OvsQemu { packed: bool, tso: bool },
    /// The switch between two `causeway-guest`s, one of which sends datagrams that are left to be
    /// cut.
    Datagrams { uso: bool },
}

/// An uplink and a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToGuest {
    pub(super) kind: &'static str,
    /// What the SPECs of both end with.
    pub(super) uplink: &'static str,
    pub(super) guest: &'static str,
    /// The sender's stack sends frames above the MTU, if the uplink lets it.
    pub(super) large: bool,
    pub(super) streams: u16,
}

/// What a run has shown.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) before_ns: f64,
    pub(super) after_ns: f64,
    pub(super) gbit_per_s: f64,
}

pub(super) fn measure(environment: &Environment, way: Way, seconds: u16) -> Result<Shown> {
    let mut scratch = Scratch::new("tcp")?;
    let before_ns = round_trip_ns()?;
    let gbit_per_s = measure_in(environment, way, seconds, &scratch)
        .with_context(|| format!("logs in {}", scratch.keep().display()))?;
    // Kept for the message only.
    let _ = std::fs::remove_dir_all(scratch.folder());
    let after_ns = round_trip_ns()?;
    Ok(Shown { before_ns, after_ns, gbit_per_s })
}

fn measure_in(env: &Environment, way: Way, seconds: u16, scratch: &Scratch) -> Result<f64> {
    let sockets = [scratch.path("v0"), scratch.path("v1")];
    match way {
        Way::Uplinks(kind) => {
            let (spaces, ends) = (spaces()?, Ends::new(kind != "tap")?);
            let spec = |number: usize| ends.spec(kind, number, &spaces);
            if kind != "tap" {
                ends.connect(&spaces)?;
            }
            let _switch = Switch::start(scratch.folder(), &[spec(0), spec(1)])?;
            between(env, &spaces, (seconds, 1), scratch)
        }
        Way::ToGuest(way) => to_guest(env, way, seconds, scratch),
        Way::Bridge { large } => {
            let (spaces, ends) = (spaces()?, Ends::new(true)?);
            ends.connect(&spaces)?;
            if !large {
                spaces.iter().try_for_each(nothing_large)?;
            }
            let _ = ip(&["link", "add", &ends.bridge(), "type", "bridge"])?;
            let _ = ip(&["link", "set", &ends.bridge(), "up"])?;
            for end in &ends.names {
                let _ = ip(&["link", "set", end, "up", "master", &ends.bridge()])?;
            }
            between(env, &spaces, (seconds, 1), scratch)
        }
        Way::OvsVeth => {
            let (spaces, ends) = (spaces()?, Ends::new(true)?);
            ends.connect(&spaces)?;
            for end in &ends.names {
                let _ = ip(&["link", "set", end, "up"])?;
            }
            let [one, other] = &ends.names;
            let _ovs = OvsDpdk::start_between(env, [one, other], scratch.folder())?;
            between(env, &spaces, (seconds, 1), scratch)
        }
        Way::Guests { packed, options, streams } => {
            let spaces = spaces()?;
            let _switch = Switch::start(scratch.folder(), &ports(&sockets))?;
            let options = format!("{options} {}", if packed { "--packed" } else { "" });
            let _guests = guests(&spaces, &sockets, &options, scratch)?;
            between(env, &spaces, (seconds, streams), scratch)
        }
        Way::OvsGuests { packed, tso } => {
            let spaces = spaces()?;
            let ovs = OvsDpdk::start_for_tcp(env, &sockets, tso, scratch.folder())?;
            let options = format!("--mode server {}", if packed { "--packed" } else { "" });
            let _guests = guests(&spaces, &sockets, &options, scratch)?;
            ovs.wait_ports_up()?;
            between(env, &spaces, (seconds, 1), scratch)
        }
        Way::Qemu { packed } => {
            let _switch = Switch::start(scratch.folder(), &ports(&sockets))?;
            machines(env, &sockets, (packed, Side::Client), seconds, scratch)
        }
        Way::OvsQemu { packed, tso } => {
            hugepages()?;
            let _ovs = OvsDpdk::start_for_tcp(env, &sockets, tso, scratch.folder())?;
            machines(env, &sockets, (packed, Side::Server), seconds, scratch)
        }
        Way::Datagrams { uso } => {
            let spaces = spaces()?;
            let switch = Switch::start(scratch.folder(), &ports(&sockets))?;
            let without = "--offloads csum,host-tso4,host-tso6,guest-csum,guest-tso4,guest-tso6";
            let _guests = guests(&spaces, &sockets, if uso { "" } else { without }, scratch)?;
            datagrams(env, &spaces, &switch, seconds)
        }
    }
}

fn spaces() -> Result<[Netns; 2]> {
    Ok([Netns::new()?, Netns::new()?])
}

fn ports(sockets: &[PathBuf; 2]) -> [String; 2] {
    let [one, other] = sockets;
    let port =
        |name: &str, socket: &Path| format!("vhost-user:name={name},socket={}", socket.display());
    [port("g0", one), port("g1", other)]
}

/// Ends of veth pairs in this namespace, and a bridge; gone in the end.
struct Ends {
    names: [String; 2],
    real: bool,
}

impl Ends {
    fn new(real: bool) -> Result<Self> {
        let name = |number: u32| format!("cwt{}-{number}", std::process::id());
        Ok(Self { names: [name(0), name(1)], real })
    }

    fn bridge(&self) -> String {
        format!("cwt{}-b", std::process::id())
    }

    /// `eth0` of each namespace gets its other end here.
    fn connect(&self, spaces: &[Netns; 2]) -> Result<()> {
        let here = std::process::id().to_string();
        for (name, space) in self.names.iter().zip(spaces) {
            let pair =
                ["link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", &here];
            let _ = space.ip(&pair)?;
        }
        Ok(())
    }

    fn spec(&self, kind: &str, number: usize, spaces: &[Netns; 2]) -> String {
        let name = self.names.get(number).map_or("", String::as_str);
        match spaces.get(number) {
            Some(space) if !self.real => {
                format!("{kind}:name=u{number},ifname=eth0,netns={}", space.name())
            }
            _ => format!("{kind}:name=u{number},ifname={name}"),
        }
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        for name in self.names.iter().chain([&self.bridge()]) {
            let _ = ip(&["link", "del", name]);
        }
    }
}

/// Lets a namespace's stack send nothing above the MTU.
fn nothing_large(space: &Netns) -> Result<()> {
    let mut ethtool = Command::new(install("ethtool", "ethtool")?);
    let _ = ethtool.args(["-K", "eth0", "tso", "off", "gso", "off"]);
    output(&mut space.command(&ethtool)?, PATIENCE).map(drop)
}

/// From the stack behind an uplink to that of a guest.
fn to_guest(env: &Environment, way: ToGuest, seconds: u16, scratch: &Scratch) -> Result<f64> {
    let ToGuest { kind, uplink, guest, large, streams } = way;
    let (spaces, ends) = (spaces()?, Ends::new(true)?);
    ends.connect(&spaces)?;
    // The other end is the guest's.
    let _ = spaces[1].ip(&["link", "del", "eth0"])?;
    if !large {
        nothing_large(&spaces[0])?;
    }
    let sockets = [scratch.path("v1")];
    let guest = format!("vhost-user:name=g1,socket={}{guest}", sockets[0].display());
    let ports = [format!("{}{uplink}", ends.spec(kind, 0, &spaces)), guest];
    let _switch = Switch::start(scratch.folder(), &ports)?;
    let _guests = guests(&spaces[1..], &sockets, "", scratch)?;
    between(env, &spaces, (seconds, streams), scratch)
}

fn guests(
    spaces: &[Netns],
    sockets: &[PathBuf],
    options: &str,
    scratch: &Scratch,
) -> Result<Vec<Process>> {
    let mut running = Vec::new();
    for (number, (space, socket)) in (1..).zip(spaces.iter().zip(sockets)) {
        let mac = format!("02:00:00:00:00:0{number}");
        let mut command = tied_command(switch::guest_program()?);
        let _ = command.arg("--socket").arg(socket).args(["--tap", "eth0", "--mac", &mac]);
        let _ = command.args(["--netns", space.name()]).args(options.split_whitespace());
        let log = scratch.path(&format!("guest{number}.log"));
        running.push((Process::spawn("causeway-guest", &mut command, &log)?, mac));
    }
    for ((guest, mac), space) in running.iter_mut().zip(spaces) {
        let start = Instant::now();
        // The address is set last of all.
        while !space.ip(&["link", "show", "eth0"]).is_ok_and(|shown| shown.contains(&*mac)) {
            if start.elapsed() > PATIENCE {
                bail!("no eth0 in {}: {}", space.name(), guest.tail());
            }
            sleep(TICK);
        }
    }
    Ok(running.into_iter().map(|(guest, _)| guest).collect())
}

fn configure(spaces: &[Netns; 2]) -> Result<()> {
    for (space, address) in spaces.iter().zip(ADDRESSES) {
        let start = Instant::now();
        while space.ip(&["link", "show", "eth0"]).is_err() {
            ensure!(start.elapsed() < PATIENCE, "no eth0 in {}", space.name());
            sleep(TICK);
        }
        space.configure("eth0", &format!("{address}/24"))?;
    }
    sleep(SETTLE);
    Ok(())
}

/// iperf3 between the namespaces.
fn between(
    environment: &Environment,
    spaces: &[Netns; 2],
    (seconds, streams): (u16, u16),
    scratch: &Scratch,
) -> Result<f64> {
    configure(spaces)?;
    let [from, to] = spaces;
    let mut command: Command = environment.server_program("iperf3")?;
    let _ = command.args(["-s", "--forceflush"]);
    let mut server = to.spawn("iperf3", &command, scratch.folder())?;
    let listens = |text: &str| text.contains("listening").then_some(());
    server.wait_for("that it listens", 0, PATIENCE, listens)?;
    let mut client = environment.server_program("iperf3")?;
    let (time, flows) = (seconds.to_string(), streams.to_string());
    let _ = client.args(["-J", "-c", ADDRESSES[1], "-t", &time, "-P", &flows]);
    let limit = Duration::from_secs(u64::from(seconds)).saturating_add(SLACK);
    let shown = output(&mut from.command(&client)?, limit)?;
    let json: serde_json::Value = serde_json::from_str(&shown)?;
    let rate = json.pointer("/end/sum_received/bits_per_second");
    let rate = rate.and_then(serde_json::Value::as_f64);
    Ok(rate.with_context(|| format!("iperf3 says: {shown}"))? / 1e9)
}

/// iperf3 between two virtual machines.
fn machines(
    environment: &Environment,
    sockets: &[PathBuf; 2],
    (packed, side): (bool, Side),
    seconds: u16,
    scratch: &Scratch,
) -> Result<f64> {
    let mut guests = Vec::new();
    for (number, socket) in (1..).zip(sockets) {
        let mut spec = GuestSpec::new(number, socket.clone());
        spec.side = side;
        if packed {
            spec.properties.push("packed=on".to_owned());
        }
        guests.push(Guest::start(environment, &spec, scratch.folder())?);
    }
    let [from, to] = guests.as_mut_slice() else { bail!("two guests") };
    from.wait_up()?;
    to.wait_up()?;
    to.iperf_server()?;
    from.wait_reachable(&to.address())?;
    let bytes = from.iperf(&to.address(), u32::from(seconds), 1)?;
    Ok(gbit(bytes, f64::from(seconds)))
}

/// What the switch delivers of the datagrams that one socket leaves to be cut.
fn datagrams(
    environment: &Environment,
    spaces: &[Netns; 2],
    switch: &Switch,
    seconds: u16,
) -> Result<f64> {
    configure(spaces)?;
    let [from, _] = spaces;
    let mut command = environment.wire_program("socat")?;
    // SOL_UDP, UDP_SEGMENT.
    let target = format!("UDP4-SENDTO:{}:9,setsockopt=17:103:i1400", ADDRESSES[1]);
    let _ = command.args(["-u", "-b", "56000", "OPEN:/dev/zero", &target]);
    let folder = switch.folder().to_owned();
    let mut sender = from.spawn("socat", &command, &folder)?;
    sleep(SETTLE);
    let delivered = || -> Result<u64> {
        let stats = switch.stats()?;
        Ok(stats.port("g1")?.queues.iter().map(|queue| queue.tx_bytes).sum())
    };
    let (before, start) = (delivered()?, Instant::now());
    sleep(Duration::from_secs(u64::from(seconds)));
    let (after, time) = (delivered()?, start.elapsed());
    let _ = sender.stop();
    Ok(gbit(after.saturating_sub(before), time.as_secs_f64()))
}

#[expect(clippy::cast_precision_loss, reason = "bytes of seconds are far below 2^52")]
fn gbit(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 * 8.0 / 1e9 / seconds.max(f64::MIN_POSITIVE)
}
