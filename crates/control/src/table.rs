//! Tables for people.

mod top;

pub use top::top;

use crate::protocol::{FdbView, PortView, PortsView, StatsView, VersionView};

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Align {
    Left,
    Right,
}
use Align::{Left, Right};

/// `ctl ports`.
pub fn ports(view: &PortsView) -> String {
    let columns = [
        ("PORT", Left),
        ("KIND", Left),
        ("STATE", Left),
        ("SINCE", Right),
        ("QUEUES", Right),
        ("CPUS", Left),
        ("LOAD", Right),
        ("INTERFACE", Left),
        ("REASON", Left),
    ];
    let rows = view.ports.iter().map(|port| {
        let mut reason = port.reason.clone();
        if let Some(error) = &port.last_error {
            let gap = if reason.is_empty() { "" } else { "; " };
            reason =
                format!("{reason}{gap}last error {} ago: {}", duration(error.age_ms), error.text);
        }
        let mut cpus: Vec<String> = port
            .placement
            .iter()
            .map(|at| at.cpu.map_or_else(|| "any".to_owned(), |cpu| cpu.to_string()))
            .collect();
        cpus.sort_unstable();
        cpus.dedup();
        let interface = port.interface.as_ref();
        let (name, mode) =
            interface.map_or(("", ""), |interface| (&interface.name, &interface.mode));
        let umem = interface.map(|interface| &interface.umem).filter(|umem| !umem.is_empty());
        let umem = umem.map_or_else(String::new, |umem| format!("umem={umem}"));
        let narrow = !matches!(port.offloads.as_str(), "" | "on");
        let offloads = if narrow { format!("offloads={}", port.offloads) } else { String::new() };
        let interface = [name, mode, &umem, &offloads].into_iter().filter(|word| !word.is_empty());
        vec![
            port.name.clone(),
            port.kind.clone(),
            port.state.clone(),
            duration(port.since_ms),
            port.queues.to_string(),
            cpus.join(","),
            match port.placement.as_slice() {
                [] => "-".to_owned(),
                pairs => percent(pairs.iter().map(|at| at.busy).sum()),
            },
            interface.collect::<Vec<_>>().join(" "),
            reason,
        ]
    });
    let mut text = render(&columns, rows);
    let many = || view.ports.iter().filter(|port| port.placement.len() > 1);
    if many().next().is_some() {
        text.push('\n');
        text.push_str(&pairs(many()));
    }
    text
}

/// The pairs of ports that have several.
fn pairs<'a>(ports: impl Iterator<Item = &'a PortView>) -> String {
    let columns = [
        ("PORT", Left),
        ("PAIR", Right),
        ("WORKER", Right),
        ("CPU", Right),
        ("SHARE", Right),
        ("LOAD", Right),
        ("", Left),
    ];
    let rows = ports.flat_map(|port| port.placement.iter().map(move |at| (port, at)));
    let rows = rows.map(|(port, at)| {
        vec![
            port.name.clone(),
            at.index.to_string(),
            at.worker.map_or_else(|| "own".to_owned(), |worker| worker.to_string()),
            at.cpu.map_or_else(|| "any".to_owned(), |cpu| cpu.to_string()),
            percent(at.share),
            percent(at.busy),
            if at.pinned { "pinned" } else { "" }.to_owned(),
        ]
    });
    render(&columns, rows)
}

fn percent(part: f64) -> String {
    format!("{:.1}%", part * 100.0)
}

