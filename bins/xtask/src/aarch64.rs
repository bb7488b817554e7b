//! Builds everything for 64-bit Arm and runs unit tests there, in an emulator.
//!
//! The proof that the orderings hold on weak memory is loom's; this shows that nothing else rests
//! on x86-64. The linker, the C library and the emulator are Debian packages, unpacked into the
//! cache and not installed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::environment::{CrossTools, Environment};
use conformance::process::output;

use crate::steps::{Steps, cargo};

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// Crates whose unit tests need neither namespaces nor an x86-64 peer.
const TESTED: [&str; 5] = ["packet", "virtq", "port", "virtio-net", "switch"];
/// Members that only start programs here, or measure.
const LEFT_OUT: [&str; 5] = ["xtask", "conformance", "tidy", "virtqueue", "parts"];
/// Tests of what Debian 12's emulator has not, and what that is.
const NOT_EMULATED: [(&str, &str); 10] = [
    ("virtio-net notify::tests::a_kick_that_the_peer_made_blocking_stops_nobody", NO_PREADV2),
    ("virtio-net notify::tests::the_kernels_signal_is_an_edge_though_the_counter_is_full", NO_AIO),
    ("virtio-net notify::tests::every_call_counts_and_wakes", NO_AIO),
    ("virtio-net notify::tests::only_eventfds_are_eventfds", NO_AIO),
    ("virtq mem::guard::tests::a_fault_elsewhere_still_ends_the_process", NO_EXEC),
    ("virtq mem::guard::tests::a_handler_from_before_is_asked", NO_EXEC),
    ("virtq mem::guard::tests::a_signal_that_was_sent_still_ends_the_process", NO_EXEC),
    ("virtq mem::guard::tests::huge_pages_are_replaced_too", NO_HUGE_PAGES),
    (
        "virtq mem::userfault::tests::what_is_there_is_read_at_once_and_what_ends_is_zeros",
        NO_USERFAULT,
    ),
    (
        "virtq mem::userfault::tests::who_touches_a_missing_page_sleeps_until_it_is_given_up",
        NO_USERFAULT,
    ),
];
const NO_PREADV2: &str = "qemu-user 7.2 has no preadv2, which takes kicks back";
const NO_AIO: &str = "qemu-user 7.2 has no asynchronous I/O, which signals eventfds";
const NO_EXEC: &str = "the test starts itself, which needs the emulator to be registered";
const NO_HUGE_PAGES: &str = "qemu-user 7.2 does not map huge pages";
const NO_USERFAULT: &str = "qemu-user 7.2 has no userfaultfd";
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(300);

pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    let tools = match tools() {
        Ok(tools) => tools,
        Err(error) => {
            steps.not_run("aarch64", &format!("{error:#}"), false);
            return Ok(());
        }
    };
    let mut build = cross(&tools);
    let _ = build.args(["build", "--target", TARGET, "--workspace"]);
    for package in LEFT_OUT {
        let _ = build.args(["--exclude", package]);
    }
    steps.command("build for aarch64", &mut build)?;
    let mut test = cross(&tools);
    let _ = test.args(["test", "--target", TARGET, "--no-fail-fast", "--lib"]);
    for package in TESTED {
        let _ = test.args(["-p", package]);
    }
    let _ = test.arg("--");
    for (test_name, why) in NOT_EMULATED {
        let name = test_name.split(' ').next_back().unwrap_or(test_name);
        let _ = test.args(["--skip", name]);
        steps.not_run(&format!("aarch64: {test_name}"), why, false);
    }
    steps.command("unit tests on aarch64, emulated", &mut test)
}

fn tools() -> Result<CrossTools> {
    standard_library()?;
    Environment::open()?.aarch64()
}

/// Makes sure that the compiler has a standard library for the target.
fn standard_library() -> Result<()> {
    let has_one = || {
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        let _ = rustc.args(["--print", "target-libdir", "--target", TARGET]);
        let folder = output(&mut rustc, DOWNLOAD_TIMEOUT)?;
        anyhow::Ok(Path::new(folder.trim()).is_dir())
    };
    if !has_one()? {
        let mut rustup = Command::new("rustup");
        let _ = output(rustup.args(["target", "add", TARGET]), DOWNLOAD_TIMEOUT)
            .with_context(|| format!("rustup cannot add the target {TARGET}"))?;
    }
    ensure!(has_one()?, "the compiler has no standard library for {TARGET}");
    Ok(())
}

/// cargo, with the linker and the emulator for the target.
fn cross(tools: &CrossTools) -> Command {
    let variable = |what: &str| {
        format!("CARGO_TARGET_{}_{what}", TARGET.to_ascii_uppercase().replace('-', "_"))
    };
    let mut command = cargo();
    let _ = command.env(variable("LINKER"), &tools.linker).env(variable("RUNNER"), &tools.runner);
    command
}
