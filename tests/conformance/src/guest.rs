//! A QEMU guest with Linux, on a vhost-user socket, that runs shell commands for the tests.
//!
//! **Theory of operation** The guest's `init` reads commands from its serial console, which is
//! QEMU's standard input and output. `run` sends a line and waits for the line that ends its
//! output. After a reboot the same console goes on.

mod ping;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::environment::image::{DONE, UP};
use crate::environment::{Environment, Image, QemuVersion};
use crate::process::Process;
pub use ping::Pings;

const BOOT_TIMEOUT: Duration = Duration::from_secs(90);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Where iperf3 listens if it is not told otherwise.
const IPERF_PORT: u16 = 5201;
const POWEROFF_TIMEOUT: Duration = Duration::from_secs(20);

/// Which end of the socket QEMU is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// QEMU connects, and again when it lost the connection.
    Client,
    /// QEMU listens.
    Server,
}

/// What a guest is like.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// A short name for files and messages.
    pub name: String,
    /// Which QEMU runs it.
    pub version: QemuVersion,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// QEMU's end of it.
    pub side: Side,
    /// The last byte of its MAC address 52:54:00:00:00:XX and of its IPv4 address 10.77.0.X.
    pub number: u8,
    /// How often QEMU tries to connect again, in milliseconds; QEMU 7 knows whole seconds only.
    pub reconnect_ms: u32,
    /// Queue pairs, and virtual CPUs to use them.
    pub queues: u16,
    /// More properties of virtio-net-pci, such as `packed=on`.
    pub properties: Vec<String>,
    /// More arguments of QEMU.
    pub arguments: Vec<String>,
    /// More words of the guest kernel's command line.
    pub kernel: String,
    /// Properties of the machine, such as `kernel-irqchip=split`.
    pub machine: String,
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    /// Where in the console's log the next answer starts.
    position: u64,
    number: u8,
}

impl GuestSpec {
    /// A guest on split rings with one queue pair, whose QEMU 10 connects to `socket`.
    #[must_use]
    pub fn new(number: u8, socket: PathBuf) -> Self {
        Self {
            name: format!("g{number}"),
            version: QemuVersion::V10,
            socket,
            side: Side::Client,
            number,
            reconnect_ms: 1000,
            queues: 1,
            properties: Vec::new(),
            arguments: Vec::new(),
            kernel: String::new(),
            machine: "q35,accel=tcg".to_owned(),
        }
    }

    /// Its MAC address.
    #[must_use]
    pub fn mac(&self) -> String {
        format!("52:54:00:00:00:{:02x}", self.number)
    }

    /// QEMU before 10.2 can lose an interrupt's wake-up of a virtual CPU that halts just then, in
    /// TCG (it reads `exit_request` without the order that this takes): what the interrupt was
    /// about waits for the next one, for seconds in a guest without ticks. A tick finds it.
    /// A call that we owe is not made up for by it: the driver looks when it is called.
    fn ticks(&self) -> &'static str {
        if self.queues > 1 { "nohz=off" } else { "" }
    }

    fn network_arguments(&self) -> Vec<String> {
        let side = match (self.side, self.version) {
            (Side::Client, QemuVersion::V7) => "reconnect=1".to_owned(),
            (Side::Client, QemuVersion::V10) => format!("reconnect-ms={}", self.reconnect_ms),
            (Side::Server, _) => "server=on,wait=off".to_owned(),
        };
        let mut device = format!("virtio-net-pci,netdev=n0,mac={},romfile=", self.mac());
        if self.queues > 1 {
            device.push_str(",mq=on");
        }
        match self.version {
            QemuVersion::V7 => device.push_str(",vectors=0"),
            QemuVersion::V10 => {
                let vectors = self.queues.saturating_mul(2).saturating_add(2);
                device.push_str(&format!(",vectors={vectors}"));
            }
        }
        for property in &self.properties {
            device.push(',');
            device.push_str(property);
        }
        let memory = "memory-backend-memfd,id=mem,size=192M,share=on";
        [
            ("-m", "192".to_owned()),
            ("-object", memory.to_owned()),
            ("-numa", "node,memdev=mem".to_owned()),
            ("-smp", self.queues.to_string()),
            ("-chardev", format!("socket,id=c0,path={},{side}", self.socket.display())),
            ("-netdev", format!("vhost-user,chardev=c0,id=n0,queues={}", self.queues)),
            ("-device", device),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value])
        .collect()
    }
}

impl Guest {
    /// Starts QEMU; the guest boots meanwhile, see [`Guest::wait_up`].
    ///
    /// # Errors
    /// QEMU or the image cannot be had, or QEMU cannot be started.
    pub fn start(environment: &Environment, spec: &GuestSpec, folder: &Path) -> Result<Self> {
        let mut command = environment.qemu(spec.version)?;
        let _ = command.args(["-M", &spec.machine]).args(&spec.arguments);
        let _ = command.args(spec.network_arguments());
        Self::launch(environment, &mut command, spec, folder)
    }

