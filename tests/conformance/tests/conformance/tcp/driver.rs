//! What a Linux guest's driver made of what it was offered.

use anyhow::{Result, ensure};
use conformance::{Environment, Scratch, Switch};
use libtest_mimic::Trial;

use crate::switch::{guest, guest_port};
use crate::trial;

/// As `ethtool -k` calls what the driver leaves to us. Its kernel, 6.1, knows no USO.
const SENT: [&str; 5] = [
    "tx-checksumming",
    "tcp-segmentation-offload",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp6-segmentation",
];
/// Numbers of the feature bits for a driver that takes checksums, TSO and ECN from us.
const TAKEN: [usize; 4] = [1, 7, 8, 9];

pub(crate) fn trials() -> Vec<Trial> {
    let rows = [("on", true), ("off", false)].map(|(value, on)| {
        trial(format!("tcp/ethtool-in-a-guest-with-offloads-{value}"), move |env, scratch| {
            shown(env, scratch, value, on)
        })
    });
    rows.into()
}

fn shown(environment: &Environment, scratch: &Scratch, value: &str, on: bool) -> Result<()> {
    let port = format!("{},offloads={value}", guest_port("g1", scratch));
    let switch = Switch::start(scratch.folder(), &[port])?;
    let mut guest = guest(environment, scratch, 1)?;
    guest.wait_up()?;
    let features = guest.run("ethtool -k eth0")?;
    for feature in SENT {
        let state = features.lines().find_map(|line| line.trim().strip_prefix(feature));
        let is_on = state.is_some_and(|state| state.starts_with(": on"));
        ensure!(is_on == on, "{feature} is {state:?} with offloads={value}\n{features}");
    }
    for bit in TAKEN {
        ensure!(guest.has_feature(bit)? == on, "bit {bit} with offloads={value}");
    }
    guest.power_off()?;
    switch.stop()
}
