//! The saved results as tables of the README, so that nobody copies figures by hand.
//!
//! Each table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use conformance::scratch::repository;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::migration;
use super::report::{Report, saved_folder};
use super::round::Run;
use super::summary::{Row, Spread};
use super::{crash_record, hostile, takeover, uplinks};
use crate::steps::Steps;

/// Options of `cargo xtask bench readme`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Fail if the README does not show the saved results, and write nothing
    #[arg(long)]
    check: bool,
}

/// What the summary of `idle` is about.
#[derive(Clone, Copy, Debug, Deserialize)]
struct IdleRun {
    guests: u8,
    booted: bool,
}

/// The tables of the README.
const SECTIONS: [&str; 10] = [
    "pvp",
    "latency",
    "scale",
    "idle",
    "uplinks",
    "tcp",
    takeover::NAME,
    crash_record::NAME,
    migration::NAME,
    hostile::NAME,
];

pub(crate) fn run(steps: &mut Steps, options: &Options) -> Result<()> {
    let path = repository().join("README.md");
    let old = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    let mut new = old.clone();
    for name in SECTIONS {
        new = replace(&new, name, &section(name)?)?;
    }
    let same = new == old;
    if options.check {
        ensure!(same, "the README does not show the saved results: cargo xtask bench readme");
    } else if !same {
        fs::write(&path, new).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let said = if same { "shows the saved results" } else { "written" };
    steps.note("README.md", Ok(said.to_owned()));
    Ok(())
}

/// The text with another section `name`.
fn replace(text: &str, name: &str, section: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- bench:{name} -->\n"), format!("<!-- /bench:{name} -->"));
    let found = text.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some((before, after))
    });
    let Some((before, after)) = found else {
        bail!("the README lacks the lines {} and {end}", begin.trim_end());
    };
    Ok(format!("{before}{begin}{section}{end}{after}"))
}

fn section(name: &str) -> Result<String> {
    let chart = saved_folder().join("pvp.svg").is_file().then_some("benches/results/pvp.svg");
    Ok(match name {
        "pvp" => load::<Value, Vec<Row>>(name)?.map(|report| {
            let mut lines = vec!["Million frames per second, per direction:".to_owned()];
            lines.extend(chart.map(|path| format!("\n![frames per second]({path})")));
            lines.push(format!("\n{}", side_by_side(&report.summary)));
            lines.push(origin(&report));
            lines.join("\n")
        }),
        "latency" => load::<Value, Vec<Row>>(name)?.map(|report| {
            let table = side_by_side(&report.summary);
            format!("Microseconds of a round trip:\n\n{table}\n{}", origin(&report))
        }),
        "scale" => load::<Value, Vec<Row>>(name)?.map(|report| {
            let table = with_and_without(&report.summary);
            format!(
                "Million frames per second with more and with less:\n\n{table}\n{}",
                origin(&report)
            )
        }),
        "uplinks" => load::<Run, Vec<Row>>(name)?.map(|report| {
            let table = side_by_side(&report.summary);
            let spent = uplinks::spent(&report.runs).join("\n");
            format!(
                "Million frames per second, one way; the ratio is ours to the peer's:\n\n{table}\n\
                 Where the time of the thread that moves frames goes, for each frame:\n\n\
                 | case | back end | in the kernel | in its own code, polling included | kernel |\n\
                 |---|---|---|---|---|\n{spent}\n\n{}",
                origin(&report)
            )
        }),
        "tcp" => load::<Value, Vec<Row>>(name)?.map(|report| {
            let table = side_by_side(&report.summary);
            format!(
                "Gbit/s of payload; the ratio is that of causeway to it:\n\n{table}\n{}",
                origin(&report)
            )
        }),
        takeover::NAME => load::<Value, Vec<takeover::Summary>>(name)?
            .map(|report| format!("{}\n{}", takeover::table(&report.summary), origin(&report))),
        crash_record::NAME => load::<Value, Vec<Row>>(name)?.map(|report| {
            let table = with_and_without(&report.summary);
            let what = "Million frames per second with what is kept and with nothing";
            format!("{what}:\n\n{table}\n{}", origin(&report))
        }),
        "idle" => load::<IdleRun, Option<Spread>>(name)?.and_then(|report| idle(&report)),
        migration::NAME => load::<Value, Vec<migration::Summary>>(name)?.map(|report| {
            let lines = report.summary.iter().map(|one| format!("* {}\n", one.line()));
            format!("Downtime:\n\n{}\n{}", lines.collect::<String>(), origin(&report))
        }),
        hostile::NAME => load::<Value, Vec<hostile::Summary>>(name)?
            .map(|report| format!("{}\n{}", hostile::markdown(&report.summary), origin(&report))),
        other => bail!("there are no results called {other}"),
    }
    .unwrap_or_else(|| "No results are saved.\n".to_owned()))
}

/// The saved results, if there are any.
fn load<R: DeserializeOwned, S: DeserializeOwned>(name: &str) -> Result<Option<Report<R, S>>> {
    let path: PathBuf = saved_folder().join(format!("{name}.json"));
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path)?;
    let report = serde_json::from_str(&text);
    report.map(Some).with_context(|| format!("{} has other fields", path.display()))
}

/// Where, when, with what and how.
fn origin<R, S>(report: &Report<R, S>) -> String {
    let [place, versions] = report.origin();
    format!("{place}; {versions}; `{}`.\n", report.command)
}

