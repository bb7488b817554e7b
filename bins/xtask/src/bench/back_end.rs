//! What is measured: the switch, or a peer in its place, between two vhost-user sockets.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use conformance::{Environment, Forwarder, OvsDpdk, Scratch, Switch, VhostUserNet};
use serde::{Deserialize, Serialize};

use super::machine::Versions;
use super::quiet::Quiet;
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
    /// cloud-hypervisor's `vhost_user_net`, which joins one guest and a tap.
    #[value(skip)]
    VhostUserNet,
}

/// A back end to start.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) subject: Subject,
    /// Bytes of the largest frame.
    pub(crate) frame_bytes: u32,
    /// Another build of the switch than the usual one.
    pub(crate) program: Option<PathBuf>,
    /// Guests that are attached to the switch besides, and do nothing.
    pub(crate) quiet_guests: u16,
    /// More arguments of `causeway run`.
    pub(crate) arguments: Vec<String>,
    /// Names of more ports of the switch, whose sockets are called like them.
    pub(crate) more_ports: Vec<String>,
    /// What is added to the SPEC of each port of the switch, from a comma on.
    pub(crate) port_keys: String,
}

/// A running back end.
#[derive(Debug)]
pub(crate) enum BackEnd {
    /// The guests go before it does.
    Switch {
        quiet: Option<Quiet>,
        switch: Switch,
        dropped: u64,
    },
    Ovs {
        ovs: OvsDpdk,
        dropped: u64,
    },
    Testpmd(Forwarder),
    VhostUserNet(VhostUserNet),
}

/// What `ctl --json top --once` says, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Top {
    workers: Vec<WorkerTop>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct WorkerTop {
    busy_ratio: f64,
    /// Of turns that had work.
    ns_per_frame: Option<f64>,
}

/// What a back end says of a run after it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Account {
    /// Cycles for each frame, polls that found nothing excluded.
    pub(crate) cycles_per_frame: Option<f64>,
    /// Frames that it dropped.
    pub(crate) dropped: u64,
    /// The share of the time that had work; peers are not asked.
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
            Self::VhostUserNet => "vhost_user_net",
        }
    }

    /// Whether the guest listens on the sockets: OVS connects to them.
    pub(crate) fn guest_listens(self) -> bool {
        self == Self::Ovs
    }

    /// Whether its polling thread stays awake under load.
    pub(crate) fn polls(self) -> bool {
        !matches!(self, Self::CausewayInterrupt | Self::VhostUserNet)
    }

    fn poll(self) -> &'static str {
        match self {
            Self::CausewayBusy => "busy",
            Self::CausewayInterrupt => "interrupt",
            Self::Causeway | Self::Ovs | Self::Testpmd | Self::VhostUserNet => "adaptive",
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
            Subject::VhostUserNet => Err(one_guest()),
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

impl Setup {
    /// The usual build with its two ports only.
    pub(crate) fn new(subject: Subject, frame_bytes: u32) -> Self {
        Self {
            subject,
            frame_bytes,
            program: None,
            quiet_guests: 0,
            arguments: Vec::new(),
            more_ports: Vec::new(),
            port_keys: String::new(),
        }
    }
}

impl Top {
    /// Cycles for each frame at that frequency, if there were frames.
    fn cycles_per_frame(&self, mhz: f64) -> Option<f64> {
        let nanos = self.workers.iter().find_map(|worker| worker.ns_per_frame)?;
        Some(nanos * mhz / 1e3)
    }

    fn busy_ratio(&self) -> f64 {
        self.workers.iter().map(|worker| worker.busy_ratio).sum()
    }
}

impl BackEnd {
    /// Starts it on CPU 0.
    pub(crate) fn start(
        setup: &Setup,
        environment: &Environment,
        scratch: &Scratch,
    ) -> Result<Self> {
        let (sockets, folder) = (sockets(scratch), scratch.folder());
        match setup.subject {
            Subject::Causeway | Subject::CausewayBusy | Subject::CausewayInterrupt => {
                start_switch(setup, &sockets, scratch)
            }
            Subject::Ovs => {
                let mtu = setup.frame_bytes.saturating_sub(HEADER).max(1500);
                let ovs = OvsDpdk::start(environment, &sockets, mtu, folder)?;
                Ok(Self::Ovs { ovs, dropped: 0 })
            }
            Subject::Testpmd => {
                Forwarder::between_sockets(environment, &sockets, folder).map(Self::Testpmd)
            }
            Subject::VhostUserNet => Err(one_guest()),
        }
    }

    /// A switch that was started elsewhere.
    pub(crate) fn of_switch(switch: Switch) -> Self {
        Self::Switch { quiet: None, switch, dropped: 0 }
    }

    /// Runs `causeway ctl` with these arguments; peers say nothing.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Result<String> {
        match self {
            Self::Switch { switch, .. } => switch.ctl(arguments),
            Self::Ovs { .. } | Self::Testpmd(_) | Self::VhostUserNet(_) => Ok(String::new()),
        }
    }

    /// Waits until it serves both front ends.
    pub(crate) fn wait_connected(&self) -> Result<()> {
        match self {
            Self::Switch { switch, .. } => switch.wait_ports_up(&["g0", "g1"])?,
            Self::Ovs { ovs, .. } => ovs.wait_ports_up()?,
            Self::Testpmd(_) | Self::VhostUserNet(_) => {}
        }
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// The id of the process that polls.
    pub(crate) fn id(&self) -> u32 {
        match self {
            Self::Switch { switch, .. } => switch.id(),
            Self::Ovs { ovs, .. } => ovs.id(),
            Self::Testpmd(forwarder) => forwarder.id(),
            Self::VhostUserNet(back_end) => back_end.id(),
        }
    }

    /// Lets its account count from now on; testpmd's counts from its start, and `vhost_user_net`
    /// has none.
    pub(crate) fn begin(&mut self) -> Result<()> {
        match self {
            Self::Switch { switch, dropped, .. } => *dropped = switch.stats()?.ledger().drops,
            Self::Ovs { ovs, dropped } => {
                *dropped = ovs.dropped()?;
                ovs.clear_cycles()?;
            }
            Self::Testpmd(_) | Self::VhostUserNet(_) => {}
        }
        Ok(())
    }

    /// What the switch's worker does in that time, which passes; peers are not looked at.
    pub(crate) fn top(&self, time: Duration) -> Result<Option<Top>> {
        let Self::Switch { switch, .. } = self else { return Ok(None) };
        let seconds = time.as_secs_f64().to_string();
        let shown = switch.ctl(&["--json", "top", "--once", "--interval", &seconds])?;
        let top = serde_json::from_str(&shown);
        top.map(Some).with_context(|| format!("ctl --json top says: {shown}"))
    }

    /// What the run has cost it. `mhz` is the frequency in whose cycles that is said.
    pub(crate) fn account(&mut self, top: Option<&Top>, mhz: Option<f64>) -> Result<Account> {
        match self {
            Self::Switch { switch, dropped, .. } => Ok(Account {
                cycles_per_frame: top.zip(mhz).and_then(|(top, mhz)| top.cycles_per_frame(mhz)),
                dropped: switch.stats()?.ledger().drops.saturating_sub(*dropped),
                busy_ratio: top.map(Top::busy_ratio),
            }),
            Self::Ovs { ovs, dropped } => Ok(Account {
                cycles_per_frame: ovs.cycles_per_frame()?,
                dropped: ovs.dropped()?.saturating_sub(*dropped),
                busy_ratio: None,
            }),
            Self::Testpmd(forwarder) => {
                let said = forwarder.stop_forwarding()?;
                Ok(Account {
                    cycles_per_frame: said.cycles.map(|cycles| cycles.per_frame),
                    dropped: said.dropped,
                    busy_ratio: None,
                })
            }
            Self::VhostUserNet(_) => Ok(Account::default()),
        }
    }

    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::Switch { quiet, switch, .. } => {
                // It does nothing to the end: a guest that ended was not attached.
                quiet.map_or(Ok(()), |quiet| quiet.stop(&switch))?;
                switch.stop()
            }
            Self::Testpmd(forwarder) => forwarder.stop(),
            Self::VhostUserNet(back_end) => back_end.stop(),
            // Dropped, it ends: its database is of no use to anybody.
            Self::Ovs { .. } => Ok(()),
        }
    }
}

