//! `--tap`: a network namespace behind the port.
//!
//! ```text
//!  namespace ── tap ──► slot of the transmitq ──► back end
//!  namespace ◄─ tap ─── private buffer ◄── receiveq ◄── back end
//! ```
//!
//! **Limits.** One queue of the tap; a receiveq of every pair. No offloads on either side.

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use port::{BURST_MAX, Egress, FrameBuf, Ingress, Offload, QueueCounters};
use uplink::tap::{Tap, TapEgress, TapIngress, TapSettings};
use virtq::mem::Pool;

use super::{deadline, is_over};
use crate::cli::Cli;
use crate::idle::Idle;
use crate::port::GuestPort;
use crate::rings::NET_HEADER;
use crate::stop::Stop;
use crate::totals::{Meter, Totals};

/// Bytes of a private buffer: the largest frame, in whole pages.
const SLOT_BYTES: u32 = 17 * 4096;

/// Runs until the time is over or a signal comes.
pub(crate) fn run(
    cli: &Cli,
    ports: &mut [GuestPort],
    stop: &Stop,
) -> anyhow::Result<Option<Totals>> {
    let (Some(name), Some(mac)) = (&cli.tap, ports.first().map(|p| p.mac)) else { return Ok(None) };
    let counters = Arc::new(QueueCounters::default());
    let settings = TapSettings { ifname: name.clone(), queues: 1, netns: cli.netns.clone() };
    let Tap { link, queues } = uplink::tap::open(&settings, &[Arc::clone(&counters)])?;
    set_mac(cli, name, mac)?;
    let Some((mut from_tap, to_tap)) = queues.into_iter().next() else { return Ok(None) };
    let mut out = Outward::new(to_tap)?;
    let mut frames = FrameBuf::default();
    let mut meter = Meter::new(ports, &cli.socket);
    let mut idle = Idle::new(cli.busy, ports, from_tap.wake_fd())?;
    let end = deadline(cli, Instant::now());
    loop {
        let now = Instant::now();
        if stop.asked() || is_over(end, now) {
            break;
        }
        let worked = {
            let Some(port) = ports.first_mut() else { break };
            inward(&mut from_tap, &mut frames, port, &mut meter)? | out.turn(port, &mut meter)?
        };
        if worked {
            meter.active(now);
            idle.turn(true, ports, end)?;
        } else if from_tap.arm() {
            from_tap.disarm();
        } else {
            idle.turn(false, ports, end)?;
            from_tap.disarm();
        }
    }
    drop(link);
    Ok(meter.totals(ports, idle.calls()))
}

/// Gives the tap the address that the port has.
fn set_mac(cli: &Cli, name: &str, mac: crate::mac::MacAddr) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = &cli.netns {
        let _ = command.args(["-n", netns]);
    }
    let _ = command.args(["link", "set", "dev", name, "address", &mac.to_string()]);
    let done = command.output().context("cannot run `ip` to set the address of the tap")?;
    if !done.status.success() {
        bail!("cannot set the address of {name}: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}

/// From the tap to the back end; returns whether anything moved.
fn inward(
    tap: &mut TapIngress,
    frames: &mut FrameBuf,
    port: &mut GuestPort,
    meter: &mut Meter,
) -> anyhow::Result<bool> {
    let Some(pair) = port.pairs.first_mut() else { return Ok(false) };
    // What the ring has no room for stays in the tap's queue, where the kernel counts its drops.
    if pair.tx.room()? < BURST_MAX.min(usize::from(pair.tx.queue().size())) {
        return Ok(false);
    }
    let batch = tap.receive(frames);
    let some = !batch.is_empty();
    for frame in batch.frames() {
        let room = pair.tx.pool().buffer_bytes().saturating_sub(NET_HEADER);
        let Some(slot) = (frame.len() <= room).then(|| pair.tx.take()).transpose()?.flatten()
        else {
            meter.dropped = meter.dropped.wrapping_add(1);
            continue;
        };
        let mut writer = pair.tx.pool().writable(slot).writer();
        let _ = writer.write(&[0; NET_HEADER as usize]);
        let _ = writer.write(frame.head());
        let mut body = batch.body(frame);
        let _ = writer.copy_from(&mut body, frame.body.len);
        pair.tx.send(slot, frame.len())?;
        meter.sent(0, 1, u64::from(frame.len()));
    }
    let fault = batch.fault().cloned();
    if some {
        pair.tx.flush();
    }
    tap.release();
    fault.map_or(Ok(some), |fault| Err(fault.into()))
}

/// From the back end to the tap.
struct Outward {
    tap: TapEgress,
    pool: Pool,
    frames: FrameBuf,
    /// Bytes of the frames in the pool's slots.
    lens: Vec<u32>,
}

impl Outward {
    fn new(tap: TapEgress) -> anyhow::Result<Self> {
        let slots = u32::try_from(BURST_MAX)?;
        Ok(Self {
            tap,
            pool: Pool::new(slots, SLOT_BYTES)?,
            frames: FrameBuf::default(),
            lens: Vec::with_capacity(BURST_MAX),
        })
    }

    fn turn(&mut self, port: &mut GuestPort, meter: &mut Meter) -> anyhow::Result<bool> {
        let mut any = false;
        for pair in &mut port.pairs {
            self.lens.clear();
            let count = pair.rx.receive(|frame| {
                let slot = u32::try_from(self.lens.len())?;
                if let Some(buffer) = self.pool.slot_mut(slot) {
                    let got = frame.copy_to(buffer);
                    self.lens.push(u32::try_from(got)?);
                    meter.received(0, u64::from(frame.len));
                }
                Ok(())
            })?;
            if count > 0 {
                self.write()?;
                any = true;
            }
        }
        Ok(any)
    }

    fn write(&mut self) -> anyhow::Result<()> {
        let mut picked = [0u16; BURST_MAX];
        self.frames.clear();
        for (slot, len) in self.lens.iter().enumerate() {
            let span = Pool::span(u32::try_from(slot)?, 0, *len);
            let Some(frame) = self.frames.slot() else { break };
            if frame.fill(self.pool.store().reader(span), span, Offload::default()) {
                let index = self.frames.len();
                if let Some(place) = picked.get_mut(index) {
                    *place = u16::try_from(index)?;
                }
                self.frames.keep();
            }
        }
        let count = self.frames.len();
        let batch = self.frames.batch(self.pool.store(), None);
        self.tap.send(&batch, picked.get(..count).unwrap_or_default())?;
        let _ = self.tap.notify();
        Ok(())
    }
}
