//! DPDK's vhost library as the back end: testpmd passes frames between two ports and decides
//! nothing. So it is the bound for a switch that uses that library.
//!
//! **Limits** Its polling thread has CPU 0 and never sleeps; it uses 512 MiB of hugepages.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;

use crate::environment::Environment;
use crate::process::Process;
use crate::testpmd::{Forwarded, command, drivers, parse_forwarded, wait_prompt};

const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A running testpmd that forwards between two devices.
#[derive(Debug)]
pub struct Forwarder {
    process: Process,
}

impl Forwarder {
    /// Forwards between two vhost-user sockets, on which it listens.
    ///
    /// # Errors
    /// DPDK cannot be had or testpmd does not start.
    pub fn between_sockets(
        environment: &Environment,
        sockets: &[PathBuf; 2],
        folder: &Path,
    ) -> Result<Self> {
        let [a, b] = sockets;
        let device = |port: u8, socket: &Path| {
            format!("net_vhost{port},iface={},queues=1", socket.display())
        };
        Self::start(environment, [device(0, a), device(1, b)], folder)
    }

    /// Forwards between two devices, each as `--vdev` takes it.
    ///
    /// # Errors
    /// As [`Forwarder::between_sockets`].
    pub fn start(environment: &Environment, devices: [String; 2], folder: &Path) -> Result<Self> {
        let mut testpmd = environment.testpmd()?;
        let _ = testpmd.args(drivers(&devices));
        // Several may run at a time.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let prefix = format!("--file-prefix=cwpeer{process}-{number}");
        let _ = testpmd.args(["--lcores", "0@0,1@0", "-m", "512", "--no-pci", &prefix]);
        for device in devices {
            let _ = testpmd.arg(format!("--vdev={device}"));
        }
        let _ = testpmd.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"]);
        let mut process = Process::spawn("testpmd", &mut testpmd, &folder.join("peer.log"))?;
        let _ = wait_prompt(&mut process)?;
        for line in ["set record-core-cycles on", "set fwd io", "start"] {
            let _ = command(&mut process, line)?;
        }
        Ok(Self { process })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Stops forwarding and says what it cost.
    ///
    /// # Errors
    /// testpmd does not answer.
    pub fn stop_forwarding(&mut self) -> Result<Forwarded> {
        Ok(parse_forwarded(&command(&mut self.process, "stop")?))
    }

    /// Ends testpmd.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(mut self) -> Result<()> {
        self.process.send("stop")?;
        self.process.send("quit")?;
        self.process.finish(END_TIMEOUT).map(drop)
    }
}
