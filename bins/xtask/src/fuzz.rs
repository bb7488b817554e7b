//! Fuzzes the targets of `fuzz/fuzz_targets`, on the pinned stable toolchain.
//!
//! cargo-fuzz wants nightly flags, which `RUSTC_BOOTSTRAP` allows; the address sanitizer is used
//! where the toolchain ships its runtime.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use conformance::environment::host::find;
use conformance::process::output;
use conformance::scratch::{repository, target_folder};

use crate::steps::{Steps, cargo};

pub(crate) fn run(steps: &mut Steps, seconds: u32, only: Option<&str>) -> Result<()> {
    let known = targets()?;
    let chosen: Vec<&String> =
        known.iter().filter(|name| only.is_none_or(|only| only == name.as_str())).collect();
    if chosen.is_empty() {
        bail!("no fuzz target {}; there are {}", only.unwrap_or_default(), known.join(", "));
    }
    install()?;
    let sanitizer = if has_sanitizer()? { "address" } else { "none" };
    for name in chosen {
        let mut command = cargo();
        let _ = command
            .args(["fuzz", "run", "--sanitizer", sanitizer, name, "--target-dir"])
            .arg(target_folder().join("fuzz"))
            .args(["--", "-rss_limit_mb=4096", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}"))
            .env("RUSTC_BOOTSTRAP", "1");
        steps
            .command(&format!("fuzz {name} ({seconds} s, sanitizer {sanitizer})"), &mut command)?;
    }
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let folder = repository().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .filter_map(|path| path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

fn install() -> Result<()> {
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        Into::into,
    );
    if find("cargo-fuzz").is_some() || home.join("bin/cargo-fuzz").is_file() {
        return Ok(());
    }
    println!("cargo-fuzz not found: installing it with cargo install");
    let status = cargo().args(["install", "--locked", "cargo-fuzz"]).status()?;
    anyhow::ensure!(status.success(), "cargo install cargo-fuzz failed");
    Ok(())
}

/// Whether the toolchain has the runtime of the address sanitizer.
fn has_sanitizer() -> Result<bool> {
    let mut rustc = std::process::Command::new("rustc");
    let asked = rustc.args(["--print", "target-libdir"]).current_dir(repository());
    let folder = output(asked, std::time::Duration::from_secs(20))?;
    let entries = fs::read_dir(folder.trim()).context("no rustc libraries")?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.into_iter().any(|name| name.contains("rt.asan")))
}
