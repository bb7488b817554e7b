//! DPDK's testpmd with virtio-user ports: an independent vhost-user front end without a VM.
//!
//! **Limits** One testpmd at a time uses 512 MiB of hugepages. Ports are pinned to CPU 1 where
//! there is one, so that the switch keeps CPU 0.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::environment::Environment;
use crate::process::Process;
use crate::testpmd::{self, Forwarded, number};

const END_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest frame: MTU 8986 and the Ethernet header.
pub const LARGEST_FRAME: usize = 9000;
/// What testpmd is prepared for unless it is told more.
pub const USUAL_FRAME: usize = 1518;
/// `RTE_ETH_TX_OFFLOAD_MULTI_SEGS`: a frame may lie in several mbufs.
const MULTI_SEGS: &str = "0x8000";

/// Where testpmd sends what a port has received.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Topology {
    /// To the next port.
    Pairs,
    /// Back to the same port.
    Loop,
}

/// What the virtio-user ports are like.
#[derive(Clone, Debug)]
pub struct VirtioUserSpec {
    /// One socket for each port.
    pub sockets: Vec<PathBuf>,
    /// Where received frames go.
    pub topology: Topology,
    /// testpmd listens on the sockets.
    pub server: bool,
    /// Packed rings.
    pub packed: bool,
    /// Mergeable receive buffers.
    pub mrg_rxbuf: bool,
    /// In-order completion.
    pub in_order: bool,
    /// Ask for the vector path.
    pub vectorized: bool,
    /// Queue pairs of each port.
    pub queues: u16,
    /// Bytes of the largest frame, without its check sequence.
    pub largest_frame: usize,
    /// Pages of 4 KiB instead of hugepages for the memory that the switch maps.
    pub small_pages: bool,
}

/// Frames that one testpmd port has counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortCount {
    /// Received by testpmd.
    pub rx: u64,
    /// Sent by testpmd.
    pub tx: u64,
}

/// A running testpmd.
#[derive(Debug)]
pub struct VirtioUser {
    process: Process,
    spec: VirtioUserSpec,
}

impl VirtioUserSpec {
    /// The case's name, which says every choice.
    #[must_use]
    pub fn name(&self) -> String {
        format!(
            "{}-mrg{}-inorder{}-vec{}-q{}-{}",
            if self.packed { "packed" } else { "split" },
            u8::from(self.mrg_rxbuf),
            u8::from(self.in_order),
            u8::from(self.vectorized),
            self.queues,
            if self.server { "server" } else { "client" },
        )
    }

    /// The MAC address of port `index`.
    #[must_use]
    pub fn mac(index: usize) -> String {
        format!("02:01:02:03:04:{index:02x}")
    }

    /// Whether DPDK has a vector path for this combination on this machine.
    #[must_use]
    pub fn has_vector_path(&self) -> bool {
        if !self.vectorized || self.mrg_rxbuf {
            return false;
        }
        if self.packed { self.in_order && has_avx512() } else { !self.in_order }
    }

    fn device(&self, index: usize, socket: &Path) -> String {
        format!(
            "net_virtio_user{index},mac={},path={},queues={},queue_size=256,packed_vq={},\
             mrg_rxbuf={},in_order={},vectorized={}{}",
            Self::mac(index),
            socket.display(),
            self.queues,
            u8::from(self.packed),
            u8::from(self.mrg_rxbuf),
            u8::from(self.in_order),
            u8::from(self.vectorized),
            if self.server { ",server=1" } else { "" },
        )
    }

    fn arguments(&self) -> Vec<String> {
        let cores = if two_cpus() { "0@1,1@1" } else { "0@0,1@0" };
        let mut arguments: Vec<String> = [
            "-v",
            "--lcores",
            cores,
            "-m",
            "512",
            "--no-pci",
            // Without hugepages it is one memfd, which it shares as well.
            if self.small_pages { "--no-huge" } else { "--single-file-segments" },
            "--log-level=pmd.net.virtio.init:debug",
            "--log-level=pmd.net.virtio.driver:info",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!("--file-prefix=cw{}", std::process::id()));
        if self.packed && self.vectorized && has_avx512() {
            arguments.push("--force-max-simd-bitwidth=512".to_owned());
        }
        for (index, socket) in self.sockets.iter().enumerate() {
            arguments.push(format!("--vdev={}", self.device(index, socket)));
        }
        arguments
            .extend(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"].map(str::to_owned));
        arguments.extend(self.jumbo_arguments());
        arguments.extend([format!("--rxq={}", self.queues), format!("--txq={}", self.queues)]);
        if self.topology == Topology::Loop {
            arguments.push("--port-topology=loop".to_owned());
        }
        for index in 0..self.sockets.len() {
            let peer = index ^ 1;
            arguments.push(format!("--eth-peer={index},{}", Self::mac(peer)));
        }
        arguments
    }

    /// Mergeable: the frame lies in several buffers; otherwise it must fit into one. testpmd must
    /// be told of both.
    fn jumbo_arguments(&self) -> Vec<String> {
        if self.largest_frame <= USUAL_FRAME {
            return Vec::new();
        }
        let mut arguments = vec![format!("--max-pkt-len={}", self.largest_frame.saturating_add(4))];
        if self.mrg_rxbuf {
            arguments
                .extend(["--enable-scatter".to_owned(), format!("--tx-offloads={MULTI_SEGS}")]);
        } else {
            arguments.push(format!("--mbuf-size={}", self.largest_frame.saturating_add(1240)));
        }
        arguments
    }
}

fn has_avx512() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ["avx512f", "avx512bw", "avx512vl"].iter().all(|flag| info.contains(flag))
}

