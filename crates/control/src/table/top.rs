//! `ctl top` for people.

use super::Align::{Left, Right};
use super::render;
use crate::top::{PortTop, TopView, WorkerTop};

/// Sizes of bursts, as headings.
const SIZES: [&str; 7] = ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64"];

/// `ctl top`: workers, and how they spend their time, then ports.
pub fn top(view: &TopView) -> String {
    let mut text =
        format!("{} frames/s over {:.1} s\n\n", short(view.frames_per_s()), view.interval_s);
    let columns = [
        ("WORKER", Right),
        ("CPU", Right),
        ("BUSY", Right),
        ("FRAMES/S", Right),
        ("NS/FRAME", Right),
        ("KICKS/S", Right),
        ("CALLS/S", Right),
        ("SUPPRESSED/S", Right),
        ("SLEEPS/S", Right),
    ];
    text.push_str(&render(&columns, view.workers.iter().map(worker)));
    text.push_str("\nBursts by number of frames:\n");
    let sizes = SIZES.map(|size| (size, Right));
    let columns: Vec<_> = [("WORKER", Right), ("BURSTS", Right)].into_iter().chain(sizes).collect();
    text.push_str(&render(&columns, view.workers.iter().map(batches)));
    let columns = [
        ("PORT", Left),
        ("STATE", Left),
        ("RX FRAMES/S", Right),
        ("RX BIT/S", Right),
        ("TX FRAMES/S", Right),
        ("TX BIT/S", Right),
        ("CALLS/S", Right),
        ("DROPS/S", Right),
        ("WHY", Left),
    ];
    text.push('\n');
    text.push_str(&render(&columns, view.ports.iter().map(port)));
    text
}

fn worker(worker: &WorkerTop) -> Vec<String> {
    vec![
        worker.number.to_string(),
        worker.cpu.map_or_else(|| "-".to_owned(), |cpu| cpu.to_string()),
        format!("{:.1}%", worker.busy_ratio * 100.0),
        short(worker.frames_per_s),
        worker.ns_per_frame.map_or_else(|| "-".to_owned(), |ns| format!("{ns:.1}")),
        short(worker.kicks_per_s),
        short(worker.calls_per_s),
        short(worker.calls_suppressed_per_s),
        short(worker.sleeps_per_s),
    ]
}

fn batches(worker: &WorkerTop) -> Vec<String> {
    let share = |bursts: &u64| match bursts.saturating_mul(100).checked_div(worker.bursts) {
        None | Some(0) if *bursts > 0 => "<1%".to_owned(),
        None | Some(0) => "-".to_owned(),
        Some(percent) => format!("{percent}%"),
    };
    let head = [worker.number.to_string(), worker.bursts.to_string()];
    head.into_iter().chain(worker.batches.iter().map(share)).collect()
}

fn port(port: &PortTop) -> Vec<String> {
    let why: Vec<_> =
        port.drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    vec![
        port.name.clone(),
        port.state.clone(),
        short(port.rx_frames_per_s),
        short(port.rx_bits_per_s),
        short(port.tx_frames_per_s),
        short(port.tx_bits_per_s),
        short(port.calls_per_s),
        short(port.drops_per_s),
        why.join(", "),
    ]
}

/// A number in at most five characters.
fn short(number: f64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|(unit, _)| number >= *unit) {
        Some((unit, name)) if number < 10.0 * unit => format!("{:.2}{name}", number / unit),
        Some((unit, name)) => format!("{:.1}{name}", number / unit),
        None if number == 0.0 || number >= 10.0 => format!("{number:.0}"),
        None => format!("{number:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{short, top};
    use crate::top::{PortTop, TopView, WorkerTop};

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.3, "0.3"),
            (12.3, "12"),
            (999.0, "999"),
            (1234.0, "1.23k"),
            (12_340.0, "12.3k"),
            (5_550_000.0, "5.55M"),
            (25e9, "25.0G"),
        ];
        for (number, text) in cases {
            assert_eq!(short(number), text);
        }
    }

    #[test]
    fn a_screen_shows_where_time_goes() {
        let worker = WorkerTop {
            number: 0,
            cpu: Some(3),
            busy_ratio: 0.5,
            frames: 1000,
            frames_per_s: 2e6,
            ns_per_frame: Some(41.26),
            bursts: 1000,
            batches: [500, 0, 0, 0, 0, 499, 1],
            kicks_per_s: 12.0,
            calls_per_s: 0.0,
            calls_suppressed_per_s: 62_500.0,
            sleeps_per_s: 0.5,
        };
        let port = PortTop {
            name: "g0".to_owned(),
            kind: "vhost-user".to_owned(),
            state: "up".to_owned(),
            rx_frames: 1,
            rx_frames_per_s: 1e6,
            rx_bits_per_s: 512e6,
            tx_frames: 2,
            tx_frames_per_s: 2e6,
            tx_bits_per_s: 1.024e9,
            drops: BTreeMap::from([("no_buffer".to_owned(), 9)]),
            drops_per_s: 4.5,
            kicks_per_s: 1.0,
            calls_per_s: 2.0,
            calls_suppressed_per_s: 3.0,
        };
        let view = TopView { interval_s: 2.0, workers: vec![worker], ports: vec![port] };
        assert_eq!(
            top(&view),
            "2.00M frames/s over 2.0 s\n\
             \n\
             WORKER  CPU   BUSY  FRAMES/S  NS/FRAME  KICKS/S  CALLS/S  SUPPRESSED/S  SLEEPS/S\n\
             \x20    0    3  50.0%     2.00M      41.3       12        0         62.5k       0.5\n\
             \n\
             Bursts by number of frames:\n\
             WORKER  BURSTS    1  2  3-4  5-8  9-16  17-32  33-64\n     \
             0    1000  50%  -    -    -     -    49%    <1%\n\
             \n\
             PORT  STATE  RX FRAMES/S  RX BIT/S  TX FRAMES/S  TX BIT/S  CALLS/S  DROPS/S  WHY\n\
             g0    up           1.00M    512.0M        2.00M     1.02G      2.0      4.5  \
             no_buffer 9\n"
        );
    }
}
