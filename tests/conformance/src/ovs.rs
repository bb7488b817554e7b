//! OVS-DPDK as a peer: a bridge that learns (`NORMAL`) between two vhost-user client ports.
//!
//! **Limits** Its polling thread has CPU 0 and never sleeps; it uses 512 MiB of hugepages. The
//! front ends listen on the sockets. One folder has everything of an instance.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::environment::{Environment, Ovs};
use crate::process::{Process, output};
use crate::testpmd::number;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const LINK_TIMEOUT: Duration = Duration::from_secs(30);
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// What the log says when DPDK has started in it.
const READY: &str = "DPDK Enabled - initialized";
const TICK: Duration = Duration::from_millis(50);

/// A running OVS-DPDK; dropped, both of its processes end.
#[derive(Debug)]
pub struct OvsDpdk {
    programs: Ovs,
    folder: PathBuf,
    /// Before the database: the fields are dropped in order.
    switch: Process,
    _database: Process,
}

impl OvsDpdk {
    /// Starts it with a port for each socket; `mtu` is their largest packet.
    ///
    /// # Errors
    /// It cannot be had, or a part of it does not start.
    pub fn start(
        environment: &Environment,
        sockets: &[PathBuf; 2],
        mtu: u32,
        folder: &Path,
    ) -> Result<Self> {
        let ovs = Self::start_empty(environment, false, folder)?;
        ovs.add_ports(sockets, mtu).with_context(|| ovs.switch.tail())?;
        Ok(ovs)
    }

    /// The same without a limit of the MTU; with `tso`, guests may leave segmentation to it.
    ///
    /// # Errors
    /// As [`OvsDpdk::start`].
    pub fn start_for_tcp(
        environment: &Environment,
        sockets: &[PathBuf; 2],
        tso: bool,
        folder: &Path,
    ) -> Result<Self> {
        let ovs = Self::start_empty(environment, tso, folder)?;
        ovs.add_ports(sockets, 1500).with_context(|| ovs.switch.tail())?;
        Ok(ovs)
    }

    /// The same between two interfaces of this namespace.
    ///
    /// # Errors
    /// As [`OvsDpdk::start`].
    pub fn start_between(
        environment: &Environment,
        interfaces: [&str; 2],
        folder: &Path,
    ) -> Result<Self> {
        let ovs = Self::start_empty(environment, true, folder)?;
        ovs.add_bridge()?;
        for interface in interfaces {
            let _ = ovs.vsctl(&["add-port", "br0", interface])?;
        }
        Ok(ovs)
    }

    fn start_empty(environment: &Environment, tso: bool, folder: &Path) -> Result<Self> {
        let programs = environment.ovs()?;
        let file = folder.join("conf.db");
        let mut create = with_folder(programs.command("usr/bin/ovsdb-tool")?, folder);
        let schema = programs.file("usr/share/openvswitch/vswitch.ovsschema");
        let _ = output(create.arg("create").arg(&file).arg(schema), ASK_TIMEOUT)?;
        let mut serve = with_folder(programs.command("usr/sbin/ovsdb-server")?, folder);
        let remote = format!("--remote=p{}", database(folder));
        let _ = serve.arg(&file).args([remote, unixctl(folder, "db")]);
        let served = Process::spawn("ovsdb-server", &mut serve, &folder.join("ovsdb.log"))?;
        wait_file(&folder.join("db.sock"))?;
        configure(&programs, tso, folder)?;
        let mut run = with_folder(programs.switch()?, folder);
        let _ = run.args([database(folder), unixctl(folder, "vs")]);
        let switch = Process::spawn("ovs-vswitchd", &mut run, &folder.join("ovs.log"))?;
        let folder = folder.to_owned();
        let mut ovs = Self { programs, folder, switch, _database: served };
        let ready = |text: &str| text.contains(READY).then_some(());
        ovs.switch.wait_for("DPDK's start", 0, START_TIMEOUT, ready)?;
        Ok(ovs)
    }

    fn add_bridge(&self) -> Result<()> {
        let bridge = ["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"];
        self.vsctl(&bridge).map(drop)
    }

    fn add_ports(&self, sockets: &[PathBuf; 2], mtu: u32) -> Result<()> {
        self.add_bridge()?;
        for (port, socket) in PORTS.iter().zip(sockets) {
            let path = format!("options:vhost-server-path={}", socket.display());
            let mtu = format!("mtu_request={mtu}");
            let add = ["add-port", "br0", port, "--", "set", "Interface", port];
            let _ = self.vsctl(&[&add[..], &["type=dpdkvhostuserclient", &path, &mtu]].concat())?;
        }
        Ok(())
    }

    /// Waits until the front ends of both ports are there.
    ///
    /// # Errors
    /// One does not come.
    pub fn wait_ports_up(&self) -> Result<()> {
        let start = Instant::now();
        for port in PORTS {
            while self.vsctl(&["get", "Interface", port, "link_state"])?.trim() != "up" {
                if start.elapsed() > LINK_TIMEOUT {
                    bail!("OVS' port {port} does not come up\n{}", self.switch.tail());
                }
                std::thread::sleep(TICK);
            }
        }
        Ok(())
    }

