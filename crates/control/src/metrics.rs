//! Everything that is counted in Prometheus' text format (version 0.0.4).
//!
//! Names are a contract with dashboards: `causeway_port_*`, `causeway_worker_*`,
//! `causeway_switch_*`. A port's `rx` is into the switch, `tx` out of it. Ports that were removed
//! are one port `(removed)`, so that the sums stay right.

use std::fmt::{Display, Write};

use crate::protocol::{BATCH_SIZES, PortStats, QueueStats, StatsView, VersionView, WorkerStats};

/// The content type of [`text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// States of a port; exactly one has the value 1.
const STATES: [&str; 5] = ["up", "waiting", "down", "broken", "quarantined"];

/// A counter or gauge of a `T`: name, help, value.
type Metric<T> = (&'static str, &'static str, fn(&T) -> u64);

const QUEUE: &[Metric<QueueStats>] = &[
    ("rx_frames_total", "Frames into the switch.", |q| q.rx_frames),
    ("rx_bytes_total", "Bytes into the switch.", |q| q.rx_bytes),
    ("tx_frames_total", "Frames out of the switch.", |q| q.tx_frames),
    ("tx_bytes_total", "Bytes out of the switch.", |q| q.tx_bytes),
    ("kicks_total", "Kicks that woke the way in.", |q| q.kicks),
    ("rests_total", "Times that the way in rested for its port's rate.", |q| q.rests),
    ("rx_calls_total", "Calls after the way in gave buffers back.", |q| q.rx_calls),
    ("rx_calls_suppressed_total", "Calls left out there.", |q| q.rx_calls_suppressed),
    ("tx_calls_total", "Calls after the way out filled buffers.", |q| q.tx_calls),
    ("tx_calls_suppressed_total", "Calls left out there.", |q| q.tx_calls_suppressed),
];

const WORKER: &[Metric<WorkerStats>] = &[
    ("frames_total", "Frames that the worker took from ports.", |w| w.frames),
    ("sleeps_total", "Times that the worker slept.", |w| w.sleeps),
    ("kicks_total", "Queues that were woken by a kick.", |w| w.kicks),
    ("calls_total", "Calls that the worker sent.", |w| w.calls),
    ("calls_suppressed_total", "Calls that it left out.", |w| w.calls_suppressed),
];

const SWITCH: &[Metric<StatsView>] = &[
    ("flood_copies_total", "Copies made by flooding.", |s| s.switch.flood_copies),
    ("segments_added_total", "Segments made from large frames.", |s| s.switch.segments_added),
    ("merged_total", "Segments merged into large frames.", |s| s.switch.merged),
    ("originated_total", "Frames that the switch sent itself.", |s| s.switch.originated),
    ("held_frames", "Frames on their way.", |s| s.switch.held),
    ("fdb_entries", "Entries of the forwarding table.", |s| s.switch.fdb_entries.into()),
    ("fdb_refused_total", "Addresses that it had no room for.", |s| s.switch.fdb_refused),
];

/// The whole text.
pub fn text(stats: &StatsView, version: &VersionView) -> String {
    let mut out = Exposition::default();
    out.family("causeway_build_info", "gauge", "The running version.");
    out.sample("", &[("version", &version.version)], 1);
    out.family("causeway_uptime_seconds", "gauge", "Time since the switch began.");
    out.sample("", &[], seconds(stats.up_ns));
    for (name, help, value) in SWITCH {
        out.family(&format!("causeway_switch_{name}"), kind(name), help);
        out.sample("", &[], value(stats));
    }
    ports(&mut out, &stats.ports);
    workers(&mut out, &stats.workers);
    out.text
}

fn ports(out: &mut Exposition, ports: &[PortStats]) {
    out.family("causeway_port_state", "gauge", "1 for the state that the port is in.");
    for port in ports {
        for state in STATES {
            let labels = [("port", &*port.name), ("kind", &*port.kind), ("state", state)];
            out.sample("", &labels, u8::from(port.state == state));
        }
    }
    for (name, help, value) in QUEUE {
        out.family(&format!("causeway_port_{name}"), kind(name), help);
        for (port, queue, index) in queues(ports) {
            out.sample("", &[("port", port), ("queue", &index)], value(queue));
        }
    }
    out.family("causeway_port_drops_total", "counter", "Frames that died, by reason.");
    for (port, queue, index) in queues(ports) {
        for (reason, count) in &queue.drops {
            out.sample("", &[("port", port), ("queue", &index), ("reason", reason)], count);
        }
    }
}

fn queues(ports: &[PortStats]) -> impl Iterator<Item = (&str, &QueueStats, String)> {
    ports.iter().flat_map(|port| {
        port.queues.iter().map(|queue| (&*port.name, queue, queue.index.to_string()))
    })
}

fn workers(out: &mut Exposition, workers: &[WorkerStats]) {
    let labelled: Vec<(&WorkerStats, [String; 2])> = workers
        .iter()
        .map(|worker| {
            let cpu = worker.cpu.map_or_else(String::new, |cpu| cpu.to_string());
            (worker, [worker.number.to_string(), cpu])
        })
        .collect();
    for (name, help, value) in WORKER {
        out.family(&format!("causeway_worker_{name}"), kind(name), help);
        for (worker, [number, cpu]) in &labelled {
            out.sample("", &[("worker", number), ("cpu", cpu)], value(worker));
        }
    }
    out.family("causeway_worker_busy_seconds_total", "counter", "Time of turns that had work.");
    for (worker, [number, cpu]) in &labelled {
        out.sample("", &[("worker", number), ("cpu", cpu)], seconds(worker.busy_ns));
    }
    out.family("causeway_worker_burst_frames", "histogram", "Frames of a burst.");
    for (worker, [number, cpu]) in &labelled {
        let mut bursts = 0u64;
        for (size, count) in BATCH_SIZES.iter().zip(worker.batches) {
            bursts = bursts.saturating_add(count);
            let size = size.to_string();
            out.sample("_bucket", &[("worker", number), ("cpu", cpu), ("le", &size)], bursts);
        }
        out.sample("_bucket", &[("worker", number), ("cpu", cpu), ("le", "+Inf")], bursts);
        out.sample("_sum", &[("worker", number), ("cpu", cpu)], worker.frames);
        out.sample("_count", &[("worker", number), ("cpu", cpu)], bursts);
    }
}

/// Counters say so by their names.
fn kind(name: &str) -> &'static str {
    if name.ends_with("_total") { "counter" } else { "gauge" }
}

/// Nanoseconds as seconds, exactly.
fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

/// The text as it grows.
#[derive(Debug, Default)]
struct Exposition {
    text: String,
    family: String,
}

impl Exposition {
    /// Starts a metric: its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        name.clone_into(&mut self.family);
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut shown = String::new();
        for (name, value) in labels {
            let gap = if shown.is_empty() { "{" } else { "," };
            shown.push_str(&format!("{gap}{name}=\"{}\"", escaped(value)));
        }
        if !labels.is_empty() {
            shown.push('}');
        }
        let family = std::mem::take(&mut self.family);
        self.line(format_args!("{family}{suffix}{shown} {value}"));
        self.family = family;
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a text does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// The value of a label between its quotes.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests;
