//! Debian packages fetched with a private apt configuration: no root, nothing installed, nothing
//! of the machine's own apt state touched.
//!
//! The mirror is the one that the machine already uses. An empty package status makes apt name
//! the whole dependency closure, whatever is installed here, so that the unpacked programs run on
//! any Debian that is at least as new; only the C and C++ runtimes stay the machine's own.
//!
//! **Trust** apt checks signatures with the archive keyring of the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::say;
use crate::process::output;

const UPDATE_TIMEOUT: Duration = Duration::from_secs(180);
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(600);
const UNPACK_TIMEOUT: Duration = Duration::from_secs(60);

/// The runtimes that come from the machine: a newer C library runs old programs, an older loader
/// does not run a newer C library.
const RUNTIMES: [&str; 4] = ["libc6", "libgcc-s1", "libstdc++6", "libcrypt1"];
/// Packages of a closure that hold what programs load while they run.
const LOADED: [&str; 5] = ["lib", "ibverbs-providers", "qemu-system", "seabios", "ipxe"];

/// Unpacks `packages` and the libraries that they need into `root`.
pub(super) fn unpack_closure(
    cache: &Path,
    suites: &[&str],
    packages: &[&str],
    root: &Path,
) -> Result<()> {
    let apt = PrivateApt::new(cache, suites)?;
    for deb in apt.download_closure(packages)? {
        let name = package_name(&deb);
        let loaded = LOADED.iter().any(|prefix| name.starts_with(prefix));
        let loaded = loaded && !name.ends_with("-dev");
        if packages.contains(&name) || (loaded && !RUNTIMES.contains(&name)) {
            unpack(&deb, root)?;
        }
    }
    Ok(())
}

/// Unpacks a guest's world: `packages`, all their libraries, and the package that `meta` points at.
pub(super) fn unpack_guest(cache: &Path, packages: &[&str], meta: &str, root: &Path) -> Result<()> {
    let apt = PrivateApt::new(cache, &["bookworm"])?;
    for deb in apt.download_closure(packages)? {
        let name = package_name(&deb);
        if packages.contains(&name) || name.starts_with("lib") {
            unpack(&deb, root)?;
        }
    }
    let shown = apt.run("apt-cache", &["depends", meta], UPDATE_TIMEOUT)?;
    let depends = shown.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let package = depends.with_context(|| format!("{meta} depends on nothing"))?;
    for deb in apt.download_one(package)? {
        unpack(&deb, root)?;
    }
    Ok(())
}

fn unpack(deb: &Path, root: &Path) -> Result<()> {
    let mut command = Command::new("dpkg");
    output(command.arg("-x").arg(deb).arg(root), UNPACK_TIMEOUT).map(drop)
}

fn package_name(deb: &Path) -> &str {
    let file = deb.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    file.split('_').next().unwrap_or_default()
}

/// An apt with its own sources, lists and package status below one folder.
struct PrivateApt {
    folder: PathBuf,
    preferred: String,
}

impl PrivateApt {
    fn new(cache: &Path, suites: &[&str]) -> Result<Self> {
        let preferred = suites.last().context("no suite")?;
        let folder = cache.join(format!("apt-{preferred}"));
        for part in ["state/lists/partial", "cache/archives/partial", "none"] {
            fs::create_dir_all(folder.join(part))?;
        }
        fs::write(folder.join("status"), "")?;
        let apt = Self { folder, preferred: (*preferred).to_owned() };
        let mirrors = mirrors()?;
        for mirror in &mirrors {
            fs::write(apt.folder.join("sources.list"), sources(mirror, suites))?;
            match apt.run("apt-get", &["update", "--error-on=any"], UPDATE_TIMEOUT) {
                Ok(_) => return Ok(apt),
                Err(error) => say(&format!("{mirror} does not have {suites:?}: {error:#}")),
            }
        }
        bail!("no mirror of this machine ({}) has Debian {suites:?}", mirrors.join(", "))
    }

    fn download_closure(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let mut arguments = vec!["install", "--yes", "--download-only", "-t", &self.preferred];
        arguments.extend(packages);
        let _ = self.run("apt-get", &arguments, DOWNLOAD_TIMEOUT)?;
        debs(&self.folder.join("cache/archives"))
    }

    fn download_one(&self, package: &str) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("single");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let mut command = self.command("apt-get");
        let _ = output(command.args(["download", package]).current_dir(&folder), DOWNLOAD_TIMEOUT)?;
        debs(&folder)
    }

    fn run(&self, program: &str, arguments: &[&str], timeout: Duration) -> Result<String> {
        output(self.command(program).args(arguments), timeout)
    }

    fn command(&self, program: &str) -> Command {
        let at = |part: &str| self.folder.join(part).display().to_string();
        let options = [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            format!("Dir::Etc::sourceparts={}", at("none")),
            format!("Dir::Etc::preferencesparts={}", at("none")),
            format!("Dir::Etc::preferences={}", at("none/preferences")),
            format!("Dir::State={}", at("state")),
            format!("Dir::State::status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            "APT::Install-Recommends=0".to_owned(),
            // Our own lock on the cache is held, and the sandbox user cannot write to it.
            "Debug::NoLocking=1".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ];
        let mut command = Command::new(program);
        for option in options {
            let _ = command.arg("-o").arg(option);
        }
        let _ = command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

impl Drop for PrivateApt {
    fn drop(&mut self) {
        // What was downloaded is unpacked by now; a failed try starts clean.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn sources(mirror: &str, suites: &[&str]) -> String {
    let keyring = ["gpg", "pgp"]
        .map(|end| format!("/usr/share/keyrings/debian-archive-keyring.{end}"))
        .into_iter()
        .find(|path| Path::new(path).exists());
    let signed = keyring.map(|path| format!("[signed-by={path}] ")).unwrap_or_default();
    suites.iter().map(|suite| format!("deb {signed}{mirror} {suite} main\n")).collect()
}

/// The archives that this machine's apt uses, the likeliest Debian mirrors first.
fn mirrors() -> Result<Vec<String>> {
    let format = ["indextargets", "--format", "$(REPO_URI)"];
    let shown = output(Command::new("apt-get").args(format), UPDATE_TIMEOUT)
        .context("this machine has no working apt-get: QEMU and the guest come as its packages")?;
    Ok(rank_mirrors(&shown))
}

fn rank_mirrors(shown: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for uri in shown.lines().map(str::trim).filter(|uri| !uri.is_empty()) {
        if !found.iter().any(|known| known == uri) {
            found.push(uri.to_owned());
        }
    }
    found.sort_by_key(|uri| !uri.trim_end_matches('/').ends_with("/debian"));
    found
}

fn debs(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "deb") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debian_mirror_comes_first_and_once() {
        let shown = "http://m/debian-security/\nhttp://m/debian/\nhttp://x/apt\nhttp://m/debian/\n";
        let ranked = rank_mirrors(shown);
        assert_eq!(ranked, ["http://m/debian/", "http://m/debian-security/", "http://x/apt"]);
    }

    #[test]
    fn a_package_is_named_by_the_start_of_its_file() {
        assert_eq!(package_name(Path::new("/x/libc6_2.36-9_amd64.deb")), "libc6");
    }
}
