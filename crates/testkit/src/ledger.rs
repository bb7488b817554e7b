//! The switch's books: every counter that a test moves is declared, all others stand still.

use std::collections::BTreeMap;
use std::fmt;

use port::{DropReason, QueueTotals};
use switch::SwitchStats;

/// A counter, by names as they stand in `causeway ctl stats`.
type CounterName = String;

/// What a test says that it moved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moved {
    counters: BTreeMap<CounterName, u64>,
}

impl Moved {
    /// Nothing.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// And frames from `port` into the switch.
    #[must_use]
    pub fn rx(self, port: &str, frames: u64, bytes: u64) -> Self {
        self.add(format!("{port} rx_frames"), frames).add(format!("{port} rx_bytes"), bytes)
    }

    /// And frames out of the switch to `port`.
    #[must_use]
    pub fn tx(self, port: &str, frames: u64, bytes: u64) -> Self {
        self.add(format!("{port} tx_frames"), frames).add(format!("{port} tx_bytes"), bytes)
    }

    /// And frames that died at `port`.
    #[must_use]
    pub fn dropped(self, port: &str, reason: DropReason, frames: u64) -> Self {
        self.add(format!("{port} drops {}", reason.name()), frames)
    }

    /// And copies beyond the first of flooded frames.
    #[must_use]
    pub fn flood_copies(self, frames: u64) -> Self {
        self.add("flood_copies".into(), frames)
    }

    /// And frames of the switch's own.
    #[must_use]
    pub fn originated(self, frames: u64) -> Self {
        self.add("originated".into(), frames)
    }

    /// Segments beyond the first that frames were cut into.
    #[must_use]
    pub fn segments_added(self, segments: u64) -> Self {
        self.add("segments_added".into(), segments)
    }

    /// Frames that left as parts of others.
    #[must_use]
    pub fn merged(self, frames: u64) -> Self {
        self.add("merged".into(), frames)
    }

    fn add(mut self, name: CounterName, count: u64) -> Self {
        let place = self.counters.entry(name).or_default();
        *place = place.saturating_add(count);
        self
    }
}

/// Books that do not balance, or a counter that moved otherwise than declared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Imbalance {
    lines: Vec<String>,
}

impl fmt::Display for Imbalance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("; "))
    }
}

/// A snapshot to compare with.
#[derive(Debug, Clone)]
pub struct Ledger {
    before: BTreeMap<CounterName, u64>,
}

impl Ledger {
    /// Opens the books.
    pub fn open(stats: &SwitchStats) -> Self {
        Self { before: flatten(stats) }
    }

    /// Compares with the books of now, when all is quiet, and keeps those for the next time.
    ///
    /// # Errors
    ///
    /// [`Imbalance`] names every counter that is not what `moved` says, and the law if it does
    /// not hold.
    pub fn close(&mut self, stats: &SwitchStats, moved: &Moved) -> Result<(), Imbalance> {
        let now = flatten(stats);
        let mut lines = Vec::new();
        let zero = 0;
        let names =
            now.keys().chain(moved.counters.keys()).collect::<std::collections::BTreeSet<_>>();
        for name in names {
            let is = now.get(name).unwrap_or(&zero);
            let was = self.before.get(name).unwrap_or(&zero);
            let should = moved.counters.get(name).unwrap_or(&zero);
            let moved = is.wrapping_sub(*was);
            if moved != *should {
                lines.push(format!("{name} moved by {moved}, should by {should}"));
            }
        }
        lines.extend(Self::balance(stats).err().map(|imbalance| imbalance.to_string()));
        self.before = now;
        if lines.is_empty() { Ok(()) } else { Err(Imbalance { lines }) }
    }

    /// The law, for a switch that is quiet: `rx + flood_copies + segments_added + originated =
    /// tx + drops + merged`, and nothing is held.
    ///
    /// # Errors
    ///
    /// [`Imbalance`] with all terms.
    pub fn balance(stats: &SwitchStats) -> Result<(), Imbalance> {
        let queues = stats.ports.iter().flat_map(|port| &port.queues);
        let all = || queues.clone().chain([&stats.removed_ports]);
        let sum = |term: fn(&QueueTotals) -> u64| all().map(term).sum::<u64>();
        let (rx, tx) = (sum(|q| q.rx_frames), sum(|q| q.tx_frames));
        let drops = sum(QueueTotals::dropped);
        let began = rx.wrapping_add(stats.flood_copies).wrapping_add(stats.originated);
        let began = began.wrapping_add(stats.segments_added);
        let ended = tx.wrapping_add(drops).wrapping_add(stats.merged);
        if began == ended && stats.held == 0 {
            return Ok(());
        }
        let line = format!(
            "rx {rx} + flood_copies {} + segments_added {} + originated {} is not tx {tx} + drops \
             {drops} + merged {} (held {})",
            stats.flood_copies, stats.segments_added, stats.originated, stats.merged, stats.held
        );
        Err(Imbalance { lines: vec![line] })
    }
}

fn flatten(stats: &SwitchStats) -> BTreeMap<CounterName, u64> {
    let mut all = BTreeMap::new();
    for port in &stats.ports {
        for queue in &port.queues {
            add_queue(&mut all, &port.name, queue);
        }
    }
    add_queue(&mut all, "(removed)", &stats.removed_ports);
    let _ = all.insert("flood_copies".into(), stats.flood_copies);
    let _ = all.insert("originated".into(), stats.originated);
    let _ = all.insert("segments_added".into(), stats.segments_added);
    let _ = all.insert("merged".into(), stats.merged);
    all
}

fn add_queue(all: &mut BTreeMap<CounterName, u64>, port: &str, queue: &QueueTotals) {
    let named = [
        ("rx_frames", queue.rx_frames),
        ("rx_bytes", queue.rx_bytes),
        ("tx_frames", queue.tx_frames),
        ("tx_bytes", queue.tx_bytes),
    ];
    let drops = DropReason::ALL.iter().zip(queue.drops);
    let drops = drops.map(|(reason, count)| (format!("drops {}", reason.name()), count));
    for (name, count) in named.into_iter().map(|(n, c)| (n.to_owned(), c)).chain(drops) {
        let place = all.entry(format!("{port} {name}")).or_default();
        *place = place.wrapping_add(count);
    }
}
