//! The guest that sends: testpmd with a virtio-user port on CPU 1.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use conformance::testpmd::{self, command, drivers};
use conformance::{Environment, Process};

/// How DPDK's `net_af_packet` is set up, on either side.
pub(super) const AF_PACKET: &str = "blocksz=65536,framesz=2048,framecnt=4096,qdisc_bypass=1";
/// Descriptors of the guest's rings.
const RING: u16 = 256;
/// The guest's station, and the one behind the uplink.
const GUEST: &str = "02:01:02:03:04:05";
const FAR: &str = "02:01:02:03:04:06";
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A running testpmd.
#[derive(Debug)]
pub(super) struct Guest {
    process: Process,
}

impl Guest {
    pub(super) fn start(environment: &Environment, socket: &Path, folder: &Path) -> Result<Self> {
        let shown = socket.display();
        let device = format!(
            "net_virtio_user0,mac={GUEST},path={shown},queues=1,queue_size={RING},packed_vq=0,\
             mrg_rxbuf=1,in_order=0"
        );
        let devices = vec![device];
        let mut testpmd = environment.testpmd()?;
        let prefix = format!("--file-prefix=cw{}", std::process::id());
        let memory = ["-v", "-m", "512", "--no-pci", "--single-file-segments"];
        let _ = testpmd.args(drivers(&devices)).args(["--lcores", "0@1,1@1"]).args(memory);
        let _ = testpmd.arg(prefix).args(devices.iter().map(|device| format!("--vdev={device}")));
        let _ = testpmd.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"]);
        let _ = testpmd.arg(format!("--eth-peer=0,{FAR}")).arg("--port-topology=loop");
        let mut process = Process::spawn("testpmd", &mut testpmd, &folder.join("testpmd.log"))?;
        let _ = testpmd::wait_prompt(&mut process)?;
        Ok(Self { process })
    }

    /// Sends frames as fast as it can.
    pub(super) fn send(&mut self, size: u16) -> Result<()> {
        self.all(&[&format!("set txpkts {size}"), "set fwd txonly", "start"])
    }

    fn all(&mut self, lines: &[&str]) -> Result<()> {
        lines.iter().try_for_each(|line| command(&mut self.process, line).map(drop))
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Stops to send.
    pub(super) fn stop_forwarding(&mut self) -> Result<()> {
        command(&mut self.process, "stop").map(drop)
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