fn two_cpus() -> bool {
    std::thread::available_parallelism().is_ok_and(|count| count.get() > 1)
}

impl VirtioUser {
    /// Starts testpmd; with `server` it waits for the switch to connect to every socket.
    ///
    /// # Errors
    /// DPDK cannot be had or testpmd cannot be started.
    pub fn start(environment: &Environment, spec: &VirtioUserSpec, folder: &Path) -> Result<Self> {
        let mut command = environment.testpmd()?;
        let log = folder.join("testpmd.log");
        let process = Process::spawn("testpmd", command.args(spec.arguments()), &log)?;
        Ok(Self { process, spec: spec.clone() })
    }

    /// Waits for the prompt, and checks that the vector path was taken where DPDK has it.
    ///
    /// # Errors
    /// testpmd ends, or the log does not speak of the vector path.
    pub fn wait_up(&mut self) -> Result<()> {
        let log = testpmd::wait_prompt(&mut self.process)?;
        if self.spec.has_vector_path() {
            let vector = if self.spec.packed {
                "using packed ring vectorized Rx path"
            } else {
                "using vectorized Rx path"
            };
            ensure!(log.contains(vector), "the log lacks `{vector}`\n{}", vector_lines(&log));
        }
        Ok(())
    }

    /// Runs one testpmd command and returns what it prints.
    ///
    /// # Errors
    /// The prompt does not come back.
    pub fn command(&mut self, line: &str) -> Result<String> {
        testpmd::command(&mut self.process, line)
    }

    /// Lets every port send `bursts` bursts of frames, which go round between the ports until
    /// [`VirtioUser::stop_forwarding`].
    ///
    /// # Errors
    /// testpmd does not answer.
    pub fn circulate(&mut self, size: usize, bursts: u32) -> Result<()> {
        for line in [
            format!("set txpkts {}", testpmd::parts(size)),
            "set record-core-cycles on".to_owned(),
            "set fwd mac".to_owned(),
            format!("start tx_first {bursts}"),
        ] {
            let _ = self.command(&line)?;
        }
        Ok(())
    }

    /// Frames per second that each port has received since the last look.
    ///
    /// # Errors
    /// testpmd does not answer as it should.
    pub fn rates(&mut self) -> Result<Vec<u64>> {
        let shown = self.command("show port stats all")?;
        let rates = testpmd::parse_rates(&shown);
        ensure!(rates.len() == self.spec.sockets.len(), "show port stats all says: {shown}");
        Ok(rates)
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Stops forwarding and says what it cost testpmd.
    ///
    /// # Errors
    /// testpmd does not answer.
    pub fn stop_forwarding(&mut self) -> Result<Forwarded> {
        Ok(testpmd::parse_forwarded(&self.command("stop")?))
    }

    /// DPDK's version.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn version(&self) -> Result<Option<String>> {
        let log = self.process.output_from(0)?;
        Ok(testpmd::parse_version(&log))
    }

    /// The counters of every port.
    ///
    /// # Errors
    /// testpmd does not answer as it should.
    pub fn counts(&mut self) -> Result<Vec<PortCount>> {
        let shown = self.command("show port stats all")?;
        let counts = parse_counts(&shown);
        ensure!(counts.len() == self.spec.sockets.len(), "show port stats all says: {shown}");
        Ok(counts)
    }

    /// Ends testpmd and expects a clean exit.
    ///
    /// # Errors
    /// It fails or does not end.
    pub fn quit(mut self) -> Result<()> {
        self.process.send("stop")?;
        self.process.send("quit")?;
        let status = self.process.finish(END_TIMEOUT)?;
        ensure!(status.success(), "testpmd ended with {status}\n{}", self.process.tail());
        Ok(())
    }
}

fn vector_lines(log: &str) -> String {
    log.lines().filter(|line| line.contains("path")).collect::<Vec<_>>().join("\n")
}

fn parse_counts(shown: &str) -> Vec<PortCount> {
    let rx = shown.lines().filter_map(|line| number(line, "RX-packets:"));
    let tx = shown.lines().filter_map(|line| number(line, "TX-packets:"));
    rx.zip(tx).map(|(rx, tx)| PortCount { rx, tx }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_port_by_port() {
        let shown = "  RX-packets: 12   RX-missed: 0\n  TX-packets: 34  TX-errors: 0\n\
                     \n  RX-packets: 5   RX-missed: 0\n  TX-packets: 6  TX-errors: 0\n";
        assert_eq!(parse_counts(shown), [PortCount { rx: 12, tx: 34 }, PortCount { rx: 5, tx: 6 }]);
    }
}
