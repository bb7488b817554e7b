//! `causeway run`, started for a test and asked through `causeway ctl --json`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use crate::process::{Process, output, tied_command};
use crate::scratch::target_folder;

const START_TIMEOUT: Duration = Duration::from_secs(10);
const PORT_TIMEOUT: Duration = Duration::from_secs(30);
const QUIET_TIMEOUT: Duration = Duration::from_secs(5);
const CTL_TIMEOUT: Duration = Duration::from_secs(5);

/// A running switch.
#[derive(Debug)]
pub struct Switch {
    program: PathBuf,
    process: Process,
    control: PathBuf,
    folder: PathBuf,
    /// Processes that took over.
    successors: u32,
    /// What the process before this one has logged.
    predecessor: String,
}

/// What `ctl --json stats` says, as far as the tests look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Stats {
    /// Every port.
    pub ports: Vec<PortStats>,
    /// The counters that belong to no port.
    pub switch: SwitchStats,
    /// Every worker.
    #[serde(default)]
    pub workers: Vec<WorkerStats>,
}

/// One worker of [`Stats`].
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct WorkerStats {
    /// The share of the time since the start that had work.
    pub busy_ratio: f64,
    /// Frames that it took from ports.
    pub frames: u64,
}

/// One port of [`Stats`].
#[derive(Clone, Debug, Deserialize)]
pub struct PortStats {
    /// Its name.
    pub name: String,
    /// `up`, `waiting`, `down`, `broken` or `quarantined`.
    pub state: String,
    /// Why it is in that state.
    #[serde(default)]
    pub reason: Option<String>,
    /// Its queue pairs.
    pub queues: Vec<QueueStats>,
}

/// One queue pair of a port.
#[derive(Clone, Debug, Deserialize)]
pub struct QueueStats {
    /// The pair.
    pub index: u32,
    /// Frames into the switch.
    pub rx_frames: u64,
    /// Bytes into the switch.
    pub rx_bytes: u64,
    /// Frames out of the switch.
    pub tx_frames: u64,
    /// Bytes out of the switch.
    pub tx_bytes: u64,
    /// Dropped frames by reason.
    pub drops: std::collections::BTreeMap<String, u64>,
}

/// The part of [`Stats`] that belongs to no port.
#[derive(Clone, Debug, Deserialize)]
pub struct SwitchStats {
    flood_copies: u64,
    segments_added: u64,
    merged: u64,
    originated: u64,
    held: u64,
}

/// Both sides of the law of the ledger: nothing gets lost without a reason.
///
/// The switch computes `held` as what came and did not go, so adding it would balance any two
/// sides. Only a quiet switch, which holds nothing, shows that no frame is missing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ledger {
    /// Frames received, and frames made inside.
    pub came: u64,
    /// Frames sent, dropped or merged into others.
    pub went: u64,
    /// Frames on their way.
    pub held: u64,
    /// Dropped frames.
    pub drops: u64,
}

impl Stats {
    /// The sums of the ledger.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        let queues = || self.ports.iter().flat_map(|port| &port.queues);
        let rx: u64 = queues().map(|queue| queue.rx_frames).sum();
        let tx: u64 = queues().map(|queue| queue.tx_frames).sum();
        let drops: u64 = queues().flat_map(|queue| queue.drops.values()).sum();
        let switch = &self.switch;
        let came = [rx, switch.flood_copies, switch.segments_added, switch.originated];
        let went = [tx, drops, switch.merged];
        Ledger { came: came.iter().sum(), went: went.iter().sum(), held: switch.held, drops }
    }

    /// The port of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn port(&self, name: &str) -> Result<&PortStats> {
        let port = self.ports.iter().find(|port| port.name == name);
        port.with_context(|| format!("no port {name} in ctl stats"))
    }
}

impl Ledger {
    /// Whether every frame that came is accounted for, and nothing is on its way any more.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.came == self.went && self.held == 0
    }
}

impl PortStats {
    /// Frames into the switch, over all queues.
    #[must_use]
    pub fn rx_frames(&self) -> u64 {
        self.queues.iter().map(|queue| queue.rx_frames).sum()
    }

    /// Frames out of the switch, over all queues.
    #[must_use]
    pub fn tx_frames(&self) -> u64 {
        self.queues.iter().map(|queue| queue.tx_frames).sum()
    }

    /// How many queue pairs have received frames.
    #[must_use]
    pub fn active_queues(&self) -> usize {
        self.queues.iter().filter(|queue| queue.rx_frames > 0).count()
    }
}

