//! `--generate`: sends on the first port and checks what arrives at the others.

use std::time::{Duration, Instant};

use anyhow::bail;

use super::{announce, deadline, earlier, is_over, run_number};
use crate::checker::Checker;
use crate::cli::Cli;
use crate::generator::{Generator, Load};
use crate::idle::Idle;
use crate::mac::MacAddr;
use crate::port::GuestPort;
use crate::stop::Stop;
use crate::totals::{Latency, Meter, Totals};
use crate::tracker::Losses;

/// Frames that are made available at once, unless `--burst` says otherwise.
const BURST: u16 = 32;
/// How long after the last frame others may still arrive, on a machine that has other things to do.
const QUIET: Duration = Duration::from_secs(1);
/// How long frames may be on their way before a window gives them up.
const GIVE_UP: Duration = Duration::from_secs(1);
/// How long the back end may take to read what was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs until the count, the time or a signal.
pub(crate) fn run(
    cli: &Cli,
    ports: &mut [GuestPort],
    stop: &Stop,
) -> anyhow::Result<Option<Totals>> {
    announce(cli, ports)?;
    let dst = destination(cli, ports);
    let Some(first) = ports.first() else { return Ok(None) };
    let load = Load {
        sizes: cli.sizes(),
        flows: cli.flow_count(),
        burst: cli.burst.unwrap_or(BURST),
        rate_pps: cli.rate_pps,
        count: cli.count,
    };
    let sender = first.sender(dst, cli.vlan, run_number());
    let generator = Generator::new(first, sender, load)?;
    let mut job = Job {
        generator: match cli.stations {
            Some(count) => generator.with_stations(count),
            None => generator,
        },
        checkers: ports.iter().map(|_| Checker::new(cli.verify)).collect::<Result<_, _>>()?,
        meter: Meter::new(ports, &cli.socket),
        idle: Idle::new(cli.busy, ports, None)?,
        window: cli.window.map(Window::new),
        receivers: receivers(ports, dst).filter(|to| *to).count(),
    };
    let end = deadline(cli, Instant::now());
    loop {
        let now = Instant::now();
        if stop.asked() || is_over(end, now) || job.generator.is_done() {
            break;
        }
        let worked = job.send(ports, now)? | job.receive(ports, now)?;
        let until = earlier(end, job.generator.due());
        job.idle.turn(worked, ports, until)?;
    }
    job.drain(ports)?;
    job.finish(cli, ports, dst)
}

/// Where frames go unless `--dst` says otherwise: to the second port, or to everybody.
fn destination(cli: &Cli, ports: &[GuestPort]) -> MacAddr {
    cli.dst.or(ports.get(1).map(|p| p.mac)).unwrap_or(MacAddr::BROADCAST)
}

/// Which ports should get what goes to `dst`, the sender's own first.
fn receivers(ports: &[GuestPort], dst: MacAddr) -> impl Iterator<Item = bool> {
    let others = ports.iter().enumerate().map(move |(index, port)| (index, port.mac));
    others.map(move |(index, mac)| index > 0 && (dst == MacAddr::BROADCAST || dst == mac))
}

struct Job {
    generator: Generator,
    /// One per port.
    checkers: Vec<Checker>,
    meter: Meter,
    idle: Idle,
    window: Option<Window>,
    /// Ports at which every frame should arrive.
    receivers: usize,
}

/// How many frames may be on their way.
#[derive(Debug)]
struct Window {
    size: u64,
    /// Frames that will not arrive any more.
    given_up: u64,
    /// When the window was seen open last.
    open: Instant,
}

impl Window {
    fn new(size: u64) -> Self {
        Self { size, given_up: 0, open: Instant::now() }
    }

    /// Frames that may be sent now. A window that stays shut is opened: its frames are lost.
    fn room(&mut self, sent: u64, arrived: u64, now: Instant) -> u64 {
        let on_the_way = sent.saturating_sub(arrived).saturating_sub(self.given_up);
        let room = self.size.saturating_sub(on_the_way);
        if room > 0 {
            self.open = now;
        } else if now.duration_since(self.open) > GIVE_UP {
            self.given_up = sent.saturating_sub(arrived);
        }
        room
    }
}

