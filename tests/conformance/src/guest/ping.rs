//! Pings, counted by the guest's kernel.
//!
//! Busybox's ping has a receive buffer for a handful of answers: of those that come at once, after
//! the guest or its peer stood still for half a second, it misses the rest. The kernel counts them
//! before that. What ping shows serves for how long answers took.

use std::time::Duration;

use anyhow::{Context, Result};

use super::Guest;

/// For answers that come after ping has ended.
const LOOKS: u32 = 20;
const LOOK: Duration = Duration::from_millis(100);

/// What became of pings.
#[derive(Clone, Debug)]
pub struct Pings {
    /// Not answered.
    pub lost: u32,
    /// Milliseconds until answers that ping has seen, sorted.
    pub times_ms: Vec<f64>,
}

impl Pings {
    /// The time within which this part of the answers came.
    #[must_use]
    pub fn quantile_ms(&self, percent: usize) -> f64 {
        let last = self.times_ms.len().saturating_sub(1);
        let at = self.times_ms.len().saturating_mul(percent).checked_div(100).unwrap_or(0);
        self.times_ms.get(at.min(last)).copied().unwrap_or(f64::NAN)
    }
}

impl Guest {
    /// Sends `count` pings `interval_ms` apart and returns how many were lost.
    ///
    /// # Errors
    /// The guest does not say so.
    pub fn ping(&mut self, address: &str, count: u32, interval_ms: u32) -> Result<u32> {
        Ok(self.pings(address, count, interval_ms)?.lost)
    }

    /// The same, and how long the answers took.
    ///
    /// # Errors
    /// As [`Self::ping`].
    pub fn pings(&mut self, address: &str, count: u32, interval_ms: u32) -> Result<Pings> {
        let seconds = f64::from(interval_ms) / 1000.0;
        let before = self.echo_replies()?;
        // It fails when an answer is missing, which is for the caller to judge.
        let line = format!("ping -c {count} -i {seconds} -W 2 {address} || true");
        let shown = self.run(&line)?;
        // Answers that came twice are answers to one.
        let twice = shown.lines().filter(|line| line.contains("DUP!")).count();
        let wanted = u64::from(count).saturating_add(twice as u64).saturating_add(before);
        let mut now = self.echo_replies()?;
        for _ in 0..LOOKS {
            if now < wanted {
                std::thread::sleep(LOOK);
                now = self.echo_replies()?;
            }
        }
        let lost = u32::try_from(wanted.saturating_sub(now)).unwrap_or(u32::MAX);
        let time = |line: &str| line.split("time=").nth(1)?.split(' ').next()?.parse().ok();
        let mut times_ms: Vec<f64> = shown.lines().filter_map(time).collect();
        times_ms.sort_by(f64::total_cmp);
        Ok(Pings { lost: lost.min(count), times_ms })
    }

    /// Answers to pings that the guest's kernel has received.
    fn echo_replies(&mut self) -> Result<u64> {
        let shown = self.run("grep Icmp: /proc/net/snmp")?;
        let mut lines = shown.lines().map(str::split_whitespace);
        let (names, values) = (lines.next().context("no names")?, lines.next().context("none")?);
        let found = names.zip(values).find(|(name, _)| *name == "InEchoReps");
        let count = found.and_then(|(_, value)| value.parse().ok());
        count.with_context(|| format!("the guest says: {shown}"))
    }
}
