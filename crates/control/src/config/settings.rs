//! The `[switch]` and `[[static]]` tables.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::keys::{Key, KeyError, names, set};
use crate::spec::is_name;
use crate::values::{MacAddress, Poll, StateDir, VlanId, Workers, address, between, switch};

/// The `[switch]` table: what is not given keeps its default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SwitchSettings {
    /// Where queues are worked on.
    pub workers: Option<Workers>,
    /// How workers wait.
    pub poll: Option<Poll>,
    /// How long a worker spins without work, in microseconds.
    pub poll_us: Option<u32>,
    /// Seconds between two looks whether a pair should move to another worker; 0: never.
    pub rebalance_s: Option<u32>,
    /// The control socket.
    pub control: Option<PathBuf>,
    /// Where ring positions are kept for a successor.
    pub state_dir: Option<StateDir>,
    /// Where scrapers read the metrics; nowhere if it is not given.
    pub metrics: Option<SocketAddr>,
    /// Seconds until a learned address is forgotten.
    pub ageing_s: Option<u32>,
    /// The most learned addresses of the switch.
    pub fdb_entries: Option<u32>,
    /// The most learned addresses of one port.
    pub fdb_entries_per_port: Option<u32>,
    /// How often a full receiveq is tried again before a frame is dropped.
    pub retries: Option<u32>,
    /// Whether reserved link-local addresses are forwarded.
    pub forward_reserved: Option<bool>,
}

/// A static entry of the forwarding table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticEntry {
    /// The station.
    pub mac: MacAddress,
    /// Its VLAN; none for untagged frames of ports without VLAN rule.
    pub vlan: Option<VlanId>,
    /// The port that it is behind.
    pub port: String,
}

/// A static entry while its keys are read.
#[derive(Debug, Default)]
pub(super) struct StaticDraft {
    mac: Option<MacAddress>,
    vlan: Option<VlanId>,
    port: Option<String>,
}

impl StaticDraft {
    pub(super) fn complete(self) -> Result<StaticEntry, KeyError> {
        let missing = |key, allowed| KeyError::Missing { of: "[[static]]", key, allowed };
        Ok(StaticEntry {
            mac: self.mac.ok_or_else(|| missing("mac", "ADDRESS"))?,
            vlan: self.vlan,
            port: self.port.ok_or_else(|| missing("port", "NAME"))?,
        })
    }
}

fn text<T: ToString>(value: Option<&T>) -> Option<String> {
    value.map(T::to_string)
}