impl Job {
    fn send(&mut self, ports: &mut [GuestPort], now: Instant) -> anyhow::Result<bool> {
        let Some(first) = ports.first_mut() else { return Ok(false) };
        let copies = u64::try_from(self.receivers.max(1))?;
        let arrived = self.meter.rx_frames().checked_div(copies).unwrap_or(0);
        let sent = self.generator.sent();
        let room = self.window.as_mut().map_or(u64::MAX, |w| w.room(sent, arrived, now));
        self.generator.turn(first, room, &mut self.meter, now)
    }

    fn receive(&mut self, ports: &mut [GuestPort], now: Instant) -> anyhow::Result<bool> {
        let mut worked = false;
        for (index, (port, checker)) in ports.iter_mut().zip(&mut self.checkers).enumerate() {
            worked |= checker.turn(index, port, &mut self.meter, now)?;
        }
        Ok(worked)
    }

    /// Waits until everything that was sent was read, and nothing more arrives.
    fn drain(&mut self, ports: &mut [GuestPort]) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut last = begin;
        self.idle.draining = true;
        loop {
            let now = Instant::now();
            let mut worked = self.receive(ports, now)?;
            let mut left = 0u64;
            for pair in ports.iter_mut().flat_map(|p| &mut p.pairs) {
                worked |= pair.tx.reclaim()? > 0;
                left = left.saturating_add(u64::from(pair.tx.outstanding()));
            }
            if worked {
                last = now;
            }
            let quiet = now.duration_since(last);
            let copies = u64::try_from(self.receivers)?.saturating_mul(self.generator.sent());
            if left == 0 && (self.meter.rx_frames() >= copies || quiet >= QUIET) {
                return Ok(());
            }
            if quiet >= PATIENCE {
                bail!("the back end did not read the last {left} frames");
            }
            self.idle.turn(worked, ports, now.checked_add(QUIET))?;
        }
    }

    fn finish(
        self,
        cli: &Cli,
        ports: &[GuestPort],
        dst: MacAddr,
    ) -> anyhow::Result<Option<Totals>> {
        let corrupt = self.meter.corrupt;
        let sent = self.generator.sent();
        let Some(mut totals) = self.meter.totals(ports, self.idle.calls()) else { return Ok(None) };
        let mut sum: Option<Losses> = None;
        for (expects, checker) in receivers(ports, dst).zip(&self.checkers) {
            if expects {
                let found = checker.tracker.losses();
                let arrived = checker.frames.saturating_sub(found.duplicated);
                let sum = sum.get_or_insert_default();
                sum.lost = sum.lost.saturating_add(sent.saturating_sub(arrived));
                sum.out_of_order = sum.out_of_order.saturating_add(found.out_of_order);
                sum.duplicated = sum.duplicated.saturating_add(found.duplicated);
            }
        }
        if let Some(sum) = sum {
            totals = totals.with_losses(sum);
        }
        if cli.verify {
            totals.corrupt = Some(corrupt);
            totals.latency = self.checkers.get(1).and_then(|c| Latency::from_histogram(&c.delays));
        }
        Ok(Some(totals))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Window;

    #[test]
    fn a_window_that_stays_shut_gives_its_frames_up() {
        let mut window = Window::new(10);
        let now = Instant::now();
        assert_eq!(window.room(0, 0, now), 10);
        assert_eq!(window.room(8, 2, now), 4);
        assert_eq!(window.room(12, 2, now), 0);
        assert_eq!(window.room(12, 2, now + Duration::from_millis(900)), 0);
        let later = now + Duration::from_secs(2);
        assert_eq!(window.room(12, 2, later), 0);
        assert_eq!(window.room(12, 2, later), 10);
    }
}
