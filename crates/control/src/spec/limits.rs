//! What a port may send into the switch: the keys that can change while the port runs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{PortKind, PortSpec, VhostUserSpec};
use crate::keys::{Key, KeyError};
use crate::values::{self, between, thousandths};

/// The highest rate: of 1 Tbit/s, and of as many frames.
const RATE_MAX: u64 = 1_000_000;
/// The most addresses of a port.
const ADDRESSES_MAX: usize = 256;

/// The limits that every kind of port has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitsSpec {
    /// `rate-mbps`, in kbit/s.
    pub rate_kbps: Option<u64>,
    /// `burst-kb`: KiB beyond the rate at once.
    pub burst_kb: Option<u32>,
    /// `rate-kpps`, in frames per second.
    pub rate_fps: Option<u64>,
    /// `burst-frames`: frames beyond the rate at once.
    pub burst_frames: Option<u32>,
    /// `storm-kpps`, in flooded frames per second.
    pub storm_fps: Option<u64>,
}

pub(super) const LIMITS: &[Key<PortSpec>] = &[
    Key {
        name: "rate-mbps",
        allowed: "megabits per second from 0.001 to 1000000, with at most 3 decimals",
        set: |port, text| {
            port.limits.rate_kbps = Some(thousandths(text, RATE_MAX)?);
            Some(())
        },
        show: |port| port.limits.rate_kbps.map(values::show_thousandths),
    },
    Key {
        name: "burst-kb",
        allowed: "a number of KiB from 1 to 1048576",
        set: |port, text| {
            port.limits.burst_kb = Some(between(text, 1, 1 << 20)?);
            Some(())
        },
        show: |port| port.limits.burst_kb.map(|kib| kib.to_string()),
    },
    Key {
        name: "rate-kpps",
        allowed: "thousands of frames per second from 0.001 to 1000000, with at most 3 decimals",
        set: |port, text| {
            port.limits.rate_fps = Some(thousandths(text, RATE_MAX)?);
            Some(())
        },
        show: |port| port.limits.rate_fps.map(values::show_thousandths),
    },
    Key {
        name: "burst-frames",
        allowed: "a number of frames from 1 to 1048576",
        set: |port, text| {
            port.limits.burst_frames = Some(between(text, 1, 1 << 20)?);
            Some(())
        },
        show: |port| port.limits.burst_frames.map(|frames| frames.to_string()),
    },
    Key {
        name: "storm-kpps",
        allowed: "thousands of frames per second from 0.001 to 1000000, with at most 3 decimals",
        set: |port, text| {
            port.limits.storm_fps = Some(thousandths(text, RATE_MAX)?);
            Some(())
        },
        show: |port| port.limits.storm_fps.map(values::show_thousandths),
    },
];

/// The keys about addresses, of guests only: others speak for whole networks.
pub(super) const SOURCES: &[Key<VhostUserSpec>] = &[
    Key {
        name: "antispoof",
        allowed: "on or off",
        set: |port, text| {
            port.antispoof = values::switch(text)?;
            Some(())
        },
        show: |port| port.antispoof.then(|| "on".to_owned()),
    },
    Key {
        name: "ip",
        allowed: "up to 256 IPv4 and IPv6 addresses of stations as A+B+C, each once",
        set: |port, text| {
            port.ips = addresses(text)?;
            Some(())
        },
        show: |port| {
            let all: Vec<_> = port.ips.iter().collect();
            (!all.is_empty()).then(|| values::joined(&all, "+"))
        },
    },
];

fn addresses(text: &str) -> Option<BTreeSet<IpAddr>> {
    let mut all = BTreeSet::new();
    for part in text.split('+') {
        let address: IpAddr = part.parse().ok()?;
        let group = address.is_multicast() || address.is_unspecified();
        let broadcast = address == IpAddr::from([255, 255, 255, 255]);
        if group || broadcast || !all.insert(address) || all.len() > ADDRESSES_MAX {
            return None;
        }
    }
    Some(all)
}

impl PortSpec {
    /// Checks keys that need another one.
    pub(super) fn check_limits(&self) -> Result<(), KeyError> {
        let missing = |of, key, allowed| Err(KeyError::Missing { of, key, allowed });
        let limits = &self.limits;
        if limits.burst_kb.is_some() && limits.rate_kbps.is_none() {
            return missing("burst-kb", "rate-mbps", "N");
        }
        if limits.burst_frames.is_some() && limits.rate_fps.is_none() {
            return missing("burst-frames", "rate-kpps", "N");
        }
        if let PortKind::VhostUser(guest) = &self.kind {
            if guest.antispoof && guest.mac.is_none() {
                return missing("antispoof=on", "mac", "ADDRESS");
            }
            if !guest.ips.is_empty() && !guest.antispoof {
                return missing("ip", "antispoof", "on");
            }
        }
        Ok(())
    }

    /// The same port with the limits of `other`: they can be changed while it runs.
    #[must_use]
    pub fn with_limits_of(&self, other: &Self) -> Self {
        let mut new = Self { limits: other.limits, ..self.clone() };
        if let (PortKind::VhostUser(guest), PortKind::VhostUser(other)) =
            (&mut new.kind, &other.kind)
        {
            guest.antispoof = other.antispoof;
            guest.ips.clone_from(&other.ips);
        }
        new
    }
}
