//! The Rust files of the tree, with their tests told apart from the rest, and their comments and
//! strings blanked out for checks that look for code.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Folders that hold no source of ours.
const SKIPPED: [&str; 4] = ["target", ".git", "corpus", "artifacts"];

/// All files that the checks look at.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Where it lies.
    pub root: PathBuf,
    /// Every `.rs` file.
    pub sources: Vec<Source>,
    /// Every `.md` file, as path and text.
    pub documents: Vec<(PathBuf, String)>,
}

/// One Rust file.
#[derive(Clone, Debug)]
pub struct Source {
    /// Relative to the tree.
    pub path: PathBuf,
    /// As written.
    pub text: String,
    /// The same lines and columns, without the contents of comments and strings.
    pub code: String,
    /// How many lines come before the file's own `#[cfg(test)]` module.
    pub lines_without_tests: usize,
}

impl Tree {
    /// Reads the tree that this crate lives in.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read() -> Result<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.ancestors().nth(2).context("tests/tidy lies in a tree")?.to_owned();
        let mut tree = Self { root: root.clone(), sources: Vec::new(), documents: Vec::new() };
        tree.read_folder(&root)?;
        tree.sources.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(tree)
    }

    fn read_folder(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() {
                if !SKIPPED.contains(&name) {
                    self.read_folder(&path)?;
                }
                continue;
            }
            let relative = path.strip_prefix(&self.root)?.to_owned();
            match path.extension().and_then(|end| end.to_str()) {
                Some("rs") => self.sources.push(Source::new(relative, fs::read_to_string(&path)?)),
                Some("md") => self.documents.push((relative, fs::read_to_string(&path)?)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Source {
    /// A file with this text.
    #[must_use]
    pub fn new(path: PathBuf, text: String) -> Self {
        let code = blank(&text);
        let before_tests =
            |line: &&str| line.trim() != "#[cfg(test)]" && !line.contains("cfg(all(test");
        let lines_without_tests = text.lines().take_while(before_tests).count();
        Self { path, text, code, lines_without_tests }
    }

    /// Whether the whole file is a test, a bench or an example.
    #[must_use]
    pub fn is_test(&self) -> bool {
        let folder = |name: &str| self.path.components().any(|part| part.as_os_str() == name);
        let nested = self.path.starts_with("crates") || self.path.starts_with("bins");
        let file = self.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let named = file == "tests" || file.ends_with("_tests");
        self.path.starts_with("tests")
            || self.path.starts_with("benches")
            || self.path.starts_with("fuzz")
            || (nested && (folder("tests") || folder("examples") || folder("benches")))
            || named
    }

    /// The code lines before the file's tests, numbered from 1.
    pub fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let count = self.lines_without_tests;
        self.code
            .lines()
            .take(count)
            .enumerate()
            .map(|(index, line)| (index.saturating_add(1), line))
    }

    /// Whether one of the lines from `above` lines before line `number` (from 1) on has `needle`.
    #[must_use]
    pub fn says_near(&self, number: usize, above: usize, needle: &str) -> bool {
        let first = number.saturating_sub(above.saturating_add(1));
        let lines = self.text.lines().skip(first).take(number.saturating_sub(first));
        lines.into_iter().any(|line| line.contains(needle))
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    Code,
    LineComment,
    BlockComment(u32),
    Text,
    RawText(usize),
}

/// Replaces the contents of comments, strings and character literals by spaces.
#[must_use]
pub fn blank(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut state = State::Code;
    let mut rest = &bytes[..];
    while let Some((&first, _)) = rest.split_first() {
        let (next, length) = step(state, rest);
        let keep = state == State::Code && next == State::Code && length == 1;
        let taken = rest.get(..length).unwrap_or(rest);
        for &character in taken {
            out.push(if character == '\n' || keep { character } else { ' ' });
        }
        debug_assert!(length > 0, "no progress at {first}");
        state = next;
        rest = rest.get(length..).unwrap_or_default();
    }
    out
}

/// The state after the first characters of `rest`, and how many they are.
fn step(state: State, rest: &[char]) -> (State, usize) {
    match (state, rest) {
        (State::Code, ['/', '/', ..]) => (State::LineComment, 2),
        (State::Code | State::BlockComment(0), ['/', '*', ..]) => (State::BlockComment(1), 2),
        (State::Code, ['"', ..]) => (State::Text, 1),
        (State::Code, ['r', '#' | '"', ..]) => raw_start(rest),
        (State::Code, ['\'', '\\', ..]) => (State::Code, character_length(rest)),
        (State::Code, ['\'', _, '\'', ..]) => (State::Code, 3),
        (State::LineComment, ['\n', ..]) => (State::Code, 1),
        (State::BlockComment(depth), ['/', '*', ..]) => {
            (State::BlockComment(depth.saturating_add(1)), 2)
        }
        (State::BlockComment(1), ['*', '/', ..]) => (State::Code, 2),
        (State::BlockComment(depth), ['*', '/', ..]) => {
            (State::BlockComment(depth.saturating_sub(1)), 2)
        }
        (State::Text, ['\\', _, ..]) => (State::Text, 2),
        (State::Text, ['"', ..]) => (State::Code, 1),
        (State::RawText(hashes), ['"', after @ ..])
            if after.iter().take_while(|c| **c == '#').count() >= hashes =>
        {
            (State::Code, hashes.saturating_add(1))
        }
        _ => (state, 1),
    }
}

/// `r"` and `r#"` start a raw string; `r#name` is a name.
fn raw_start(rest: &[char]) -> (State, usize) {
    let hashes = rest.iter().skip(1).take_while(|c| **c == '#').count();
    match rest.get(hashes.saturating_add(1)) {
        Some('"') => (State::RawText(hashes), hashes.saturating_add(2)),
        _ => (State::Code, 1),
    }
}

/// The length of a character literal that starts with a backslash.
fn character_length(rest: &[char]) -> usize {
    let end = rest.iter().skip(3).position(|c| *c == '\'');
    end.map_or(1, |end| end.saturating_add(4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_blanked() {
        let text = "a // {\n\"}\\\"\" b '{' '\\'' r#\"\"{\"# /* /* } */ { */ c";
        let code = blank(text);
        assert_eq!(code.len(), text.len());
        assert!(!code.contains(['{', '}']), "{code}");
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "b", "c"]);
    }

    #[test]
    fn lifetimes_are_code() {
        assert_eq!(blank("fn a<'a>(x: &'a str) {}"), "fn a<'a>(x: &'a str) {}");
    }

    #[test]
    fn tests_do_not_count() {
        let text = "fn a() {}\n\n#[cfg(test)]\nmod tests {}\n".to_owned();
        assert_eq!(Source::new("a.rs".into(), text).lines_without_tests, 2);
    }
}
