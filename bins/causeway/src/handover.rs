//! What two processes say to each other when one takes the switch over from the other.
//!
//! ```text
//!  new: run --take-over                     old: serving
//!    take-over {version} ─────────────────►   refuses another version, or a second one
//!    Offer ◄───────────────────────────────   everything that takes time to prepare, with fds
//!    adopts ports, maps memory, starts        (serves on)
//!    workers, opens what is new
//!    Ready ───────────────────────────────►   stops its rings and uplinks      ┐
//!    State ◄───────────────────────────────   where everything stopped         │ nobody
//!    Confirm ─────────────────────────────►   (until here it can go on itself) │ serves
//!    Leave ◄───────────────────────────────   touches nothing any more         │
//!    starts rings and uplinks                                                  ┘
//!    Running ─────────────────────────────►   closes what was not taken
//!    Rest ◄────────────────────────────────   (if the kernel is not done with that)
//!    opens what had to wait for that          ends
//! ```
//!
//! **Compatibility.** As [`control::handover`] says: fields may be added, each has a default, and
//! what is unknown is ignored. Fds are named by their place beside the message.

mod counts;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use control::{PortSpec, StaticEntry};
use port::{PortState, PortStatus, QueueRecord};
use serde::{Deserialize, Serialize};
use switch::{PortDebt, SwitchRecord};
use vhost_user_net::handover::{PortHandover, RingBase};

pub(crate) use counts::QueueCount;

/// What the old process has.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Offer {
    pub(crate) control: ControlOffer,
    pub(crate) metrics: Option<MetricsOffer>,
    /// The way to the service manager.
    pub(crate) service: Option<u32>,
    pub(crate) ports: Vec<PortOffer>,
    /// Learned stations.
    pub(crate) stations: Vec<Station>,
}

/// The control socket.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ControlOffer {
    pub(crate) fd: u32,
    pub(crate) path: PathBuf,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// Where scrapers read the metrics.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MetricsOffer {
    pub(crate) fd: u32,
    /// As it was asked for.
    pub(crate) asked: String,
}

/// What the new process goes on with.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Prepared {
    /// Names of ports; the others end with the old process.
    pub(crate) ports: BTreeSet<String>,
}

/// What is still in use when the old process ends.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Rest {
    /// Places of queues that were closed and whose frames the kernel may still read, by UMEM.
    pub(crate) umems: BTreeMap<String, Vec<u32>>,
}

/// A port.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PortOffer {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) keys: Vec<(String, String)>,
    /// What no other port may use too: see [`PortSpec::resource`].
    pub(crate) resource: String,
    /// Static entries: address and VLAN.
    pub(crate) statics: Vec<(String, Option<String>)>,
    /// Who asked for it: `file`, `command-line` or `client`.
    pub(crate) origin: String,
    /// The guest's side, if it is one.
    pub(crate) guest: Option<PortHandover>,
    /// Whether it is an uplink that is open.
    pub(crate) uplink: bool,
}

/// A station that was learned, or a static one.
#[derive(Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Station {
    pub(crate) mac: String,
    pub(crate) vlan: u16,
    pub(crate) port: String,
    pub(crate) age_s: u32,
    pub(crate) fixed: bool,
}

/// Where everything stopped.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    pub(crate) ports: Vec<PortStop>,
    /// Stations that were learned, or moved, since the offer.
    pub(crate) stations: Vec<Station>,
    pub(crate) switch: SwitchCount,
}

/// Where a port stopped.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PortStop {
    pub(crate) name: String,
    pub(crate) status: Status,
    pub(crate) counts: Vec<QueueCount>,
    /// What was counted where the guest was before: frames and bytes from it, to it, drops.
    pub(crate) elsewhere: [u64; 5],
    /// What it had used up of its limits.
    pub(crate) debt: Debt,
    /// The guest's side, if it changed since the offer.
    pub(crate) guest: Option<PortHandover>,
    /// Where the guest's rings stopped, if it did not.
    pub(crate) rings: Vec<RingBase>,
    /// What an open uplink is made of.
    pub(crate) uplink: Option<UplinkStop>,
}

/// What a port had used up of its limits: nanoseconds in which it would not have sent.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Debt {
    bytes_ns: u64,
    frames_ns: u64,
    storm_ns: u64,
}

impl Debt {
    pub(crate) fn of(debt: PortDebt) -> Self {
        let PortDebt { bytes_ns, frames_ns, storm_ns } = debt;
        Self { bytes_ns, frames_ns, storm_ns }
    }

    pub(crate) fn debt(self) -> PortDebt {
        let Self { bytes_ns, frames_ns, storm_ns } = self;
        PortDebt { bytes_ns, frames_ns, storm_ns }
    }
}

/// An uplink's parts.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct UplinkStop {
    pub(crate) state: String,
    pub(crate) fds: Vec<u32>,
}

