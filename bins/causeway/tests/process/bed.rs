//! A running `causeway` and what tests ask of it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_causeway");
const PATIENCE: Duration = Duration::from_secs(10);

/// A folder with a control socket, a log, and perhaps a running switch.
pub(crate) struct Bed {
    pub(crate) folder: TempDir,
    child: Option<Child>,
    /// The first process's environment has this, too; its successors' has not.
    pub(crate) environment: Vec<(String, String)>,
}

impl Bed {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), child: None, environment: Vec::new() }
    }

    /// Starts a switch and waits until it listens.
    pub(crate) fn started(arguments: &[&str]) -> Self {
        let mut bed = Self::new();
        bed.start(arguments);
        bed
    }

    pub(crate) fn start(&mut self, arguments: &[&str]) {
        self.start_command(&mut Command::new(PROGRAM), arguments);
    }

    /// Starts this program, which is a switch, in its own way.
    pub(crate) fn start_command(&mut self, command: &mut Command, arguments: &[&str]) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path());
        let before = self.log().len();
        let child = command
            .arg("run")
            .arg("--control")
            .arg(self.control())
            .args(arguments)
            // Which threads share a heap is chance otherwise, and mappings are counted.
            .env("MALLOC_ARENA_MAX", "1")
            .envs(self.environment.clone())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
        eventually("it listens", || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "ended at start: {}", self.log());
            self.log().get(before..).unwrap().contains(" listening ")
        });
    }

    /// Another process takes the switch over; the old one has to leave with 0.
    pub(crate) fn take_over(&mut self, arguments: &[&str]) {
        let log = std::fs::OpenOptions::new().append(true).open(self.log_path());
        let before = self.log().len();
        let mut child = Command::new(PROGRAM)
            .args(["run", "--take-over"])
            .arg(self.control())
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        eventually("it listens", || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "ended at start: {}", self.log());
            self.log().get(before..).unwrap().contains(" listening ")
        });
        let mut old = self.child.replace(child).unwrap();
        let mut status = None;
        eventually("the old one leaves", || {
            status = old.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(0), "{}", self.log());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.path("log")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(self.id().try_into().unwrap()).unwrap();
        kill_process(id, signal).unwrap();
    }

    /// Ends the switch by a signal.
    pub(crate) fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let mut child = self.child.take().unwrap();
        let mut status = None;
        eventually("it ends", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Runs `causeway ctl`: exit code, standard output and standard error.
    pub(crate) fn ctl_full(&self, arguments: &[&str]) -> (i32, String, String) {
        let control = self.control();
        let mut all = vec!["ctl", "--control", control.to_str().unwrap()];
        all.extend_from_slice(arguments);
        causeway(self.folder.path(), &all)
    }

    /// Starts `causeway ctl` with pipes for its outputs.
    pub(crate) fn spawn_ctl(&self, arguments: &[&str]) -> Child {
        Command::new(PROGRAM)
            .args(["ctl", "--control", self.control().to_str().unwrap()])
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs `causeway ctl`, which has to succeed, and returns what it prints.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let (code, out, error) = self.ctl_full(arguments);
        assert_eq!((code, error.as_str()), (0, ""), "{arguments:?}");
        out
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend_from_slice(arguments);
        serde_json::from_str(&self.ctl(&all)).unwrap()
    }

    /// A port of `ctl ports`.
    pub(crate) fn port(&self, name: &str) -> Value {
        let view = self.json(&["ports"]);
        let ports = view["ports"].as_array().unwrap();
        let found = ports.iter().find(|port| port["name"] == name);
        found.unwrap_or_else(|| panic!("no port {name} in {view}")).clone()
    }

    pub(crate) fn wait_state(&self, name: &str, state: &str) -> Value {
        let mut port = Value::Null;
        eventually(&format!("port {name} is {state}, not {port}"), || {
            port = self.port(name);
            port["state"] == state
        });
        port
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the program to its end: exit code, standard output and standard error.
pub(crate) fn causeway(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(PROGRAM).args(arguments).current_dir(folder).output().unwrap();
    let Output { status, stdout, stderr } = output;
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Waits until `done`.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not so after {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What came, what went and what is on its way. What is on its way is itself the difference of
/// two sums, so only a ledger without it says that no frame was lost.
pub(crate) fn ledger(bed: &Bed) -> (u64, u64, u64) {
    let stats = bed.json(&["stats"]);
    let switch = |key: &str| stats["switch"][key].as_u64().unwrap();
    let mut came = switch("flood_copies") + switch("segments_added") + switch("originated");
    let mut went = switch("merged");
    for port in stats["ports"].as_array().unwrap() {
        for queue in port["queues"].as_array().unwrap() {
            came += queue["rx_frames"].as_u64().unwrap();
            went += queue["tx_frames"].as_u64().unwrap();
            let drops = queue["drops"].as_object().unwrap().values();
            went += drops.map(|count| count.as_u64().unwrap()).sum::<u64>();
        }
    }
    (came, went, switch("held"))
}
