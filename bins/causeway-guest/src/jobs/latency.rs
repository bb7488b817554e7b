//! `--latency`: one frame at a time, there and back.
//!
//! ```text
//!  two ports   first ──► switch ──► second, which sends it back ──► switch ──► first
//!  one port    first ──► switch ──► a `--receive --echo` elsewhere ──► switch ──► first
//! ```
//!
//! With `--neighbour`, two other ports load the switch meanwhile.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::neighbour::Neighbour;
use super::{announce, deadline, is_over, run_number};
use crate::cli::Cli;
use crate::clock::now_ns;
use crate::frame::{HEAD_MAX, STAMP, Sender, Stamp, hash_of_pattern, recognise};
use crate::idle::Idle;
use crate::port::GuestPort;
use crate::rings::NET_HEADER;
use crate::stop::Stop;
use crate::totals::{Latency, Meter, Totals};

/// Round trips unless `--count` or `--seconds` say otherwise.
const DEFAULT_COUNT: u64 = 10_000;
/// After this a frame is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs until the count, the time or a signal.
pub(crate) fn run(
    cli: &Cli,
    ports: &mut [GuestPort],
    stop: &Stop,
) -> anyhow::Result<Option<Totals>> {
    announce(cli, ports)?;
    let neighbour = Neighbour::open(cli, stop)?;
    let Some(mut job) = Job::new(cli, ports, neighbour)? else { return Ok(None) };
    // A back end that has just been connected still has other things to do.
    let warm = Instant::now().checked_add(Duration::from_secs(cli.warm_up.unwrap_or(0)));
    while !is_over(warm, Instant::now()) && !stop.asked() {
        let begin = Instant::now();
        let _ = job.round_trip(ports, stop)?;
        job.pause(cli, ports, begin)?;
    }
    let start = Instant::now();
    let arrived = job.neighbour.as_ref().map_or(0, |neighbour| neighbour.arrived);
    let end = deadline(cli, start);
    let count = cli.count.or_else(|| end.is_none().then_some(DEFAULT_COUNT));
    let mut lost = 0u64;
    let mut tries = 0u64;
    while count.is_none_or(|count| tries < count) && !is_over(end, Instant::now()) && !stop.asked()
    {
        tries = tries.wrapping_add(1);
        let begin = Instant::now();
        let back = job.round_trip(ports, stop)?;
        if back {
            let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
            job.times.saturating_record(nanos);
        } else if !stop.asked() {
            lost = lost.wrapping_add(1);
        }
        job.pause(cli, ports, begin)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let neighbour_pps = job.neighbour.as_ref().map(|neighbour| {
        let frames = u32::try_from(neighbour.arrived.wrapping_sub(arrived)).unwrap_or(u32::MAX);
        (f64::from(frames) / seconds).round()
    });
    job.neighbour.as_mut().map_or(Ok(()), Neighbour::stop)?;
    let Some(mut totals) = job.meter.totals(ports, job.idle.calls()) else { return Ok(None) };
    totals.neighbour_pps = neighbour_pps;
    totals.lost = Some(lost);
    totals.latency = Latency::from_histogram(&job.times);
    Ok(Some(totals))
}

struct Job {
    /// The legs of the trip: who sends, and from which port to which.
    legs: Vec<(Sender, usize, usize)>,
    len: u32,
    seq: u32,
    frame: Vec<u8>,
    times: Histogram<u64>,
    meter: Meter,
    idle: Idle,
    neighbour: Option<Neighbour>,
}

impl Job {
    fn new(
        cli: &Cli,
        ports: &[GuestPort],
        neighbour: Option<Neighbour>,
    ) -> anyhow::Result<Option<Self>> {
        let run = run_number();
        let legs = match (ports, cli.dst) {
            ([a, b], _) => {
                vec![(a.sender(b.mac, cli.vlan, run), 0, 1), (b.sender(a.mac, cli.vlan, run), 1, 0)]
            }
            ([a], Some(dst)) => vec![(a.sender(dst, cli.vlan, run), 0, 0)],
            _ => return Ok(None),
        };
        Ok(Some(Self {
            legs,
            len: cli.sizes().0,
            seq: 0,
            frame: Vec::new(),
            times: Histogram::new_with_max(10_000_000_000, 3)?,
            meter: Meter::new(ports, &cli.socket),
            // It has always something to do.
            idle: Idle::new(cli.busy || neighbour.is_some(), ports, None)?,
            neighbour,
        }))
    }

    /// Sends a frame all legs; false if it did not arrive.
    fn round_trip(&mut self, ports: &mut [GuestPort], stop: &Stop) -> anyhow::Result<bool> {
        self.seq = self.seq.wrapping_add(1);
        for leg in 0..self.legs.len() {
            let Some((sender, from, to)) = self.legs.get(leg).copied() else { return Ok(false) };
            self.send(ports, &sender, from)?;
            if !self.wait(ports, to, stop)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn send(
        &mut self,
        ports: &mut [GuestPort],
        sender: &Sender,
        from: usize,
    ) -> anyhow::Result<()> {
        let Some(pair) = ports.get_mut(from).and_then(|p| p.pairs.first_mut()) else {
            return Ok(());
        };
        let Some(slot) = pair.tx.take()? else { return Ok(()) };
        sender.build(&mut self.frame, self.len as usize, 0);
        let pattern = self.frame.get(sender.pattern_at()..).unwrap_or_default();
        let (hash, room) = (hash_of_pattern(pattern), pattern.len());
        let stamp = Stamp { seq: self.seq, flow: 0, sent_ns: now_ns() };
        let bytes: [u8; STAMP] = stamp.bytes(self.len as usize, 0, hash);
        if let Some(place) = self.frame.get_mut(sender.stamp_at()..sender.pattern_at()) {
            place.copy_from_slice(&bytes);
        }
        if let (Some(tail), Some(place)) = (stamp.tail(room), self.frame.last_chunk_mut()) {
            *place = tail;
        }
        let _ = pair.tx.pool().write(slot, 0, &[0; NET_HEADER as usize]);
        let _ = pair.tx.pool().write(slot, NET_HEADER, &self.frame);
        pair.tx.send(slot, self.len)?;
        pair.tx.flush();
        self.meter.sent(from, 1, u64::from(self.len));
        Ok(())
    }

    /// Waits for the frame at port `to`.
    fn wait(&mut self, ports: &mut [GuestPort], to: usize, stop: &Stop) -> anyhow::Result<bool> {
        let until = Instant::now().checked_add(PATIENCE);
        loop {
            let now = Instant::now();
            let (mut worked, mut found) = (false, false);
            for (index, port) in ports.iter_mut().enumerate() {
                for pair in &mut port.pairs {
                    let count = pair.rx.receive(|frame| {
                        let mut head = [0; HEAD_MAX];
                        let got = frame.copy_to(&mut head);
                        match recognise(head.get(..got).unwrap_or_default()) {
                            Some(seen) if seen.stamp.seq == self.seq && index == to => {
                                self.meter.received(index, u64::from(frame.len));
                                found = true;
                            }
                            Some(_) => {}
                            None => self.meter.foreign = self.meter.foreign.wrapping_add(1),
                        }
                        Ok(())
                    })?;
                    worked |= count > 0;
                }
            }
            if found {
                self.meter.active(now);
                return Ok(true);
            }
            if stop.asked() || is_over(until, now) {
                return Ok(false);
            }
            self.wait_a_little(worked, ports, until)?;
        }
    }

    /// Waits until the next frame is due at `--rate-pps`.
    fn pause(&mut self, cli: &Cli, ports: &mut [GuestPort], begin: Instant) -> anyhow::Result<()> {
        let Some(nanos) = cli.rate_pps.and_then(|rate| 1_000_000_000u64.checked_div(rate)) else {
            return Ok(());
        };
        let due = begin.checked_add(Duration::from_nanos(nanos));
        while !is_over(due, Instant::now()) {
            self.wait_a_little(false, ports, due)?;
        }
        Ok(())
    }

    fn wait_a_little(
        &mut self,
        worked: bool,
        ports: &mut [GuestPort],
        until: Option<Instant>,
    ) -> anyhow::Result<()> {
        if let Some(neighbour) = &mut self.neighbour {
            neighbour.step()?;
        }
        self.idle.turn(worked, ports, until)
    }
}