/// The release build of `causeway`: `$CAUSEWAY_BIN`, or the one in cargo's target folder.
///
/// # Errors
/// There is none.
pub fn program() -> Result<PathBuf> {
    let named = std::env::var_os("CAUSEWAY_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| target_folder().join("release/causeway"));
    ensure!(path.is_file(), "no {}: cargo build --release -p causeway", path.display());
    Ok(path)
}

/// The release build of `causeway-guest`, beside that of `causeway`.
///
/// # Errors
/// There is none.
pub fn guest_program() -> Result<PathBuf> {
    let path = program()?.with_file_name("causeway-guest");
    ensure!(path.is_file(), "no {}: cargo build --release -p causeway-guest", path.display());
    Ok(path)
}

impl Switch {
    /// Starts a switch with these ports (each a SPEC) and waits until it answers.
    ///
    /// # Errors
    /// There is no program, or it ends or does not answer in time.
    pub fn start(folder: &Path, ports: &[String]) -> Result<Self> {
        let arguments: Vec<&str> = ports.iter().flat_map(|spec| ["--port", spec]).collect();
        Self::start_with(folder, &arguments)
    }

    /// Starts `causeway run` with these arguments (besides the control socket and, unless it is
    /// among them, the state directory), and with `$CAUSEWAY_LOG` as its log level.
    ///
    /// # Errors
    /// As [`Switch::start`].
    pub fn start_with(folder: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_program(program()?, folder, arguments)
    }

    /// The same with another build of `causeway`.
    ///
    /// # Errors
    /// As [`Switch::start`].
    pub fn start_program(program: PathBuf, folder: &Path, arguments: &[&str]) -> Result<Self> {
        let control = folder.join("control.sock");
        let mut command = tied_command(&program);
        let _ = command.arg("run").arg("--control").arg(&control).args(arguments);
        if !arguments.contains(&"--state-dir") {
            let _ = command.arg("--state-dir").arg(folder.join("state"));
        }
        if let Some(level) = std::env::var_os("CAUSEWAY_LOG") {
            let _ = command.arg("--log").arg(level);
        }
        let log = folder.join("causeway.log");
        let process = Process::spawn("causeway", &mut command, &log)?;
        let mut switch = Self {
            program,
            process,
            control,
            folder: folder.to_owned(),
            successors: 0,
            predecessor: String::new(),
        };
        let start = Instant::now();
        loop {
            match switch.stats() {
                Ok(_) => return Ok(switch),
                Err(error) if start.elapsed() > START_TIMEOUT => {
                    bail!("causeway does not answer: {error:#}\n{}", switch.process.tail())
                }
                Err(_) => {
                    // Gives up at once if the program has ended.
                    let end = switch.process.log_end()?;
                    let tick = Duration::from_millis(20);
                    let waited = switch.process.wait_for("an answer", end, tick, |_| None::<()>);
                    if let Err(error) = waited
                        && error.to_string().contains("ended")
                    {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Lets another process with these ports take over.
    ///
    /// # Errors
    /// As [`Switch::take_over`].
    pub fn take_over_with(&mut self, ports: &[String]) -> Result<()> {
        let arguments: Vec<&str> = ports.iter().flat_map(|spec| ["--port", spec]).collect();
        self.take_over(&arguments)
    }

    /// Lets another process, started with these arguments, take over.
    ///
    /// # Errors
    /// It does not, or the old process does not leave with status 0.
    pub fn take_over(&mut self, arguments: &[&str]) -> Result<()> {
        let mut command = tied_command(&self.program);
        let _ = command.arg("run").arg("--take-over").arg(&self.control).args(arguments);
        if !arguments.contains(&"--state-dir") {
            let _ = command.arg("--state-dir").arg(self.folder.join("state"));
        }
        self.successors = self.successors.saturating_add(1);
        let log = self.folder.join(format!("causeway.{}.log", self.successors));
        let mut new = Process::spawn("causeway", &mut command, &log)?;
        let listens = |text: &str| text.contains(" listening ").then_some(());
        new.wait_for("that it listens", 0, START_TIMEOUT, listens)
            .with_context(|| format!("the old process says:\n{}", self.process.tail()))?;
        let status = self.process.finish(START_TIMEOUT)?;
        ensure!(status.success(), "the old process left with {status}\n{}", self.process.tail());
        let log = self.process.output_from(0)?;
        ensure!(!log.contains("panicked"), "the old process panicked\n{}", self.process.tail());
        self.process = new;
        self.predecessor = log;
        Ok(())
    }

    /// Runs `causeway ctl` with these arguments and returns what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        let _ = command.arg("ctl").arg("--control").arg(&self.control).args(arguments);
        output(&mut command, CTL_TIMEOUT)
    }

    /// The counters now.
    ///
    /// # Errors
    /// The switch does not answer, or not as the design says.
    pub fn stats(&self) -> Result<Stats> {
        let shown = self.ctl(&["--json", "stats"])?;
        serde_json::from_str(&shown).with_context(|| format!("ctl --json stats says: {shown}"))
    }

    /// Waits until the named ports are up.
    ///
    /// # Errors
    /// One stays in another state: then with its reason.
    pub fn wait_ports_up(&self, names: &[&str]) -> Result<()> {
        let start = Instant::now();
        loop {
            let stats = self.stats()?;
            let mut down = Vec::new();
            for name in names {
                let port = stats.port(name)?;
                if port.state != "up" {
                    down.push(format!("{name} is {}: {:?}", port.state, port.reason));
                }
            }
            if down.is_empty() {
                return Ok(());
            }
            if start.elapsed() > PORT_TIMEOUT {
                bail!("{}\n{}", down.join("; "), self.process.tail());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until nothing is on its way and the ledger adds up; traffic may take a moment to
    /// come to rest.
    ///
    /// # Errors
    /// The two sides stay different, or frames stay held: they are lost.
    pub fn check_ledger(&self) -> Result<Stats> {
        let start = Instant::now();
        loop {
            let stats = self.stats()?;
            let ledger = stats.ledger();
            if ledger.is_settled() && ledger.came > 0 {
                return Ok(stats);
            }
            if start.elapsed() > QUIET_TIMEOUT {
                bail!("the ledger does not add up: {ledger:?}\n{stats:#?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Each port's counters in a line, for error messages.
    #[must_use]
    pub fn counters(&self) -> String {
        let Ok(stats) = self.stats() else { return "the switch does not answer".to_owned() };
        let line = |port: &PortStats| {
            let counted = port.queues.iter().flat_map(|queue| &queue.drops);
            let drops: Vec<_> = counted.filter(|(_, count)| **count > 0).collect();
            let (name, rx, tx) = (&port.name, port.rx_frames(), port.tx_frames());
            format!("{name} ({}): rx {rx}, tx {tx}, drops {drops:?}", port.state)
        };
        stats.ports.iter().map(line).collect::<Vec<_>>().join("; ")
    }

    /// The folder of its control socket and log.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Ends the switch with SIGKILL, does something while nobody serves, and starts it again with
    /// these arguments, as for [`Switch::start_with`].
    ///
    /// # Errors
    /// `meanwhile` fails, or the new process does not start.
    pub fn crash(
        &mut self,
        arguments: &[&str],
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let id = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw);
        kill_process(id.context("no process id")?, Signal::KILL)?;
        let _ = self.process.finish(START_TIMEOUT)?;
        let log = self.process.output_from(0)?;
        ensure!(!log.contains("panicked"), "causeway panicked\n{}", self.process.tail());
        meanwhile()?;
        *self = Self::start_program(self.program.clone(), &self.folder.clone(), arguments)?;
        Ok(())
    }

    /// Ends the switch with SIGKILL, as a crash does.
    pub fn kill(self) {
        drop(self.process);
    }

    /// What it has logged.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        self.process.output_from(0)
    }

    /// What the process has logged that this one took over from.
    #[must_use]
    pub fn predecessors_log(&self) -> &str {
        &self.predecessor
    }

    /// Ends the switch with SIGTERM and expects a clean exit.
    ///
    /// # Errors
    /// It does not end, or not with status 0, or its log speaks of a panic.
    pub fn stop(mut self) -> Result<()> {
        let status = self.process.stop()?;
        ensure!(status.success(), "causeway ended with {status}\n{}", self.process.tail());
        let log = self.process.output_from(0)?;
        ensure!(!log.contains("panicked"), "causeway panicked\n{}", self.process.tail());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_adds_all_columns() {
        let stats: Stats = serde_json::from_str(
            r#"{"ports":[{"name":"a","kind":"tap","state":"up","reason":null,"since_ms":1,"queues":[
                {"index":0,"rx_frames":5,"rx_bytes":0,"tx_frames":3,"tx_bytes":0,
                 "drops":{"no_destination":1,"vlan_untagged":2}}]}],
              "switch":{"flood_copies":2,"segments_added":1,"merged":1,"originated":0,"held":1}}"#,
        )
        .unwrap();
        assert_eq!(stats.ledger(), Ledger { came: 8, went: 7, held: 1, drops: 3 });
    }

    #[test]
    fn a_lost_frame_does_not_settle() {
        let quiet = Ledger { came: 8, went: 8, held: 0, drops: 3 };
        assert!(quiet.is_settled());
        assert!(!Ledger { went: 7, held: 1, ..quiet }.is_settled());
        assert!(!Ledger { came: 7, ..quiet }.is_settled());
    }
}
