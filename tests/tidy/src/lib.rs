//! The mechanical part of the house style: what a program can check, a reviewer need not.
//!
//! Each check takes the tree and returns its findings; `tests/house_style.rs` runs them.
//!
//! **Not supported** The sources are read as text, not parsed: macros that hide braces could
//! mislead the function lengths, which clippy counts too.
#![forbid(unsafe_code)]

pub mod accounts;
pub mod layers;
pub mod sizes;
pub mod source;
pub mod unsafety;

use std::fmt;
use std::path::PathBuf;

pub use source::Tree;

/// Something that is not as the house style has it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    /// The file, relative to the tree.
    pub path: PathBuf,
    /// The line, from 1; 0 speaks of the whole file.
    pub line: usize,
    /// What is wrong, and what is allowed.
    pub what: String,
}

impl Finding {
    /// A finding at one line.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>, line: usize, what: String) -> Self {
        Self { path: path.into(), line, what }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.what)
    }
}
