//! Runs every test that this machine and user can run, and names each that it did not run.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use conformance::environment::host::{self, is_root};
use conformance::process::output;
use conformance::scratch::target_folder;

use crate::soak::{self, Soak};
use crate::steps::{Steps, build, cargo};

const LIST_TIMEOUT: Duration = Duration::from_secs(600);
/// Test targets of the workspace that configure the machine, by package.
const ROOTED: [(&str, &str); 1] = [("uplink", "tap")];
/// What tests of the workspace start, and its Debian packages: namespaces for real interfaces,
/// settings of interfaces, and independent readers of what was captured.
const PROGRAMS: [(&str, &str); 4] =
    [("ip", "iproute2"), ("ethtool", "ethtool"), ("tcpdump", "tcpdump"), ("tshark", "tshark")];
const WHY_ROOT: &str = "needs root, for hugepages or a tap";

/// Options of `cargo xtask test`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Run every combination of the conformance matrices instead of all pairs
    #[arg(long)]
    full: bool,
    /// Leave out what needs root, and do not count that as a failure
    #[arg(long)]
    unprivileged: bool,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    filter: Option<String>,
}

impl Options {
    /// What CI runs: everything, all pairs of the matrices.
    pub(crate) fn for_ci() -> Self {
        Self { full: false, unprivileged: false, filter: None }
    }

    /// Proofs under loom are built another way; a filter runs them only by their name.
    fn wants_loom(&self) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.contains("loom"))
    }

    fn filter(&self) -> &str {
        self.filter.as_deref().unwrap_or_default()
    }
}

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    // The tests of the programs and the conformance tests start them.
    build(&["--release", "-p", "causeway", "-p", "causeway-guest"])?;
    if may_use_root(options) {
        for (program, package) in PROGRAMS {
            let _ = host::install(program, package)?;
        }
    }
    workspace(steps, options)?;
    let runners = ["test", "-p", "conformance", "--lib", "--", options.filter()];
    steps.cargo("unit tests of the runners", &runners)?;
    if options.wants_loom() {
        loom(steps)?;
    }
    conformance(steps, options)?;
    soak(steps, options);
    Ok(())
}

/// Half a minute of it, or a quarter of an hour.
fn soak(steps: &mut Steps, options: &Options) {
    if options.filter.as_ref().is_none_or(|filter| filter.contains("soak")) {
        let seconds = if options.full { 15 * 60 } else { 30 };
        soak::step(steps, Soak::of_seconds(seconds));
    }
}

fn workspace(steps: &mut Steps, options: &Options) -> Result<()> {
    let name = "unit, model, integration and doc tests, examples";
    let rooted = may_use_root(options);
    steps.tests(name, |names| {
        let mut command = with_program(cargo(), options);
        let _ = command.args(["test", "--workspace", "--no-fail-fast", "--exclude", "conformance"]);
        for (package, _) in ROOTED.iter().filter(|_| !rooted) {
            let _ = command.args(["--exclude", package]);
        }
        which(&mut command, names, options);
        command
    })?;
    if rooted {
        return Ok(());
    }
    for (package, target) in ROOTED {
        let unit = ["test", "-p", package, "--lib", "--", options.filter()];
        steps.cargo(&format!("unit tests of {package}"), &unit)?;
        let tests = ["test", "-p", package, "--test", target];
        for test in list(options, &tests)? {
            steps.not_run(&format!("{package} {target} {test}"), WHY_ROOT, !options.unprivileged);
        }
    }
    Ok(())
}

/// The proofs on the orderings, with loom's words in place of the guest's memory and of what
/// threads share.
fn loom(steps: &mut Steps) -> Result<()> {
    let mut command = cargo();
    let _ = command
        .args(["test", "--release", "-p", "virtq", "-p", "switch", "--all-features", "--lib"])
        .args(["--", "loom", "proofs"])
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", target_folder().join("loom"));
    steps.command("loom", &mut command)
}

fn conformance(steps: &mut Steps, options: &Options) -> Result<()> {
    let skipped = if may_use_root(options) { Vec::new() } else { rooted_tests(options)? };
    steps.tests("conformance with QEMU and DPDK", |names| {
        let mut command = with_program(cargo(), options);
        let _ = command.args(CONFORMANCE);
        which(&mut command, names, options);
        for name in &skipped {
            let _ = command.args(["--skip", name]);
        }
        command
    })?;
    for name in &skipped {
        steps.not_run(name, WHY_ROOT, !options.unprivileged);
    }
    Ok(())
}

/// Tells the test runners of `command` to run the tests of these names, or those of the filter.
fn which(command: &mut Command, names: &[String], options: &Options) {
    let _ = command.arg("--");
    if names.is_empty() {
        let _ = command.arg(options.filter());
    } else {
        let _ = command.arg("--exact").args(names);
    }
}

const CONFORMANCE: [&str; 5] = ["test", "-p", "conformance", "--test", "conformance"];

fn may_use_root(options: &Options) -> bool {
    is_root() && !options.unprivileged
}

fn rooted_tests(options: &Options) -> Result<Vec<String>> {
    let tests = list(options, &CONFORMANCE)?;
    Ok(tests.into_iter().filter(|name| conformance::needs_root(name)).collect())
}

/// The names of the tests that `cargo` with these arguments would run.
fn list(options: &Options, arguments: &[&str]) -> Result<Vec<String>> {
    let mut command = with_program(cargo(), options);
    let _ = command.args(arguments).args(["--", "--list", options.filter()]);
    let shown = output(&mut command, LIST_TIMEOUT)?;
    Ok(shown.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Tells tests which program to start, whether every combination is wanted, and whether tests
/// that configure the machine may run.
fn with_program(mut command: Command, options: &Options) -> Command {
    let _ = command.env("CAUSEWAY_BIN", target_folder().join("release/causeway"));
    if options.full {
        let _ = command.env("CAUSEWAY_FULL", "1");
    }
    if !may_use_root(options) {
        let _ = command.env("CAUSEWAY_UNPRIVILEGED", "1");
    }
    command
}
