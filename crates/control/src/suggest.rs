//! "Did you mean": the known word that is closest to a wrong one.

/// The most edits between a wrong word and a suggestion.
const EDITS_MAX: usize = 3;

/// ` (did you mean X?)`, or nothing if no known word is close.
pub(crate) fn did_you_mean<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let best = known.map(|word| (edits(wrong, word), word)).min();
    match best {
        Some((edits, word)) if edits <= EDITS_MAX && edits < word.len() => {
            format!(" (did you mean {word}?)")
        }
        _ => String::new(),
    }
}

/// Insertions, deletions and replacements between two words; a prefix counts as one.
fn edits(a: &str, b: &str) -> usize {
    if a.len() >= 2 && a != b && b.starts_with(a) {
        return 1;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i.saturating_add(1);
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (y, above) in b.iter().zip(row.iter_mut().skip(1)) {
            let replaced = diagonal.saturating_add(usize::from(x != *y));
            diagonal = *above;
            left = replaced.min(above.saturating_add(1)).min(left.saturating_add(1));
            *above = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{did_you_mean, edits};

    #[test]
    fn edits_are_counted() {
        assert_eq!(edits("socket", "socket"), 0);
        assert_eq!(edits("sockt", "socket"), 1);
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("queue", "queue-size"), 1);
    }

    #[test]
    fn only_close_words_are_suggested() {
        let known = ["socket", "mode", "queues"];
        assert_eq!(did_you_mean("sokcet", known.into_iter()), " (did you mean socket?)");
        assert_eq!(did_you_mean("zzzzzzzz", known.into_iter()), "");
    }
}