/// How a port is.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    pub(crate) state: String,
    pub(crate) reason: String,
    pub(crate) for_ms: u64,
    pub(crate) error: Option<(String, u64)>,
}

/// What was counted that belongs to no port.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SwitchCount {
    pub(crate) flood_copies: u64,
    pub(crate) originated: u64,
    pub(crate) fdb_refused: u64,
    pub(crate) removed_ports: QueueCount,
}

impl Status {
    pub(crate) fn of(status: PortStatus) -> Self {
        let ms = |since: std::time::Instant| {
            u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
        };
        Self {
            state: status.state.name().to_owned(),
            reason: status.reason,
            for_ms: ms(status.since),
            error: status.last_error.map(|(text, at)| (text, ms(at))),
        }
    }

    /// As it is in this process; a state that is not known here is waited out.
    pub(crate) fn restore(self) -> PortStatus {
        let now = std::time::Instant::now();
        let ago = |ms| now.checked_sub(std::time::Duration::from_millis(ms)).unwrap_or(now);
        PortStatus {
            state: PortState::named(&self.state).unwrap_or(PortState::Waiting),
            reason: self.reason,
            since: ago(self.for_ms),
            last_error: self.error.map(|(text, ms)| (text, ago(ms))),
        }
    }
}

impl SwitchCount {
    pub(crate) fn of(record: &SwitchRecord) -> Self {
        Self {
            flood_copies: record.flood_copies,
            originated: record.originated,
            fdb_refused: record.fdb_refused,
            removed_ports: QueueCount::of(&counts::as_record(&record.removed_ports)),
        }
    }

    /// What belongs to the switch, and what the ports that are gone had counted.
    pub(crate) fn records(&self) -> (SwitchRecord, QueueRecord) {
        let record = SwitchRecord {
            flood_copies: self.flood_copies,
            originated: self.originated,
            fdb_refused: self.fdb_refused,
            ..SwitchRecord::default()
        };
        (record, self.removed_ports.record())
    }
}

/// Keys whose change does not concern the front end: its connection stays. `offloads` is for those
/// that connect anew, and what is put together for a guest (`gro`) changes at once, as do an
/// uplink's `offloads`; `umem-queues` is for memory that is made anew.
const OF_THE_SWITCH: [&str; 14] = [
    "vlan",
    "trunk",
    "wait",
    "mac",
    "cpus",
    "offloads",
    "antispoof",
    "ip",
    "rate-mbps",
    "burst-kb",
    "rate-kpps",
    "burst-frames",
    "storm-kpps",
    "umem-queues",
];

impl PortOffer {
    /// A port as it was asked for.
    pub(crate) fn of(spec: &PortSpec, statics: &[StaticEntry], origin: &str) -> Self {
        let keys = spec.keys().into_iter().map(|(key, value)| (key.to_owned(), value));
        let entry = |entry: &StaticEntry| {
            (entry.mac.to_string(), entry.vlan.as_ref().map(ToString::to_string))
        };
        Self {
            name: spec.name.clone(),
            kind: spec.kind.name().to_owned(),
            keys: keys.collect(),
            resource: spec.resource(),
            statics: statics.iter().map(entry).collect(),
            origin: origin.to_owned(),
            guest: None,
            uplink: false,
        }
    }

    /// The port as this program understands it.
    pub(crate) fn spec(&self) -> Result<PortSpec, String> {
        let keys = self.keys.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        PortSpec::from_keys(&self.kind, keys)
            .map_err(|error| format!("port {}: {error}", self.name))
    }

    /// Its static entries.
    pub(crate) fn entries(&self) -> Result<Vec<StaticEntry>, String> {
        let wrong = |text: &str| format!("port {}: {text} is no static entry", self.name);
        let entry = |(mac, vlan): &(String, Option<String>)| {
            let vlan = vlan.as_ref().map(|vlan| vlan.parse().map_err(|_| wrong(vlan)));
            Ok(StaticEntry {
                mac: mac.parse().map_err(|_| wrong(mac))?,
                vlan: vlan.transpose()?,
                port: self.name.clone(),
            })
        };
        self.statics.iter().map(entry).collect()
    }

    /// Whether `spec`, whose socket path is absolute, can go on with what is behind this port.
    pub(crate) fn goes_on_as(&self, spec: &PortSpec) -> bool {
        let own = self.keys.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let new = spec.keys();
        let new = new.iter().map(|(key, value)| (*key, value.as_str()));
        let of_peer = |(key, _): &(&str, &str)| !OF_THE_SWITCH.contains(key);
        self.kind == spec.kind.name()
            && own.filter(of_peer).collect::<std::collections::BTreeSet<_>>()
                == new.filter(of_peer).collect()
    }
}

#[cfg(test)]
mod tests;
