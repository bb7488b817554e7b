//! The interfaces of a run: a veth pair, or a tap that the back end makes.

use std::fs;

use anyhow::{Context, Result};
use conformance::environment::host::ip;

/// What is behind the uplink. A veth pair goes with it, a tap with its back end.
#[derive(Debug)]
pub(super) struct Wire {
    near: String,
    far: String,
}

impl Wire {
    /// Of a tap both ends have one name: the back end holds one, the kernel the other.
    pub(super) fn new(tap: bool) -> Result<Self> {
        let id = std::process::id();
        if tap {
            let name = format!("cwt{id}");
            return Ok(Self { near: name.clone(), far: name });
        }
        let wire = Self { near: format!("cwu{id}"), far: format!("cwf{id}") };
        let veth = ["link", "add", &wire.near, "type", "veth", "peer", "name", &wire.far];
        let _ = ip(&veth)?;
        Ok(wire)
    }

    /// Makes both ends ready, once a back end is there.
    pub(super) fn bring_up(&self) -> Result<()> {
        for name in [&self.near, &self.far] {
            // IPv6 would say hello by itself.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
            let _ = ip(&["link", "set", name, "promisc", "on", "up"])?;
        }
        Ok(())
    }

    /// The uplink's end.
    pub(super) fn near(&self) -> &str {
        &self.near
    }

    /// The end where frames arrive and come from.
    pub(super) fn far(&self) -> &str {
        &self.far
    }

    /// Frames that have arrived at the far end.
    pub(super) fn arrived(&self) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/rx_packets", self.far);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.trim().parse().with_context(|| format!("{path} says {text}"))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.near != self.far {
            let _ = ip(&["link", "del", &self.near]);
        }
    }
}
