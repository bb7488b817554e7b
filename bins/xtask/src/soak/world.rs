//! The switch, the guests and the wires of a soak, and what an action does to them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::environment::host::{hugepages, is_root};
use conformance::process::tied_command;
use conformance::virtio_user::USUAL_FRAME;
use conformance::{
    Environment, Netns, Process, Scratch, Switch, Topology, VirtioUser, VirtioUserSpec,
};
use rustix::process::{Pid, Signal, kill_process};

use super::checks::{Footprint, Totals, said};
use super::hostile;
use super::plan::{Action, EXTRAS, Manner, UPLINKS};

/// Frames a second of the good pair: its rings hold half a second of them, so that a machine which
/// is busy elsewhere costs none.
const GOOD_PPS: &str = "500";
/// Captures at a time.
const CAPTURES: usize = 4;
/// Entries of the receiver's rings: what the sender makes up for after a crash has room.
const RING: &str = "4096";
/// The ports of DPDK's front end, which listens.
const USERS: [&str; 2] = ["v0", "v1"];
const FREEZE: Duration = Duration::from_millis(150);
const REST: Duration = Duration::from_millis(500);

/// Everything that is there.
pub(super) struct World {
    pub(super) switch: Switch,
    folder: PathBuf,
    /// Numbered frames, and who counts them.
    sender: Process,
    receiver: Process,
    extras: BTreeMap<u8, Process>,
    captures: Vec<Process>,
    wires: Option<Wires>,
    /// DPDK's front end, if there is one on this machine.
    user: Option<VirtioUser>,
    /// Before anything happened.
    before: Footprint,
    /// Processes that took over.
    taken_over: u32,
    crashes: u32,
    started: u32,
}

/// Namespaces with the uplinks' interfaces, and with what is behind them.
struct Wires {
    place: Netns,
    peer: Netns,
}

const KINDS: [(&str, &str); UPLINKS as usize] =
    [("tap", "u0"), ("af-xdp", "u1"), ("packet-mmap", "u2")];

impl Wires {
    fn new() -> Result<Self> {
        let wires = Self { place: Netns::new()?, peer: Netns::new()? };
        (1..UPLINKS).try_for_each(|number| wires.join(number))?;
        Ok(wires)
    }

    /// A veth pair; a tap is made by who opens it.
    fn join(&self, number: u8) -> Result<()> {
        let (ours, theirs) = (format!("u{number}"), format!("p{number}"));
        let peer = self.peer.name();
        let _ = self
            .place
            .ip(&["link", "add", &ours, "type", "veth", "peer", "name", &theirs, "netns", peer])?;
        let _ = self.peer.ip(&["link", "set", &theirs, "up"])?;
        Ok(())
    }

    fn ports(&self) -> impl Iterator<Item = String> {
        KINDS.iter().map(|(kind, name)| {
            format!(
                "[[port]]\nkind = \"{kind}\"\nname = \"{name}\"\nifname = \"{name}\"\n\
                 netns = \"{}\"\nwait = true\n",
                self.place.name()
            )
        })
    }

    fn flap(&self, number: u8) -> Result<()> {
        let name = format!("u{number}");
        // It may be absent just now.
        let _ = self.place.ip(&["link", "set", &name, "down"]);
        std::thread::sleep(Duration::from_millis(30));
        let _ = self.place.ip(&["link", "set", &name, "up"]);
        Ok(())
    }

    fn replace(&self, number: u8) -> Result<()> {
        let _ = self.place.ip(&["link", "del", &format!("u{number}")]);
        if number == 0 { Ok(()) } else { self.join(number) }
    }
}

