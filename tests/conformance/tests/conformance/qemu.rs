//! Two QEMU guests through the switch: releases, rings, queues, features and socket roles.

use anyhow::{Result, bail, ensure};
use conformance::{Environment, Guest, GuestSpec, QemuVersion, Scratch, Side, Switch, pairwise};
use libtest_mimic::Trial;

use crate::{full, trial};

const PINGS: u32 = 50;
const PING_INTERVAL_MS: u32 = 50;
/// Far below what TCG does, far above what a stalled connection moves.
const LEAST_TCP_BYTES: u64 = 4_000_000;

const MRG_RXBUF: usize = 15;
const MQ: usize = 22;
const INDIRECT_DESC: usize = 28;
const EVENT_IDX: usize = 29;
const RING_PACKED: usize = 34;
const RING_RESET: usize = 40;

/// One thing that is other than QEMU's default.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Feature {
    Default,
    EventIdxOff,
    IndirectOff,
    MrgRxbufOff,
    QueueReset,
    InOrder,
}

#[derive(Clone, Debug)]
struct Case {
    version: QemuVersion,
    packed: bool,
    queues: u16,
    feature: Feature,
    /// QEMU's end; the switch has the other.
    side: Side,
}

const VERSIONS: [QemuVersion; 2] = [QemuVersion::V10, QemuVersion::V7];
const PACKED: [bool; 2] = [false, true];
const QUEUES: [u16; 3] = [1, 2, 4];
const FEATURES: [Feature; 6] = [
    Feature::Default,
    Feature::EventIdxOff,
    Feature::IndirectOff,
    Feature::MrgRxbufOff,
    Feature::QueueReset,
    Feature::InOrder,
];
const SIDES: [Side; 2] = [Side::Client, Side::Server];

pub(crate) fn trials() -> Vec<Trial> {
    let sizes = [VERSIONS.len(), PACKED.len(), QUEUES.len(), FEATURES.len(), SIDES.len()];
    let valid = |row: &[usize]| Case::of(row).is_some_and(|case| case.exists());
    let rows = if full() { pairwise::all(&sizes, valid) } else { pairwise::pairs(&sizes, valid) };
    let cases = rows.iter().filter_map(|row| Case::of(row));
    cases.map(|case| trial(case.name(), move |env, scratch| run(env, scratch, &case))).collect()
}

impl Case {
    fn of(row: &[usize]) -> Option<Self> {
        let &[version, packed, queues, feature, side] = row else { return None };
        Some(Self {
            version: *VERSIONS.get(version)?,
            packed: *PACKED.get(packed)?,
            queues: *QUEUES.get(queues)?,
            feature: *FEATURES.get(feature)?,
            side: *SIDES.get(side)?,
        })
    }

    /// QEMU 7.2 has no `in_order`.
    fn exists(&self) -> bool {
        self.version == QemuVersion::V10 || self.feature != Feature::InOrder
    }

    fn name(&self) -> String {
        let ring = if self.packed { "packed" } else { "split" };
        let feature = match self.feature {
            Feature::Default => "default",
            Feature::EventIdxOff => "event_idx_off",
            Feature::IndirectOff => "indirect_off",
            Feature::MrgRxbufOff => "mrg_rxbuf_off",
            Feature::QueueReset => "queue_reset",
            Feature::InOrder => "in_order",
        };
        let role = match self.side {
            Side::Client => "server",
            Side::Server => "client",
        };
        let (version, queues) = (self.version.name(), self.queues);
        format!("qemu/{version}-{ring}-q{queues}-{feature}-causeway-{role}")
    }

    fn properties(&self) -> Vec<String> {
        let feature = match self.feature {
            Feature::Default => "ctrl_guest_offloads=off",
            Feature::EventIdxOff => "event_idx=off",
            Feature::IndirectOff => "indirect_desc=off",
            Feature::MrgRxbufOff => "mrg_rxbuf=off",
            Feature::QueueReset => "queue_reset=on",
            Feature::InOrder => "in_order=on",
        };
        let packed = if self.packed { "packed=on" } else { "packed=off" };
        vec![feature.to_owned(), packed.to_owned()]
    }

