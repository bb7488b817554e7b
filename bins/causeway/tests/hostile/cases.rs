//! The cases, by what they abuse.

mod addresses;
mod chains;
mod fds;
mod frames;
mod hoards;
mod load;
mod long;
mod mappings;
mod memory;
mod messages;
mod requests;
mod states;
mod transfers;
mod translations;
mod under_load;

use crate::world::{Case, run, run_short_of_fds};

/// The least number of cases; each runs with split and with packed rings.
const PROMISED: usize = 200;

fn all() -> [Vec<Case>; 15] {
    [
        messages::cases(),
        memory::cases(),
        addresses::cases(),
        chains::cases(),
        frames::cases(),
        fds::cases(),
        states::cases(),
        transfers::cases(),
        load::cases(),
        long::cases(),
        mappings::cases(),
        translations::cases(),
        requests::cases(),
        under_load::cases(),
        hoards::cases(),
    ]
}

#[test]
fn there_are_as_many_cases_as_promised_and_none_twice() {
    let mut names: Vec<String> = all().into_iter().flatten().map(|case| case.name).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count, "two cases have one name");
    assert!(count >= PROMISED, "{count} cases");
    println!("{count} cases");
}

#[test]
fn messages() {
    run(&messages::cases());
}

#[test]
fn memory_tables() {
    run(&memory::cases());
}

#[test]
fn ring_addresses() {
    run(&addresses::cases());
}

#[test]
fn ring_contents() {
    run(&chains::cases());
}

#[test]
fn frames() {
    run(&frames::cases());
}

#[test]
fn descriptors() {
    run(&fds::cases());
}

#[test]
fn departures() {
    run(&states::cases());
}

#[test]
fn transfers() {
    run(&transfers::cases());
}

#[test]
fn floods() {
    run(&load::cases());
}

#[test]
fn long_chains() {
    run(&long::cases());
}

#[test]
fn other_mappings() {
    run(&mappings::cases());
}

#[test]
fn translations() {
    run(&translations::cases());
}

#[test]
fn other_requests() {
    run(&requests::cases());
}

#[test]
fn changes_under_load() {
    run(&under_load::cases());
}

#[test]
fn hoards_of_fds() {
    run_short_of_fds(&hoards::cases());
}
