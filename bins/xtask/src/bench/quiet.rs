//! Guests that are attached to the switch and do nothing.
//!
//! They are the ports of one `causeway-guest --receive`, which sleeps.

use std::path::PathBuf;

use anyhow::Result;
use conformance::process::{Process, tied_command};
use conformance::{Scratch, Switch};

use super::machine::guest_program;

/// The guests, attached; dropped, they go.
#[derive(Debug)]
pub(crate) struct Quiet {
    process: Process,
    names: Vec<String>,
}

impl Quiet {
    /// Names and sockets of as many ports.
    pub(crate) fn ports(count: u16, scratch: &Scratch) -> Vec<(String, PathBuf)> {
        let port = |number| {
            let name = format!("i{number}");
            let socket = scratch.path(&name);
            (name, socket)
        };
        (0..count).map(port).collect()
    }

    /// Attaches a guest to each of these ports, and waits until the switch serves all of them.
    pub(crate) fn attach(
        ports: &[(String, PathBuf)],
        switch: &Switch,
        scratch: &Scratch,
    ) -> Result<Self> {
        let mut command = tied_command("taskset");
        // The guests are away from the switch, also while they attach.
        let _ = command.args(["--cpu-list", "1"]).arg(guest_program()?).arg("--receive");
        for (_, socket) in ports {
            let _ = command.arg("--socket").arg(socket);
        }
        let process = Process::spawn("causeway-guest", &mut command, &scratch.path("quiet.log"))?;
        let names = ports.iter().map(|(name, _)| name.clone()).collect();
        let quiet = Self { process, names };
        quiet.wait_up(switch)?;
        Ok(quiet)
    }

    fn wait_up(&self, switch: &Switch) -> Result<()> {
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        switch.wait_ports_up(&names)
    }

    /// Ends the guests; an error if one was not attached any more.
    pub(crate) fn stop(mut self, switch: &Switch) -> Result<()> {
        self.wait_up(switch)?;
        self.process.stop().map(drop)
    }
}