    /// Feature bits that the driver must or must not have taken.
    fn expected_features(&self) -> Vec<(usize, bool)> {
        let off = |feature| self.feature != feature;
        vec![
            (RING_PACKED, self.packed),
            (MRG_RXBUF, off(Feature::MrgRxbufOff)),
            (INDIRECT_DESC, off(Feature::IndirectOff)),
            (EVENT_IDX, off(Feature::EventIdxOff)),
            (MQ, self.queues > 1),
        ]
    }

    fn guest(&self, number: u8, scratch: &Scratch) -> GuestSpec {
        let mut spec = GuestSpec::new(number, scratch.path(&format!("g{number}.sock")));
        spec.version = self.version;
        spec.side = self.side;
        spec.queues = self.queues;
        spec.properties = self.properties();
        spec
    }

    fn port(&self, number: u8, scratch: &Scratch) -> String {
        let socket = scratch.path(&format!("g{number}.sock"));
        let mode = match self.side {
            Side::Client => "server",
            Side::Server => "client",
        };
        format!("vhost-user:name=g{number},socket={},mode={mode}", socket.display())
    }
}

fn run(environment: &Environment, scratch: &Scratch, case: &Case) -> Result<()> {
    let ports = [1, 2].map(|number| case.port(number, scratch));
    let switch = Switch::start(scratch.folder(), &ports)?;
    let mut a = Guest::start(environment, &case.guest(1, scratch), scratch.folder())?;
    let mut b = Guest::start(environment, &case.guest(2, scratch), scratch.folder())?;
    a.wait_up()?;
    b.wait_up()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    for (bit, expected) in case.expected_features() {
        let has = a.has_feature(bit)?;
        ensure!(has == expected, "feature bit {bit} is {has} in the guest, expected {expected}");
    }
    a.wait_reachable(&b.address())?;
    no_ping_lost(&switch, (&mut a, &mut b), PINGS)?;
    tcp(&switch, &mut a, &mut b, case.queues)?;
    if case.feature == Feature::QueueReset {
        // QEMU up to 10.0 keeps the reset of a ring from a vhost-user back end. So the feature must
        // either not be offered, and the guest's kernel refuses to resize, or work.
        let resized = a.run("ethtool -G eth0 rx 64 tx 64").is_ok();
        ensure!(resized == a.has_feature(RING_RESET)?, "resizing a ring: {resized}");
        a.wait_reachable(&b.address())?;
        no_ping_lost(&switch, (&mut a, &mut b), 10)?;
    }
    a.rebind_driver()?;
    a.wait_reachable(&b.address())?;
    b.reboot()?;
    b.wait_reachable(&a.address())?;
    no_ping_lost(&switch, (&mut b, &mut a), 10)?;
    let _ = switch.check_ledger()?;
    switch.wait_ports_up(&["g1", "g2"])?;
    a.power_off()?;
    b.power_off()?;
    switch.stop()
}

fn no_ping_lost(switch: &Switch, (from, to): (&mut Guest, &mut Guest), count: u32) -> Result<()> {
    let address = to.address();
    let lost = from.ping(&address, count, PING_INTERVAL_MS)?;
    if lost == 0 {
        return Ok(());
    }
    // Which ring stands still, and who does not go on, cannot be seen any more afterwards.
    let again = from.ping(&address, 10, PING_INTERVAL_MS)?;
    let mut shown = format!("{lost} of {count} pings to {address} are lost, {again} of 10 later");
    for state in [switch.ctl(&["stats"]), switch.ctl(&["ports"]), from.state(), to.state()] {
        shown.push('\n');
        shown.push_str(&state.unwrap_or_else(|error| format!("{error:#}")));
    }
    bail!("{shown}")
}

/// Bytes arrive in both directions, and more than one queue works where there are several.
fn tcp(switch: &Switch, a: &mut Guest, b: &mut Guest, queues: u16) -> Result<()> {
    b.iperf_server()?;
    let bytes = a.iperf(&b.address(), 2, queues.saturating_mul(2))?;
    ensure!(bytes > LEAST_TCP_BYTES, "TCP moved only {bytes} bytes in 2 s");
    if queues > 1 {
        let active = switch.stats()?.port("g1")?.active_queues();
        ensure!(active > 1, "only {active} of {queues} queue pairs carried frames");
    }
    Ok(())
}
