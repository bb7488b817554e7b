//! `--neighbour`: two more ports, between which frames go as fast as the back end takes them while
//! something else is measured.
//!
//! One thread has both jobs, so it does a little of this one at a time ([`Neighbour::step`]): what
//! waits for a frame of the other looks for it in between. Frames are made once, are all the same
//! and nobody looks into them, so that the back end has more to do for each than we have.

use anyhow::Context;

use super::run_number;
use crate::cli::Cli;
use crate::mac;
use crate::port::GuestPort;
use crate::rings::NET_HEADER;
use crate::stop::Stop;

/// Frames that are sent in one step, and as many are taken.
const STEP: u16 = 4;

/// The two ports.
#[derive(Debug)]
pub(crate) struct Neighbour {
    ports: [GuestPort; 2],
    size: u32,
    /// Frames that arrived.
    pub(crate) arrived: u64,
    /// Steps since the sessions were looked at.
    steps: u32,
}

/// Steps between two looks at the sessions.
const CHECK_STEPS: u32 = 65_536;

impl Neighbour {
    /// Connects both and lets the switch know where they are. None without `--neighbour`, or if
    /// stopped meanwhile.
    pub(crate) fn open(cli: &Cli, stop: &Stop) -> anyhow::Result<Option<Self>> {
        let [first, second] = cli.neighbour.as_slice() else { return Ok(None) };
        let size = cli.neighbour_size.unwrap_or_else(|| cli.sizes().0);
        let theirs = Cli { size: Some(size), ..cli.clone() };
        let open = |path: &std::path::Path| {
            GuestPort::open(&theirs, path, mac::derived(path), false, stop)
                .with_context(|| format!("port {}", path.display()))
        };
        let (Some(from), Some(to)) = (open(first)?, open(second)?) else { return Ok(None) };
        let mut this = Self { ports: [from, to], size, arrived: 0, steps: 0 };
        for port in &mut this.ports {
            port.announce(port.mac, cli.vlan)?;
            port.settle()?;
        }
        this.prepare(cli.vlan);
        Ok(Some(this))
    }

    /// Writes the frame into every slot.
    fn prepare(&self, vlan: Option<u16>) {
        let [from, to] = &self.ports;
        let mut frame = Vec::new();
        from.sender(to.mac, vlan, run_number()).build(&mut frame, self.size as usize, 0);
        for pool in from.pairs.iter().map(|pair| pair.tx.pool()) {
            for slot in 0..u32::try_from(pool.len()).unwrap_or(0) {
                let _ = pool.write(slot, 0, &[0; NET_HEADER as usize]);
                let _ = pool.write(slot, NET_HEADER, &frame);
            }
        }
    }

    /// Sends a few frames and takes a few.
    pub(crate) fn step(&mut self) -> anyhow::Result<()> {
        let Self { ports: [from, to], size, .. } = self;
        for pair in &mut from.pairs {
            let mut any = false;
            for _ in 0..STEP {
                let Some(slot) = pair.tx.take()? else { break };
                pair.tx.send(slot, *size)?;
                any = true;
            }
            if any {
                pair.tx.flush();
            }
        }
        for pair in &mut to.pairs {
            let count = pair.rx.receive_most(STEP.into(), |_| Ok(()))?;
            self.arrived = self.arrived.wrapping_add(count as u64);
        }
        self.steps = self.steps.wrapping_add(1);
        if self.steps >= CHECK_STEPS {
            self.steps = 0;
            self.ports.iter_mut().try_for_each(GuestPort::check)?;
        }
        Ok(())
    }

    /// Stops its rings.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        self.ports.iter_mut().try_for_each(GuestPort::stop)
    }
}