/// `ctl stats`: ports, their drops, the switch and the workers.
pub fn stats(view: &StatsView) -> String {
    let columns = [
        ("PORT", Left),
        ("QUEUE", Right),
        ("STATE", Left),
        ("RX FRAMES", Right),
        ("RX BYTES", Right),
        ("TX FRAMES", Right),
        ("TX BYTES", Right),
        ("DROPS", Right),
        ("WHY", Left),
    ];
    let rows = view.ports.iter().flat_map(|port| {
        port.queues.iter().map(|queue| {
            let drops = queue.drops.iter().filter(|(_, count)| **count > 0);
            let why: Vec<_> = drops.map(|(reason, count)| format!("{reason} {count}")).collect();
            vec![
                port.name.clone(),
                queue.index.to_string(),
                port.state.clone(),
                queue.rx_frames.to_string(),
                queue.rx_bytes.to_string(),
                queue.tx_frames.to_string(),
                queue.tx_bytes.to_string(),
                queue.dropped().to_string(),
                why.join(", "),
            ]
        })
    });
    let mut text = render(&columns, rows);
    let switch = &view.switch;
    text.push_str(&format!(
        "\nflood copies {}, segments added {}, merged {}, originated {}, held {}\n\n",
        switch.flood_copies, switch.segments_added, switch.merged, switch.originated, switch.held
    ));
    let columns = [("WORKER", Right), ("CPU", Right), ("BUSY", Right), ("FRAMES", Right)];
    let rows = view.workers.iter().map(|worker| {
        vec![
            worker.number.to_string(),
            worker.cpu.map_or_else(|| "-".to_owned(), |cpu| cpu.to_string()),
            format!("{:.1}%", worker.busy_ratio * 100.0),
            worker.frames.to_string(),
        ]
    });
    text.push_str(&render(&columns, rows));
    text
}

/// `ctl fdb`.
pub fn fdb(view: &FdbView) -> String {
    let columns = [("MAC", Left), ("VLAN", Right), ("PORT", Left), ("AGE", Right)];
    let rows = view.entries.iter().map(|entry| {
        let age = if entry.is_static {
            "static".to_owned()
        } else {
            duration(entry.age_s.saturating_mul(1000))
        };
        vec![entry.mac.clone(), entry.vlan.to_string(), entry.port.clone(), age]
    });
    render(&columns, rows)
}

/// `ctl version`.
pub fn version(view: &VersionView) -> String {
    let up = duration(view.uptime_s.saturating_mul(1000));
    let sandbox = &view.sandbox;
    let held = if sandbox.on {
        format!(
            "on\n  no_new_privs  {}\n  seccomp       {}\n  Landlock      {}\n  \
             capabilities  {}\n  refused       {} system calls\n",
            sandbox.no_new_privs,
            sandbox.seccomp,
            sandbox.landlock,
            sandbox.kept(),
            sandbox.refused
        )
    } else {
        "off\n".to_owned()
    };
    format!("causeway {}, process {}, up for {up}\nsandbox: {held}", view.version, view.pid)
}

/// A time as people say it: its two largest units at most.
fn duration(ms: u64) -> String {
    let (s, m, h, d) = (ms / 1000, ms / 60_000, ms / 3_600_000, ms / 86_400_000);
    match (d, h, m, s) {
        (0, 0, 0, 0) => format!("{ms}ms"),
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{}s", s % 60),
        (0, h, m, _) => format!("{h}h{}m", m % 60),
        (d, h, _, _) => format!("{d}d{}h", h % 24),
    }
}

