//! Two uplinks of the switch that are wired to each other: what leaves by one comes back by the
//! other, so each frame crosses both.

use anyhow::Result;

use crate::Netns;

/// The wire; it goes with the value.
#[derive(Debug)]
pub struct Looped {
    _places: [Netns; 2],
    ports: [String; 2],
}

impl Looped {
    /// Makes two interfaces for ports of `kind`: two taps in a bridge of the host, or a veth pair.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn new(kind: &str) -> Result<Self> {
        let (place, peer) = (Netns::new()?, Netns::new()?);
        let spec = |name: &str, netns: &Netns| {
            format!("{kind}:name={name},ifname={name},netns={}", netns.name())
        };
        let ports = if kind == "tap" {
            let _ = place.ip(&["link", "add", "br0", "type", "bridge"])?;
            let _ = place.ip(&["link", "set", "br0", "up"])?;
            for tap in ["u0", "u1"] {
                let _ = place.ip(&["tuntap", "add", tap, "mode", "tap"])?;
                let _ = place.ip(&["link", "set", tap, "master", "br0"])?;
                let _ = place.ip(&["link", "set", tap, "up"])?;
            }
            [spec("u0", &place), spec("u1", &place)]
        } else {
            let ends =
                ["link", "add", "u0", "type", "veth", "peer", "name", "u1", "netns", peer.name()];
            let _ = place.ip(&ends)?;
            let _ = place.ip(&["link", "set", "u0", "up"])?;
            let _ = peer.ip(&["link", "set", "u1", "up"])?;
            [spec("u0", &place), spec("u1", &peer)]
        };
        Ok(Self { _places: [place, peer], ports })
    }

    /// The two ports, `u0` of VLAN 10 and `u1` of VLAN 20: there is no other way from a guest of
    /// the one to a guest of the other.
    #[must_use]
    pub fn ports(&self) -> [String; 2] {
        [format!("{},vlan=10", self.ports[0]), format!("{},vlan=20", self.ports[1])]
    }
}
