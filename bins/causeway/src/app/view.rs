//! What `ctl` is told.

use std::collections::BTreeMap;

use control::protocol::{
    FdbEntry, FdbView, FrontEndView, InterfaceView, LastError, Placement, PortStats, PortTotals,
    PortView, PortsView, QueueStats, StatsView, SwitchStats, VersionView, WorkerStats,
};
use event_manager::{EventManager, SubscriberOps};
use port::{DropReason, PortId, PortStatus, QueueTotals};

use super::ports::{Port, Side};
use super::{App, Subscriber};

impl App {
    pub(super) fn ports_view(&mut self) -> PortsView {
        let stats = self.switch.stats();
        let placement = self.switch.placement();
        let manager = &mut self.manager;
        let ports = self.ports.iter().map(|port| {
            let id = port.handle.id;
            let status = port.handle.status.read();
            let of_port = stats.ports.iter().find(|stats| stats.id == id);
            PortView {
                name: port.spec.name.clone(),
                kind: port.spec.kind.name().to_owned(),
                state: status.state.name().to_owned(),
                since_ms: millis(&status),
                last_error: last_error(&status),
                reason: status.reason,
                queues: of_port.map_or(0, |stats| stats.queues.len()),
                placement: placed(&placement, id),
                interface: interface(port),
                front_end: front_end(port, manager),
                offloads: port.spec.kind.offloads(),
                spec: port.spec.to_string(),
            }
        });
        PortsView { ports: ports.collect() }
    }

    pub(super) fn stats_view(&self) -> StatsView {
        let stats = self.switch.stats();
        let mut ports = Vec::with_capacity(stats.ports.len());
        for port in &self.ports {
            let Some(of_port) = stats.ports.iter().find(|p| p.id == port.handle.id) else {
                continue;
            };
            ports.push(port_stats(of_port, port.spec.kind.name()));
        }
        // The law holds for the switch as a whole, so frames of ports that are gone are shown.
        let gone = &stats.removed_ports;
        if gone.rx_frames > 0 || gone.tx_frames > 0 || gone.dropped() > 0 {
            ports.push(PortStats {
                name: "(removed)".to_owned(),
                kind: "removed".to_owned(),
                state: "down".to_owned(),
                reason: "all ports that were removed, together".to_owned(),
                since_ms: 0,
                queues: vec![queue(0, gone)],
                elsewhere: None,
            });
        }
        with_ports(&stats, ports)
    }

    pub(super) fn fdb_view(&self) -> FdbView {
        let name = |id: PortId| {
            let found = self.ports.iter().find(|port| port.handle.id == id);
            found.map_or_else(String::new, |port| port.spec.name.clone())
        };
        let entries = self.switch.fdb().into_iter().map(|entry| FdbEntry {
            mac: entry.mac.to_string(),
            vlan: entry.vlan.get(),
            port: name(entry.port),
            age_s: u64::from(entry.age_secs),
            is_static: entry.fixed,
        });
        FdbView { entries: entries.collect() }
    }

    pub(super) fn version_view(&self) -> VersionView {
        VersionView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.began.elapsed().as_secs(),
            sandbox: self.sandbox.view(),
        }
    }
}

/// The statistics with `ports` for the ports.
pub(crate) fn with_ports(stats: &switch::SwitchStats, ports: Vec<PortStats>) -> StatsView {
    let switch = SwitchStats {
        flood_copies: stats.flood_copies,
        segments_added: stats.segments_added,
        merged: stats.merged,
        originated: stats.originated,
        held: stats.held,
        fdb_entries: stats.fdb_entries,
        fdb_refused: stats.fdb_refused,
    };
    let workers = stats.workers.iter().map(|worker| WorkerStats {
        number: worker.number,
        cpu: worker.cpu.and_then(|cpu| u16::try_from(cpu).ok()),
        busy_ratio: worker.busy_ratio(),
        frames: worker.frames,
        bursts: worker.bursts,
        batches: worker.batches,
        busy_ns: worker.busy_ns,
        sleeps: worker.sleeps,
        kicks: worker.kicks,
        calls: worker.calls.sent,
        calls_suppressed: worker.calls.suppressed,
    });
    StatsView { ports, switch, workers: workers.collect(), up_ns: stats.up_ns }
}

/// A port's statistics.
pub(crate) fn port_stats(stats: &switch::PortStats, kind: &str) -> PortStats {
    PortStats {
        name: stats.name.clone(),
        kind: kind.to_owned(),
        state: stats.status.state.name().to_owned(),
        reason: stats.status.reason.clone(),
        since_ms: millis(&stats.status),
        queues: (0u16..).zip(&stats.queues).map(|(i, q)| queue(i, q)).collect(),
        elsewhere: elsewhere(&stats.elsewhere),
    }
}

fn elsewhere(totals: &port::PortTotals) -> Option<PortTotals> {
    let port::PortTotals { rx_frames, rx_bytes, tx_frames, tx_bytes, drops } = *totals;
    let counted = *totals != port::PortTotals::default();
    counted.then_some(PortTotals { rx_frames, rx_bytes, tx_frames, tx_bytes, drops })
}

fn queue(index: u16, totals: &QueueTotals) -> QueueStats {
    let names = DropReason::ALL.iter().map(|reason| reason.name().to_owned());
    QueueStats {
        index,
        rx_frames: totals.rx_frames,
        rx_bytes: totals.rx_bytes,
        tx_frames: totals.tx_frames,
        tx_bytes: totals.tx_bytes,
        drops: names.zip(totals.drops).collect::<BTreeMap<_, _>>(),
        kicks: totals.kicks,
        rests: totals.rests,
        rx_calls: totals.rx_calls.sent,
        rx_calls_suppressed: totals.rx_calls.suppressed,
        tx_calls: totals.tx_calls.sent,
        tx_calls_suppressed: totals.tx_calls.suppressed,
    }
}

fn front_end(port: &Port, manager: &mut EventManager<Subscriber>) -> Option<FrontEndView> {
    let Side::Guest(id) = &port.side else { return None };
    let Ok(Subscriber::Guest(guest)) = manager.subscriber_mut(*id) else { return None };
    let session = guest.session()?;
    let hex = |bits: Option<u64>| bits.map_or_else(String::new, |bits| format!("{bits:#x}"));
    Some(FrontEndView {
        features: hex(session.features()),
        protocol_features: hex(session.protocol_features()),
        regions: session.regions(),
        dirty_log: session.is_logging(),
        translations: session.translations(),
    })
}

fn interface(port: &Port) -> Option<InterfaceView> {
    let Side::Uplink(uplink) = &port.side else { return None };
    let device = uplink.device()?;
    let link = device.link();
    Some(InterfaceView {
        name: link.name(),
        index: link.index(),
        mtu: link.current_mtu(),
        driver: link.driver().0,
        mode: device.mode().to_owned(),
        umem: device.umem().to_owned(),
        kernel: device.kernel_counts(),
    })
}

fn placed(placement: &[switch::Placement], id: PortId) -> Vec<Placement> {
    let of_port = placement.iter().filter(|at| at.queue.port == id);
    of_port
        .map(|at| Placement {
            index: at.queue.pair,
            worker: at.worker,
            cpu: at.cpu.and_then(|cpu| u16::try_from(cpu).ok()),
            pinned: at.pinned,
            share: at.share,
            busy: at.busy,
        })
        .collect()
}

fn millis(status: &PortStatus) -> u64 {
    u64::try_from(status.since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn last_error(status: &PortStatus) -> Option<LastError> {
    let (text, at) = status.last_error.as_ref()?;
    let age_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
    Some(LastError { text: text.clone(), age_ms })
}
