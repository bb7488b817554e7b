//! A crate depends only on crates above it; `testkit` serves tests only.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::Finding;

/// From the top down: each may use the ones before it.
pub const LAYERS: [&str; 10] = [
    "packet",
    "virtq",
    "port",
    "virtio-net",
    "vhost-user-net",
    "uplink",
    "overlay",
    "switch",
    "control",
    "testkit",
];
const TEST_ONLY: &str = "testkit";

/// What `cargo metadata` says, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub struct Metadata {
    packages: Vec<Package>,
}

#[derive(Clone, Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Clone, Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `None` is a normal dependency.
    kind: Option<String>,
}

impl Metadata {
    /// Asks cargo.
    ///
    /// # Errors
    /// cargo fails.
    pub fn read(root: &std::path::Path) -> Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        let _ = command.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]);
        let done = command.current_dir(root).output().context("cannot start cargo")?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(serde_json::from_slice(&done.stdout)?)
    }
}

/// Checks every dependency between our crates.
#[must_use]
pub fn check(metadata: &Metadata) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        for dependency in &package.dependencies {
            if let Some(what) = fault(&package.name, dependency) {
                findings.push(Finding::at(&package.manifest_path, 0, what));
            }
        }
    }
    findings
}

fn fault(package: &str, dependency: &Dependency) -> Option<String> {
    if dependency.kind.as_deref() == Some("dev") {
        return None;
    }
    let place = |name: &str| LAYERS.iter().position(|layer| *layer == name);
    let target = place(&dependency.name)?;
    // The developer's commands are no part of what is shipped.
    if dependency.name == TEST_ONLY && package == "xtask" {
        return None;
    }
    if dependency.name == TEST_ONLY {
        return Some(format!("{package} uses {TEST_ONLY} outside its tests"));
    }
    // A program, a test or a bench may use every crate.
    let own = place(package)?;
    (target >= own).then(|| format!("{package} depends on {}, which is below it", dependency.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dependency(name: &str, kind: Option<&str>) -> Dependency {
        Dependency { name: name.to_owned(), kind: kind.map(str::to_owned) }
    }

    #[test]
    fn only_upwards() {
        assert!(fault("switch", &dependency("port", None)).is_none());
        assert!(fault("port", &dependency("switch", None)).is_some());
        assert!(fault("port", &dependency("anyhow", None)).is_none());
        assert!(fault("causeway", &dependency("control", None)).is_none());
    }

    #[test]
    fn testkit_is_for_tests() {
        assert!(fault("switch", &dependency("testkit", Some("dev"))).is_none());
        assert!(fault("xtask", &dependency("testkit", None)).is_none());
        assert!(fault("causeway", &dependency("testkit", None)).is_some());
    }
}
