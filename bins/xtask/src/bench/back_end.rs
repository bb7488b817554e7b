//! What is measured: the switch, or a peer in its place, between two vhost-user sockets.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use conformance::{Environment, Forwarder, OvsDpdk, Scratch, Switch};
use serde::Serialize;

use super::machine::Versions;
use crate::steps::Steps;

/// A peer does not say when its ports are ready; this is many times what it takes.
const SETTLE: Duration = Duration::from_millis(500);
/// Bytes of an Ethernet header, which no MTU counts.
const HEADER: u32 = 14;

/// What can be measured; the peers are what `--peers` takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    /// The switch, polling as it does by default: adaptive.
    #[value(skip)]
    Causeway,
    /// The switch, which never sleeps.
    #[value(skip)]
    CausewayBusy,
    /// The switch, which sleeps whenever there is nothing to do.
    #[value(skip)]
    CausewayInterrupt,
    /// OVS-DPDK, learning (NORMAL)
    Ovs,
    /// DPDK's testpmd, which passes frames on and decides nothing (io)
    Testpmd,
}

/// A running back end.
#[derive(Debug)]
pub(crate) enum BackEnd {
    Switch { switch: Switch, start: Instant },
    Ovs(OvsDpdk),
    Testpmd(Forwarder),
}

/// What a back end says of a run after it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Account {
    /// Cycles for each frame, polls that found nothing excluded.
    pub(crate) cycles_per_frame: Option<f64>,
    /// Frames that the switch dropped; peers are not asked.
    pub(crate) dropped: Option<u64>,
    /// The share of the run that had work; peers are not asked.
    pub(crate) busy_ratio: Option<f64>,
}

impl Subject {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Causeway => "causeway",
            Self::CausewayBusy => "causeway busy",
            Self::CausewayInterrupt => "causeway interrupt",
            Self::Ovs => "OVS-DPDK",
            Self::Testpmd => "testpmd io",
        }
    }

    /// Whether the guest listens on the sockets: OVS connects to them.
    pub(crate) fn guest_listens(self) -> bool {
        self == Self::Ovs
    }

    /// Whether its polling thread stays awake under load.
    pub(crate) fn polls(self) -> bool {
        self != Self::CausewayInterrupt
    }

    fn poll(self) -> &'static str {
        match self {
            Self::CausewayBusy => "busy",
            Self::CausewayInterrupt => "interrupt",
            Self::Causeway | Self::Ovs | Self::Testpmd => "adaptive",
        }
    }
}

/// The sockets of a run.
pub(crate) fn sockets(scratch: &Scratch) -> [PathBuf; 2] {
    ["v0", "v1"].map(|name| scratch.path(name))
}

/// Those of the peers that can be had; the others are noted as not run, with the reason.
pub(crate) fn available(
    steps: &mut Steps,
    environment: &Environment,
    peers: &[Subject],
    versions: &mut Versions,
) -> Vec<Subject> {
    let mut found = Vec::new();
    for peer in peers.iter().copied() {
        let had = match peer {
            Subject::Ovs => environment.ovs().and_then(|programs| programs.version()).map(Some),
            Subject::Testpmd => environment.testpmd().map(|_| None),
            Subject::Causeway | Subject::CausewayBusy | Subject::CausewayInterrupt => Ok(None),
        };
        match had {
            Ok(version) => {
                versions.ovs = versions.ovs.take().or(version);
                found.push(peer);
            }
            Err(error) => {
                let reason = format!("it cannot be had: {error:#}");
                println!("without {}: {reason}", peer.name());
                steps.not_run(&format!("the peer {}", peer.name()), &reason, false);
            }
        }
    }
    found
}

