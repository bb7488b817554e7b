//! The libraries that a program of an unpacked root loads, as its own loader lists them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::output;

/// The loader below the root of an x86-64 Debian.
pub(super) const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
const FOLDERS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// Paths of all libraries that `program` (below `root`) needs, without the loader.
pub(super) fn libraries(root: &Path, program: &str) -> Result<Vec<PathBuf>> {
    let search = std::env::join_paths(FOLDERS.map(|folder| root.join(folder)))?;
    let mut command = Command::new(root.join(LOADER));
    let _ = command.arg("--library-path").arg(search).arg("--list").arg(root.join(program));
    let shown = output(&mut command, Duration::from_secs(10))
        .with_context(|| format!("cannot list the libraries of {program}"))?;
    Ok(parse(&shown))
}

fn parse(shown: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let (_, rest) = line.split_once("=> ")?;
        rest.split_whitespace().next().map(PathBuf::from)
    };
    shown.lines().filter_map(path).filter(|path| !path.ends_with("ld-linux-x86-64.so.2")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_with_a_path_count() {
        let shown = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /r/lib/libc.so.6 (0x2)\n";
        assert_eq!(parse(shown), [PathBuf::from("/r/lib/libc.so.6")]);
    }
}
