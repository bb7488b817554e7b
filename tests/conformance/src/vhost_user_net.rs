//! cloud-hypervisor's back end for a single guest, between its socket and a tap that it makes.
//!
//! Nobody packages the program: who wants it builds it (`benches/results/README.md` says how).
//!
//! **Limits** It is on CPU 0, serves one guest, and ends when that goes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::{Process, output, tied_command};

const START_TIMEOUT: Duration = Duration::from_secs(10);
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest ring that a guest of ours asks for.
const RING: u16 = 1024;
/// Its tap cannot be without an address: one of no network that anybody has.
const ADDRESS: &str = "ip=203.0.113.1,mask=255.255.255.255";

/// A running `vhost_user_net`.
#[derive(Debug)]
pub struct VhostUserNet {
    process: Process,
}

impl VhostUserNet {
    /// Listens on `socket`, and makes the interface `tap`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(program: &Path, socket: &Path, tap: &str, folder: &Path) -> Result<Self> {
        let shown = socket.display();
        let setup = format!("{ADDRESS},tap={tap},socket={shown},num_queues=2,queue_size={RING}");
        let mut command = tied_command("taskset");
        let _ = command.args(["--cpu-list", "0"]).arg(program).args(["--net-backend", &setup]);
        let log = folder.join("peer.log");
        let mut process = Process::spawn("vhost_user_net", &mut command, &log)?;
        // The tap is there before the socket is.
        let there = |_: &str| socket.exists().then_some(());
        process.wait_for("its socket", 0, START_TIMEOUT, there)?;
        Ok(Self { process })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Ends it, if its guest has not.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop().map(drop)
    }
}

/// What the program calls itself, and the commit that the tree around it is at, if there is one.
///
/// # Errors
/// The program cannot be run.
pub fn version(program: &Path) -> Result<String> {
    let shown = output(Command::new(program).arg("--version"), ASK_TIMEOUT)?;
    let folder = program.canonicalize()?.parent().map(PathBuf::from).unwrap_or_default();
    let mut git = Command::new("git");
    let _ = git.args(["describe", "--tags", "--always"]).current_dir(folder);
    Ok(version_line(&shown, output(&mut git, ASK_TIMEOUT).ok().as_deref()))
}

fn version_line(shown: &str, commit: Option<&str>) -> String {
    let number = shown.split_whitespace().last().unwrap_or_default();
    let commit = commit.map(|commit| format!(" ({})", commit.trim()));
    format!("vhost_user_net {number}{}", commit.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn one_that_ends_at_once_is_told_with_its_words() {
        let scratch = Scratch::new("vhost-user-net").unwrap();
        let socket = scratch.path("v0");
        let other = Path::new("ls");
        let error = VhostUserNet::start(other, &socket, "t0", scratch.folder()).unwrap_err();
        assert!(error.to_string().contains("option '--net-backend"), "{error}");
    }

    #[test]
    fn the_commit_says_more_than_the_number() {
        let shown = "vhost-user-net backend 0.1.0\n";
        let commit = Some("v53.0-12-gae44c29\n");
        assert_eq!(version_line(shown, commit), "vhost_user_net 0.1.0 (v53.0-12-gae44c29)");
        assert_eq!(version_line(shown, None), "vhost_user_net 0.1.0");
    }
}