    /// Starts QEMU 10 with a configuration file (`-readconfig`) that names machine, memory and
    /// network; `spec` gives the guest's name and number. Sockets are relative to `folder`.
    ///
    /// # Errors
    /// As [`Guest::start`].
    pub fn start_config(
        environment: &Environment,
        config: &Path,
        spec: &GuestSpec,
        folder: &Path,
    ) -> Result<Self> {
        let mut command = environment.qemu(QemuVersion::V10)?;
        let _ = command.arg("-readconfig").arg(config).args(["-M", "accel=tcg"]);
        Self::launch(environment, &mut command, spec, folder)
    }

    /// Starts a guest of `image` without a vhost-user port on QEMU 10, with these arguments more:
    /// see [`Guest::wait_shell`].
    ///
    /// # Errors
    /// As [`Guest::start`].
    pub fn start_apart(
        environment: &Environment,
        image: Image,
        arguments: &[&str],
        folder: &Path,
    ) -> Result<Self> {
        let mut command = environment.qemu(QemuVersion::V10)?;
        let _ = command.args(["-M", "q35,accel=tcg", "-m", "512"]).args(arguments);
        Self::launch_image(image, &mut command, ("apart", 1, ""), folder)
    }

    fn launch(
        environment: &Environment,
        command: &mut Command,
        spec: &GuestSpec,
        folder: &Path,
    ) -> Result<Self> {
        let kernel = format!("{} {}", spec.ticks(), spec.kernel);
        let who = (spec.name.as_str(), spec.number, kernel.as_str());
        Self::launch_image(environment.image()?, command, who, folder)
    }

    fn launch_image(
        image: Image,
        command: &mut Command,
        (name, number, kernel): (&str, u8, &str),
        folder: &Path,
    ) -> Result<Self> {
        let _ = command
            .args(["-name", name, "-cpu", "max", "-display", "none", "-nodefaults"])
            .args(["-no-user-config", "-serial", "stdio"])
            .arg("-kernel")
            .arg(image.kernel)
            .arg("-initrd")
            .arg(image.initrd)
            .arg("-append")
            .arg(format!("console=ttyS0 quiet loglevel=1 panic=-1 {kernel}"))
            .current_dir(folder);
        let log = folder.join(format!("{name}.log"));
        let process = Process::spawn(name, command, &log)?;
        Ok(Self { process, position: 0, number })
    }

    /// Waits until the guest has booted and takes commands, and gives its interface an address.
    ///
    /// # Errors
    /// It does not come up in time.
    pub fn wait_up(&mut self) -> Result<()> {
        self.wait_shell()?;
        self.configure()
    }

    /// Waits until the guest has booted and takes commands.
    ///
    /// # Errors
    /// It does not come up in time.
    pub fn wait_shell(&mut self) -> Result<()> {
        let found = |text: &str| end_of_line_with(text, UP).map(|(end, _)| end);
        let end = self.process.wait_for("the guest's shell", self.position, BOOT_TIMEOUT, found)?;
        self.position = self.position.saturating_add(end);
        Ok(())
    }

    /// Gives `eth0` the guest's address and brings it up.
    ///
    /// # Errors
    /// There is no `eth0`.
    pub fn configure(&mut self) -> Result<()> {
        let address = self.address();
        self.run(&format!("ip addr add {address}/24 dev eth0 && ip link set eth0 up")).map(drop)
    }

    /// The process id of its QEMU.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// Runs a command line that ends within 30 seconds and returns its output.
    ///
    /// # Errors
    /// It fails or does not end.
    pub fn run(&mut self, line: &str) -> Result<String> {
        self.run_within(line, COMMAND_TIMEOUT)
    }

    /// Runs a command line and returns its output.
    ///
    /// # Errors
    /// It fails or does not end in time.
    pub fn run_within(&mut self, line: &str, timeout: Duration) -> Result<String> {
        ensure!(
            line.len() < 4000 && !line.contains('\n'),
            "a line for the guest is one short line"
        );
        self.process.send(line)?;
        let found = |text: &str| {
            let (end, status) = end_of_line_with(text, DONE)?;
            Some((end, status, text.to_owned()))
        };
        let what = format!("the end of `{line}`");
        let (end, status, text) = self.process.wait_for(&what, self.position, timeout, found)?;
        self.position = self.position.saturating_add(end);
        let said = text.split(DONE).next().unwrap_or_default().trim().to_owned();
        ensure!(status == "0", "`{line}` failed with {status} in guest {}: {said}", self.number);
        Ok(said)
    }

