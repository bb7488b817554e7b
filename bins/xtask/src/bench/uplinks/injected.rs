//! Generator and guest in one: causeway-guest on CPU 1 sends into the far side of the uplink and
//! counts what comes back through the back end.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::Scratch;
use conformance::environment::host::hugepages;
use conformance::process::{Process, tied_command};
use serde::Deserialize;

use crate::bench::machine::guest_program;

/// How long it may take to end after its time.
const SLACK: Duration = Duration::from_secs(20);
/// Entries of its rings: a turn of the back end's is never bounded by them.
const RING: &str = "1024";

/// What it says, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Said {
    rx_pps: f64,
}

/// A running causeway-guest.
#[derive(Debug)]
pub(super) struct Injected(Process);

impl Injected {
    pub(super) fn start(
        socket: &Path,
        far: &str,
        (size, time): (u16, Duration),
        scratch: &Scratch,
    ) -> Result<Self> {
        hugepages()?;
        let mut command = tied_command("taskset");
        let _ = command
            .args(["--cpu-list", "1"])
            .arg(guest_program()?)
            .args(["--receive", "--inject", far, "--busy", "--hugepages", "--json"])
            .args(["--queue-size", RING, "--size", &size.to_string()])
            .args(["--seconds", &time.as_secs().to_string(), "--socket"])
            .arg(socket);
        Process::spawn("causeway-guest", &mut command, &scratch.path("guest.log")).map(Self)
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits for its end; frames per second that arrived.
    pub(super) fn finish(mut self) -> Result<f64> {
        let status = self.0.finish(SLACK)?;
        ensure!(status.success(), "causeway-guest ended with {status}\n{}", self.0.tail());
        let text = self.0.output_from(0)?;
        let line = text.lines().rev().find(|line| line.starts_with('{'));
        let said: Said = serde_json::from_str(line.unwrap_or_default())
            .with_context(|| format!("causeway-guest says {text}"))?;
        Ok(said.rx_pps)
    }
}
