//! Rows of a test matrix: all of them, or few that still hold every pair of values.

/// A way to choose one value of each of several axes; `row[i]` is an index into axis `i`.
pub type Row = Vec<usize>;

/// Every combination of `sizes.len()` axes that `valid` accepts.
#[must_use]
pub fn all(sizes: &[usize], valid: impl Fn(&[usize]) -> bool) -> Vec<Row> {
    let mut rows = vec![Row::new()];
    for &size in sizes {
        let extend = |row: Row| {
            (0..size).map(move |value| {
                let mut longer = row.clone();
                longer.push(value);
                longer
            })
        };
        rows = rows.into_iter().flat_map(extend).collect();
    }
    rows.retain(|row| valid(row));
    rows
}

/// Rows out of [`all`] that together hold every pair of values of two axes which any valid row
/// holds. Greedy: each row is the one that adds most; the first of equals, so a matrix is stable.
#[must_use]
pub fn pairs(sizes: &[usize], valid: impl Fn(&[usize]) -> bool) -> Vec<Row> {
    let candidates = all(sizes, valid);
    let mut missing: Vec<Pair> = candidates.iter().flat_map(|row| pairs_of(row)).collect();
    missing.sort_unstable();
    missing.dedup();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let gain = |row: &Row| pairs_of(row).filter(|p| missing.binary_search(p).is_ok()).count();
        let best = candidates.iter().rev().max_by_key(|row| gain(row));
        let Some(best) = best else { break };
        missing.retain(|pair| !pairs_of(best).any(|held| held == *pair));
        chosen.push(best.clone());
    }
    chosen
}

type Pair = ((usize, usize), (usize, usize));

fn pairs_of(row: &[usize]) -> impl Iterator<Item = Pair> + '_ {
    row.iter().enumerate().flat_map(move |(i, &a)| {
        let later = row.iter().enumerate().filter(move |(j, _)| *j > i);
        later.map(move |(j, &b)| ((i, a), (j, b)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_the_product() {
        assert_eq!(all(&[2, 3, 2], |_| true).len(), 12);
        assert_eq!(all(&[2, 2], |row| row != [1, 1]), [[0, 0], [0, 1], [1, 0]]);
    }

    #[test]
    fn pairs_hold_every_pair_in_fewer_rows() {
        let sizes = [2, 2, 2, 2, 3, 2];
        let every = all(&sizes, |_| true);
        let few = pairs(&sizes, |_| true);
        assert!(few.len() <= 9, "{}", few.len());
        for pair in every.iter().flat_map(|row| pairs_of(row)) {
            assert!(few.iter().any(|row| pairs_of(row).any(|held| held == pair)), "{pair:?}");
        }
    }

    #[test]
    fn pairs_never_choose_an_invalid_row() {
        let valid = |row: &[usize]| !(row[0] == 1 && row[1] == 1);
        assert!(pairs(&[2, 2, 3], valid).iter().all(|row| valid(row)));
    }
}