fn render(columns: &[(&str, Align)], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = vec![columns.iter().map(|(name, _)| (*name).to_owned()).collect()];
    table.extend(rows);
    let width = |index: usize| {
        let cells = table.iter().filter_map(|row: &Vec<String>| row.get(index));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    for row in &table {
        let mut line = String::new();
        for ((cell, (_, align)), width) in row.iter().zip(columns).zip(&widths) {
            let gap = if line.is_empty() { "" } else { "  " };
            line.push_str(&match align {
                Left => format!("{gap}{cell:<width$}"),
                Right => format!("{gap}{cell:>width$}"),
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{duration, fdb, ports};
    use crate::protocol::{
        FdbEntry, FdbView, InterfaceView, LastError, Placement, PortView, PortsView,
    };

    #[test]
    fn durations_are_short() {
        let cases = [
            (0, "0ms"),
            (999, "999ms"),
            (59_999, "59s"),
            (61_000, "1m1s"),
            (3_661_000, "1h1m"),
            (90_000_000, "1d1h"),
        ];
        for (ms, text) in cases {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let entry = |mac: &str, port: &str, age_s, is_static| FdbEntry {
            mac: mac.to_owned(),
            vlan: 10,
            port: port.to_owned(),
            age_s,
            is_static,
        };
        let entries = vec![
            entry("02:00:00:00:00:01", "guest-one", 65, false),
            entry("02:00:00:00:00:02", "g2", 0, true),
        ];
        assert_eq!(
            fdb(&FdbView { entries }),
            "MAC                VLAN  PORT          AGE\n\
             02:00:00:00:00:01    10  guest-one    1m5s\n\
             02:00:00:00:00:02    10  g2         static\n"
        );
    }

    fn port() -> PortView {
        PortView {
            name: "g0".to_owned(),
            kind: "vhost-user".to_owned(),
            state: "waiting".to_owned(),
            reason: "waiting for the front end to connect to /run/g0.sock".to_owned(),
            since_ms: 1500,
            last_error: Some(LastError { text: "bad message".to_owned(), age_ms: 61_000 }),
            queues: 0,
            placement: Vec::new(),
            interface: None,
            front_end: None,
            offloads: "on".to_owned(),
            spec: String::new(),
        }
    }

    #[test]
    fn pairs_of_a_port_with_several_have_lines_of_their_own() {
        let place = |index, worker, cpu, pinned| Placement {
            index,
            worker,
            cpu,
            pinned,
            share: 0.5,
            busy: 0.251,
        };
        let placement = vec![place(0, Some(1), Some(3), true), place(1, None, None, false)];
        let text = ports(&PortsView { ports: vec![PortView { placement, ..port() }, port()] });
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("  3,any  50.2%  "), "{text}");
        assert!(lines[2].contains("  -  "), "{text}");
        assert_eq!(
            lines[3..],
            [
                "",
                "PORT  PAIR  WORKER  CPU  SHARE   LOAD",
                "g0       0       1    3  50.0%  25.1%  pinned",
                "g0       1     own  any  50.0%  25.1%",
            ]
        );
    }

    #[test]
    fn offloads_are_shown_where_some_are_missing_and_memory_where_it_is_shared() {
        let guest = |offloads: &str| PortView { offloads: offloads.to_owned(), ..port() };
        let interface = InterfaceView {
            name: "tap0".to_owned(),
            index: 7,
            mtu: 1500,
            driver: String::new(),
            mode: String::new(),
            umem: String::new(),
            kernel: Vec::new(),
        };
        let (mode, umem) = ("copy".to_owned(), "u".to_owned());
        let shares = InterfaceView { mode, umem, ..interface.clone() };
        let shares = PortView { interface: Some(shares), ..guest("") };
        let uplink = PortView { interface: Some(interface), ..guest("off") };
        let ports = vec![guest("csum+tso4"), uplink, guest("on"), guest(""), shares];
        let text = super::ports(&PortsView { ports });
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("-  offloads=csum+tso4  waiting"), "{text}");
        assert!(lines[2].contains("-  tap0 offloads=off   waiting"), "{text}");
        assert!(lines[5].contains("-  tap0 copy umem=u    waiting"), "{text}");
        assert!(!lines[3].contains("offloads") && !lines[4].contains("offloads"), "{text}");
    }

    #[test]
    fn a_port_says_why_it_is_not_up_and_what_went_wrong() {
        let port = port();
        let text = ports(&PortsView { ports: vec![port] });
        let line = text.lines().nth(1).unwrap();
        let reason = "waiting for the front end to connect to /run/g0.sock; last error 1m1s ago: \
                      bad message";
        assert!(line.ends_with(reason), "{line}");
    }
}
