//! What CI runs, in the order in which mistakes are cheapest to find.

use anyhow::Result;
use conformance::environment::host::find;

use crate::steps::Steps;
use crate::{aarch64, bench, fuzz, lint, test};

/// Enough to replay the corpus and to find what is shallow; `cargo xtask fuzz` looks deeper.
const FUZZ_SECONDS: u32 = 15;

pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    lint::run(steps)?;
    licences(steps)?;
    test::run(steps, &test::Options::for_ci())?;
    if bench::has_budgets() {
        bench::run(steps, &bench::Kind::Instructions)?;
    }
    bench::run(steps, &bench::Kind::TwoWorkers)?;
    aarch64::run(steps)?;
    fuzz::run(steps, FUZZ_SECONDS, None)
}

fn licences(steps: &mut Steps) -> Result<()> {
    if find("cargo-deny").is_some() {
        return steps.cargo("licences and advisories", &["deny", "check", "licenses", "bans"]);
    }
    // It compiles for minutes, which would double the time of this run.
    steps.not_run("licences", "cargo-deny is not installed: cargo install cargo-deny", false);
    Ok(())
}
