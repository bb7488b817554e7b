//! A guest whose network device is behind a vIOMMU: with translations that stay (`iommu=pt`), and
//! with one for each buffer (`strict`, `lazy`). With `lazy` the guest's kernel forgets everything
//! at once now and then, the places of the rings too. Frames wait for the address of a ring or
//! buffer: none is lost.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::switch::QueueStats;
use conformance::{Environment, Guest, GuestSpec, Scratch, Switch};
use libtest_mimic::Trial;
use serde_json::json;

use crate::switch::{guest, guest_port};
use crate::{full, trial};

pub(crate) const ACCESS_PLATFORM: usize = 33;
const LEAST_TCP_BYTES: u64 = 200_000;
/// Looks for translations.
const LOOKS: u32 = 40;
const SECONDS: u32 = 3;
const TCP_TIMEOUT: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug)]
struct Case {
    packed: bool,
    /// How the guest's kernel uses the IOMMU.
    mode: &'static str,
}

pub(crate) fn trials() -> Vec<Trial> {
    let all = [("pt", "iommu=pt"), ("lazy", "iommu.strict=0"), ("strict", "iommu.strict=1")];
    let mut trials = Vec::new();
    for packed in [false, true] {
        for (name, mode) in all {
            // Each mode with one layout, unless all combinations are asked for.
            if full() || (name == "lazy") != packed {
                let ring = if packed { "packed" } else { "split" };
                let case = Case { packed, mode };
                trials.push(trial(format!("iommu/{ring}-{name}"), move |env, scratch| {
                    behind_iommu(env, scratch, case)
                }));
            }
        }
    }
    trials
}

fn received(shown: &str) -> Result<u64> {
    let json: serde_json::Value = serde_json::from_str(shown)?;
    let bytes = json.pointer("/end/sum_received/bytes").and_then(serde_json::Value::as_u64);
    bytes.with_context(|| format!("iperf3 says: {shown}"))
}

fn spec(scratch: &Scratch, case: Case) -> GuestSpec {
    let mut spec = GuestSpec::new(1, scratch.path("g1.sock"));
    let packed = if case.packed { "packed=on" } else { "packed=off" };
    spec.properties = ["ctrl_guest_offloads=off", packed].map(str::to_owned).to_vec();
    put_behind(&mut spec, case.mode);
    spec
}

/// Puts a guest's network device behind a vIOMMU, which its kernel uses in this way.
pub(crate) fn put_behind(spec: &mut GuestSpec, mode: &str) {
    let properties = ["iommu_platform=on", "ats=on", "disable-legacy=on"];
    spec.properties.extend(properties.map(str::to_owned));
    spec.machine = "q35,accel=tcg,kernel-irqchip=split".to_owned();
    let arguments = ["-device", "intel-iommu,device-iotlb=on,intremap=off"];
    spec.arguments.extend(arguments.map(str::to_owned));
    spec.kernel = format!("intel_iommu=on {mode}");
}

fn translations(switch: &Switch) -> Result<u64> {
    let shown: serde_json::Value = serde_json::from_str(&switch.ctl(&["--json", "ports"])?)?;
    let ports = shown.get("ports").and_then(|ports| ports.as_array()).context("no ports")?;
    let port = ports.iter().find(|port| port.get("name") == Some(&json!("g1")));
    let count = port.and_then(|port| port.pointer("/front_end/translations"));
    count.and_then(serde_json::Value::as_u64).with_context(|| format!("ports: {shown}"))
}

/// How many frames the port behind the IOMMU has dropped for each reason that a missing address
/// could be.
fn untranslated(switch: &Switch) -> Result<[u64; 3]> {
    let stats = switch.stats()?;
    let queues = &stats.port("g1")?.queues;
    let dropped = |queue: &QueueStats, why| queue.drops.get(why).copied().unwrap_or(0);
    Ok(["not_translated", "no_buffer", "port_down"]
        .map(|why| queues.iter().map(|queue| dropped(queue, why)).sum()))
}

fn behind_iommu(environment: &Environment, scratch: &Scratch, case: Case) -> Result<()> {
    let ports = [guest_port("g1", scratch), guest_port("g2", scratch)];
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut peer = guest(environment, scratch, 2)?;
    let mut behind = Guest::start(environment, &spec(scratch, case), scratch.folder())?;
    peer.wait_up()?;
    behind.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    ensure!(behind.has_feature(ACCESS_PLATFORM)?, "the driver did not take ACCESS_PLATFORM");
    // Asked more than once: a lazy guest may have forgotten everything just now.
    let mut known = translations(&switch)?;
    for _ in 0..LOOKS {
        if known == 0 {
            std::thread::sleep(Duration::from_millis(50));
            known = translations(&switch)?;
        }
    }
    ensure!(known > 0, "nothing was translated");
    behind.wait_reachable(&peer.address())?;
    // While its driver came up there were no buffers.
    let before = untranslated(&switch)?;
    ensure!(before[0] == 0, "{} frames were not translated", before[0]);
    let lost = behind.ping(&peer.address(), 50, 50)?;
    ensure!(lost == 0, "{lost} of 50 pings lost; {}", switch.counters());
    // Later TCP may find the guest's ring full.
    let after = untranslated(&switch)?;
    ensure!(after == before, "frames waited for an address and were dropped: {before:?} {after:?}");
    peer.iperf_server()?;
    let line = format!("iperf3 -J -c {} -t {SECONDS}", peer.address());
    let bytes = received(&behind.run_within(&line, TCP_TIMEOUT)?)?;
    ensure!(bytes > LEAST_TCP_BYTES, "{bytes} bytes of TCP; {}", switch.counters());
    let mbit = bytes.saturating_mul(8).checked_div(u64::from(SECONDS).saturating_mul(1_000_000));
    println!("TCP behind the IOMMU: {} Mbit/s", mbit.unwrap_or(0));
    let line = format!("iperf3 -J -R -c {} -t {SECONDS}", peer.address());
    let _ = behind.run_within(&line, TCP_TIMEOUT)?;
    behind.rebind_driver()?;
    switch.wait_ports_up(&["g1"])?;
    behind.wait_reachable(&peer.address())?;
    let lost = behind.ping(&peer.address(), 20, 50)?;
    ensure!(lost == 0, "{lost} of 20 pings lost after the driver came back");
    let _ = switch.check_ledger()?;
    behind.power_off()?;
    peer.power_off()?;
    switch.stop()
}
