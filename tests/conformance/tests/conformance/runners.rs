//! The runners themselves, against a peer: what fails here is not the switch's fault.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use conformance::virtio_user::LARGEST_FRAME;
use conformance::{
    Environment, Forwarder, Guest, GuestSpec, HostTap, QemuVersion, Scratch, Topology, VirtioUser,
    VirtioUserSpec,
};
use libtest_mimic::Trial;

use crate::trial;

/// Frames that have not come after so long do not come.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let guests = [QemuVersion::V10, QemuVersion::V7].map(|version| {
        let name = format!("runners/{}-through-testpmd", version.name());
        trial(name, move |environment, scratch| guests(environment, scratch, version))
    });
    let user = trial("runners/virtio-user-through-testpmd".to_owned(), virtio_user);
    let echo = trial("runners/echo-through-testpmd".to_owned(), echo);
    guests.into_iter().chain([user, echo]).collect()
}

/// The sockets of the back end, by which frames come and go.
fn sockets(scratch: &Scratch) -> [PathBuf; 2] {
    ["s0", "s1"].map(|name| scratch.path(name))
}

fn guests(environment: &Environment, scratch: &Scratch, version: QemuVersion) -> Result<()> {
    let peer = Forwarder::between_sockets(environment, &sockets(scratch), scratch.folder())?;
    let mut specs =
        [1, 2].map(|n: u8| GuestSpec::new(n, scratch.path(&format!("s{}", n.saturating_sub(1)))));
    for spec in &mut specs {
        spec.version = version;
    }
    let [first, second] = &specs;
    let mut a = Guest::start(environment, first, scratch.folder())?;
    let mut b = Guest::start(environment, second, scratch.folder())?;
    a.wait_up()?;
    b.wait_up()?;
    ensure!(a.run("false").is_err(), "the guest's shell hides a failure");
    a.wait_reachable(&b.address())?;
    ensure!(a.ping(&b.address(), 20, 50)? == 0, "pings are lost through testpmd");
    b.iperf_server()?;
    ensure!(a.iperf(&b.address(), 1, 1)? > 0, "TCP moved nothing");
    ensure!(a.has_feature(32)?, "VERSION_1 is not seen");
    a.reboot()?;
    a.wait_reachable(&b.address())?;
    a.rebind_driver()?;
    a.wait_reachable(&b.address())?;
    a.power_off()?;
    b.power_off()?;
    peer.stop()
}

fn virtio_user(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let peer = Forwarder::between_sockets(environment, &sockets(scratch), scratch.folder())?;
    let spec = VirtioUserSpec {
        sockets: sockets(scratch).into(),
        topology: Topology::Pairs,
        server: false,
        packed: false,
        mrg_rxbuf: false,
        in_order: false,
        vectorized: true,
        queues: 1,
        largest_frame: LARGEST_FRAME,
        small_pages: false,
    };
    let mut user = VirtioUser::start(environment, &spec, scratch.folder())?;
    user.wait_up()?;
    let _ = user.command("set fwd mac")?;
    let _ = user.command("start tx_first 1")?;
    let start = Instant::now();
    loop {
        let counts = user.counts()?;
        if counts.iter().all(|count| count.rx > 0 && count.tx > 0) {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "no frames: {counts:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    user.quit()?;
    peer.stop()
}

/// The echo of `virtio-user/` through a tap of the peer's.
fn echo(environment: &Environment, scratch: &Scratch) -> Result<()> {
    let tap = HostTap::named("p");
    let socket = scratch.path("s0");
    let devices = [
        format!("net_vhost0,iface={},queues=1", socket.display()),
        format!("net_tap0,iface={}", tap.name()),
    ];
    let peer = Forwarder::start(environment, devices, scratch.folder())?;
    let mut spec = VirtioUserSpec {
        sockets: vec![socket],
        topology: Topology::Loop,
        server: false,
        packed: false,
        mrg_rxbuf: true,
        in_order: false,
        vectorized: false,
        queues: 1,
        largest_frame: LARGEST_FRAME,
        small_pages: false,
    };
    tap.configure("10.78.0.1/24", 1500)?;
    tap.neighbour("10.78.0.2", &VirtioUserSpec::mac(0))?;
    for mrg_rxbuf in [false, true] {
        spec.mrg_rxbuf = mrg_rxbuf;
        let mut user = VirtioUser::start(environment, &spec, scratch.folder())?;
        user.wait_up()?;
        let _ = user.command("set fwd 5tswap")?;
        let _ = user.command("start")?;
        // DPDK's tap takes no larger frames.
        crate::virtio_user::echo("10.78.0.2", &[60, 61, 511, 512, 1000, 1514])?;
        user.quit()?;
    }
    peer.stop()
}
