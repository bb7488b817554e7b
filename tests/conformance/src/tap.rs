//! The host's side of a tap port of the switch: its address, its neighbours, its size.
//!
//! **Limits** Names end at 15 bytes; they hold the process id, so that test runs do not meet.

use anyhow::Result;

use crate::environment::host::ip;

/// A tap interface that the switch has made, configured for a test. The switch removes it.
#[derive(Debug)]
pub struct HostTap {
    name: String,
}

impl HostTap {
    /// A name for a tap port of this test run.
    #[must_use]
    pub fn named(suffix: &str) -> Self {
        Self { name: format!("cw{}{suffix}", std::process::id()) }
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The port's SPEC, with `name=h0`.
    #[must_use]
    pub fn spec(&self) -> String {
        format!("tap:name=h0,ifname={}", self.name)
    }

    /// Gives the interface an address ("10.77.0.254/24") and a largest packet, and brings it up.
    ///
    /// # Errors
    /// `ip` fails: there is no such interface, or no right to configure it.
    pub fn configure(&self, address: &str, mtu: u32) -> Result<()> {
        // IPv6 would say hello by itself, and the tests count frames.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name), "1");
        let _ = ip(&["address", "add", address, "dev", &self.name])?;
        let _ = ip(&["link", "set", &self.name, "mtu", &mtu.to_string(), "up"])?;
        Ok(())
    }

    /// Tells the host which MAC address an IP address has, so that it does not ask.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn neighbour(&self, address: &str, mac: &str) -> Result<()> {
        let arguments =
            ["neigh", "replace", address, "lladdr", mac, "dev", &self.name, "nud", "permanent"];
        ip(&arguments).map(drop)
    }
}
