//! What ports may send, in the switch's terms; it can change while they run.

use control::{PortKind, PortSpec};
use packet::MacAddr;
use switch::{PortLimits, Rate, Sources};

use super::App;

/// Bytes of the least burst that is not asked for: the largest frame.
const LEAST_BURST_BYTES: u64 = 64 * 1024;
/// Frames of such a burst.
const LEAST_BURST_FRAMES: u64 = 64;
/// Floods that come at once: those of a station that starts.
const LEAST_BURST_FLOODS: u64 = 16;
/// Such a burst is what the rate gives in 10 ms, and floods in 100 ms.
const BURSTS_PER_SECOND: u64 = 100;
const FLOOD_BURSTS_PER_SECOND: u64 = 10;
/// Bytes per second of a kbit/s.
const KBPS: u64 = 125;

/// What `spec` allows.
pub(super) fn limits(spec: &PortSpec) -> PortLimits {
    let asked = &spec.limits;
    let rate = |per_second: u64, asked: Option<u64>, least: u64, bursts: u64| Rate {
        per_second,
        burst: asked.unwrap_or_else(|| per_second.div_euclid(bursts).max(least)),
    };
    let bytes = asked.rate_kbps.map(|kbps| {
        let burst = asked.burst_kb.map(|kib| u64::from(kib).saturating_mul(1024));
        rate(kbps.saturating_mul(KBPS), burst, LEAST_BURST_BYTES, BURSTS_PER_SECOND)
    });
    let frames = asked.rate_fps.map(|fps| {
        rate(fps, asked.burst_frames.map(u64::from), LEAST_BURST_FRAMES, BURSTS_PER_SECOND)
    });
    let storm =
        asked.storm_fps.map(|fps| rate(fps, None, LEAST_BURST_FLOODS, FLOOD_BURSTS_PER_SECOND));
    PortLimits { bytes, frames, storm, sources: sources(spec) }
}

fn sources(spec: &PortSpec) -> Option<Sources> {
    let PortKind::VhostUser(guest) = &spec.kind else { return None };
    let mac = guest.mac.filter(|_| guest.antispoof)?;
    Some(Sources::new(MacAddr(mac.bytes()), guest.ips.iter().copied()))
}

impl App {
    /// Lets a running port send what `spec` allows, and nothing else. Returns whether there is
    /// such a port.
    pub(super) fn set_limits(&mut self, spec: &PortSpec) -> bool {
        let found = self.ports.iter_mut().find(|port| port.spec.name == spec.name);
        let Some(port) = found else { return false };
        port.spec = port.spec.with_limits_of(spec);
        tracing::info!(port = spec.name, "limits changed: {}", port.spec);
        self.switch.set_limits(port.handle.id, &limits(spec))
    }
}

#[cfg(test)]
mod tests {
    use super::{Rate, limits};

    #[test]
    fn bursts_have_sensible_defaults() {
        let of = |keys: &str| limits(&format!("tap:name=t,ifname=t,{keys}").parse().unwrap());
        let fast = of("rate-mbps=10000,rate-kpps=1000,storm-kpps=10");
        assert_eq!(fast.bytes, Some(Rate { per_second: 1_250_000_000, burst: 12_500_000 }));
        assert_eq!(fast.frames, Some(Rate { per_second: 1_000_000, burst: 10_000 }));
        assert_eq!(fast.storm, Some(Rate { per_second: 10_000, burst: 1000 }));
        let slow = of("rate-mbps=0.5,rate-kpps=0.01,storm-kpps=0.01");
        assert_eq!(slow.bytes, Some(Rate { per_second: 62_500, burst: 65_536 }));
        assert_eq!(slow.frames, Some(Rate { per_second: 10, burst: 64 }));
        assert_eq!(slow.storm, Some(Rate { per_second: 10, burst: 16 }));
        let asked = of("rate-mbps=1,burst-kb=3,rate-kpps=1,burst-frames=5");
        assert_eq!(asked.bytes.map(|rate| rate.burst), Some(3072));
        assert_eq!(asked.frames.map(|rate| rate.burst), Some(5));
        assert_eq!(of("wait=on"), switch::PortLimits::default());
    }
}
