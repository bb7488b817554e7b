//! `--tap`: a network namespace behind the port.
//!
//! ```text
//!  namespace ── tap ── read ──► slot of the transmitq ──► back end
//!  namespace ◄─ tap ◄─ writev ─ buffers of the receiveq ◄─ back end
//! ```
//!
//! Frames keep their virtio-net headers: what the tap's kernel leaves undone goes to the back end
//! as it is, and the other way round. `--offloads` says what that may be. Nothing is copied here.
//!
//! **Limits.** As many queues of the tap as queue pairs, all served by one thread.

use std::io;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use port::OffloadSet;
use rustix::io::Errno;
use uplink::tap::{RawQueue, RawTap, TapSettings, open_raw};

use super::{deadline, is_over};
use crate::cli::Cli;
use crate::idle::Idle;
use crate::port::{GuestPort, Pair};
use crate::rings::Received;
use crate::stop::Stop;
use crate::totals::{Meter, Totals};

/// Frames that are read before the other way gets its turn.
const FRAMES: usize = 64;
/// Bytes that are read before the back end is shown them.
const FLUSH_BYTES: usize = 128 << 10;
/// How long we spin after the last work: both ends of the way are waiting for a CPU, too.
const SPIN: Duration = Duration::from_micros(5);

/// The tap, which is there before the back end is asked for what it offers.
#[derive(Debug)]
pub(crate) struct Namespace {
    tap: RawTap,
    /// Whether the kernel's taps know USO.
    pub(crate) uso: bool,
}

impl Namespace {
    /// Makes or opens the tap, if there is to be one.
    pub(crate) fn open(cli: &Cli) -> anyhow::Result<Option<Self>> {
        let Some(name) = &cli.tap else { return Ok(None) };
        let settings = TapSettings {
            ifname: name.clone(),
            queues: cli.queues,
            netns: cli.netns.clone(),
            offloads: OffloadSet::NONE,
        };
        let tap = open_raw(&settings)?;
        let all = OffloadSet { csum: true, uso: true, ..OffloadSet::default() };
        let mut uso = true;
        for queue in &tap.queues {
            uso &= queue.set_offloads(all).context("cannot ask the tap for its offloads")?.uso;
            let _ = queue.set_offloads(OffloadSet::default());
        }
        Ok(Some(Self { tap, uso }))
    }

    /// Runs until the time is over or a signal comes.
    pub(crate) fn run(
        &self,
        cli: &Cli,
        ports: &mut [GuestPort],
        stop: &Stop,
    ) -> anyhow::Result<Option<Totals>> {
        let Some(port) = ports.first_mut() else { return Ok(None) };
        for queue in &self.tap.queues {
            let _ = queue
                .set_offloads(port.features.offloads.tap())
                .context("cannot set the tap's offloads")?;
        }
        set_mac(cli, &self.tap.link.name(), port.mac)?;
        let mut meter = Meter::new(ports, &cli.socket);
        let queues = &self.tap.queues;
        let mut idle = Idle::new(cli.busy, ports, queues.iter().map(AsFd::as_fd))?;
        idle.spin = SPIN;
        let end = deadline(cli, Instant::now());
        loop {
            let now = Instant::now();
            if stop.asked() || is_over(end, now) {
                break;
            }
            let pairs = ports.iter_mut().flat_map(|port| &mut port.pairs);
            let mut worked = false;
            for (queue, pair) in queues.iter().zip(pairs) {
                worked |= inward(queue, pair, &mut meter)?;
                worked |= outward(queue, pair, &mut meter)?;
            }
            if worked {
                meter.active(now);
            }
            idle.turn(worked, ports, end)?;
        }
        Ok(meter.totals(ports, idle.calls()))
    }
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
fn inward(tap: &RawQueue, pair: &mut Pair, meter: &mut Meter) -> anyhow::Result<bool> {
    let (mut frames, mut waiting) = (0usize, 0usize);
    while frames < FRAMES {
        // What the ring has no room for stays in the tap's queue, where the kernel counts its
        // drops.
        let Some(slot) = pair.tx.take()? else { break };
        let got = match pair.tx.pool().write_piece(slot) {
            Some(room) => tap.read(room).context("cannot read from the tap")?,
            None => None,
        };
        let Some(len) = got else {
            pair.tx.put_back(slot);
            break;
        };
        frames = frames.saturating_add(1);
        let Some(bytes) = pair.tx.send_read(slot, len)? else {
            meter.dropped = meter.dropped.wrapping_add(1);
            continue;
        };
        meter.sent(0, 1, bytes);
        waiting = waiting.saturating_add(len);
        if waiting >= FLUSH_BYTES {
            pair.tx.flush();
            waiting = 0;
        }
    }
    if waiting > 0 {
        pair.tx.flush();
    }
    Ok(frames > 0)
}

/// From the back end to the tap; returns whether anything moved.
fn outward(tap: &RawQueue, pair: &mut Pair, meter: &mut Meter) -> anyhow::Result<bool> {
    let count = pair.rx.receive(|frame| {
        meter.received(0, u64::from(frame.len));
        let sent = write(tap, &frame).context("cannot write to the tap")?;
        meter.dropped = meter.dropped.wrapping_add(u64::from(!sent));
        Ok(())
    })?;
    Ok(count > 0)
}

/// Whether the kernel took the frame.
fn write(tap: &RawQueue, frame: &Received<'_>) -> io::Result<bool> {
    let Err(error) = tap.write(frame.pieces()) else { return Ok(true) };
    match Errno::from_io_error(&error) {
        // The interface is gone.
        Some(Errno::BADFD | Errno::BADF) => Err(error),
        _ => Ok(false),
    }
}