impl World {
    pub(super) fn start(scratch: &Scratch) -> Result<Self> {
        let folder = scratch.folder().to_owned();
        let wires = is_root().then(Wires::new).transpose()?;
        let mut user = is_root().then(|| virtio_user(&folder)).transpose()?.flatten();
        std::fs::write(folder.join("soak.toml"), config(&folder, wires.as_ref(), false))?;
        let config = folder.join("soak.toml");
        let config = config.to_str().context("the folder is no text")?;
        let switch = Switch::start_with(&folder, &["--config", config])?;
        let receiver = guest(
            &folder,
            "g2",
            &["--receive", "--verify", "--packed", "--reconnect", "--queue-size", RING],
        )?;
        switch.wait_ports_up(&["g2"])?;
        let sender = guest(&folder, "g1", &["--generate", "--rate-pps", GOOD_PPS, "--reconnect"])?;
        switch.wait_ports_up(&["g1"])?;
        if let Some(user) = &mut user {
            user.wait_up()?;
            switch.wait_ports_up(&USERS)?;
        }
        std::thread::sleep(REST);
        let before = Footprint::of(switch.id())?;
        Ok(Self {
            switch,
            folder,
            sender,
            receiver,
            extras: BTreeMap::new(),
            captures: Vec::new(),
            wires,
            user,
            before,
            taken_over: 0,
            crashes: 0,
            started: 0,
        })
    }

    pub(super) fn act(&mut self, action: &Action) -> Result<()> {
        match *action {
            Action::Attach(port, manner) => self.attach(port, manner),
            Action::Detach(port) => self.leave(port, Signal::TERM),
            Action::Kill(port) => self.leave(port, Signal::KILL),
            Action::Freeze(port) => self.freeze(port),
            Action::Lie(port, seed) => {
                hostile::lie(&self.socket(port), seed);
                Ok(())
            }
            Action::Hotplug(port, seed) => hostile::hotplug(&self.socket(port), seed),
            Action::Flap(number) => self.wires.as_ref().map_or(Ok(()), |wires| wires.flap(number)),
            Action::Replace(number) => {
                self.wires.as_ref().map_or(Ok(()), |wires| wires.replace(number))
            }
            Action::Reload(more) => self.reload(more),
            Action::PortCycle => self.port_cycle(),
            Action::Reset(port) => {
                // There may be nothing to reset.
                let _ = self.switch.ctl(&["port", "reset", &format!("e{port}")]);
                Ok(())
            }
            Action::TakeOver => self.take_over(),
            Action::Crash => self.crash(),
            Action::Circulate(bursts) => self.circulate(bursts),
            Action::Capture => self.capture(),
            Action::EndCaptures => {
                self.captures.clear();
                Ok(())
            }
            Action::Flush => self.switch.ctl(&["fdb", "flush"]).map(|_| ()),
        }
    }

    /// The good pair is there, and so is the switch.
    pub(super) fn looks_well(&mut self) -> Result<()> {
        let stats = self.switch.stats()?;
        let users = USERS.iter().filter(|_| self.user.is_some());
        for name in ["g1", "g2"].iter().chain(users) {
            let port = stats.port(name)?;
            ensure!(port.state == "up", "{name} is {}: {:?}", port.state, port.reason);
        }
        Ok(())
    }

    /// Ends all but the good pair, checks what is left, ends that too, and counts its frames.
    pub(super) fn finish(mut self) -> Result<String> {
        for port in 0..EXTRAS {
            self.leave(port, Signal::TERM)?;
        }
        self.captures.clear();
        self.reload(false)?;
        for port in 0..EXTRAS {
            let _ = self.switch.ctl(&["port", "reset", &format!("e{port}")]);
        }
        std::thread::sleep(REST);
        let after = self.before.again(&self.switch)?;
        let refused = self.refused_calls()?;
        ensure!(refused == 0, "the sandbox refused {refused} system calls");
        ensure!(self.sender.stop()?.success(), "the sender: {}", self.sender.tail());
        std::thread::sleep(REST);
        let _ = self.receiver.stop()?;
        let totals = Totals::of(&said(&self.sender)?, &said(&self.receiver)?)?;
        totals.check(self.crashes).with_context(|| self.switch.counters())?;
        let _ = self.switch.check_ledger()?;
        let with = if self.user.is_some() { "with" } else { "without" };
        self.user.take().map_or(Ok(()), VirtioUser::quit)?;
        let (taken_over, crashes, started) = (self.taken_over, self.crashes, self.started);
        self.switch.stop()?;
        Ok(format!(
            "{with} virtio-user, {started} guests started, {taken_over} take-overs, {crashes} \
             crashes, {} of {} good frames came; {after}",
            totals.got, totals.sent
        ))
    }

