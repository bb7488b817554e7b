//! Conformance with real front ends: QEMU guests and DPDK's virtio-user, one test a matrix row.
//!
//! Run it through `cargo xtask test`; by hand it is `cargo test -p conformance --test conformance
//! -- --test-threads=1 FILTER`. `CAUSEWAY_FULL=1` runs every combination instead of all pairs.
#![forbid(unsafe_code)]

mod configs;
mod iommu;
mod migration;
mod multiqueue;
mod promises;
mod qemu;
mod restart;
mod runners;
mod switch;
mod takeover;
mod tcp;
mod uplinks;
mod virtio_user;

use std::process::ExitCode;

use conformance::{Environment, Scratch};
use libtest_mimic::{Arguments, Failed, Trial};

/// Sorted into a matrix row: what the row is called and what it does.
pub(crate) fn trial(
    name: String,
    body: impl FnOnce(&Environment, &Scratch) -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, move || {
        let environment = Environment::open().map_err(failed)?;
        let mut scratch = Scratch::new("t").map_err(failed)?;
        body(&environment, &scratch).map_err(|error| {
            let logs = scratch.keep().display();
            failed(error.context(format!("logs are in {logs}")))
        })
    })
}

/// Whether every combination was asked for.
pub(crate) fn full() -> bool {
    std::env::var_os("CAUSEWAY_FULL").is_some_and(|value| value == "1")
}

#[expect(clippy::needless_pass_by_value, reason = "fits map_err")]
fn failed(error: anyhow::Error) -> Failed {
    format!("{error:#}").into()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The machine is small and the cases measure losses: one at a time unless told otherwise.
    let _ = arguments.test_threads.get_or_insert(1);
    let groups = [
        runners::trials(),
        promises::trials(),
        switch::trials(),
        uplinks::trials(),
        tcp::trials(),
        restart::trials(),
        takeover::trials(),
        configs::trials(),
        virtio_user::trials(),
        migration::trials(),
        iommu::trials(),
        multiqueue::trials(),
    ];
    let trials = groups.into_iter().flatten().chain(qemu::trials()).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
