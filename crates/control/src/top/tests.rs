#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::collections::BTreeMap;

use super::TopView;
use crate::protocol::{PortStats, QueueStats, StatsView, SwitchStats, WorkerStats};

fn queue(index: u16, frames: u64, no_buffer: u64) -> QueueStats {
    QueueStats {
        index,
        rx_frames: frames,
        rx_bytes: frames * 100,
        tx_frames: frames / 2,
        tx_bytes: frames * 50,
        drops: BTreeMap::from([("no_buffer".to_owned(), no_buffer), ("runt".to_owned(), 7)]),
        kicks: frames / 10,
        rests: 0,
        rx_calls: frames / 4,
        rx_calls_suppressed: 3,
        tx_calls: 1,
        tx_calls_suppressed: frames / 5,
    }
}

fn stats(up_ns: u64, worker: WorkerStats, queues: Vec<QueueStats>) -> StatsView {
    let port = PortStats {
        name: "g0".to_owned(),
        kind: "vhost-user".to_owned(),
        state: "up".to_owned(),
        reason: String::new(),
        since_ms: 1,
        queues,
        elsewhere: None,
    };
    let switch = SwitchStats::default();
    StatsView { ports: vec![port], switch, workers: vec![worker], up_ns }
}

fn worker(frames: u64, busy_ns: u64, batches: [u64; 7]) -> WorkerStats {
    let bursts = batches.iter().sum();
    let (kicks, calls) = (frames / 100, frames / 50);
    WorkerStats {
        cpu: Some(1),
        frames,
        busy_ns,
        bursts,
        batches,
        kicks,
        calls,
        calls_suppressed: frames / 25,
        sleeps: 10,
        ..WorkerStats::default()
    }
}

fn before() -> StatsView {
    let worker = worker(1000, 50_000, [5, 0, 0, 0, 0, 0, 10]);
    stats(1_000_000_000, worker, vec![queue(0, 500, 2), queue(1, 500, 0)])
}

fn after() -> StatsView {
    let worker = worker(5000, 250_050_000, [6, 0, 0, 0, 0, 4, 70]);
    stats(3_000_000_000, worker, vec![queue(0, 2500, 2), queue(1, 2500, 40)])
}

#[test]
fn two_looks_make_rates() {
    let view = TopView::between(&before(), &after());
    assert!((view.interval_s - 2.0).abs() < 1e-9);
    let worker = &view.workers[0];
    assert_eq!((worker.frames, worker.bursts), (4000, 65));
    assert_eq!(worker.batches, [1, 0, 0, 0, 0, 4, 60]);
    assert_eq!(worker.frames_per_s, 2000.0);
    assert_eq!(worker.ns_per_frame, Some(62_500.0));
    assert_eq!(worker.busy_ratio, 0.125);
    assert_eq!((worker.kicks_per_s, worker.calls_per_s), (20.0, 40.0));
    assert_eq!((worker.calls_suppressed_per_s, worker.sleeps_per_s), (80.0, 0.0));
    let port = &view.ports[0];
    assert_eq!((port.rx_frames, port.tx_frames), (4000, 2000));
    assert_eq!((port.rx_frames_per_s, port.tx_frames_per_s), (2000.0, 1000.0));
    assert_eq!((port.rx_bits_per_s, port.tx_bits_per_s), (1_600_000.0, 800_000.0));
    assert_eq!(port.drops, BTreeMap::from([("no_buffer".to_owned(), 40)]));
    assert_eq!(port.drops_per_s, 20.0);
    assert_eq!((port.kicks_per_s, port.calls_per_s), (200.0, 500.0));
    assert_eq!(port.calls_suppressed_per_s, 400.0);
    assert_eq!(view.frames_per_s(), 2000.0);
}

#[test]
fn nothing_happened() {
    let view = TopView::between(&before(), &before());
    assert_eq!(view.workers[0].frames_per_s, 0.0);
    assert_eq!(view.workers[0].ns_per_frame, None);
    assert!(view.ports[0].drops.is_empty());
}

/// A switch that was started anew, and a port or a worker that is a new one, count from zero.
#[test]
fn what_is_new_counts_from_zero() {
    let restarted = TopView::between(&after(), &before());
    assert_eq!(restarted.workers[0].frames, 1000);
    assert_eq!(restarted.workers[0].frames_per_s, 1000.0);
    assert_eq!(restarted.ports[0].rx_frames, 1000);

    let mut new = after();
    new.ports[0].name = "g1".to_owned();
    new.workers[0].number = 1;
    let view = TopView::between(&before(), &new);
    assert_eq!((view.ports[0].rx_frames, view.workers[0].frames), (5000, 5000));

    // Added again under the same name, with less on the counters than before.
    let mut again = after();
    again.ports[0].queues = vec![queue(0, 10, 1)];
    let view = TopView::between(&before(), &again);
    assert_eq!((view.ports[0].rx_frames, view.ports[0].drops["no_buffer"]), (10, 1));
}
