//! What is said over the control socket: one JSON value per line, a reply for each request.
//!
//! **Trust.** Peers have our user id or are root; their lines are parsed like any other input.

use std::collections::BTreeMap;

use crate::capture::CaptureRequest;
use crate::handover::TakeOver;
use serde::{Deserialize, Serialize};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// States and reasons of the ports: replies [`PortsView`].
    Ports,
    /// Counters: replies [`StatsView`].
    Stats,
    /// The forwarding table: replies [`FdbView`].
    Fdb,
    /// Forgets every learned address: replies [`Done`].
    FdbFlush,
    /// Replies [`VersionView`].
    Version,
    /// Everything that is counted, for a scraper: replies [`MetricsView`].
    Metrics,
    /// Adds a port: replies [`Done`].
    PortAdd {
        /// What to add.
        spec: String,
    },
    /// Removes a port: replies [`Done`].
    PortDel {
        /// Its name.
        name: String,
    },
    /// Takes a broken or quarantined port back into service: replies [`Done`].
    PortReset {
        /// Its name.
        name: String,
    },
    /// Reads the configuration file again and applies the difference: replies [`Done`].
    Reload,
    /// Captures what passes a port: replies [`Done`], and then what [`crate::capture`] says.
    Capture(CaptureRequest),
    /// Asks for the whole switch, for a process that goes on with it: replies
    /// [`crate::handover::Agreed`], and then what [`crate::handover`] says.
    TakeOver(TakeOver),
}

impl Request {
    /// Whether it changes what the switch has.
    pub fn changes(&self) -> bool {
        match self {
            Self::FdbFlush
            | Self::PortAdd { .. }
            | Self::PortDel { .. }
            | Self::PortReset { .. }
            | Self::Reload => true,
            Self::Ports
            | Self::Stats
            | Self::Fdb
            | Self::Version
            | Self::Metrics
            | Self::Capture(_)
            | Self::TakeOver(_) => false,
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done; what was asked for.
    Ok(serde_json::Value),
    /// The request was wrong: as if `run` had been used in a wrong way.
    Usage(String),
    /// The request was right and failed.
    Failed(String),
}

impl Reply {
    /// A reply that carries `view`.
    pub fn of(view: &impl Serialize) -> Self {
        match serde_json::to_value(view) {
            Ok(value) => Self::Ok(value),
            Err(error) => Self::Failed(format!("cannot write the reply: {error}")),
        }
    }

    /// It is done, in words.
    pub fn done(text: impl Into<String>) -> Self {
        Self::of(&Done { done: text.into() })
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// In words.
    pub done: String,
}

/// `ctl version`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VersionView {
    /// The version of the running switch.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since when it runs.
    pub uptime_s: u64,
    /// What it gave up.
    #[serde(default)]
    pub sandbox: SandboxView,
}

/// What a running switch gave up, and what of that the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxView {
    /// Whether there is a sandbox.
    pub on: bool,
    /// `on`, or `off:` and why; empty without a sandbox. As the next two.
    pub no_new_privs: String,
    /// Filters of system calls.
    pub seccomp: String,
    /// Restriction to some files.
    pub landlock: String,
    /// Capabilities that were kept.
    pub capabilities: Vec<String>,
    /// System calls that were refused.
    pub refused: u32,
}

impl SandboxView {
    /// The capabilities that were kept, in words.
    pub fn kept(&self) -> String {
        if self.capabilities.is_empty() { "none".to_owned() } else { self.capabilities.join(", ") }
    }
}

/// `ctl metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsView {
    /// Prometheus' text format.
    pub text: String,
}

/// `ctl ports`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortsView {
    /// Every port.
    pub ports: Vec<PortView>,
}

/// One port of `ctl ports`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortView {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// `up`, `waiting`, `down`, `broken` or `quarantined`.
    pub state: String,
    /// Why it is not up; empty if it is.
    pub reason: String,
    /// Milliseconds since the state or the reason changed.
    pub since_ms: u64,
    /// The last error, kept after recovery.
    pub last_error: Option<LastError>,
    /// Queue pairs in use.
    pub queues: usize,
    /// Which worker serves which pair.
    pub placement: Vec<Placement>,
    /// The interface, if it is an uplink and open.
    #[serde(default)]
    pub interface: Option<InterfaceView>,
    /// The front end, if one is connected.
    #[serde(default)]
    pub front_end: Option<FrontEndView>,
    /// What may be left undone there: `on`, `off` or a list; empty where nobody is asked.
    #[serde(default)]
    pub offloads: String,
    /// The SPEC that gives this port.
    pub spec: String,
}