fn one_guest() -> anyhow::Error {
    anyhow!("{} serves one guest and a tap, not two guests", Subject::VhostUserNet.name())
}

fn start_switch(setup: &Setup, sockets: &[PathBuf; 2], scratch: &Scratch) -> Result<BackEnd> {
    let [a, b] = sockets;
    let mut ports = vec![("g0".to_owned(), a.clone()), ("g1".to_owned(), b.clone())];
    ports.extend(setup.more_ports.iter().map(|name| (name.clone(), scratch.path(name))));
    let quiet = Quiet::ports(setup.quiet_guests, scratch);
    ports.extend(quiet.iter().cloned());
    let spec = |(name, socket): &(String, PathBuf)| {
        format!("vhost-user:name={name},socket={}{}", socket.display(), setup.port_keys)
    };
    let specs: Vec<String> = ports.iter().map(spec).collect();
    let mut arguments = vec!["--workers", "0", "--poll", setup.subject.poll()];
    arguments.extend(specs.iter().flat_map(|spec| ["--port", spec]));
    arguments.extend(setup.arguments.iter().map(String::as_str));
    let program = setup.program.clone().map_or_else(conformance::switch::program, Ok)?;
    let switch = Switch::start_program(program, scratch.folder(), &arguments)?;
    let attach = (!quiet.is_empty()).then(|| Quiet::attach(&quiet, &switch, scratch));
    Ok(BackEnd::Switch { quiet: attach.transpose()?, switch, dropped: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_are_those_of_turns_that_had_work() {
        let shown = r#"{"interval_s":3.0,"ports":[],"workers":[
            {"number":0,"cpu":0,"busy_ratio":0.5,"frames":30,"ns_per_frame":20.0,"bursts":1}]}"#;
        let top: Top = serde_json::from_str(shown).unwrap();
        assert_eq!(top.cycles_per_frame(2000.0), Some(40.0));
        assert!((top.busy_ratio() - 0.5).abs() < 1e-9);
        let idle: Top = serde_json::from_str(&shown.replace("20.0", "null")).unwrap();
        assert_eq!(idle.cycles_per_frame(2000.0), None);
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
