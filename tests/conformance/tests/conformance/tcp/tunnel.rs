//! TCP in a tunnel that ends in the namespaces: its checksums are left undone within.

use anyhow::{Result, ensure};
use conformance::{Netns, Scratch};
use libtest_mimic::Trial;

use super::wire::kind;
use super::{ADDRESSES, Bed, bad_checksums, carry};
use crate::trial;

const INNER: [&str; 2] = ["10.79.0.1", "10.79.0.2"];
/// What `ethtool -K` takes from an end, because tunnels cannot be cut by us.
const CUT: [&str; 2] = ["tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"];

pub(crate) fn trials() -> Vec<Trial> {
    let ways =
        [("af-xdp", "af-xdp"), ("af-xdp", "off"), ("af-xdp-copy", "tap"), ("af-xdp", "split")];
    let row = |(from, to)| {
        trial(format!("tcp/vxlan-from-{from}-to-{to}"), move |_, scratch| {
            carry_inside(scratch, [from, to])
        })
    };
    ways.map(row).into()
}

fn carry_inside(scratch: &Scratch, names: [&str; 2]) -> Result<()> {
    let bed = Bed::new([kind(names[0])?, kind(names[1])?], false, scratch)?;
    for (number, space) in bed.spaces.iter().enumerate() {
        tunnel(space, number)?;
    }
    let [one, other] = &bed.spaces;
    for (from, to, address) in [(one, other, INNER[1]), (other, one, INNER[0])] {
        carry(from, to, address.parse()?)?;
    }
    for space in &bed.spaces {
        let wrong = space.inside(bad_checksums)?;
        ensure!(wrong == 0, "{wrong} wrong checksums arrived in {}", space.name());
    }
    bed.stop()
}

/// A VXLAN tunnel to the other side.
fn tunnel(space: &Netns, number: usize) -> Result<()> {
    let peer = number ^ 1;
    let outer = ADDRESSES[0].get(peer).copied().unwrap_or_default();
    let inner = INNER.get(number).copied().unwrap_or_default();
    let make = ["link", "add", "vx0", "type", "vxlan", "id", "5", "dev", "eth0", "dstport", "4789"];
    let _ = space.ip(&[&make[..], &["remote", outer]].concat())?;
    let _ = space.ip(&["address", "add", &format!("{inner}/24"), "dev", "vx0"])?;
    let ethtool = conformance::environment::host::install("ethtool", "ethtool")?;
    let mut command = conformance::process::tied_command(ethtool);
    let _ = command.args(["-K", "eth0"]);
    for feature in CUT {
        let _ = command.args([feature, "off"]);
    }
    let patience = std::time::Duration::from_secs(10);
    let _ = conformance::process::output(&mut space.command(&command)?, patience)?;
    let _ = space.ip(&["link", "set", "vx0", "up"])?;
    Ok(())
}