/// The interface behind an uplink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceView {
    /// Its name now.
    pub name: String,
    /// Its index in its namespace.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The driver; empty if it does not tell.
    pub driver: String,
    /// How it is used, as far as there was a choice; else empty.
    pub mode: String,
    /// The memory that it shares with other interfaces; empty if none.
    #[serde(default)]
    pub umem: String,
    /// What the kernel counts of each queue since it was opened; of a tap, of the interface since
    /// it was made.
    #[serde(default)]
    pub kernel: Vec<BTreeMap<String, u64>>,
}

/// The front end of a vhost-user port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontEndView {
    /// The negotiated features, in hexadecimal; empty before they are.
    pub features: String,
    /// The negotiated protocol features, in hexadecimal; empty before they are.
    pub protocol_features: String,
    /// Memory regions that it shares.
    pub regions: usize,
    /// Whether written pages are logged: the guest migrates.
    pub dirty_log: bool,
    /// Translations in use; null if it is not behind a vIOMMU.
    #[serde(default)]
    pub translations: Option<usize>,
}

/// An error that happened once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// What happened.
    pub text: String,
    /// Milliseconds since then.
    pub age_ms: u64,
}

/// Where a queue pair is served, and how much work that was in the last second.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Placement {
    /// The pair.
    pub index: u16,
    /// The worker, as an index into `workers` of `ctl stats`; null if it is the pair's own.
    pub worker: Option<usize>,
    /// The worker's CPU; null if it is not pinned.
    pub cpu: Option<u16>,
    /// Whether the port's `cpus` keeps it there.
    pub pinned: bool,
    /// Its part of what the worker did, 0 to 1.
    pub share: f64,
    /// The part of a CPU that this was, 0 to 1.
    pub busy: f64,
}

/// `ctl stats`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatsView {
    /// Every port.
    pub ports: Vec<PortStats>,
    /// Counters that belong to no port.
    pub switch: SwitchStats,
    /// Every worker.
    pub workers: Vec<WorkerStats>,
    /// Nanoseconds since the switch began.
    #[serde(default)]
    pub up_ns: u64,
}

/// One port of `ctl stats`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// `up`, `waiting`, `down`, `broken` or `quarantined`.
    pub state: String,
    /// Why it is not up; empty if it is.
    pub reason: String,
    /// Milliseconds since the state or the reason changed.
    pub since_ms: u64,
    /// Every queue pair.
    pub queues: Vec<QueueStats>,
    /// What was counted where its guest was before it moved here, if it brought that along. It is
    /// in no other number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<PortTotals>,
}

/// What a port counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PortTotals {
    /// Frames into the switch.
    pub rx_frames: u64,
    /// Bytes into the switch.
    pub rx_bytes: u64,
    /// Frames out of the switch.
    pub tx_frames: u64,
    /// Bytes out of the switch.
    pub tx_bytes: u64,
    /// Drops, both ways.
    pub drops: u64,
}

/// One queue pair: rx is into the switch, tx out of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueStats {
    /// The pair: rings `2 * index` and `2 * index + 1` of a guest.
    pub index: u16,
    /// Frames into the switch.
    pub rx_frames: u64,
    /// Bytes into the switch.
    pub rx_bytes: u64,
    /// Frames out of the switch.
    pub tx_frames: u64,
    /// Bytes out of the switch.
    pub tx_bytes: u64,
    /// Every reason, with 0 too.
    pub drops: BTreeMap<String, u64>,
    /// Kicks that woke the way in.
    pub kicks: u64,
    /// Times that the way in rested because the port's rate was used up.
    pub rests: u64,
    /// Calls after the way in gave buffers back.
    pub rx_calls: u64,
    /// Calls that were left out there, because the driver did not ask for them.
    pub rx_calls_suppressed: u64,
    /// Calls after the way out filled buffers.
    pub tx_calls: u64,
    /// Calls that were left out there.
    pub tx_calls_suppressed: u64,
}