impl BackEnd {
    /// Starts it on CPU 0; frames have at most `frame_bytes`.
    pub(crate) fn start(
        subject: Subject,
        environment: &Environment,
        scratch: &Scratch,
        frame_bytes: u32,
    ) -> Result<Self> {
        let (sockets, folder) = (sockets(scratch), scratch.folder());
        match subject {
            Subject::Causeway | Subject::CausewayBusy | Subject::CausewayInterrupt => {
                let [a, b] = sockets;
                let ports = [("g0", a), ("g1", b)].map(|(name, socket)| {
                    format!("vhost-user:name={name},socket={}", socket.display())
                });
                let mut arguments = vec!["--workers", "0", "--poll", subject.poll()];
                arguments.extend(ports.iter().flat_map(|spec| ["--port", spec]));
                let start = Instant::now();
                Ok(Self::Switch { switch: Switch::start_with(folder, &arguments)?, start })
            }
            Subject::Ovs => {
                let mtu = frame_bytes.saturating_sub(HEADER).max(1500);
                OvsDpdk::start(environment, &sockets, mtu, folder).map(Self::Ovs)
            }
            Subject::Testpmd => {
                Forwarder::between_sockets(environment, &sockets, folder).map(Self::Testpmd)
            }
        }
    }

    /// Waits until it serves both front ends.
    pub(crate) fn wait_connected(&self) -> Result<()> {
        match self {
            Self::Switch { switch, .. } => switch.wait_ports_up(&["g0", "g1"])?,
            Self::Ovs(ovs) => ovs.wait_ports_up()?,
            Self::Testpmd(_) => {}
        }
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// The id of the process that polls.
    pub(crate) fn id(&self) -> u32 {
        match self {
            Self::Switch { switch, .. } => switch.id(),
            Self::Ovs(ovs) => ovs.id(),
            Self::Testpmd(forwarder) => forwarder.id(),
        }
    }

    /// What the run has cost it. `mhz` is the frequency in whose cycles that is said.
    pub(crate) fn account(&mut self, mhz: Option<f64>) -> Result<Account> {
        match self {
            Self::Switch { switch, start } => {
                let (stats, elapsed) = (switch.stats()?, start.elapsed());
                let frames = stats.workers.iter().map(|worker| worker.frames).sum();
                let busy: f64 = stats.workers.iter().map(|worker| worker.busy_ratio).sum();
                let cycles = mhz.and_then(|mhz| per_frame(busy * cycles_of(elapsed, mhz), frames));
                Ok(Account {
                    cycles_per_frame: cycles,
                    dropped: Some(stats.ledger().drops),
                    busy_ratio: Some(busy),
                })
            }
            Self::Ovs(ovs) => {
                Ok(Account { cycles_per_frame: ovs.cycles_per_frame()?, ..Account::default() })
            }
            Self::Testpmd(forwarder) => {
                let cycles = forwarder.stop_forwarding()?.map(|cycles| cycles.per_frame);
                Ok(Account { cycles_per_frame: cycles, ..Account::default() })
            }
        }
    }

    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::Switch { switch, .. } => switch.stop(),
            Self::Testpmd(forwarder) => forwarder.stop(),
            // Dropped, it ends: its database is of no use to anybody.
            Self::Ovs(_) => Ok(()),
        }
    }
}

fn cycles_of(time: Duration, mhz: f64) -> f64 {
    time.as_secs_f64() * mhz * 1e6
}

#[expect(clippy::cast_precision_loss, reason = "a mean for people")]
fn per_frame(cycles: f64, frames: u64) -> Option<f64> {
    (frames > 0).then(|| cycles / frames as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_are_shared_by_the_frames() {
        let busy = 0.5 * cycles_of(Duration::from_secs(2), 2300.0);
        assert_eq!(per_frame(busy, 23_000_000), Some(100.0));
        assert_eq!(per_frame(busy, 0), None);
    }

    #[test]
    fn only_peers_can_be_chosen() {
        let names: Vec<String> = Subject::value_variants()
            .iter()
            .filter_map(|subject| Some(subject.to_possible_value()?.get_name().to_owned()))
            .collect();
        assert_eq!(names, ["ovs", "testpmd"]);
    }
}
