//! Runs every check on the tree.
#![forbid(unsafe_code)]

use tidy::layers::Metadata;
use tidy::{Finding, Tree, accounts, layers, sizes, unsafety};

fn none(findings: &[Finding]) -> anyhow::Result<()> {
    let shown: Vec<String> = findings.iter().map(ToString::to_string).collect();
    anyhow::ensure!(shown.is_empty(), "{} findings:\n{}", shown.len(), shown.join("\n"));
    Ok(())
}

#[test]
fn files_functions_and_lines_are_small() -> anyhow::Result<()> {
    none(&sizes::check(&Tree::read()?))
}

#[test]
fn unsafe_and_orderings_stand_where_they_may_and_say_why() -> anyhow::Result<()> {
    none(&unsafety::check(&Tree::read()?))
}

#[test]
fn crates_depend_upwards() -> anyhow::Result<()> {
    none(&layers::check(&Metadata::read(&Tree::read()?.root)?))
}

#[test]
fn drop_reasons_are_documented_and_tested() -> anyhow::Result<()> {
    none(&accounts::drop_reasons(&Tree::read()?)?)
}

#[test]
fn qemu_configs_are_tested() -> anyhow::Result<()> {
    none(&accounts::qemu_configs(&Tree::read()?)?)
}
