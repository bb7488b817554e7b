//! Where and with what a measurement was made: without that a figure says nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use conformance::environment::host::find;
use conformance::process::output;
use conformance::scratch::repository;
use conformance::{Environment, QemuVersion, switch};
use serde::{Deserialize, Serialize};

const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// The machine that measures.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    kernel: String,
}

/// What was measured with what.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Versions {
    causeway: String,
    /// The last commit that changed what is measured, `-dirty` if files differ from it.
    commit: Option<String>,
    pub(crate) dpdk: Option<String>,
    pub(crate) ovs: Option<String>,
    #[serde(default)]
    pub(crate) qemu: Option<String>,
    /// cloud-hypervisor's back end.
    #[serde(default)]
    pub(crate) vhost_user_net: Option<String>,
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

    /// Whether the same switch was measured.
    pub(crate) fn is_same_switch(&self, other: &Self) -> bool {
        let same = (&self.causeway, &self.commit) == (&other.causeway, &other.commit);
        same && self.commit.is_some()
    }

    /// Takes what it does not know from `other`.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            dpdk: self.dpdk.or(other.dpdk),
            ovs: self.ovs.or(other.ovs),
            qemu: self.qemu.or(other.qemu),
            vhost_user_net: self.vhost_user_net.or(other.vhost_user_net),
            ..self
        }
    }

    /// In words.
    pub(crate) fn line(&self) -> String {
        let commit = self.commit.as_ref().map(|commit| format!(" ({commit})"));
        let causeway = format!("{}{}", self.causeway, commit.unwrap_or_default());
        let peers = [&self.dpdk, &self.ovs, &self.qemu, &self.vhost_user_net];
        let parts = [causeway].into_iter().chain(peers.into_iter().flatten().cloned());
        parts.collect::<Vec<_>>().join(", ")
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

/// The CPU's frequency as the kernel knows it: that of the time stamp counter in most machines.
pub(crate) fn cpu_mhz() -> Option<f64> {
    parse_mhz(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn parse_mhz(info: &str) -> Option<f64> {
    let line = info.lines().find(|line| line.starts_with("cpu MHz"))?;
    line.split_once(':')?.1.trim().parse().ok()
}

fn cpu_name(info: &str) -> Option<String> {
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The switch, its guest without a VM, and what they are built from.
const MEASURED: [&str; 4] = ["crates", "bins/causeway", "bins/causeway-guest", "Cargo.lock"];

/// What else is in the tree, such as results, does not matter.
fn commit() -> Option<String> {
    // Nobody knows what that program was built from.
    if std::env::var_os("CAUSEWAY_BIN").is_some() {
        return None;
    }
    let git = |arguments: &[&str]| {
        let mut git = Command::new(find("git")?);
        let _ = git.args(arguments).arg("--").args(MEASURED).current_dir(repository());
        output(&mut git, ASK_TIMEOUT).ok()
    };
    let hash = git(&["log", "-1", "--format=%h"])?.trim().to_owned();
    let changed = git(&["status", "--porcelain"])?;
    let suffix = if changed.trim().is_empty() { "" } else { "-dirty" };
    (!hash.is_empty()).then(|| format!("{hash}{suffix}"))
}

/// The version of the QEMU that boots guests.
pub(crate) fn qemu_version(environment: &Environment) -> Result<String> {
    let shown = output(environment.qemu(QemuVersion::V10)?.arg("--version"), ASK_TIMEOUT)?;
    let first = shown.lines().next().unwrap_or_default();
    let version = first.split("version ").nth(1).and_then(|rest| rest.split([' ', '(']).next());
    Ok(format!("QEMU {}", version.unwrap_or(first).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_a_name() {
        let info = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\ncpu MHz\t\t: 2000.125\n";
        assert_eq!(cpu_name(info).unwrap(), "Some CPU @ 2 GHz");
        assert_eq!(parse_mhz(info), Some(2000.125));
    }

    #[test]
    fn only_the_measured_code_makes_another_switch() {
        let version = |commit: &str, dpdk: Option<&str>| Versions {
            commit: Some(commit.to_owned()),
            dpdk: dpdk.map(str::to_owned),
            ..Versions::default()
        };
        let (one, other) = (version("a", None), version("a", Some("DPDK 22.11")));
        assert!(one.is_same_switch(&other));
        assert!(!one.is_same_switch(&version("b", None)));
        let unknown = Versions::default();
        assert!(!unknown.is_same_switch(&unknown.clone()));
        assert_eq!(one.or(other).line(), " (a), DPDK 22.11");
    }

    #[test]
    fn files_without_the_newer_peers_are_read() {
        let old = r#"{"causeway":"causeway 0.1","commit":"a","dpdk":"DPDK 22.11","ovs":null}"#;
        let old: Versions = serde_json::from_str(old).unwrap();
        let peer = Some("vhost_user_net 0.1.0".to_owned());
        let both = old.or(Versions { vhost_user_net: peer, ..Versions::default() });
        assert_eq!(both.line(), "causeway 0.1 (a), DPDK 22.11, vhost_user_net 0.1.0");
    }
}
