//! The jobs: what the guest does once its ports are connected.

pub(crate) mod generate;
pub(crate) mod inject;
pub(crate) mod latency;
mod neighbour;
pub(crate) mod receive;
pub(crate) mod tap;

use std::time::{Duration, Instant};

use crate::cli::Cli;
use crate::mac;
use crate::port::GuestPort;

/// When a job must end, if it must.
fn deadline(cli: &Cli, begin: Instant) -> Option<Instant> {
    begin.checked_add(Duration::from_secs(cli.seconds?))
}

/// Whether `deadline` is over.
fn is_over(deadline: Option<Instant>, now: Instant) -> bool {
    deadline.is_some_and(|d| now >= d)
}

/// The earlier of two moments.
fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Lets a learning switch know all ports, and waits until it has read that and had the time to
/// learn. The buffers are free again then, and may be written anew.
fn announce(cli: &Cli, ports: &mut [GuestPort]) -> anyhow::Result<()> {
    for port in ports.iter_mut() {
        for number in 0..cli.stations.unwrap_or(1) {
            port.announce(mac::station(port.mac, number), cli.vlan)?;
        }
    }
    ports.iter_mut().try_for_each(GuestPort::settle)?;
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}

/// A number that tells this run from the one before.
#[expect(clippy::cast_possible_truncation, reason = "any 16 bits do")]
fn run_number() -> u16 {
    (crate::clock::now_ns() >> 16) as u16 ^ std::process::id() as u16
}
