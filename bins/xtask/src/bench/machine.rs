//! Where and with what a measurement was made: without that a figure says nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use conformance::environment::host::find;
use conformance::process::output;
use conformance::scratch::repository;
use conformance::switch;
use serde::Serialize;

const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// The machine that measures.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    kernel: String,
}

/// What was measured with what.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Versions {
    causeway: String,
    /// The tree's commit, `-dirty` if files differ from it.
    commit: Option<String>,
    pub(crate) dpdk: Option<String>,
    pub(crate) ovs: Option<String>,
}

impl Machine {
    pub(crate) fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = cpu_name(&read("/proc/cpuinfo")).unwrap_or_else(|| "unknown".to_owned());
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { cpu, cpus, kernel: read("/proc/sys/kernel/osrelease").trim().to_owned() }
    }

    /// In words.
    pub(crate) fn line(&self) -> String {
        format!("{}, {} CPUs, Linux {}", self.cpu, self.cpus, self.kernel)
    }
}

impl Versions {
    pub(crate) fn this() -> Result<Self> {
        let shown = output(Command::new(switch::program()?).arg("--version"), ASK_TIMEOUT)?;
        let causeway = shown.trim().to_owned();
        Ok(Self { causeway, commit: commit(), ..Self::default() })
    }

    /// In words.
    pub(crate) fn line(&self) -> String {
        let commit = self.commit.as_ref().map(|commit| format!(" ({commit})"));
        let causeway = format!("{}{}", self.causeway, commit.unwrap_or_default());
        let parts = [Some(causeway), self.dpdk.clone(), self.ovs.clone()];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// The guest without a VM, beside the switch that is measured.
pub(crate) fn guest_program() -> Result<PathBuf> {
    let path = switch::program()?.with_file_name("causeway-guest");
    anyhow::ensure!(path.is_file(), "no {}", path.display());
    Ok(path)
}

/// Date and time in UTC, as ISO 8601 writes it.
pub(crate) fn now() -> Result<String> {
    let shown = output(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]), ASK_TIMEOUT)?;
    Ok(shown.trim().to_owned())
}

/// What the scheduler gave to a process.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct CpuTime {
    pub(crate) running: Duration,
    /// It could have run, and another program had its CPU.
    pub(crate) waiting: Duration,
}

/// The times of all threads of a process so far. A thread that has ended meanwhile is not in it,
/// and neither the switch nor its peers end one while they are measured.
pub(crate) fn cpu_time(process: u32) -> Result<CpuTime> {
    let mut total = CpuTime::default();
    for entry in fs::read_dir(format!("/proc/{process}/task")).context("the process has ended")? {
        if let Ok(text) = fs::read_to_string(entry?.path().join("schedstat")) {
            let thread = parse_times(&text).with_context(|| format!("schedstat says {text}"))?;
            total.running = total.running.saturating_add(thread.running);
            total.waiting = total.waiting.saturating_add(thread.waiting);
        }
    }
    Ok(total)
}

/// Reads a line of `schedstat`: nanoseconds on a CPU, nanoseconds waiting for one, time slices.
fn parse_times(text: &str) -> Option<CpuTime> {
    let mut numbers = text.split_whitespace().map(|word| word.parse().ok());
    let mut next = || numbers.next().flatten().map(Duration::from_nanos);
    Some(CpuTime { running: next()?, waiting: next()? })
}

fn cpu_name(info: &str) -> Option<String> {
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn commit() -> Option<String> {
    let mut git = Command::new(find("git")?);
    let _ = git.args(["describe", "--always", "--dirty"]).current_dir(repository());
    output(&mut git, ASK_TIMEOUT).ok().map(|shown| shown.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_a_name() {
        let info = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n";
        assert_eq!(cpu_name(info).unwrap(), "Some CPU @ 2 GHz");
    }

    #[test]
    fn cpu_time_is_the_sum_of_the_threads() {
        let [running, waiting] = [1500, 7].map(Duration::from_nanos);
        assert_eq!(parse_times("1500 7 3\n"), Some(CpuTime { running, waiting }));
        assert_eq!(parse_times("none"), None);
        assert!(cpu_time(std::process::id()).unwrap().running > Duration::ZERO);
        assert!(cpu_time(u32::MAX).is_err());
    }
}
