//! Formatting, clippy, rustdoc and the house style.

use anyhow::Result;

use crate::steps::{Steps, cargo};

pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    steps.cargo("rustfmt", &["fmt", "--all", "--check"])?;
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    steps.cargo("clippy", &clippy)?;
    let mut doc = cargo();
    let _ = doc.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    steps.command("rustdoc", doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    tidy(steps)
}

/// The mechanical part of the house style, which is a test of its own package.
pub(crate) fn tidy(steps: &mut Steps) -> Result<()> {
    steps.cargo("tidy", &["test", "--quiet", "-p", "tidy"])
}
