//! Where `unsafe` may stand, and that it and every ordering say why they are right.

use crate::source::Source;
use crate::{Finding, Tree};

/// The only modules with `unsafe`, as the start of their path.
const UNSAFE_MODULES: [&str; 5] = [
    "crates/virtq/src/mem",
    "crates/vhost-user-net/src/sys",
    "crates/uplink/src/sys",
    // A measurement that is no part of a program.
    "crates/uplink/examples/tap_ways.rs",
    "bins/causeway/src/sandbox/trap.rs",
];
/// Crates with such a module cannot forbid it as a whole.
const UNSAFE_CRATES: [&str; 4] =
    ["crates/virtq/", "crates/vhost-user-net/", "crates/uplink/", "bins/causeway/"];
/// How far above its line a comment may begin.
const COMMENT_REACH: usize = 12;
const ORDERINGS: [&str; 4] =
    ["Ordering::Acquire", "Ordering::Release", "Ordering::AcqRel", "Ordering::SeqCst"];

/// Checks every Rust file.
#[must_use]
pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.sources.iter().flat_map(check_source).collect()
}

fn check_source(source: &Source) -> Vec<Finding> {
    let mut findings = forbids(source);
    let path = source.path.to_string_lossy();
    let may = UNSAFE_MODULES.iter().any(|module| path.starts_with(module));
    for (number, line) in source.code.lines().enumerate() {
        let number = number.saturating_add(1);
        if !has_word(line, "unsafe") {
            continue;
        }
        if !may {
            let what = "unsafe outside the modules that design.md names".to_owned();
            findings.push(Finding::at(&source.path, number, what));
        } else if !is_justified(source, number, line) {
            let what = "unsafe without SAFETY: above it".to_owned();
            findings.push(Finding::at(&source.path, number, what));
        }
    }
    if !source.is_test() {
        findings.extend(orderings(source));
    }
    findings
}

fn is_justified(source: &Source, number: usize, line: &str) -> bool {
    let declares = line.contains("unsafe fn") || line.contains("unsafe trait");
    let wanted = if declares { "# Safety" } else { "SAFETY:" };
    // A signature whose contract the trait or the block above states says so with SAFETY:.
    source.says_near(number, COMMENT_REACH, wanted)
        || source.says_near(number, COMMENT_REACH, "SAFETY:")
}

fn forbids(source: &Source) -> Vec<Finding> {
    let name = source.path.file_name().and_then(|name| name.to_str());
    let root = matches!(name, Some("lib.rs" | "main.rs"))
        && source.path.parent().is_some_and(|folder| folder.ends_with("src"));
    let path = source.path.to_string_lossy();
    let exempt = UNSAFE_CRATES.iter().any(|folder| path.starts_with(folder));
    if root && !exempt && !source.code.contains("#![forbid(unsafe_code)]") {
        let what = "no #![forbid(unsafe_code)]".to_owned();
        return vec![Finding::at(&source.path, 1, what)];
    }
    Vec::new()
}

fn orderings(source: &Source) -> Vec<Finding> {
    let speaks = |line: &str| {
        !line.starts_with("use ") && ORDERINGS.iter().any(|ordering| line.contains(ordering))
    };
    let lines = source.code_lines().filter(|(_, line)| speaks(line));
    let silent = lines.filter(|(number, _)| !source.says_near(*number, COMMENT_REACH, "ORDERING:"));
    let what = "an ordering without ORDERING: above it".to_owned();
    silent.map(|(number, _)| Finding::at(&source.path, number, what.clone())).collect()
}

/// Whether `line` has `word` as a whole word.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    line.split(|c| !part_of_name(c)).any(|found| found == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> usize {
        check_source(&Source::new(path.into(), text.to_owned())).len()
    }

    #[test]
    fn unsafe_has_its_place_and_its_reason() {
        let good = "// SAFETY: kept by the caller.\nunsafe { x() };\n";
        assert_eq!(findings("crates/virtq/src/mem/map.rs", good), 0);
        assert_eq!(findings("crates/virtq/src/mem/map.rs", "unsafe { x() };\n"), 1);
        assert_eq!(findings("crates/switch/src/fdb.rs", good), 1);
        assert_eq!(findings("crates/switch/src/fdb.rs", "// unsafe\nlet unsafe_code = 1;\n"), 0);
    }

    #[test]
    fn a_crate_forbids_it() {
        assert_eq!(findings("crates/switch/src/lib.rs", "//! x\n"), 1);
        assert_eq!(findings("crates/switch/src/lib.rs", "#![forbid(unsafe_code)]\n"), 0);
        assert_eq!(findings("crates/virtq/src/lib.rs", "//! x\n"), 0);
    }

    #[test]
    fn an_ordering_names_its_partner() {
        let line = "x.load(Ordering::Acquire);\n";
        assert_eq!(findings("crates/switch/src/a.rs", line), 1);
        assert_eq!(findings("crates/switch/src/a.rs", &format!("// ORDERING: b.\n{line}")), 0);
        assert_eq!(findings("crates/switch/src/a.rs", "x.load(Ordering::Relaxed);\n"), 0);
    }
}
