use std::collections::{BTreeMap, BTreeSet};

use super::text;
use crate::protocol::{PortStats, QueueStats, StatsView, SwitchStats, VersionView, WorkerStats};

fn stats() -> StatsView {
    let queue = |index| QueueStats {
        index,
        rx_frames: 11 + u64::from(index),
        rx_bytes: 1100,
        tx_frames: 22,
        tx_bytes: 2200,
        drops: BTreeMap::from([("no_buffer".to_owned(), 3), ("runt".to_owned(), 0)]),
        kicks: 4,
        rests: 9,
        rx_calls: 5,
        rx_calls_suppressed: 6,
        tx_calls: 7,
        tx_calls_suppressed: 8,
    };
    let port = |name: &str, queues| PortStats {
        name: name.to_owned(),
        kind: "vhost-user".to_owned(),
        state: "broken".to_owned(),
        reason: "\"text\"\nof any kind".to_owned(),
        since_ms: 0,
        queues,
        elsewhere: None,
    };
    let worker = WorkerStats {
        number: 2,
        cpu: Some(1),
        frames: 70,
        bursts: 4,
        batches: [1, 0, 0, 2, 0, 0, 1],
        busy_ns: 1_500_000_001,
        ..WorkerStats::default()
    };
    StatsView {
        ports: vec![port("g0", vec![queue(0), queue(1)]), port("a\\b\"c\nd", Vec::new())],
        switch: SwitchStats { flood_copies: 9, fdb_entries: 12, ..SwitchStats::default() },
        workers: vec![worker, WorkerStats { number: 3, ..WorkerStats::default() }],
        up_ns: 2_000_000_000,
    }
}

fn all() -> String {
    let version =
        VersionView { version: "1.2.3".to_owned(), pid: 1, uptime_s: 2, ..Default::default() };
    text(&stats(), &version)
}

#[test]
fn everything_that_is_counted_is_there() {
    let text = all();
    for line in [
        r#"causeway_build_info{version="1.2.3"} 1"#,
        "causeway_uptime_seconds 2.000000000",
        "causeway_switch_flood_copies_total 9",
        "causeway_switch_fdb_entries 12",
        r#"causeway_port_state{port="g0",kind="vhost-user",state="broken"} 1"#,
        r#"causeway_port_state{port="g0",kind="vhost-user",state="up"} 0"#,
        r#"causeway_port_state{port="a\\b\"c\nd",kind="vhost-user",state="broken"} 1"#,
        r#"causeway_port_rx_frames_total{port="g0",queue="1"} 12"#,
        r#"causeway_port_tx_bytes_total{port="g0",queue="0"} 2200"#,
        r#"causeway_port_kicks_total{port="g0",queue="0"} 4"#,
        r#"causeway_port_rx_calls_total{port="g0",queue="0"} 5"#,
        r#"causeway_port_tx_calls_suppressed_total{port="g0",queue="0"} 8"#,
        r#"causeway_port_drops_total{port="g0",queue="1",reason="no_buffer"} 3"#,
        r#"causeway_port_drops_total{port="g0",queue="1",reason="runt"} 0"#,
        r#"causeway_worker_frames_total{worker="2",cpu="1"} 70"#,
        r#"causeway_worker_frames_total{worker="3",cpu=""} 0"#,
        r#"causeway_worker_busy_seconds_total{worker="2",cpu="1"} 1.500000001"#,
        r#"causeway_worker_burst_frames_bucket{worker="2",cpu="1",le="4"} 1"#,
        r#"causeway_worker_burst_frames_bucket{worker="2",cpu="1",le="8"} 3"#,
        r#"causeway_worker_burst_frames_bucket{worker="2",cpu="1",le="+Inf"} 4"#,
        r#"causeway_worker_burst_frames_sum{worker="2",cpu="1"} 70"#,
        r#"causeway_worker_burst_frames_count{worker="2",cpu="1"} 4"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

/// Each metric says its type once, before its samples, and its samples stand together.
#[test]
fn metrics_are_declared_once_and_stand_together() {
    let text = all();
    let (mut declared, mut samples) = (BTreeSet::new(), BTreeSet::new());
    let mut present = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(declared.insert(name.to_owned()), "{name} is declared twice");
            let total = name.ends_with("_total");
            assert_eq!(total, kind == "counter", "{name} is a {kind}");
            present = name.to_owned();
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&present), "{line} stands under {present}");
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(samples.insert(series.to_owned()), "{series} is there twice");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(text.ends_with('\n') && declared.len() > 20);
}
