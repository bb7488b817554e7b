//! The guest: testpmd with a virtio-user port on CPU 1, and perhaps with the far end of the uplink.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::testpmd::{self, Forwarded, command, drivers, parse_forwarded};
use conformance::{Environment, Process};

use super::wire::Wire;

/// How DPDK's `net_af_packet` is set up, on either side.
pub(super) const AF_PACKET: &str = "blocksz=65536,framesz=2048,framecnt=4096,qdisc_bypass=1";
/// Descriptors of the guest's rings.
const RING: u16 = 256;
/// The same when a ring of frames goes round: enough that an uplink which hands over blocks of
/// frames, or waits a little for more of them, does not wait for those that are elsewhere.
const RING_OF_A_ROUND: u16 = 1024;
/// The guest's station, and the one behind the uplink.
const GUEST: &str = "02:01:02:03:04:05";
const FAR: &str = "02:01:02:03:04:06";
const END_TIMEOUT: Duration = Duration::from_secs(20);
/// Time in which far more frames are sent than the guest's ring holds.
const FILL: Duration = Duration::from_millis(100);

/// A running testpmd.
#[derive(Debug)]
pub(super) struct Guest {
    process: Process,
    /// Whether the far end is one of its ports.
    has_far: bool,
}

impl Guest {
    pub(super) fn start(
        environment: &Environment,
        socket: &Path,
        far: Option<&str>,
        folder: &Path,
    ) -> Result<Self> {
        let shown = socket.display();
        let mut devices = vec![format!(
            "net_virtio_user0,mac={GUEST},path={shown},queues=1,queue_size={},packed_vq=0,\
             mrg_rxbuf=1,in_order=0",
            if far.is_some() { RING_OF_A_ROUND } else { RING }
        )];
        devices.extend(far.map(|far| format!("net_af_packet1,iface={far},{AF_PACKET}")));
        let mut testpmd = environment.testpmd()?;
        let prefix = format!("--file-prefix=cw{}", std::process::id());
        let memory = ["-v", "-m", "512", "--no-pci", "--single-file-segments"];
        let _ = testpmd.args(drivers(&devices)).args(["--lcores", "0@1,1@1"]).args(memory);
        let _ = testpmd.arg(prefix).args(devices.iter().map(|device| format!("--vdev={device}")));
        let _ = testpmd.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"]);
        // What waits in the guest's ring at a start is what goes round.
        let _ = testpmd.arg("--no-flush-rx");
        // Each port sends to the other one's station.
        let _ = testpmd.arg(format!("--eth-peer=0,{FAR}"));
        if far.is_some() {
            let _ = testpmd.arg(format!("--eth-peer=1,{GUEST}"));
        } else {
            let _ = testpmd.arg("--port-topology=loop");
        }
        let mut process = Process::spawn("testpmd", &mut testpmd, &folder.join("testpmd.log"))?;
        let _ = testpmd::wait_prompt(&mut process)?;
        Ok(Self { process, has_far: far.is_some() })
    }

    /// Sends frames as fast as it can.
    pub(super) fn send(&mut self, size: u16) -> Result<()> {
        self.all(&[&format!("set txpkts {size}"), "set fwd txonly", "start"])
    }

    /// Fills its receive ring from the far end, and from then on sends everything that it receives
    /// out there again.
    pub(super) fn circulate(&mut self, size: u16) -> Result<()> {
        let txpkts = format!("set txpkts {size}");
        self.all(&[&txpkts, "set portlist 1", "set fwd txonly", "start"])?;
        sleep(FILL);
        self.all(&["stop", "set portlist 0,1", "set record-core-cycles on", "set fwd io", "start"])
    }

    fn all(&mut self, lines: &[&str]) -> Result<()> {
        lines.iter().try_for_each(|line| command(&mut self.process, line).map(drop))
    }

    /// Frames that have arrived: at the guest if the far end is its own, else at the far end.
    pub(super) fn arrived(&mut self, wire: &Wire) -> Result<u64> {
        if !self.has_far {
            return wire.arrived();
        }
        let shown = command(&mut self.process, "show port stats 0")?;
        let count = shown.lines().find_map(|line| {
            line.split_once("RX-packets:")?.1.split_whitespace().next()?.parse().ok()
        });
        count.with_context(|| format!("show port stats 0 says: {shown}"))
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Stops to forward, and says what it cost.
    pub(super) fn stop_forwarding(&mut self) -> Result<Forwarded> {
        Ok(parse_forwarded(&command(&mut self.process, "stop")?))
    }

    /// DPDK's version.
    pub(super) fn version(&self) -> Result<Option<String>> {
        Ok(testpmd::parse_version(&self.process.output_from(0)?))
    }

    pub(super) fn quit(mut self) -> Result<()> {
        self.process.send("quit")?;
        let status = self.process.finish(END_TIMEOUT)?;
        ensure!(status.success(), "testpmd ended with {status}\n{}", self.process.tail());
        Ok(())
    }
}
