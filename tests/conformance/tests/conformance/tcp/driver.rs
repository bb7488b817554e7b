//! What drivers made of what they were offered: a Linux guest's, and DPDK's.

use anyhow::{Result, ensure};
use conformance::virtio_user::USUAL_FRAME;
use conformance::{Environment, Scratch, Switch, Topology, VirtioUser, VirtioUserSpec};
use libtest_mimic::Trial;

use crate::switch::{guest, guest_port};
use crate::trial;

/// As `ethtool -k` calls what the driver leaves to us. Its kernel, 6.1, knows no USO.
const SENT: [&str; 5] = [
    "tx-checksumming",
    "tcp-segmentation-offload",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp6-segmentation",
];
/// Numbers of the feature bits for a driver that takes checksums, TSO and ECN from us.
const TAKEN: [usize; 4] = [1, 7, 8, 9];

/// As `show port 0 tx_offload capabilities` and its like call them.
const TX_TOLD: [&str; 3] = ["UDP_CKSUM", "TCP_CKSUM", "TCP_TSO"];
const RX_TOLD: [&str; 3] = ["UDP_CKSUM", "TCP_CKSUM", "TCP_LRO"];

pub(crate) fn trials() -> Vec<Trial> {
    let rows = [("on", true), ("off", false)].map(|(value, on)| {
        trial(format!("tcp/ethtool-in-a-guest-with-offloads-{value}"), move |env, scratch| {
            shown(env, scratch, value, on)
        })
    });
    let info = [("on", true), ("off", false)].map(|(value, on)| {
        trial(format!("tcp/port-info-with-offloads-{value}"), move |env, scratch| {
            told(env, scratch, value, on)
        })
    });
    rows.into_iter().chain(info).collect()
}

/// What DPDK's driver says that it can leave to us and take from us, with several queues.
fn told(environment: &Environment, scratch: &Scratch, value: &str, on: bool) -> Result<()> {
    let socket = scratch.path("v0");
    let port = format!("vhost-user:name=v0,socket={},offloads={value}", socket.display());
    let switch = Switch::start(scratch.folder(), &[port])?;
    let spec = VirtioUserSpec {
        sockets: vec![socket],
        topology: Topology::Loop,
        server: false,
        packed: on,
        mrg_rxbuf: true,
        in_order: false,
        vectorized: false,
        queues: 2,
        largest_frame: USUAL_FRAME,
        small_pages: false,
    };
    let mut user = VirtioUser::start(environment, &spec, scratch.folder())?;
    user.wait_up()?;
    let info = user.command("show port info 0")?;
    let told = |name: &str| info.lines().find_map(|line| line.trim().strip_prefix(name));
    ensure!(told("Current number of RX queues: ") == Some("2"), "queues\n{info}");
    ensure!(told("Link status: ") == Some("up"), "link\n{info}");
    for (direction, wanted) in [("tx", TX_TOLD), ("rx", RX_TOLD)] {
        let shown = user.command(&format!("show port 0 {direction}_offload capabilities"))?;
        let line = shown.lines().find(|line| line.trim().starts_with("Per Port"));
        let has: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        for name in wanted {
            ensure!(has.contains(&name) == on, "{name} with offloads={value}\n{shown}");
        }
    }
    user.quit()?;
    switch.stop()
}

fn shown(environment: &Environment, scratch: &Scratch, value: &str, on: bool) -> Result<()> {
    let port = format!("{},offloads={value}", guest_port("g1", scratch));
    let switch = Switch::start(scratch.folder(), &[port])?;
    let mut guest = guest(environment, scratch, 1)?;
    guest.wait_up()?;
    let features = guest.run("ethtool -k eth0")?;
    for feature in SENT {
        let state = features.lines().find_map(|line| line.trim().strip_prefix(feature));
        let is_on = state.is_some_and(|state| state.starts_with(": on"));
        ensure!(is_on == on, "{feature} is {state:?} with offloads={value}\n{features}");
    }
    for bit in TAKEN {
        ensure!(guest.has_feature(bit)? == on, "bit {bit} with offloads={value}");
    }
    guest.power_off()?;
    switch.stop()
}