    /// Pings until an answer comes, for at most 20 seconds: links and rings need a moment.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_reachable(&mut self, address: &str) -> Result<()> {
        for _ in 0..20 {
            if self.run(&format!("ping -c 1 -W 1 {address} >/dev/null")).is_ok() {
                return Ok(());
            }
        }
        let state = self.state().unwrap_or_default();
        bail!("guest {} cannot reach {address}\n{state}", self.number)
    }

    /// What it knows of its interface, its neighbours, and the interrupts of each virtual CPU.
    ///
    /// # Errors
    /// It does not answer.
    pub fn state(&mut self) -> Result<String> {
        let look = "ip addr show eth0; ip neigh; cat /proc/net/dev; ethtool -S eth0; \
                    grep -e CPU -e virtio -e LOC -e RES /proc/interrupts; cat /proc/softirqs";
        let shown = self.run(look)?;
        Ok(format!("guest {}:\n{shown}", self.number))
    }

    /// Starts an iperf3 server and waits until it listens.
    ///
    /// # Errors
    /// It does not listen in time.
    pub fn iperf_server(&mut self) -> Result<()> {
        let _ = self.run("iperf3 -s -D >/dev/null")?;
        self.wait_listening(IPERF_PORT)
    }

    /// Waits until something listens on a TCP port: a daemon's command ends before it does.
    ///
    /// # Errors
    /// Nothing listens in time.
    pub fn wait_listening(&mut self, port: u16) -> Result<()> {
        // State 0A is LISTEN.
        let line = format!(
            "until cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':{port:04X} [^ ]* 0A '; \
             do sleep 0.1; done"
        );
        self.run(&line).map(drop).with_context(|| format!("nothing listens on port {port}"))
    }

    /// Runs an iperf3 client against a server at `address` and returns the bytes received there.
    ///
    /// # Errors
    /// iperf3 fails.
    pub fn iperf(&mut self, address: &str, seconds: u32, streams: u16) -> Result<u64> {
        let line = format!("iperf3 -J -c {address} -t {seconds} -P {streams}");
        let timeout = Duration::from_secs(u64::from(seconds).saturating_add(30));
        let shown = self.run_within(&line, timeout)?;
        let json: serde_json::Value =
            serde_json::from_str(&shown).with_context(|| format!("iperf3 says: {shown}"))?;
        let bytes = json.pointer("/end/sum_received/bytes").and_then(serde_json::Value::as_u64);
        bytes.with_context(|| format!("iperf3 says: {shown}"))
    }

    /// Whether the driver has negotiated a virtio feature bit.
    ///
    /// # Errors
    /// The guest has no virtio device.
    pub fn has_feature(&mut self, bit: usize) -> Result<bool> {
        let bits = self.run("cat /sys/bus/virtio/devices/virtio0/features")?;
        Ok(bits.as_bytes().get(bit).copied() == Some(b'1'))
    }

    /// Takes the network driver from the device and gives it back.
    ///
    /// # Errors
    /// The guest's kernel refuses.
    pub fn rebind_driver(&mut self) -> Result<()> {
        let driver = "/sys/bus/virtio/drivers/virtio_net";
        let _ = self.run(&format!("echo virtio0 >{driver}/unbind"))?;
        let _ = self.run(&format!("echo virtio0 >{driver}/bind"))?;
        self.configure()
    }

    /// Reboots the guest and waits until it is up again.
    ///
    /// # Errors
    /// It does not come up.
    pub fn reboot(&mut self) -> Result<()> {
        self.process.send("reboot -f")?;
        self.wait_up()
    }

    /// Powers the guest off and waits for QEMU to end well.
    ///
    /// # Errors
    /// QEMU fails or does not end.
    pub fn power_off(mut self) -> Result<()> {
        self.process.send("poweroff -f")?;
        let status = self.process.finish(POWEROFF_TIMEOUT)?;
        ensure!(status.success(), "QEMU ended with {status}\n{}", self.process.tail());
        Ok(())
    }
}

/// The position after the line that starts with `marker`, and the rest of that line.
fn end_of_line_with(text: &str, marker: &str) -> Option<(u64, String)> {
    let (before, rest) = text.split_once(marker)?;
    let (word, _) = rest.split_once('\n')?;
    let length = [before.len(), marker.len(), word.len(), 1].iter().sum::<usize>();
    Some((u64::try_from(length).ok()?, word.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_with_a_whole_line() {
        assert_eq!(end_of_line_with("x\n@@DONE 0", DONE), None);
        assert_eq!(end_of_line_with("x\n@@DONE 1\r\nmore", DONE), Some((12, "1".to_owned())));
    }

    #[test]
    fn qemu_7_gets_no_msi_x() {
        let mut spec = GuestSpec::new(1, PathBuf::from("/s"));
        spec.version = QemuVersion::V7;
        assert!(spec.network_arguments().iter().any(|argument| argument.contains("vectors=0")));
    }
}
