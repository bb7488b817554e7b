//! Nothing without its entry: every drop reason is documented and tested, every QEMU file tested.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{Finding, Tree};

const REASONS: &str = "crates/port/src/drop_reason.rs";
const CONFIGS: &str = "qemu-configs";
const CONFIG_TESTS: &str = "tests/conformance/tests/conformance/configs.rs";

/// Checks that each drop reason is in a document and in a test.
///
/// # Errors
/// The table of drop reasons is not where it was.
pub fn drop_reasons(tree: &Tree) -> Result<Vec<Finding>> {
    let table = tree.sources.iter().find(|source| source.path.ends_with(REASONS));
    let table = table.with_context(|| format!("no {REASONS}"))?;
    let reasons = reasons(&table.text);
    ensure!(!reasons.is_empty(), "{REASONS} has no table");
    let tests = test_texts(tree);
    let mut findings = Vec::new();
    for (line, variant, name) in reasons {
        let documented = tree.documents.iter().any(|(_, text)| text.contains(&format!("`{name}`")));
        if !documented {
            let what = format!("drop reason `{name}` is in no document");
            findings.push(Finding::at(REASONS, line, what));
        }
        let (quoted, typed) = (format!("\"{name}\""), format!("DropReason::{variant}"));
        if !tests.iter().any(|text| text.contains(&quoted) || text.contains(&typed)) {
            let what = format!("drop reason `{name}` is hit by no test");
            findings.push(Finding::at(REASONS, line, what));
        }
    }
    Ok(findings)
}

/// Line, variant and name of each row like `Runt "runt" "The frame ...";`.
fn reasons(text: &str) -> Vec<(usize, String, String)> {
    let row = |(index, line): (usize, &str)| {
        let line = line.trim().strip_suffix(';')?;
        let (variant, rest) = line.split_once(" \"")?;
        let (name, _) = rest.split_once("\" \"")?;
        let plain = variant.chars().all(char::is_alphanumeric);
        plain.then(|| (index.saturating_add(1), variant.to_owned(), name.to_owned()))
    };
    text.lines().enumerate().filter_map(row).collect()
}

/// The texts of all tests: whole files, and the test modules of the others.
fn test_texts(tree: &Tree) -> Vec<String> {
    let part = |source: &crate::source::Source| {
        let skipped = if source.is_test() { 0 } else { source.lines_without_tests };
        source.text.lines().skip(skipped).collect::<Vec<_>>().join("\n")
    };
    let own = |source: &&crate::source::Source| !source.path.ends_with(REASONS);
    tree.sources.iter().filter(own).map(part).collect()
}

/// Checks that each QEMU file is in the list of the conformance tests and in its folder's README.
///
/// # Errors
/// A folder or file that has to be there is not.
pub fn qemu_configs(tree: &Tree) -> Result<Vec<Finding>> {
    let tests = tree.sources.iter().find(|source| source.path.ends_with(CONFIG_TESTS));
    let tests = &tests.with_context(|| format!("no {CONFIG_TESTS}"))?.text;
    let readme = fs::read_to_string(tree.root.join(CONFIGS).join("README.md"))?;
    let mut findings = Vec::new();
    let mut count = 0_usize;
    for entry in fs::read_dir(tree.root.join(CONFIGS))? {
        let path = entry?.path();
        if path.extension().is_none_or(|end| end != "cfg") {
            continue;
        }
        count = count.saturating_add(1);
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if !tests.contains(&format!("\"{stem}\"")) {
            findings.push(Finding::at(&path, 0, format!("is not started by {CONFIG_TESTS}")));
        }
        if !readme.contains(&format!("`{stem}.cfg`")) {
            findings.push(Finding::at(&path, 0, "is not in the README of its folder".to_owned()));
        }
    }
    ensure!(count > 0, "{CONFIGS} has no .cfg file");
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_other_lines_are_not() {
        let text = "drop_reasons! {\n    Runt \"runt\" \"Too short.\";\n    let x = \"a\";\n}\n";
        assert_eq!(reasons(text), [(2, "Runt".to_owned(), "runt".to_owned())]);
    }
}
