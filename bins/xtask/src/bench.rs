//! Measurements: of the whole switch beside its peers, and of its parts.
//!
//! ```text
//!  pvp, scale, sweep ──► round ─┐
//!  latency ─────────────────────┴► back_end (the switch, or a peer) ◄── a guest on CPU 1
//!        │  turn    regime and watch: was the machine the same, and ours, in each run?
//!        ▼
//!     summary (medians, only within one regime) ──► table, chart, JSON ──► readme
//! ```
//!
//! **Limits** Two CPUs: the back end has CPU 0 and the guest CPU 1. One measurement at a time.

mod addresses;
mod back_end;
mod case;
mod chart;
mod costs;
mod crash_record;
mod fairness;
mod hostile;
mod idle;
mod instructions;
mod latency;
mod lines;
mod machine;
mod migration;
mod pvp;
mod quiet;
mod readme;
mod regime;
mod report;
mod round;
mod scale;
mod summary;
mod sweep;
mod takeover;
mod tcp;
mod turn;
mod uplinks;
mod watch;

use anyhow::{Result, ensure};
use clap::Subcommand;
use conformance::environment::host::is_root;

use crate::steps::{Steps, build};

pub(crate) use instructions::has_budgets;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Kind {
    /// Time of virtqueue processing (criterion)
    Micro,
    /// Instructions of each case in benches/budgets.toml, against its budget (callgrind)
    Instructions,
    /// Cache lines that two workers on two disjoint pairs of guests both touch: none may be written
    TwoWorkers,
    /// Frames per second through the switch, beside its peers: guest to guest and back
    ///
    /// The guest is DPDK's testpmd with two virtio-user ports on CPU 1, which keeps frames going
    /// round; the back end has CPU 0. The switch and the peers take turns, and only runs in which
    /// the machine's CPUs were equally near are compared. Writes pvp.json and pvp.svg. Needs root,
    /// for hugepages; `$CAUSEWAY_BIN` names another program to measure.
    Pvp(pvp::Options),
    /// Round trip of a single frame between two guests, for each way of polling, beside the peers
    ///
    /// Writes latency.json. Needs root, for hugepages.
    Latency(latency::Options),
    /// Round trips of a slow guest beside one at full rate on the same worker, and alone
    ///
    /// Its p99 is to stay below twice of alone, and it must not lose a frame. Writes fairness.json.
    /// Needs root, for hugepages.
    Fairness(fairness::Options),
    /// What the sandbox and limits that are never hit cost
    ///
    /// Frames per second with both and without, as in `pvp`. Writes costs.json. Needs root, for
    /// hugepages.
    Costs(costs::Options),
    /// What a hostile guest costs a good one that shares a worker with it
    ///
    /// Frames per second of the good guest beside each of the hostile one's acts, without it, and
    /// beside somebody harmless who takes the same CPU time; it must not lose any. Writes
    /// hostile.json.
    Hostile(hostile::Options),
    /// CPU time that the switch takes with guests attached that do nothing
    ///
    /// The guests are booted by QEMU. Writes idle.json.
    Idle(idle::Options),
    /// What 64 idle guests and 100,000 learned addresses cost a busy pair of guests
    ///
    /// Writes scale.json. Needs root, for hugepages.
    Scale(scale::Options),
    /// Burst sizes, prefetch distances and spin times, each against the others
    ///
    /// Builds the switch with each value, and lets the builds take turns. Writes sweep.json and
    /// sweep.md. Needs root, for hugepages.
    Sweep(sweep::Options),
    /// Frames per second between a guest and each kind of uplink, both ways, beside DPDK's drivers
    ///
    /// The guest is DPDK's testpmd on CPU 1; the back end has CPU 0: the switch, or testpmd between
    /// `net_vhost` and the driver of the same kind; with `--vhost-user-net`, cloud-hypervisor's
    /// back end for taps too. Writes uplinks.json and uplinks.svg. Needs root, for hugepages and
    /// interfaces.
    Uplinks(uplinks::Options),
    /// TCP through the switch and its peers: between QEMU guests, and between namespaces behind
    /// causeway-guest, taps and veth pairs
    ///
    /// The switch, OVS-DPDK with and without userspace TSO, OVS' userspace datapath and the
    /// kernel's bridge take turns. Writes tcp.json. Needs root, for hugepages and namespaces.
    Tcp(tcp::Options),
    /// What it costs to be ready for a crash: frames per second with the record of ring positions,
    /// with the front end's in-flight file, and with neither
    ///
    /// Writes crash-record.json. Needs root, for hugepages.
    CrashRecord(crash_record::Options),
    /// How long guests wait when another process takes the switch over
    ///
    /// Writes take-over.json.
    TakeOver(takeover::Options),
    /// How long a QEMU guest stands still when it moves between two switches, or two testpmds
    ///
    /// Writes migration.json. Needs root, for hugepages.
    Migration(migration::Options),
    /// Write the saved results into the README, or check that they are there
    Readme(readme::Options),
}

pub(crate) fn run(steps: &mut Steps, kind: &Kind) -> Result<()> {
    match kind {
        Kind::Micro => steps.cargo("microbenchmarks", &["bench", "-p", "virtqueue", "-p", "parts"]),
        Kind::Instructions => instructions::run(steps),
        Kind::TwoWorkers => lines::run(steps),
        Kind::Pvp(options) => pvp::run(steps, options),
        Kind::Latency(options) => latency::run(steps, options),
        Kind::Fairness(options) => fairness::run(steps, options),
        Kind::Costs(options) => costs::run(steps, options),
        Kind::Hostile(options) => hostile::run(steps, options),
        Kind::Idle(options) => idle::run(steps, options),
        Kind::Scale(options) => scale::run(steps, options),
        Kind::Sweep(options) => sweep::run(steps, options),
        Kind::Uplinks(options) => uplinks::run(steps, options),
        Kind::Tcp(options) => tcp::run(steps, options),
        Kind::CrashRecord(options) => crash_record::run(steps, options),
        Kind::TakeOver(options) => takeover::run(steps, options),
        Kind::Migration(options) => migration::run(steps, options),
        Kind::Readme(options) => readme::run(steps, options),
    }
}

/// What every measurement of the whole switch needs.
fn prepare(steps: &mut Steps, needs_root: bool) -> Result<()> {
    ensure!(!needs_root || is_root(), "only root may raise the hugepages that the guests need");
    regime::check_cpus()?;
    if std::env::var_os("CAUSEWAY_BIN").is_some() {
        let program = conformance::switch::program()?;
        let text = format!("not built, CAUSEWAY_BIN names {}", program.display());
        steps.note("causeway", Ok(text));
        return Ok(());
    }
    build(&["--release", "-p", "causeway", "-p", "causeway-guest"])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options that several measurements have are written once; defaults differ.
    #[test]
    fn each_has_its_own_number_of_runs() {
        let all = Kind::augment_subcommands(clap::Command::new("bench"));
        let runs = |name: &str| {
            let command = all.find_subcommand(name).unwrap();
            let runs = command.get_arguments().find(|argument| argument.get_id() == "runs");
            runs.unwrap().get_default_values().to_vec()
        };
        for name in ["pvp", "latency", "fairness", "costs", "scale", "uplinks", "tcp"] {
            assert_eq!(runs(name), ["7"], "{name}");
        }
        assert_eq!(runs("crash-record"), ["7"]);
        for (name, count) in [("idle", "3"), ("sweep", "3"), ("hostile", "3"), ("migration", "5")] {
            assert_eq!(runs(name), [count], "{name}");
        }
    }
}
