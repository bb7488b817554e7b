//! The few things that the machine itself must have: some programs, and hugepages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::say;
use crate::process::output;

const HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// 2 GiB: 512 MiB for each of up to two DPDK processes, the rest for a guest on hugepages.
const HUGEPAGES_NEEDED: u32 = 1024;
const INSTALL_TIMEOUT: Duration = Duration::from_secs(600);
const HUGETLBFS: &str = "/dev/hugepages";

/// Whether this process may configure the machine.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where `program` is, looked for in the search path and where administrators' programs live.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    let places = std::env::split_paths(&path).chain(system);
    places.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Makes sure of a program, by installing its Debian package if it is missing.
///
/// # Errors
/// It is missing, and either we are not root or apt fails.
pub fn install(program: &str, package: &str) -> Result<PathBuf> {
    if let Some(found) = find(program) {
        return Ok(found);
    }
    if !is_root() {
        bail!("{program} not found; as root: apt-get install {package}");
    }
    say(&format!("{program} not found: installing {package}"));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        let _ = command.args(["-qq", "-o", "DPkg::Lock::Timeout=300"]).args(arguments);
        output(command.env("DEBIAN_FRONTEND", "noninteractive"), INSTALL_TIMEOUT)
    };
    let _ = apt(&["update"])?;
    let _ = apt(&["install", "--yes", "--no-install-recommends", package])
        .with_context(|| format!("cannot install {package}"))?;
    find(program).with_context(|| format!("{package} is installed but has no {program}"))
}

/// Makes sure that 1024 hugepages of 2 MiB exist and that their file system is mounted.
///
/// # Errors
/// There are too few and they cannot be raised.
pub fn hugepages() -> Result<()> {
    let count = read_count()?;
    if count < HUGEPAGES_NEEDED {
        if !is_root() {
            bail!(
                "{count} hugepages, {HUGEPAGES_NEEDED} are needed; as root: \
                   echo {HUGEPAGES_NEEDED} >{HUGEPAGES}"
            );
        }
        say(&format!("raising the hugepages from {count} to {HUGEPAGES_NEEDED}"));
        fs::write(HUGEPAGES, HUGEPAGES_NEEDED.to_string())?;
        let got = read_count()?;
        if got < HUGEPAGES_NEEDED {
            bail!("the kernel gave only {got} of {HUGEPAGES_NEEDED} hugepages");
        }
    }
    mount_hugetlbfs()
}

fn read_count() -> Result<u32> {
    let text = fs::read_to_string(HUGEPAGES).context("this kernel has no 2 MiB hugepages")?;
    Ok(text.trim().parse()?)
}

fn mount_hugetlbfs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(HUGETLBFS)) {
        return Ok(());
    }
    if !is_root() {
        bail!("{HUGETLBFS} is not mounted; as root: mount -t hugetlbfs none {HUGETLBFS}");
    }
    say(&format!("mounting {HUGETLBFS}"));
    fs::create_dir_all(Path::new(HUGETLBFS))?;
    let mut mount = Command::new("mount");
    output(mount.args(["-t", "hugetlbfs", "none", HUGETLBFS]), Duration::from_secs(10)).map(drop)
}

/// Runs `ip` with these arguments; the first call installs it where it is missing.
///
/// # Errors
/// It cannot be had or fails.
pub fn ip(arguments: &[&str]) -> Result<String> {
    let program = install("ip", "iproute2")?;
    output(Command::new(program).args(arguments), Duration::from_secs(10))
}