    fn refused_calls(&self) -> Result<u64> {
        let shown = self.switch.ctl(&["--json", "version"])?;
        let version: serde_json::Value = serde_json::from_str(&shown)?;
        let refused = version.pointer("/sandbox/refused");
        Ok(refused.and_then(serde_json::Value::as_u64).unwrap_or(0))
    }

    fn socket(&self, port: u8) -> PathBuf {
        self.folder.join(format!("e{port}.sock"))
    }

    fn attach(&mut self, port: u8, manner: Manner) -> Result<()> {
        self.leave(port, Signal::TERM)?;
        let number = |n: u32| n.to_string();
        let (queues, rate) = (number(manner.queues.into()), number(manner.rate_pps));
        let size = number(manner.size);
        let mut arguments = vec!["--queues", &queues];
        if manner.packed {
            arguments.push("--packed");
        }
        if port.is_multiple_of(2) {
            // The others end with the switch.
            arguments.push("--reconnect");
        }
        if manner.rate_pps == 0 {
            arguments.push("--receive");
        } else {
            arguments.extend(["--generate", "--rate-pps", &rate, "--size", &size]);
        }
        let process = guest(&self.folder, &format!("e{port}"), &arguments)?;
        self.started = self.started.saturating_add(1);
        let _ = self.extras.insert(port, process);
        Ok(())
    }

    fn leave(&mut self, port: u8, signal: Signal) -> Result<()> {
        let Some(mut process) = self.extras.remove(&port) else { return Ok(()) };
        if signal == Signal::TERM {
            // It may have gone before: a lie at its port does not hurt it, a deleted port does.
            let _ = process.stop();
        }
        drop(process);
        Ok(())
    }

    fn freeze(&mut self, port: u8) -> Result<()> {
        let Some(process) = self.extras.get(&port) else { return Ok(()) };
        // It may have ended.
        if signal(process, Signal::STOP).is_ok() {
            std::thread::sleep(FREEZE);
            signal(process, Signal::CONT)?;
        }
        Ok(())
    }

    /// Frames that come while their receiver is not there yet would be lost for that, so the sender
    /// stands still from the end of the old process until the receiver has come to the new one.
    fn crash(&mut self) -> Result<()> {
        let config = self.folder.join("soak.toml");
        let config = config.to_str().context("the folder is no text")?;
        self.captures.clear();
        let sender = &self.sender;
        self.switch.crash(&["--config", config], || signal(sender, Signal::STOP))?;
        self.crashes = self.crashes.saturating_add(1);
        let came = self.switch.wait_ports_up(&["g2"]);
        signal(&self.sender, Signal::CONT)?;
        came?;
        self.switch.wait_ports_up(&["g1"])?;
        if self.user.is_some() {
            self.switch.wait_ports_up(&USERS)?;
        }
        Ok(())
    }

    /// DPDK's frames go round for a moment, through both of its ports.
    fn circulate(&mut self, bursts: u8) -> Result<()> {
        let Some(user) = &mut self.user else { return Ok(()) };
        let moved = |switch: &Switch| -> Result<[u64; 2]> {
            let stats = switch.stats()?;
            let [a, b] = USERS.map(|name| stats.port(name).map(|port| port.rx_frames()));
            Ok([a?, b?])
        };
        let before = moved(&self.switch)?;
        user.circulate(64, bursts.into())?;
        std::thread::sleep(Duration::from_millis(30));
        let _ = user.stop_forwarding()?;
        let after = moved(&self.switch)?;
        let stuck = before.iter().zip(after).any(|(before, after)| after <= *before);
        ensure!(!stuck, "virtio-user's frames are stuck: {}", self.switch.counters());
        Ok(())
    }