pub(super) const SWITCH: &[Key<SwitchSettings>] = &[
    Key {
        name: "workers",
        allowed: "a list of CPUs as 0,1 or 0-3, or per-queue",
        set: |switch, text| {
            switch.workers = Some(text.parse().ok()?);
            Some(())
        },
        show: |switch| text(switch.workers.as_ref()),
    },
    Key {
        name: "poll",
        allowed: "adaptive, busy or interrupt",
        set: |switch, text| {
            switch.poll = Some(text.parse().ok()?);
            Some(())
        },
        show: |switch| text(switch.poll.as_ref()),
    },
    Key {
        name: "poll-us",
        allowed: "a number of microseconds from 0 to 1000000",
        set: |switch, text| {
            switch.poll_us = Some(between(text, 0, 1_000_000)?);
            Some(())
        },
        show: |switch| text(switch.poll_us.as_ref()),
    },
    Key {
        name: "rebalance",
        allowed: "off, or a number of seconds from 1 to 3600",
        set: |switch, text| {
            switch.rebalance_s = Some(if text == "off" { 0 } else { between(text, 1, 3600)? });
            Some(())
        },
        show: |switch| match switch.rebalance_s? {
            0 => Some("off".to_owned()),
            seconds => Some(seconds.to_string()),
        },
    },
    Key {
        name: "control",
        allowed: "a path of 1 to 107 bytes",
        set: |switch, text| {
            let fits = (1..=107).contains(&text.len());
            switch.control = Some(Some(text).filter(|_| fits).map(PathBuf::from)?);
            Some(())
        },
        show: |switch| switch.control.as_ref().map(|path| path.display().to_string()),
    },
    Key {
        name: "state-dir",
        allowed: "a directory, or off",
        set: |switch, text| {
            switch.state_dir = Some(text.parse().ok()?);
            Some(())
        },
        show: |switch| text(switch.state_dir.as_ref()),
    },
    Key {
        name: "metrics",
        allowed: "a TCP port as 9101 (on 127.0.0.1), or an address as 192.0.2.1:9101 or [::]:9101",
        set: |switch, text| {
            switch.metrics = Some(address(text)?);
            Some(())
        },
        show: |switch| text(switch.metrics.as_ref()),
    },
    Key {
        name: "ageing",
        allowed: "a number of seconds from 1 to 1000000",
        set: |switch, text| {
            switch.ageing_s = Some(between(text, 1, 1_000_000)?);
            Some(())
        },
        show: |switch| text(switch.ageing_s.as_ref()),
    },
    Key {
        name: "fdb-entries",
        allowed: "a number of addresses from 1 to 1048576",
        set: |switch, text| {
            switch.fdb_entries = Some(between(text, 1, 1_048_576)?);
            Some(())
        },
        show: |switch| text(switch.fdb_entries.as_ref()),
    },
    Key {
        name: "fdb-entries-per-port",
        allowed: "a number of addresses from 1 to 1048576",
        set: |switch, text| {
            switch.fdb_entries_per_port = Some(between(text, 1, 1_048_576)?);
            Some(())
        },
        show: |switch| text(switch.fdb_entries_per_port.as_ref()),
    },
    Key {
        name: "retries",
        allowed: "a number of tries from 0 to 1000",
        set: |switch, text| {
            switch.retries = Some(between(text, 0, 1000)?);
            Some(())
        },
        show: |switch| text(switch.retries.as_ref()),
    },
    Key {
        name: "forward-reserved",
        allowed: "on or off",
        set: |target, text| {
            target.forward_reserved = Some(switch(text)?);
            Some(())
        },
        show: |switch| switch.forward_reserved.map(|on| if on { "on" } else { "off" }.to_owned()),
    },
];

impl SwitchSettings {
    /// Takes over one key as an option of the command line gives it.
    ///
    /// # Errors
    ///
    /// The key or its value, and what is allowed.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), KeyError> {
        let names: Vec<_> = names(SWITCH).collect();
        set(SWITCH, self, key, value)
            .unwrap_or_else(|| Err(KeyError::unknown(key, "[switch]", &names)))
    }

    /// The keys whose values differ, with the new value; a key that is gone has none.
    pub(super) fn changed(&self, new: &Self) -> Vec<&'static str> {
        let differs = |key: &&Key<Self>| (key.show)(self) != (key.show)(new);
        SWITCH.iter().filter(differs).map(|key| key.name).collect()
    }
}

pub(super) const STATIC: &[Key<StaticDraft>] = &[
    Key {
        name: "mac",
        allowed: "the address of one station as 02:00:00:00:00:01",
        set: |entry, text| {
            entry.mac = Some(text.parse().ok()?);
            Some(())
        },
        show: |entry| text(entry.mac.as_ref()),
    },
    Key {
        name: "vlan",
        allowed: "a VLAN from 1 to 4094",
        set: |entry, text| {
            entry.vlan = Some(text.parse().ok()?);
            Some(())
        },
        show: |entry| text(entry.vlan.as_ref()),
    },
    Key {
        name: "port",
        allowed: "the name of a port",
        set: |entry, text| {
            entry.port = Some(Some(text).filter(|t| is_name(t))?.to_owned());
            Some(())
        },
        show: |entry| entry.port.clone(),
    },
];
