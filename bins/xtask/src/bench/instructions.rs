//! Instructions of each way a chain can take, counted by callgrind, against their budgets.
//!
//! Instructions are counted because they repeat where time on a shared machine does not. Each
//! entry of `benches/budgets.toml` names a kind of ring and a batch size for the program
//! `instructions` of the package `virtqueue`; only the device's part is counted.

use std::collections::HashMap;
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

/// In bursts of so many frames one worker is compared with two.
const COMPARED: u32 = 32;
/// Two counts that differ by less are the same.
const UNCHANGED: f64 = 0.01;

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
    let mut counts = HashMap::new();
    for budget in &budgets.budget {
        let result = measure(&valgrind, budget).and_then(|used| {
            let _ = counts.insert((budget.kind.as_str(), budget.batch), used);
            judge(used, budget)
        });
        let name = format!("instructions of {}, batches of {}", budget.kind, budget.batch);
        steps.note(&name, result);
    }
    for layout in ["split", "packed"] {
        let count = |of: &str| counts.get(&(format!("{of}-{layout}").as_str(), COMPARED)).copied();
        if let (Some(one), Some(two)) = (count("switch"), count("two-workers")) {
            let name = format!("instructions of two workers and of one, {layout}");
            steps.note(&name, compare(one, two));
        }
    }
    Ok(())
}

/// Two workers on two disjoint pairs must cost what one costs.
fn compare(one: f64, two: f64) -> Result<String> {
    ensure!((one - two).abs() <= one * UNCHANGED, "{one:.1} with one worker, {two:.1} with two");
    Ok(format!("{one:.1} with one worker, {two:.1} with two"))
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
        assert!(compare(200.0, 201.9).is_ok());
        assert!(compare(200.0, 202.1).is_err() && compare(202.1, 200.0).is_err());
    }
}
