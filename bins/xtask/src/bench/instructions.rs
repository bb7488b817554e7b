//! Instructions of each way a chain can take, counted by callgrind, against their budgets.
//!
//! Instructions are counted because they repeat where time on a shared machine does not. Each
//! entry of `benches/budgets.toml` names a kind of ring and a batch size for the program
//! `instructions` of the package `virtqueue`; only the device's part is counted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use conformance::environment::host;
use conformance::process::output;
use conformance::scratch::{repository, target_folder};
use serde::Deserialize;

use crate::steps::{Steps, build};

const RUN_TIMEOUT: Duration = Duration::from_secs(120);
/// The functions whose instructions count: the device's, not the driver's.
const COUNTED: &str = "virtqueue::*::serve";

/// The contents of `benches/budgets.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budgets {
    budget: Vec<Budget>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    /// As the program `instructions` names it.
    kind: String,
    /// Chains that the device takes at once.
    batch: u32,
    /// The most instructions for one chain.
    instructions: f64,
}

/// Whether the tree has instruction budgets.
pub(crate) fn has_budgets() -> bool {
    budgets_file().is_file()
}

fn budgets_file() -> PathBuf {
    repository().join("benches/budgets.toml")
}

pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    let file = budgets_file();
    let text = fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
    let budgets: Budgets = toml::from_str(&text)?;
    let valgrind = host::install("valgrind", "valgrind")?;
    build(&["--release", "-p", "virtqueue", "--bin", "instructions"])?;
    for budget in &budgets.budget {
        let result = measure(&valgrind, budget).and_then(|used| judge(used, budget));
        let name = format!("instructions of {}, batches of {}", budget.kind, budget.batch);
        steps.note(&name, result);
    }
    Ok(())
}

/// Instructions for one chain.
fn measure(valgrind: &Path, budget: &Budget) -> Result<f64> {
    let mut command = Command::new(valgrind);
    let _ = command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1"])
        .arg(format!("--toggle-collect={COUNTED}"))
        .arg(target_folder().join("release/instructions"))
        .args([&budget.kind, &budget.batch.to_string()]);
    let shown = output(&mut command, RUN_TIMEOUT)?;
    let chains = parse_chains(&shown)?;
    ensure!(chains > 0, "no chains: {shown}");
    Ok(f64::from(parse_count(&shown)?) / f64::from(chains))
}

/// The program says: "split, batches of 32: 100000 chains, 6400000 bytes".
fn parse_chains(shown: &str) -> Result<u32> {
    let chains = shown.lines().find_map(|line| line.split_once(" chains, ")?.0.rsplit(' ').next());
    Ok(chains.with_context(|| format!("instructions says: {shown}"))?.parse()?)
}

/// callgrind says: "==1== Collected : 12345".
fn parse_count(shown: &str) -> Result<u32> {
    let collected = shown.lines().find_map(|line| line.split_once("Collected : "));
    let (_, number) = collected.with_context(|| format!("callgrind says: {shown}"))?;
    Ok(number.trim().parse()?)
}

fn judge(used: f64, budget: &Budget) -> Result<String> {
    let limit = budget.instructions;
    ensure!(used.is_finite(), "no count");
    if used > limit {
        bail!("{used:.1} instructions a chain, {limit:.1} are allowed");
    }
    Ok(format!("{used:.1} of {limit:.1} instructions a chain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        assert_eq!(parse_count("==1== \n==1== Collected : 12345\n").unwrap(), 12345);
        assert!(parse_count("==1== nothing").is_err());
        assert_eq!(parse_chains("split, batches of 32: 70 chains, 9 bytes").unwrap(), 70);
    }

    #[test]
    fn more_than_the_budget_fails() {
        let budget = Budget { kind: "split".to_owned(), batch: 32, instructions: 40.0 };
        assert!(judge(39.9, &budget).is_ok());
        assert!(judge(40.1, &budget).is_err());
    }
}
