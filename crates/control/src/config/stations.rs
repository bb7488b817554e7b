//! Stations whose ports are written down: keys `mac` of ports, and static entries.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::StaticEntry;
use crate::spec::{PortKind, PortSpec};
use crate::values::{MacAddress, VlanId};

/// A station and its VLAN; none for untagged frames of ports without VLAN rule.
pub type Station = (Option<VlanId>, MacAddress);

/// Two ports that say of one station that it is behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clash {
    /// The port that came second.
    pub port: String,
    /// Its static entry, if it was one.
    pub entry: Option<usize>,
    /// What is wrong.
    pub message: String,
}

/// The stations of a port: its key `mac` in each of its VLANs, and its static entries.
pub fn stations<'a>(
    port: &'a PortSpec,
    statics: impl IntoIterator<Item = &'a StaticEntry>,
) -> Vec<Station> {
    let mut stations = Vec::new();
    if let PortKind::VhostUser(guest) = &port.kind
        && let Some(mac) = guest.mac
    {
        let vlans = port.trunk.iter().copied().chain(port.vlan);
        stations.extend(vlans.map(|vlan| (Some(vlan), mac)));
        if stations.is_empty() {
            stations.push((None, mac));
        }
    }
    let own = statics.into_iter().filter(|entry| entry.port == port.name);
    stations.extend(own.map(|entry| (entry.vlan, entry.mac)));
    stations
}

/// Checks that no station is behind two ports. Entries for ports that are not here do not count.
///
/// # Errors
///
/// [`Clash`] names the station and both ports.
pub fn check_stations<'a>(
    ports: impl IntoIterator<Item = &'a PortSpec>,
    statics: &'a [StaticEntry],
) -> Result<(), Clash> {
    let mut owners = BTreeMap::new();
    let mut claim = |(vlan, mac): Station, port: &'a str, entry| {
        match owners.entry((vlan, mac.bytes())) {
            Entry::Vacant(place) => {
                let _ = place.insert(port);
            }
            Entry::Occupied(place) if *place.get() == port => {}
            Entry::Occupied(place) => {
                let vlan = vlan.map_or_else(String::new, |vlan| format!(" in VLAN {vlan}"));
                let other = place.get();
                let message = format!("{mac}{vlan} is behind port {other} already, not {port}");
                return Err(Clash { port: port.to_owned(), entry, message });
            }
        }
        Ok(())
    };
    let ports: Vec<_> = ports.into_iter().collect();
    for port in &ports {
        for station in stations(port, []) {
            claim(station, &port.name, None)?;
        }
    }
    for (index, entry) in statics.iter().enumerate() {
        if ports.iter().any(|port| port.name == entry.port) {
            claim((entry.vlan, entry.mac), &entry.port, Some(index))?;
        }
    }
    Ok(())
}

impl StaticEntry {
    /// Checks that the port is in the entry's VLAN: no frame would ever take the entry otherwise.
    pub(super) fn check(&self, port: &PortSpec) -> Result<(), String> {
        let any = port.vlan.is_none() && port.trunk.is_empty();
        let member = |vlan| port.vlan == Some(vlan) || port.trunk.contains(&vlan);
        match self.vlan {
            _ if any => Ok(()),
            Some(vlan) if member(vlan) => Ok(()),
            Some(vlan) => Err(format!("port {} is not in VLAN {vlan}", port.name)),
            None => {
                let vlans: Vec<String> =
                    port.vlan.iter().chain(&port.trunk).map(ToString::to_string).collect();
                let vlans = vlans.join(" or ");
                Err(format!("a static entry for port {} needs vlan={vlans}", port.name))
            }
        }
    }
}
