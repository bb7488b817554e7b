//! Results as a table for people, and as files.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use conformance::scratch::{repository, target_folder};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::machine::{Machine, Versions, now};
use super::summary::Row;

/// Where results go.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Keep {
    /// Write to benches/results/, which is part of the tree, instead of bench/ in the target folder
    #[arg(long)]
    save: bool,
    /// Add to the runs of the file that is there; it must be of this machine and this switch
    #[arg(long)]
    add: bool,
}

/// How often each is measured, and where that goes.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Series {
    /// Runs of each
    #[arg(long, value_name = "N", default_value_t = 7,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) runs: u16,
    #[command(flatten)]
    pub(crate) keep: Keep,
}

/// A file of results: where, when and with what, every run, and what follows from them.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Report<R, S> {
    pub(crate) command: String,
    pub(crate) date: String,
    pub(crate) unit: String,
    pub(crate) machine: Machine,
    pub(crate) versions: Versions,
    pub(crate) summary: S,
    pub(crate) runs: Vec<R>,
}

impl<R, S> Report<R, S> {
    pub(crate) fn new(unit: &str, versions: Versions, runs: Vec<R>, summary: S) -> Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let command = format!("cargo xtask {}", arguments.join(" "));
        let (date, machine) = (now()?, Machine::this());
        Ok(Self { command, date, unit: unit.to_owned(), machine, versions, summary, runs })
    }

    /// Where, when and with what, in two lines.
    pub(crate) fn origin(&self) -> [String; 2] {
        [format!("{}, {}", self.date, self.machine.line()), self.versions.line()]
    }
}

impl Keep {
    fn folder(self) -> PathBuf {
        if self.save { saved_folder() } else { target_folder().join("bench") }
    }

    /// With `--add`, the runs of the file that is there, if there is one; what is known of the
    /// peers' versions goes into `versions`.
    pub(crate) fn earlier<R: DeserializeOwned>(
        self,
        name: &str,
        versions: &mut Versions,
    ) -> Result<Vec<R>> {
        let path = self.folder().join(format!("{name}.json"));
        if !self.add || !path.exists() {
            return Ok(Vec::new());
        }
        let shown = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {shown}"))?;
        let report: Report<R, serde_json::Value> =
            serde_json::from_str(&text).with_context(|| format!("{shown} has other fields"))?;
        let (was, is) = (report.machine, Machine::this());
        ensure!(was == is, "{shown} is of another machine: {}, not {}", was.line(), is.line());
        if !report.versions.is_same_switch(versions) {
            let was = report.versions.line();
            bail!("{shown} is of another switch: {was}, not {}; leave --add out", versions.line());
        }
        *versions = std::mem::take(versions).or(report.versions);
        Ok(report.runs)
    }

    /// Shows the rows below what is `said` of them, their values in a column `unit`, and writes
    /// `NAME.json`. Returns its path.
    pub(crate) fn publish<R: Serialize>(
        self,
        name: &str,
        report: &Report<R, Vec<Row>>,
        (said, unit): (&str, &str),
    ) -> Result<PathBuf> {
        println!("\n{said}");
        for line in report.origin().into_iter().chain(table(unit, &report.summary, 2)) {
            println!("{line}");
        }
        ensure!(!report.summary.is_empty(), "no run can be compared, nothing is written");
        self.write_json(name, report)
    }

    /// Writes `NAME.json` and returns its path.
    pub(crate) fn write_json<R: Serialize, S: Serialize>(
        self,
        name: &str,
        report: &Report<R, S>,
    ) -> Result<PathBuf> {
        let text = serde_json::to_string_pretty(report)?;
        self.write(&format!("{name}.json"), &format!("{text}\n"))
    }

    /// Writes a file of results and returns its path.
    pub(crate) fn write(self, name: &str, text: &str) -> Result<PathBuf> {
        let folder = self.folder();
        fs::create_dir_all(&folder)?;
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// The results that are part of the tree.
pub(crate) fn saved_folder() -> PathBuf {
    repository().join("benches/results")
}

/// The least width of the column with the case.
const CASE: usize = 22;

/// The rows as lines of a table; a blank line stands between cases.
pub(crate) fn table(unit: &str, rows: &[Row], digits: usize) -> Vec<String> {
    let case = rows.iter().map(|row| row.case.len()).max().unwrap_or_default().max(CASE);
    let mut lines = vec![format!(
        "{:<case$} {:<7} {:<20} {:>4} {:>9} {:>17} {:>7} {:>9}",
        "case", "regime", "back end", "runs", unit, "min-max", "ratio", "cyc/frame"
    )];
    let mut last = None;
    for row in rows {
        let group = (&row.case, row.regime);
        if last.is_some_and(|last| last != group) {
            lines.push(String::new());
        }
        last = Some(group);
        lines.push(line(row, case, digits));
    }
    lines
}

fn line(row: &Row, case: usize, digits: usize) -> String {
    let value = row.value;
    let range = format!("{:.digits$}-{:.digits$}", value.min, value.max);
    let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"));
    let cycles = row.cycles_per_frame.map_or_else(|| "-".to_owned(), |c| format!("{c:.0}"));
    format!(
        "{:<case$} {:<7} {:<20} {:>4} {:>9.digits$} {:>17} {:>7} {:>9}",
        row.case,
        row.regime.name(),
        row.subject,
        value.runs,
        value.median,
        range,
        ratio,
        cycles
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::regime::Regime;
    use crate::bench::summary::spread;

    #[test]
    fn a_row_shows_median_spread_and_ratio() {
        let row = Row {
            case: "64 B split".to_owned(),
            regime: Regime::Near,
            subject: "OVS-DPDK".to_owned(),
            value: spread(&[7.0, 8.0, 6.5]).unwrap(),
            cycles_per_frame: Some(230.4),
            ratio: Some(1.996),
        };
        let lines = table("Mpps", &[row], 2);
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        let expected =
            ["64", "B", "split", "near", "OVS-DPDK", "3", "7.00", "6.50-8.00", "2.00x", "230"];
        assert_eq!(words, expected);
    }
}
