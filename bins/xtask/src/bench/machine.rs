//! Where and with what a measurement was made: without that a figure says nothing.

use std::collections::BTreeMap;
use std::ffi::OsString;
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

/// What the scheduler gave to each thread of a process, by the thread's id.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Threads(BTreeMap<OsString, CpuTime>);

/// What the scheduler gave to a thread.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct CpuTime {
    running: Duration,
    /// It could have run, and another program had its CPU.
    waiting: Duration,
}

impl Threads {
    /// The times of a process so far.
    pub(crate) fn of(process: u32) -> Result<Self> {
        let folder = format!("/proc/{process}/task");
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(folder).context("the process has ended")? {
            let entry = entry?;
            // A thread may end meanwhile.
            if let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) {
                let time = parse_times(&text).with_context(|| format!("schedstat says {text}"))?;
                let _ = threads.insert(entry.file_name(), time);
            }
        }
        Ok(Self(threads))
    }

    /// CPU time of all threads.
    pub(crate) fn running(&self) -> Duration {
        self.0.values().map(|time| time.running).sum()
    }

    /// How long the thread that has run most since `earlier`, the one that moves frames, waited
    /// for its CPU.
    pub(crate) fn busiest_waited(&self, earlier: &Self) -> Duration {
        let since = |(thread, time): (&OsString, &CpuTime)| {
            let before = earlier.0.get(thread).copied().unwrap_or_default();
            let running = time.running.saturating_sub(before.running);
            (running, time.waiting.saturating_sub(before.waiting))
        };
        self.0.iter().map(since).max().map_or(Duration::ZERO, |(_, waiting)| waiting)
    }
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
    fn this_process_has_run() {
        assert!(Threads::of(std::process::id()).unwrap().running() > Duration::ZERO);
        assert!(Threads::of(u32::MAX).is_err());
    }

    #[test]
    fn only_the_busiest_thread_waits() {
        let threads = |times: [&str; 2]| {
            let times = times.map(|text| parse_times(text).unwrap());
            Threads(["1", "2"].map(OsString::from).into_iter().zip(times).collect())
        };
        // The first has started the program, the second moves frames.
        let (before, after) =
            (threads(["9000 5 1", "100 20 2"]), threads(["9010 900 3", "900 60 4"]));
        assert_eq!(after.busiest_waited(&before), Duration::from_nanos(40));
        assert_eq!(after.running(), Duration::from_nanos(9910));
        assert_eq!(parse_times("none"), None);
    }
}