    fn reload(&mut self, more: bool) -> Result<()> {
        let text = config(&self.folder, self.wires.as_ref(), more);
        std::fs::write(self.folder.join("soak.toml"), text)?;
        // A port that the file names and that cannot be opened just now makes it complain.
        let _ = self.switch.ctl(&["reload"]);
        Ok(())
    }

    fn port_cycle(&mut self) -> Result<()> {
        let socket = self.folder.join("x.sock");
        let spec = format!("vhost-user:name=x,socket={}", socket.display());
        let _ = self.switch.ctl(&["port", "add", &spec])?;
        let process = guest(&self.folder, "x", &["--receive"])?;
        std::thread::sleep(Duration::from_millis(20));
        let _ = self.switch.ctl(&["port", "del", "x"])?;
        drop(process);
        Ok(())
    }

    fn take_over(&mut self) -> Result<()> {
        let config = self.folder.join("soak.toml");
        let config = config.to_str().context("the folder is no text")?;
        self.switch.take_over(&["--config", config])?;
        self.taken_over = self.taken_over.saturating_add(1);
        Ok(())
    }

    fn capture(&mut self) -> Result<()> {
        if self.captures.len() >= CAPTURES {
            return Ok(());
        }
        let mut command = tied_command(conformance::switch::program()?);
        let _ = command.arg("ctl").arg("--control").arg(self.folder.join("control.sock"));
        let _ = command.args(["capture", "g1", "--drops", "--write", "/dev/null"]);
        let log = self.folder.join("capture.log");
        self.captures.push(Process::spawn("capture", &mut command, &log)?);
        Ok(())
    }
}

/// DPDK's testpmd with two virtio-user ports that listen; none where DPDK cannot be had.
fn virtio_user(folder: &std::path::Path) -> Result<Option<VirtioUser>> {
    let there = Environment::open().and_then(|environment| {
        hugepages()?;
        let _ = environment.testpmd()?;
        Ok(environment)
    });
    let environment = match there {
        Ok(environment) => environment,
        Err(error) => {
            println!("soak: without virtio-user: {error:#}");
            return Ok(None);
        }
    };
    let spec = VirtioUserSpec {
        sockets: USERS.map(|name| folder.join(format!("{name}.sock"))).to_vec(),
        topology: Topology::Loop,
        server: true,
        packed: true,
        mrg_rxbuf: true,
        in_order: false,
        vectorized: false,
        queues: 1,
        largest_frame: USUAL_FRAME,
        small_pages: false,
    };
    VirtioUser::start(&environment, &spec, folder).map(Some)
}

fn signal(process: &Process, signal: Signal) -> Result<()> {
    let id = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("no process id")?;
    Ok(kill_process(id, signal)?)
}

/// The configuration file, with one port more or without it.
fn config(folder: &std::path::Path, wires: Option<&Wires>, more: bool) -> String {
    let port = |name: &str, rest: &str| {
        let socket = folder.join(format!("{name}.sock"));
        format!(
            "[[port]]\nkind = \"vhost-user\"\nname = \"{name}\"\nsocket = \"{}\"\n{rest}\n",
            socket.display()
        )
    };
    let good = ["g1", "g2"].map(|name| port(name, "vlan = 10"));
    let users = USERS.iter().enumerate().map(|(index, name)| {
        let mac = VirtioUserSpec::mac(index);
        port(name, &format!("vlan = 30\nmode = \"client\"\nmac = \"{mac}\""))
    });
    let extras = (0..EXTRAS).map(|number| port(&format!("e{number}"), ""));
    let uplinks = wires.into_iter().flat_map(Wires::ports);
    let more = more.then(|| port("r1", ""));
    good.into_iter().chain(users).chain(extras).chain(uplinks).chain(more).collect()
}

fn guest(folder: &std::path::Path, name: &str, arguments: &[&str]) -> Result<Process> {
    let mut command = tied_command(conformance::switch::guest_program()?);
    let socket = folder.join(format!("{name}.sock"));
    let _ = command.arg("--json").arg("--socket").arg(socket).args(arguments);
    Process::spawn(name, &mut command, &folder.join(format!("{name}.log")))
}
