//! Measurements: time with criterion, instructions with callgrind.
//!
//! Instructions are counted because they repeat where time on a shared machine does not. Each
//! entry of `benches/budgets.toml` names a case of the program `instructions` of the package
//! `virtqueue`, which takes the case and how often to do it. Two runs of different length are
//! subtracted, so that start and set-up do not count.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use conformance::environment::host;
use conformance::process::output;
use conformance::scratch::{repository, target_folder};
use serde::Deserialize;

use crate::steps::{Steps, build};

const SHORT_RUN: u64 = 2_000;
const LONG_RUN: u64 = 22_000;
const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Kind {
    /// Time of virtqueue processing (criterion)
    Micro,
    /// Instructions of each case in benches/budgets.toml, against its budget (callgrind)
    Instructions,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    /// The most instructions for one operation.
    instructions: f64,
}

pub(crate) fn run(steps: &mut Steps, kind: &Kind) -> Result<()> {
    match kind {
        Kind::Micro => steps.cargo("virtqueue benchmarks", &["bench", "-p", "virtqueue"]),
        Kind::Instructions => instructions(steps),
    }
}

/// Whether the tree has instruction budgets.
pub(crate) fn has_budgets() -> bool {
    budgets_file().is_file()
}

fn budgets_file() -> PathBuf {
    repository().join("benches/budgets.toml")
}

fn instructions(steps: &mut Steps) -> Result<()> {
    let file = budgets_file();
    let text = fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
    let budgets: BTreeMap<String, Budget> = toml::from_str(&text)?;
    let valgrind = host::install("valgrind", "valgrind")?;
    build(&["--release", "-p", "virtqueue", "--bin", "instructions"])?;
    for (case, budget) in &budgets {
        let result = measure(&valgrind, case).and_then(|used| judge(used, budget));
        steps.note(&format!("instructions of {case}"), result);
    }
    Ok(())
}

fn measure(valgrind: &Path, case: &str) -> Result<f64> {
    let short = count(valgrind, case, SHORT_RUN)?;
    let long = count(valgrind, case, LONG_RUN)?;
    let difference = u32::try_from(long.saturating_sub(short))?;
    let operations = u32::try_from(LONG_RUN.saturating_sub(SHORT_RUN))?;
    Ok(f64::from(difference) / f64::from(operations))
}

fn count(valgrind: &Path, case: &str, operations: u64) -> Result<u64> {
    let mut command = Command::new(valgrind);
    let _ = command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1"])
        .arg(target_folder().join("release/instructions"))
        .args([case, &operations.to_string()]);
    parse_count(&output(&mut command, RUN_TIMEOUT)?)
}

fn parse_count(shown: &str) -> Result<u64> {
    let collected = shown.lines().find_map(|line| line.split_once("Collected : "));
    let (_, number) = collected.with_context(|| format!("callgrind says: {shown}"))?;
    Ok(number.trim().parse()?)
}

fn judge(used: f64, budget: &Budget) -> Result<String> {
    let limit = budget.instructions;
    ensure!(used.is_finite(), "no count");
    if used > limit {
        bail!("{used:.1} instructions an operation, {limit:.1} are allowed");
    }
    Ok(format!("{used:.1} of {limit:.1} instructions an operation"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_last_word_of_its_line() {
        assert_eq!(parse_count("==1== \n==1== Collected : 12345\n").unwrap(), 12345);
        assert!(parse_count("==1== nothing").is_err());
    }

    #[test]
    fn more_than_the_budget_fails() {
        let budget = Budget { instructions: 40.0 };
        assert!(judge(39.9, &budget).is_ok());
        assert!(judge(40.1, &budget).is_err());
    }
}
