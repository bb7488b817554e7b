//! The switch, the guests and the wires of a soak, and what an action does to them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::environment::host::is_root;
use conformance::process::tied_command;
use conformance::{Netns, Process, Scratch, Switch};
use rustix::process::{Pid, Signal, kill_process};

use super::checks::{Footprint, Totals, said};
use super::hostile;
use super::plan::{Action, EXTRAS, Manner, UPLINKS};

/// Frames a second of the good pair: its rings hold half a second of them, so that a machine which
/// is busy elsewhere costs none.
const GOOD_PPS: &str = "500";
/// Captures at a time.
const CAPTURES: usize = 4;
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
    /// Before anything happened.
    before: Footprint,
    /// Processes that took over.
    taken_over: u32,
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
        std::fs::write(folder.join("soak.toml"), config(&folder, wires.as_ref(), false))?;
        let config = folder.join("soak.toml");
        let config = config.to_str().context("the folder is no text")?;
        let switch = Switch::start_with(&folder, &["--config", config])?;
        let receiver = guest(&folder, "g2", &["--receive", "--verify", "--packed"])?;
        switch.wait_ports_up(&["g2"])?;
        let sender = guest(&folder, "g1", &["--generate", "--rate-pps", GOOD_PPS])?;
        switch.wait_ports_up(&["g1"])?;
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
            before,
            taken_over: 0,
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
        for name in ["g1", "g2"] {
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
        totals.check().with_context(|| self.switch.counters())?;
        let _ = self.switch.check_ledger()?;
        let (taken_over, started) = (self.taken_over, self.started);
        self.switch.stop()?;
        Ok(format!(
            "{started} guests started, {taken_over} take-overs, {} of {} good frames came; {after}",
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
        let id = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("no pid")?;
        // It may have ended.
        if kill_process(id, Signal::STOP).is_ok() {
            std::thread::sleep(FREEZE);
            kill_process(id, Signal::CONT)?;
        }
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
    let extras = (0..EXTRAS).map(|number| port(&format!("e{number}"), ""));
    let uplinks = wires.into_iter().flat_map(Wires::ports);
    let more = more.then(|| port("r1", ""));
    good.into_iter().chain(extras).chain(uplinks).chain(more).collect()
}

fn guest(folder: &std::path::Path, name: &str, arguments: &[&str]) -> Result<Process> {
    let mut command = tied_command(conformance::switch::guest_program()?);
    let socket = folder.join(format!("{name}.sock"));
    let _ = command.arg("--json").arg("--socket").arg(socket).args(arguments);
    Process::spawn(name, &mut command, &folder.join(format!("{name}.log")))
}