impl QueueStats {
    /// Sum of all drops.
    pub fn dropped(&self) -> u64 {
        self.drops.values().fold(0, |sum, n| sum.saturating_add(*n))
    }
}

/// Counters that belong to no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SwitchStats {
    /// Copies made by flooding.
    pub flood_copies: u64,
    /// Segments made from large frames.
    pub segments_added: u64,
    /// Segments merged into large frames.
    pub merged: u64,
    /// Frames that the switch sent itself.
    pub originated: u64,
    /// Frames on their way.
    pub held: u64,
    /// Entries of the forwarding table.
    pub fdb_entries: u32,
    /// Addresses that it refused for want of room.
    pub fdb_refused: u64,
}

/// One worker.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerStats {
    /// Its number: not given to another one while the switch runs.
    pub number: usize,
    /// The CPU that it is pinned to.
    pub cpu: Option<u16>,
    /// Share of the time that it worked, 0 to 1.
    pub busy_ratio: f64,
    /// Frames that it took from ports.
    pub frames: u64,
    /// Bursts that they came in.
    pub bursts: u64,
    /// The bursts by size: see [`BATCH_SIZES`].
    pub batches: [u64; BATCH_SIZES.len()],
    /// Nanoseconds of turns that had work.
    pub busy_ns: u64,
    /// Times that it slept.
    pub sleeps: u64,
    /// Queues that were woken by a kick.
    pub kicks: u64,
    /// Calls that it sent, to whichever port.
    pub calls: u64,
    /// Calls that it left out, because the driver did not ask for them.
    pub calls_suppressed: u64,
}

/// The largest burst that each of [`WorkerStats::batches`] counts.
pub const BATCH_SIZES: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

const _: () = assert!(BATCH_SIZES.len() == switch::BATCH_SIZES);

/// `ctl fdb`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbView {
    /// Every entry.
    pub entries: Vec<FdbEntry>,
}

/// One entry of the forwarding table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbEntry {
    /// The station.
    pub mac: String,
    /// Its VLAN; 0 for untagged frames of ports without VLAN rule.
    pub vlan: u16,
    /// The port that it is behind.
    pub port: String,
    /// Seconds since a frame came from it.
    pub age_s: u64,
    /// Whether it was configured and never ages.
    #[serde(rename = "static")]
    pub is_static: bool,
}

#[cfg(test)]
mod tests {
    use super::{FdbEntry, Reply, Request, WorkerStats};

    #[test]
    fn requests_are_short_lines() {
        let line = serde_json::to_string(&Request::Ports).unwrap();
        assert_eq!(line, r#"{"command":"ports"}"#);
        let add = Request::PortAdd { spec: "tap:name=a,ifname=t".to_owned() };
        let line = serde_json::to_string(&add).unwrap();
        assert_eq!(line, r#"{"command":"port-add","spec":"tap:name=a,ifname=t"}"#);
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), add);
        assert!(serde_json::from_str::<Request>(r#"{"command":"port-add"}"#).is_err());
    }

    #[test]
    fn shapes_are_those_of_the_contract() {
        let entry = FdbEntry {
            mac: "02:00:00:00:00:01".to_owned(),
            vlan: 0,
            port: "g0".to_owned(),
            age_s: 3,
            is_static: false,
        };
        assert_eq!(
            serde_json::to_string(&entry).unwrap(),
            r#"{"mac":"02:00:00:00:00:01","vlan":0,"port":"g0","age_s":3,"static":false}"#
        );
        let text = serde_json::to_string(&WorkerStats::default()).unwrap();
        assert!(text.contains(r#""cpu":null,"busy_ratio":0.0,"frames":0,"#), "{text}");
        let old: WorkerStats = serde_json::from_str(r#"{"cpu":1,"frames":5}"#).unwrap();
        assert_eq!((old.cpu, old.frames, old.bursts), (Some(1), 5, 0));
        let reply = serde_json::to_string(&Reply::Failed("no port x".to_owned())).unwrap();
        assert_eq!(reply, r#"{"failed":"no port x"}"#);
    }
}
