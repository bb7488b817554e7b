//! What the runs come to, and a table of it.

use serde::{Deserialize, Serialize};

use super::Run;
use super::acts::Act;
use crate::bench::regime::Regime;
use crate::bench::summary::{Spread, median, spread};

/// The runs of one act on one kind of rings that can be compared.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(in crate::bench) struct Summary {
    act: Act,
    packed: bool,
    size: u16,
    alone_pps: f64,
    /// What the good guest keeps.
    pub(super) of_alone: Spread,
    /// The same of what it has beside the same use of its CPU.
    pub(super) of_twin: Spread,
    taken: f64,
    control: f64,
    waited: f64,
    acts_per_s: f64,
    lost: u64,
}

impl Summary {
    /// In the order in which acts were done first.
    pub(super) fn all(runs: &[Run]) -> Vec<Self> {
        let kind = |run: &Run| (run.act, run.packed, run.size);
        let mut kinds = Vec::new();
        for run in runs {
            if !kinds.contains(&kind(run)) {
                kinds.push(kind(run));
            }
        }
        let of = |wanted| {
            let same = |run: &&Run| kind(run) == wanted && Regime::STEADY.contains(&run.regime);
            Self::of(&runs.iter().filter(same).collect::<Vec<_>>())
        };
        kinds.into_iter().filter_map(of).collect()
    }

    fn of(runs: &[&Run]) -> Option<Self> {
        let first = runs.first()?;
        let all = |value: fn(&Run) -> f64| runs.iter().map(|run| value(run)).collect::<Vec<_>>();
        Some(Self {
            act: first.act,
            packed: first.packed,
            size: first.size,
            alone_pps: median(&all(|run| run.alone_pps))?,
            of_alone: spread(&all(Run::of_alone))?,
            of_twin: spread(&all(Run::of_twin))?,
            taken: median(&all(|run| run.taken))?,
            control: median(&all(|run| run.control))?,
            waited: median(&all(|run| run.waited))?,
            acts_per_s: median(&all(|run| run.acts_per_s))?,
            lost: runs.iter().map(|run| run.lost).sum(),
        })
    }
}

/// A line for each.
pub(in crate::bench) fn markdown(summary: &[Summary]) -> String {
    let mut text =
        "| hostile guest | acts/s | alone, Mpps | beside it | of the same CPU time taken \
                    by somebody harmless | CPU: guest, control thread | worker waited | lost |\n\
                    |---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for one in summary {
        let ratio = |spread: &Spread| {
            let Spread { median, min, max, runs } = spread;
            format!("**{median:.2}x** ({min:.2}-{max:.2}, n={runs})")
        };
        text.push_str(&format!(
            "| {}, {} | {:.0} | {:.2} ({} B) | {} | {} | {:.1} %, {:.1} % | {:.2} % | {} |\n",
            one.act.name(),
            if one.packed { "packed" } else { "split" },
            one.acts_per_s,
            one.alone_pps / 1e6,
            one.size,
            ratio(&one.of_alone),
            ratio(&one.of_twin),
            100.0 * one.taken,
            100.0 * one.control,
            100.0 * one.waited,
            one.lost
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(act: Act, packed: bool, beside_pps: f64, regime: Regime) -> Run {
        Run {
            act,
            packed,
            size: 1500,
            regime,
            before_ns: 50.0,
            after_ns: 50.0,
            alone_pps: 2e6,
            beside_pps,
            twin_pps: 1.9e6,
            taken: 0.1,
            control: 0.02,
            waited: 0.0,
            acts_per_s: 1500.0,
            lost: 1,
        }
    }

    #[test]
    fn each_act_and_layout_has_a_line_of_what_can_be_compared() {
        let runs = [
            run(Act::Kicks, false, 1.8e6, Regime::Near),
            run(Act::Kicks, true, 1.0e6, Regime::Near),
            run(Act::Kicks, false, 1.9e6, Regime::Far),
            run(Act::Kicks, false, 0.1e6, Regime::Changed),
            run(Act::Memory, false, 0.1e6, Regime::Disturbed),
            run(Act::Kicks, false, 1.0e6, Regime::Near),
        ];
        let summary = Summary::all(&runs);
        assert_eq!(summary.len(), 2);
        assert_eq!((summary[0].of_alone.runs, summary[0].lost), (3, 3));
        let text = markdown(&summary);
        let line = text.lines().nth(2).unwrap();
        assert!(line.starts_with("| kicks for nothing, split | 1500 | 2.00 (1500 B) |"), "{line}");
        assert!(
            line.contains("| **0.90x** (0.50-0.95, n=3) | **0.95x** (0.53-1.00, n=3)"),
            "{line}"
        );
        assert!(line.ends_with("| 10.0 %, 2.0 % | 0.00 % | 3 |"), "{line}");
    }
}
