//! `causeway-guest` as a process, against a running `causeway`: what its README shows, and how it
//! ends.
//!
//! The switch is the release build: `$CAUSEWAY_BIN`, which `cargo xtask test` sets, or the one in
//! the target folder that this test was built into.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const GUEST: &str = env!("CARGO_BIN_EXE_causeway-guest");
const PATIENCE: Duration = Duration::from_secs(10);

/// A running switch with two ports, in a folder of its own.
struct Bed {
    folder: TempDir,
    switch: Child,
}

/// How a program ended and what it said.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: String,
    error: String,
}

impl Bed {
    /// With the command line that the README shows.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let line = line_of(include_str!("../README.md"), "causeway run ", "--port");
        let words = in_folder(line.trim_end_matches('&'), folder.path());
        let switch = Command::new(causeway())
            .args(&words[1..])
            .arg("--control")
            .arg(folder.path().join("control.sock"))
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut bed = Self { folder, switch };
        let start = Instant::now();
        // A look at the sockets would be a front end, and a port has one at a time.
        while !bed.log().contains("listening") {
            let ended = bed.switch.try_wait().unwrap();
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "{}", bed.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        bed
    }

    /// Waits until the first port has its guest.
    fn wait_up(&self) {
        let mut ctl = Command::new(causeway());
        let _ = ctl.arg("ctl").arg("--control").arg(self.path("control.sock"));
        let _ = ctl.args(["--json", "ports"]);
        let start = Instant::now();
        loop {
            let view = json(&run(&mut ctl));
            let ports = view["ports"].as_array().unwrap();
            if ports.iter().any(|port| port["name"] == "g0" && port["state"] == "up") {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{view}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// A guest on the first `sockets` ports, with the words of `job`.
    fn guest(&self, sockets: usize, job: &str) -> Command {
        let mut command = Command::new(GUEST);
        for index in 0..sockets {
            let _ = command.arg("--socket").arg(self.path(&format!("g{index}.sock")));
        }
        let _ = command.arg("--json").args(job.split_whitespace());
        command
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.switch.kill();
        let _ = self.switch.wait();
    }
}

fn causeway() -> PathBuf {
    let built = || Path::new(GUEST).ancestors().nth(2).unwrap().join("release/causeway");
    let path = std::env::var_os("CAUSEWAY_BIN").map_or_else(built, PathBuf::from);
    assert!(path.is_file(), "no {}: cargo build --release -p causeway", path.display());
    path
}

/// The first line of `readme` that starts with `start` and has `part` in it.
fn line_of<'a>(readme: &'a str, start: &str, part: &str) -> &'a str {
    let line = readme.lines().find(|line| line.starts_with(start) && line.contains(part));
    line.unwrap_or_else(|| panic!("no line {start} with {part} in the README"))
}

/// The words of a command line, its sockets in `folder` instead of /run.
fn in_folder(line: &str, folder: &Path) -> Vec<String> {
    let line = line.replace("/run/", &format!("{}/", folder.display()));
    line.split_whitespace().map(str::to_owned).collect()
}

fn run(command: &mut Command) -> Ended {
    let done = command.stdin(Stdio::null()).output().unwrap();
    Ended {
        code: done.status.code(),
        out: String::from_utf8(done.stdout).unwrap(),
        error: String::from_utf8(done.stderr).unwrap(),
    }
}

fn json(ended: &Ended) -> Value {
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

#[test]
fn the_readmes_load_arrives_whole() {
    for readme in [include_str!("../README.md"), include_str!("../../../README.md")] {
        let bed = Bed::start();
        let line = line_of(readme, "causeway-guest ", "--generate --verify");
        let words = in_folder(line, bed.folder.path());
        let ended = run(Command::new(GUEST).args(&words[1..]).arg("--json"));
        let log = || format!("{line}: {}\nthe switch says: {}", ended.out, bed.log());
        assert_eq!((ended.code, ended.error.as_str()), (Some(0), ""), "{}", log());
        let totals = json(&ended);
        assert_eq!(totals["tx_frames"], 1_000_000);
        assert_eq!(totals["rx_frames"], 1_000_000);
        for wrong in ["lost", "out_of_order", "duplicated", "corrupt"] {
            assert_eq!(totals[wrong], 0, "{wrong}");
        }
    }
}

#[test]
fn nothing_to_verify_is_a_failure() {
    let bed = Bed::start();
    let ended = run(&mut bed.guest(1, "--receive --verify --seconds 1"));
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.error, "causeway-guest: no test frame arrived\n");
    let totals = json(&ended);
    assert_eq!(totals["rx_frames"], 0);
    let seconds = totals["seconds"].as_f64().unwrap();
    assert!((1.0..9.0).contains(&seconds), "it ran for a second, not for {seconds} s");
}

#[test]
fn without_verify_a_quiet_receiver_succeeds() {
    let bed = Bed::start();
    let mut guest = bed.guest(1, "--receive").stdout(Stdio::piped()).spawn().unwrap();
    bed.wait_up();
    kill_process(Pid::from_child(&guest), Signal::TERM).unwrap();
    assert!(guest.wait().unwrap().success());
}

#[test]
fn a_receiver_verifies_what_another_guest_sends() {
    let bed = Bed::start();
    // It has room for all frames, should they come before it runs again.
    let job = "--receive --verify --count 1000 --seconds 20 --queue-size 1024";
    let receiver = bed.guest(1, job).stdout(Stdio::piped()).spawn().unwrap();
    // Frames that come before it is connected would be missing at their flow's start.
    bed.wait_up();
    let mut sender = Command::new(GUEST);
    let _ = sender.arg("--socket").arg(bed.path("g1.sock"));
    let sent = run(sender.args(["--generate", "--count", "1000", "--rate-pps", "5000"]));
    assert_eq!(sent.code, Some(0), "{sent:?}");
    let done = receiver.wait_with_output().unwrap();
    let totals: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(done.status.success(), "{totals}");
    assert_eq!((&totals["rx_frames"], &totals["corrupt"]), (&1000.into(), &0.into()));
}

#[test]
fn wrong_use_is_one_line_and_status_2() {
    let cases = [
        ("--generate", "the following required arguments were not provided: --socket <PATH>"),
        ("--socket a --generate --sped 5", "unexpected argument '--sped' found"),
        ("--socket a --generate --verify", "--verify: needs a second --socket where"),
        ("--socket a --generate --count 0", "invalid value '0' for '--count <N>'"),
    ];
    for (words, text) in cases {
        let ended = run(Command::new(GUEST).args(words.split(' ')));
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""), "{words}");
        let told = format!("causeway-guest: {text}");
        assert!(ended.error.starts_with(&told), "{words}: {}", ended.error);
        assert_eq!(ended.error.lines().count(), 1, "{words}: {}", ended.error);
    }
    let help = run(Command::new(GUEST).arg("--help"));
    assert_eq!((help.code, help.error.as_str()), (Some(0), ""));
    assert!(help.out.contains("--generate"));
}
