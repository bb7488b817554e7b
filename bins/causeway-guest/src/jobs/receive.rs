//! `--receive`: counts, checks and perhaps echoes the test frames that arrive.

use std::time::Instant;

use super::inject::{self, Injector};
use super::{announce, deadline, is_over};
use crate::checker::Checker;
use crate::cli::Cli;
use crate::frame::recognise;
use crate::idle::Idle;
use crate::port::{GuestPort, Pair};
use crate::rings::NET_HEADER;
use crate::stop::Stop;
use crate::totals::{Latency, Meter, Totals};
use crate::tracker::Losses;

/// Runs until the count, the time or a signal.
pub(crate) fn run(
    cli: &Cli,
    ports: &mut [GuestPort],
    stop: &Stop,
) -> anyhow::Result<Option<Totals>> {
    announce(cli, ports)?;
    let mut checkers: Vec<Checker> =
        ports.iter().map(|_| Checker::new(cli.verify)).collect::<Result<_, _>>()?;
    let mut echo = cli.echo.then(Echo::default);
    let mut injector = ports.first().map(|port| Injector::open(cli, port)).transpose()?.flatten();
    let mut meter = Meter::new(ports, &cli.socket);
    let mut idle = Idle::new(cli.busy, ports, None)?;
    let end = deadline(cli, Instant::now());
    loop {
        let now = Instant::now();
        let done = cli.count.is_some_and(|count| meter.rx_frames() >= count);
        if stop.asked() || is_over(end, now) || done {
            break;
        }
        let mut worked = false;
        if let (Some(injector), Some(port)) = (&mut injector, ports.first_mut()) {
            injector.burst()?;
            let _ = inject::take(port, &mut meter, now)?;
            continue;
        }
        for (index, (port, checker)) in ports.iter_mut().zip(&mut checkers).enumerate() {
            worked |= match &mut echo {
                Some(echo) => echo.turn(index, port, &mut meter, now)?,
                None => checker.turn(index, port, &mut meter, now)?,
            };
        }
        idle.turn(worked, ports, end)?;
    }
    if let Some(injector) = &mut injector {
        injector.count(&mut meter);
    }
    let corrupt = meter.corrupt;
    let Some(mut totals) = meter.totals(ports, idle.calls()) else { return Ok(None) };
    if echo.is_none() && injector.is_none() {
        totals = totals.with_losses(sum(&checkers, cli.count));
    }
    if cli.verify {
        totals.corrupt = Some(corrupt);
        totals.latency = checkers.first().and_then(|c| Latency::from_histogram(&c.delays));
    }
    Ok(Some(totals))
}

/// What is missing: gaps, and what a `--count` promised beyond them.
fn sum(checkers: &[Checker], count: Option<u64>) -> Losses {
    let mut sum = Losses::default();
    let mut frames = 0u64;
    for checker in checkers {
        let found = checker.tracker.losses();
        sum.lost = sum.lost.saturating_add(found.lost);
        sum.out_of_order = sum.out_of_order.saturating_add(found.out_of_order);
        sum.duplicated = sum.duplicated.saturating_add(found.duplicated);
        frames = frames.saturating_add(checker.frames);
    }
    let missing = count.map_or(0, |count| count.saturating_sub(frames));
    sum.lost = sum.lost.max(missing);
    sum
}

/// Sends test frames back, with the addresses swapped.
#[derive(Debug, Default)]
struct Echo {
    frame: Vec<u8>,
}

impl Echo {
    fn turn(
        &mut self,
        index: usize,
        port: &mut GuestPort,
        meter: &mut Meter,
        now: Instant,
    ) -> anyhow::Result<bool> {
        let mut any = false;
        for Pair { rx, tx } in &mut port.pairs {
            let mut sent = false;
            let count = rx.receive(|received| {
                self.frame.resize(received.len as usize, 0);
                let _ = received.copy_to(&mut self.frame);
                if recognise(&self.frame).is_none() {
                    meter.foreign = meter.foreign.wrapping_add(1);
                    return Ok(());
                }
                let len = received.len;
                meter.received(index, u64::from(len));
                let fits = len <= tx.pool().buffer_bytes().saturating_sub(NET_HEADER);
                let Some(slot) = fits.then(|| tx.take()).transpose()?.flatten() else {
                    meter.dropped = meter.dropped.wrapping_add(1);
                    return Ok(());
                };
                if let Some((dst, rest)) = self.frame.split_at_mut_checked(6)
                    && let Some(src) = rest.get_mut(..6)
                {
                    dst.swap_with_slice(src);
                }
                let _ = tx.pool().write(slot, 0, &[0; NET_HEADER as usize]);
                let _ = tx.pool().write(slot, NET_HEADER, &self.frame);
                meter.sent(index, 1, u64::from(len));
                sent = true;
                tx.send(slot, len)
            })?;
            if sent {
                tx.flush();
            }
            any |= count > 0;
        }
        if any {
            meter.active(now);
        }
        Ok(any)
    }
}
