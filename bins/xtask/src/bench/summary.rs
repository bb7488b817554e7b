//! Medians and spreads of runs, and what may be compared with what.

use serde::{Deserialize, Serialize};

use super::regime::Regime;

/// One figure of one run.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) case: String,
    pub(crate) regime: Regime,
    pub(crate) subject: String,
    pub(crate) value: f64,
    pub(crate) cycles: Option<f64>,
}

/// Where the values of several runs lie.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) runs: usize,
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// The runs of one subject in one case and regime.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) regime: Regime,
    pub(crate) subject: String,
    pub(crate) value: Spread,
    /// Median cycles of the back end for a frame.
    pub(crate) cycles_per_frame: Option<f64>,
    /// The first subject's median divided by this one's, if both have runs here.
    pub(crate) ratio: Option<f64>,
}

/// The median; the mean of the middle two if their number is even.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().div_euclid(2);
    let upper = sorted.get(middle)?;
    if sorted.len().is_multiple_of(2) {
        let lower = sorted.get(middle.checked_sub(1)?)?;
        return Some(lower.midpoint(*upper));
    }
    Some(*upper)
}

/// `None` without values.
pub(crate) fn spread(values: &[f64]) -> Option<Spread> {
    let min = values.iter().copied().min_by(f64::total_cmp)?;
    let max = values.iter().copied().max_by(f64::total_cmp)?;
    Some(Spread { runs: values.len(), min, median: median(values)?, max })
}

/// A row for each case, steady regime and subject that has runs, in the order of first mention;
/// the ratios are those of `first` to each other subject.
pub(crate) fn rows(samples: &[Sample], first: &str) -> Vec<Row> {
    let mut cases: Vec<&str> = Vec::new();
    let mut subjects = vec![first];
    for sample in samples {
        if !cases.contains(&sample.case.as_str()) {
            cases.push(&sample.case);
        }
        if !subjects.contains(&sample.subject.as_str()) {
            subjects.push(&sample.subject);
        }
    }
    let mut rows = Vec::new();
    for case in cases {
        for regime in Regime::STEADY {
            let here = |subject: &str| {
                let fits = move |sample: &&Sample| {
                    sample.case == case && sample.regime == regime && sample.subject == subject
                };
                samples.iter().filter(fits).collect::<Vec<_>>()
            };
            let base = row(&here(first));
            let median = base.as_ref().map(|row| row.value.median);
            rows.extend(base);
            let others = subjects.iter().skip(1).filter_map(|subject| row(&here(subject)));
            rows.extend(others.map(|row| {
                let ratio = median.map(|median| median / row.value.median);
                Row { ratio: ratio.filter(|ratio| ratio.is_finite()), ..row }
            }));
        }
    }
    rows
}

fn row(samples: &[&Sample]) -> Option<Row> {
    let first = samples.first()?;
    let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
    let cycles: Vec<f64> = samples.iter().filter_map(|sample| sample.cycles).collect();
    Some(Row {
        case: first.case.clone(),
        regime: first.regime,
        subject: first.subject.clone(),
        value: spread(&values)?,
        cycles_per_frame: median(&cycles),
        ratio: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(subject: &str, regime: Regime, value: f64) -> Sample {
        let (case, subject) = ("64 B split".to_owned(), subject.to_owned());
        Sample { case, regime, subject, value, cycles: None }
    }

    #[test]
    fn medians_of_odd_and_even_numbers_of_runs() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        let expected = Spread { runs: 3, min: 1.0, median: 7.0, max: 9.0 };
        assert_eq!(spread(&[9.0, 1.0, 7.0]), Some(expected));
    }

    #[test]
    fn only_runs_of_equal_regime_are_compared() {
        use Regime::{Changed, Far, Near};
        let samples = [
            sample("causeway", Near, 14.0),
            sample("OVS", Far, 2.0),
            sample("causeway", Changed, 99.0),
            sample("OVS", Changed, 99.0),
        ];
        let rows = rows(&samples, "causeway");
        let seen: Vec<_> =
            rows.iter().map(|row| (row.subject.as_str(), row.regime, row.ratio)).collect();
        assert_eq!(seen, [("causeway", Near, None), ("OVS", Far, None)]);
    }

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let mut samples =
            [10.0, 14.0, 12.0].map(|value| sample("causeway", Regime::Near, value)).to_vec();
        samples.extend([5.0, 6.0, 70.0].map(|value| sample("OVS", Regime::Near, value)));
        let rows = rows(&samples, "causeway");
        assert_eq!(rows[0].ratio, None);
        assert_eq!((rows[1].value.median, rows[1].ratio), (6.0, Some(2.0)));
    }
}
