//! What must be as before when everything has happened.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::{Process, Switch};
use serde_json::Value;

/// How long the switch may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most frames of a burst of the switch.
const BURST: u64 = 64;
/// What the allocator may keep of what was freed.
const GROWTH_KIB: u64 = 64 * 1024;

/// What a process has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Footprint {
    /// By kind.
    fds: BTreeMap<String, usize>,
    threads: usize,
    resident_kib: u64,
}

impl Footprint {
    pub(super) fn of(id: u32) -> Result<Self> {
        let mut fds = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{id}/fd"))?.flatten() {
            // One that was closed meanwhile has no name any more.
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy();
            // Logs have other names in each process.
            let kind = match target.split_once(":[") {
                Some(("anon_inode", what)) => what,
                Some((kind, _)) => kind,
                None if target.ends_with(".log") => "log",
                None => &*target,
            };
            let kind = kind.to_owned();
            let count: &mut usize = fds.entry(kind).or_default();
            *count = count.saturating_add(1);
        }
        let threads = std::fs::read_dir(format!("/proc/{id}/task"))?.count();
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        let resident_kib = number.context("no VmRSS in /proc")?;
        Ok(Self { fds, threads, resident_kib })
    }

    /// Kinds of which `now` has more open, with the numbers of both.
    fn more(&self, now: &Self) -> Vec<(String, usize, usize)> {
        // The first fd that is refused for its kind makes a stand-in, an epoll set, for good.
        let had = |kind: &String| {
            let once = usize::from(kind.starts_with("eventpoll"));
            self.fds.get(kind).copied().unwrap_or(0).saturating_add(once)
        };
        let more = now.fds.iter().filter(|(kind, count)| **count > had(kind));
        more.map(|(kind, count)| (kind.clone(), had(kind), *count)).collect()
    }

    /// Waits until the switch has no more than at first.
    pub(super) fn again(&self, switch: &Switch) -> Result<Self> {
        let start = Instant::now();
        loop {
            let now = Self::of(switch.id())?;
            let more = self.more(&now);
            if more.is_empty() && now.threads <= self.threads {
                let limit = self.resident_kib.saturating_add(GROWTH_KIB);
                ensure!(now.resident_kib <= limit, "memory grew: {now}, at first {self}");
                return Ok(now);
            }
            ensure!(start.elapsed() < PATIENCE, "more is open: {more:?}; {now}, at first {self}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fds: usize = self.fds.values().sum();
        write!(f, "{fds} fds, {} threads, {} KiB", self.threads, self.resident_kib)
    }
}

/// The good pair's frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Totals {
    pub(super) sent: u64,
    pub(super) got: u64,
    /// Lost, duplicated, corrupt, out of order.
    wrong: [u64; 4],
}

impl Totals {
    pub(super) fn of(sender: &Value, receiver: &Value) -> Result<Self> {
        let number = |value: &Value, key: &str| {
            value.get(key).and_then(Value::as_u64).with_context(|| format!("no {key} in {value}"))
        };
        let keys = ["lost", "duplicated", "corrupt", "out_of_order"];
        let mut wrong = [0; 4];
        for (count, key) in wrong.iter_mut().zip(keys) {
            *count = number(receiver, key)?;
        }
        Ok(Self { sent: number(sender, "tx_frames")?, got: number(receiver, "rx_frames")?, wrong })
    }

    /// A crash costs at most a burst at each queue, and changes none; nothing else costs any.
    pub(super) fn check(&self, crashes: u32) -> Result<()> {
        let most = BURST.saturating_mul(u64::from(crashes));
        let [lost, repeated, changed, overtaken] = self.wrong;
        let missing = self.sent.saturating_sub(self.got.saturating_sub(repeated)).max(lost);
        let fair = missing <= most.saturating_mul(2) && repeated <= most && overtaken <= most;
        ensure!(
            fair && changed == 0 && self.sent > 0,
            "of the good pair's {} frames {} came with {crashes} crashes; lost, repeated, changed, \
             overtaken: {:?}",
            self.sent,
            self.got,
            self.wrong
        );
        Ok(())
    }
}

/// What a guest printed at its end.
pub(super) fn said(process: &Process) -> Result<Value> {
    let text = process.output_from(0)?;
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("no totals\n{}", process.tail()))?;
    serde_json::from_str(line).with_context(|| format!("{line} is no JSON"))
}

#[cfg(test)]
mod tests {
    use super::Totals;

    #[test]
    fn a_crash_costs_a_burst_and_nothing_else_does() {
        let totals = |sent, got, wrong| Totals { sent, got, wrong };
        assert!(totals(100, 100, [0; 4]).check(0).is_ok());
        assert!(totals(0, 0, [0; 4]).check(0).is_err());
        assert!(totals(100, 99, [1, 0, 0, 0]).check(0).is_err());
        // Also those at the end, which nobody misses.
        assert!(totals(100, 99, [0; 4]).check(0).is_err());
        assert!(totals(1000, 872, [128, 0, 0, 0]).check(1).is_ok());
        assert!(totals(1000, 871, [129, 0, 0, 0]).check(1).is_err());
        assert!(totals(1000, 1064, [0, 64, 0, 0]).check(1).is_ok());
        assert!(totals(1000, 1065, [0, 65, 0, 0]).check(1).is_err());
        assert!(totals(1000, 999, [1, 0, 1, 0]).check(1).is_err());
        // What came twice hides nothing that did not come.
        assert!(totals(1000, 900, [100, 64, 0, 0]).check(1).is_err());
    }
}
