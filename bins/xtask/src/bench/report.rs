//! Results as a table for people, and as files in `benches/results/`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use conformance::scratch::repository;
use serde::Serialize;

use super::machine::{Machine, Versions, now};
use super::summary::Row;

/// A file of results: where, when and with what, every run, and what follows from them.
#[derive(Debug, Serialize)]
pub(crate) struct Report<R, S> {
    pub(crate) command: String,
    pub(crate) date: String,
    pub(crate) unit: &'static str,
    pub(crate) machine: Machine,
    pub(crate) versions: Versions,
    pub(crate) summary: S,
    pub(crate) runs: Vec<R>,
}

impl<R: Serialize, S: Serialize> Report<R, S> {
    pub(crate) fn new(
        unit: &'static str,
        versions: Versions,
        runs: Vec<R>,
        summary: S,
    ) -> Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let command = format!("cargo xtask {}", arguments.join(" "));
        let (date, machine) = (now()?, Machine::this());
        Ok(Self { command, date, unit, machine, versions, summary, runs })
    }

    /// Where, when and with what, in two lines.
    pub(crate) fn origin(&self) -> [String; 2] {
        [format!("{}, {}", self.date, self.machine.line()), self.versions.line()]
    }

    /// Writes `benches/results/NAME.json` and returns its path.
    pub(crate) fn write(&self, name: &str) -> Result<PathBuf> {
        let text = serde_json::to_string_pretty(self)?;
        write(&format!("{name}.json"), &format!("{text}\n"))
    }
}

/// Writes a file of results and returns its path.
pub(crate) fn write(name: &str, text: &str) -> Result<PathBuf> {
    let folder = repository().join("benches/results");
    fs::create_dir_all(&folder)?;
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The rows as lines of a table; a blank line stands between cases.
pub(crate) fn table(unit: &str, rows: &[Row], digits: usize) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<22} {:<7} {:<20} {:>4} {:>9} {:>17} {:>7} {:>9}",
        "case", "regime", "back end", "runs", unit, "min-max", "ratio", "cyc/frame"
    )];
    let mut last = None;
    for row in rows {
        let group = (&row.case, row.regime);
        if last.is_some_and(|last| last != group) {
            lines.push(String::new());
        }
        last = Some(group);
        lines.push(line(row, digits));
    }
    lines
}

fn line(row: &Row, digits: usize) -> String {
    let value = row.value;
    let range = format!("{:.digits$}-{:.digits$}", value.min, value.max);
    let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"));
    let cycles = row.cycles_per_frame.map_or_else(|| "-".to_owned(), |c| format!("{c:.0}"));
    format!(
        "{:<22} {:<7} {:<20} {:>4} {:>9.digits$} {:>17} {:>7} {:>9}",
        row.case,
        row.regime.name(),
        row.subject.name(),
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
    use crate::bench::back_end::Subject;
    use crate::bench::regime::Regime;
    use crate::bench::summary::spread;

    #[test]
    fn a_row_shows_median_spread_and_ratio() {
        let row = Row {
            case: "64 B split".to_owned(),
            regime: Regime::Near,
            subject: Subject::Ovs,
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
