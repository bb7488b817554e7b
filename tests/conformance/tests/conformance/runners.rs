//! The runners themselves, against a peer: what fails here is not the switch's fault.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use conformance::{
    Environment, Guest, GuestSpec, Process, QemuVersion, Scratch, Topology, VirtioUser,
    VirtioUserSpec,
};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let guests = [QemuVersion::V10, QemuVersion::V7].map(|version| {
        let name = format!("runners/{}-through-testpmd", version.name());
        trial(name, move |environment, scratch| guests(environment, scratch, version))
    });
    let user = trial("runners/virtio-user-through-testpmd".to_owned(), virtio_user);
    guests.into_iter().chain([user]).collect()
}

/// DPDK's vhost library as the back end: it passes frames between two sockets and decides nothing.
struct Peer {
    process: Process,
}

impl Peer {
    fn start(environment: &Environment, folder: &Path) -> Result<Self> {
        let mut command = environment.testpmd()?;
        let prefix = format!("--file-prefix=cwpeer{}", std::process::id());
        let _ = command.args(["--lcores", "0@0,1@0", "-m", "512", "--no-pci", &prefix]);
        for port in 0..2 {
            let socket = folder.join(format!("s{port}"));
            let _ =
                command.arg(format!("--vdev=net_vhost{port},iface={},queues=1", socket.display()));
        }
        let _ = command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"]);
        let mut process = Process::spawn("testpmd", &mut command, &folder.join("peer.log"))?;
        let prompt = |text: &str| text.contains("testpmd> ").then_some(());
        process.wait_for("the prompt", 0, Duration::from_secs(30), prompt)?;
        process.send("set fwd io")?;
        process.send("start")?;
        Ok(Self { process })
    }

    fn stop(mut self) -> Result<()> {
        self.process.send("stop")?;
        self.process.send("quit")?;
        self.process.finish(Duration::from_secs(20)).map(drop)
    }
}

fn guests(environment: &Environment, scratch: &Scratch, version: QemuVersion) -> Result<()> {
    let peer = Peer::start(environment, scratch.folder())?;
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
    a.wait_reachable(&b.address())?;
    ensure!(a.ping(&b.address(), 20, 50)? == 0, "pings are lost through testpmd");
    let _ = b.run("iperf3 -s -D")?;
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
    let peer = Peer::start(environment, scratch.folder())?;
    let spec = VirtioUserSpec {
        sockets: vec![scratch.path("s0"), scratch.path("s1")],
        topology: Topology::Pairs,
        server: false,
        packed: false,
        mrg_rxbuf: false,
        in_order: false,
        vectorized: true,
        queues: 1,
    };
    let mut user = VirtioUser::start(environment, &spec, scratch.folder())?;
    user.wait_up()?;
    let _ = user.command("set fwd mac")?;
    let _ = user.command("start tx_first 1")?;
    std::thread::sleep(Duration::from_secs(1));
    let counts = user.counts()?;
    ensure!(counts.iter().all(|count| count.rx > 0 && count.tx > 0), "no frames: {counts:?}");
    user.quit()?;
    peer.stop()
}
