//! Limits on files, functions and lines, and `foo.rs` instead of `mod.rs`.

use crate::source::Source;
use crate::{Finding, Tree};

/// Lines of a file without its tests.
pub const FILE_LINES: usize = 600;
/// Lines of a function that hold code.
pub const FUNCTION_LINES: usize = 70;
/// Columns of a line.
pub const COLUMNS: usize = 100;

/// Checks every Rust file.
#[must_use]
pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.sources.iter().flat_map(check_source).collect()
}

fn check_source(source: &Source) -> Vec<Finding> {
    let mut findings = columns(source);
    if source.path.ends_with("mod.rs") {
        findings.push(Finding::at(&source.path, 0, "mod.rs: name it after its module".to_owned()));
    }
    if source.is_test() {
        return findings;
    }
    if source.lines_without_tests > FILE_LINES {
        let what = format!("{} lines, {FILE_LINES} are allowed", source.lines_without_tests);
        findings.push(Finding::at(&source.path, 0, what));
    }
    for (line, count) in functions(source) {
        if count > FUNCTION_LINES {
            let what = format!("a function of {count} lines, {FUNCTION_LINES} are allowed");
            findings.push(Finding::at(&source.path, line, what));
        }
    }
    findings
}

fn columns(source: &Source) -> Vec<Finding> {
    let long = source.text.lines().enumerate().filter(|(_, line)| line.chars().count() > COLUMNS);
    let finding = |(index, line): (usize, &str)| {
        let what = format!("{} columns, {COLUMNS} are allowed", line.chars().count());
        Finding::at(&source.path, index.saturating_add(1), what)
    };
    long.map(finding).collect()
}

/// The first line of each function, and how many lines of its body hold code.
fn functions(source: &Source) -> Vec<(usize, usize)> {
    let lines: Vec<(usize, &str)> = source.code_lines().collect();
    let mut found = Vec::new();
    for (index, &(number, line)) in lines.iter().enumerate() {
        if !starts_function(line) {
            continue;
        }
        let body = lines.iter().skip(index).map(|(_, line)| *line);
        if let Some(count) = body_lines(body) {
            found.push((number, count));
        }
    }
    found
}

fn starts_function(line: &str) -> bool {
    line.split_whitespace().take(6).any(|word| word == "fn")
}

/// Counts the lines with code between the first brace and its partner; `None` without a body.
fn body_lines<'a>(lines: impl Iterator<Item = &'a str>) -> Option<usize> {
    let mut depth = 0_usize;
    let mut brackets = 0_usize;
    let mut count = 0_usize;
    for line in lines {
        let inside = depth > 0;
        for character in line.chars() {
            match character {
                '(' | '[' => brackets = brackets.saturating_add(1),
                ')' | ']' => brackets = brackets.saturating_sub(1),
                // Inside brackets a semicolon belongs to an array type.
                ';' if depth == 0 && brackets == 0 => return None,
                '{' => depth = depth.saturating_add(1),
                '}' if depth == 1 => return Some(count),
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        if inside && !line.trim().is_empty() {
            count = count.saturating_add(1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_function_is_found_once() {
        let body = "    x();\n".repeat(FUNCTION_LINES + 1);
        let text = format!("fn short(a: [u8; 2]) {{\n}}\n\nfn long() {{\n{body}}}\n");
        let findings = check_source(&Source::new("crates/a/src/a.rs".into(), text));
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].line, 4);
    }

    #[test]
    fn a_long_file_and_a_long_line_are_found() {
        let text = "x\n".repeat(FILE_LINES + 1) + &"y".repeat(COLUMNS + 1);
        let findings = check_source(&Source::new("crates/a/src/a.rs".into(), text));
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn blank_lines_and_comments_do_not_count() {
        let body = "\n    // why\n".repeat(FUNCTION_LINES);
        let text = format!("fn long() {{\n{body}}}\n");
        assert!(check_source(&Source::new("a.rs".into(), text)).is_empty());
    }
}