    /// The process id of the switch.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.switch.id()
    }

    /// Lets [`OvsDpdk::cycles_per_frame`] count from now on.
    ///
    /// # Errors
    /// OVS does not answer.
    pub fn clear_cycles(&self) -> Result<()> {
        self.appctl(&["dpif-netdev/pmd-stats-clear"]).map(drop)
    }

    /// Cycles that the polling thread has spent on each frame since it was cleared, polls that
    /// found nothing excluded; `None` if there were no frames.
    ///
    /// # Errors
    /// OVS does not answer.
    pub fn cycles_per_frame(&self) -> Result<Option<f64>> {
        Ok(parse_cycles(&self.appctl(&["dpif-netdev/pmd-perf-show", "-nh"])?))
    }

    /// Frames that its two ports have dropped since it started.
    ///
    /// # Errors
    /// OVS does not answer as it should.
    pub fn dropped(&self) -> Result<u64> {
        let shown = self.appctl(&["dpctl/show", "-s"])?;
        parse_drops(&shown).with_context(|| format!("dpctl/show -s says: {shown}"))
    }

    fn appctl(&self, arguments: &[&str]) -> Result<String> {
        let mut ask = with_folder(self.programs.command("usr/bin/ovs-appctl")?, &self.folder);
        let _ = ask.arg("-t").arg(self.folder.join("vs.ctl")).args(arguments);
        output(&mut ask, ASK_TIMEOUT)
    }

    fn vsctl(&self, arguments: &[&str]) -> Result<String> {
        vsctl(&self.programs, &self.folder, arguments)
    }
}

const PORTS: [&str; 2] = ["p0", "p1"];

/// What the switch has to know before it starts.
fn configure(programs: &Ovs, tso: bool, folder: &Path) -> Result<()> {
    let _ = vsctl(programs, folder, &["--no-wait", "init"])?;
    let extra = format!(
        "other_config:dpdk-extra=--no-pci --file-prefix=cwovs{} -d librte_mempool_ring.so.23",
        std::process::id()
    );
    let tso = format!("other_config:userspace-tso-enable={tso}");
    let settings = [
        "--no-wait",
        "set",
        "Open_vSwitch",
        ".",
        "other_config:dpdk-init=true",
        "other_config:pmd-cpu-mask=1",
        "other_config:dpdk-lcore-mask=1",
        "other_config:dpdk-socket-mem=512",
        &tso,
        &extra,
    ];
    vsctl(programs, folder, &settings).map(drop)
}

fn vsctl(programs: &Ovs, folder: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = with_folder(programs.command("usr/bin/ovs-vsctl")?, folder);
    // Options stand before the command.
    let options =
        [format!("--db={}", database(folder)), format!("--timeout={}", START_TIMEOUT.as_secs())];
    output(command.args(options).args(arguments), ASK_TIMEOUT)
}

/// Nothing of the machine's own OVS is read or written.
fn with_folder(mut command: Command, folder: &Path) -> Command {
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        let _ = command.env(name, folder);
    }
    command
}

fn database(folder: &Path) -> String {
    format!("unix:{}", folder.join("db.sock").display())
}

fn unixctl(folder: &Path, name: &str) -> String {
    format!("--unixctl={}", folder.join(format!("{name}.ctl")).display())
}

fn wait_file(path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        if start.elapsed() > START_TIMEOUT {
            bail!("{} does not come", path.display());
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// The first thread that `pmd-perf-show` names is the polling thread:
/// "Rx packets:   70   (7100 Kpps, 230 cycles/pkt)".
fn parse_cycles(shown: &str) -> Option<f64> {
    let line = shown.lines().find(|line| line.trim_start().starts_with("Rx packets:"))?;
    let (_, rest) = line.split_once("Kpps, ")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The sum of the `dropped:` of both ports; `None` if one is missing.
fn parse_drops(shown: &str) -> Option<u64> {
    let mut sum = 0u64;
    for port in PORTS {
        let (_, rest) = shown.split_once(&format!(": {port} ("))?;
        let lines = rest.lines().skip(1).take_while(|line| !line.trim().starts_with("port "));
        let drops = lines.filter_map(|line| number(line, "dropped:"));
        sum = sum.saturating_add(drops.sum());
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polling_threads_cycles_are_read() {
        let shown = "Time: 12:00\npmd thread numa_id 0 core_id 0:\n\n  \
                     Iterations:  10  (1.0 us/it)\n  \
                     Rx packets:        7106  (7106 Kpps, 230 cycles/pkt)\n  \
                     Datapath passes:   7106  (1.00 passes/pkt)\n";
        assert_eq!(parse_cycles(shown), Some(230.0));
        assert_eq!(parse_cycles("pmd thread numa_id 0 core_id 0:\n  Rx packets:   0\n"), None);
    }

    #[test]
    fn drops_are_those_of_both_ports() {
        let shown = "netdev@ovs-netdev:\n  port 0: ovs-netdev (tap)\n    \
                     RX packets:0 errors:0 dropped:50\n  \
                     port 1: p0 (dpdkvhostuserclient: configured_rx_queues=1)\n    \
                     RX packets:9 errors:0 dropped:1 overruns:? frame:?\n    \
                     TX packets:9 errors:0 dropped:2 aborted:? carrier:?\n  \
                     port 2: p1 (dpdkvhostuserclient: configured_rx_queues=1)\n    \
                     RX packets:9 errors:0 dropped:? overruns:?\n    \
                     TX packets:9 errors:0 dropped:4 aborted:?\n";
        assert_eq!(parse_drops(shown), Some(7));
        assert_eq!(parse_drops("netdev@ovs-netdev:\n"), None);
    }
}