fn idle(report: &Report<IdleRun, Option<Spread>>) -> Option<String> {
    let (spread, run) = (report.summary?, report.runs.last()?);
    let kind = if run.booted { "booted, quiet" } else { "attached, quiet" };
    let figures = format!("{:.3} % of a CPU ({:.3}-{:.3})", spread.median, spread.min, spread.max);
    let of = format!("median and range of {} runs", spread.runs);
    Some(format!(
        "{} {kind} guests, default polling: {figures}, {of}.\n{}",
        run.guests,
        origin(report)
    ))
}

/// A line for each case and regime, a column for each back end.
pub(super) fn side_by_side(rows: &[Row]) -> String {
    let mut subjects: Vec<&str> = Vec::new();
    let mut groups: Vec<(&str, &str)> = Vec::new();
    for row in rows {
        let group = (row.case.as_str(), row.regime.name());
        if !subjects.contains(&row.subject.as_str()) {
            subjects.push(&row.subject);
        }
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let mut lines = vec![vec!["case".to_owned(), "regime".to_owned()]];
    lines.iter_mut().for_each(|head| head.extend(subjects.iter().map(|name| (*name).to_owned())));
    for group in groups {
        let mut line = vec![group.0.to_owned(), group.1.to_owned()];
        for subject in &subjects {
            let here = |row: &&Row| (row.case.as_str(), row.regime.name()) == group;
            let found = rows.iter().filter(here).find(|row| row.subject == *subject);
            line.push(found.map_or_else(|| "-".to_owned(), cell));
        }
        lines.push(line);
    }
    markdown(&lines)
}

fn cell(row: &Row) -> String {
    let mut text = format!("{:.2}", row.value.median);
    if let Some(ratio) = row.ratio {
        text.push_str(&format!(" (**{ratio:.2}x**)"));
    }
    if let Some(cycles) = row.cycles_per_frame {
        text.push_str(&format!(", {cycles:.0} cycles"));
    }
    text.push_str(&format!(", n={}", row.value.runs));
    text
}

/// A line for each row that is compared with the row before it.
fn with_and_without(rows: &[Row]) -> String {
    let head = ["case", "regime", "with", "without", "ratio"].map(str::to_owned).to_vec();
    let mut lines = vec![head];
    for pair in rows.windows(2) {
        let [more, less] = pair else { continue };
        let Some(ratio) = less.ratio else { continue };
        let figure = |row: &Row| {
            let plain = Row { ratio: None, ..row.clone() };
            format!("{}: {}", row.subject, cell(&plain))
        };
        let regime = less.regime.name().to_owned();
        let ratio = format!("**{ratio:.2}**");
        lines.push(vec![less.case.clone(), regime, figure(more), figure(less), ratio]);
    }
    markdown(&lines)
}

/// A table whose first line is its head.
fn markdown(lines: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        text.push_str(&format!("| {} |\n", line.join(" | ")));
        if number == 0 {
            text.push_str(&format!("|{}\n", "---|".repeat(line.len())));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::regime::Regime;
    use crate::bench::summary::spread;

    fn row(subject: &str, regime: Regime, value: f64, ratio: Option<f64>) -> Row {
        Row {
            case: "64 B split".to_owned(),
            regime,
            subject: subject.to_owned(),
            value: spread(&[value]).unwrap(),
            cycles_per_frame: Some(36.2),
            ratio,
        }
    }

    #[test]
    fn a_section_is_replaced_and_nothing_else() {
        let text = "a\n<!-- bench:pvp -->\nold\n<!-- /bench:pvp -->\nb\n";
        let new = replace(text, "pvp", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- bench:pvp -->\nnew\n<!-- /bench:pvp -->\nb\n");
        assert_eq!(replace(&new, "pvp", "new\n").unwrap(), new);
        assert!(replace(text, "idle", "new\n").unwrap_err().to_string().contains("bench:idle"));
    }

    #[test]
    fn back_ends_stand_side_by_side() {
        let rows = [
            row("causeway", Regime::Near, 15.0, None),
            row("OVS-DPDK", Regime::Near, 7.5, Some(2.0)),
            row("OVS-DPDK", Regime::Far, 5.0, None),
        ];
        let expected = "| case | regime | causeway | OVS-DPDK |\n|---|---|---|---|\n\
                        | 64 B split | near | 15.00, 36 cycles, n=1 | \
                        7.50 (**2.00x**), 36 cycles, n=1 |\n\
                        | 64 B split | far | - | 5.00, 36 cycles, n=1 |\n";
        assert_eq!(side_by_side(&rows), expected);
    }

    #[test]
    fn only_pairs_are_compared() {
        let rows = [
            row("with 64", Regime::Near, 9.5, None),
            row("alone", Regime::Near, 10.0, Some(0.95)),
            row("with 64", Regime::Far, 5.0, None),
        ];
        let shown = with_and_without(&rows);
        assert_eq!(shown.lines().count(), 3, "{shown}");
        assert!(shown.contains("| with 64: 9.50, 36 cycles, n=1 | alone: 10.00"), "{shown}");
        assert!(shown.contains("**0.95**"), "{shown}");
    }

    #[test]
    fn the_readme_shows_the_saved_results() {
        let text = fs::read_to_string(repository().join("README.md")).unwrap();
        for name in SECTIONS {
            let shown = replace(&text, name, &section(name).unwrap()).unwrap();
            assert_eq!(shown, text, "cargo xtask bench readme");
        }
    }
}
