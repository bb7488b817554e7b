//! What happened, as a table or as JSON.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::port::{Agreed, GuestPort};
use crate::tracker::Losses;

/// What one port did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PortTotals {
    pub(crate) socket: String,
    pub(crate) mac: String,
    pub(crate) tx_frames: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_frames: u64,
    pub(crate) rx_bytes: u64,
}

/// Times in nanoseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Latency {
    samples: u64,
    min_ns: u64,
    mean_ns: u64,
    p50_ns: u64,
    p99_ns: u64,
    p99_9_ns: u64,
    max_ns: u64,
}

/// The result of a run. What was not looked at is null.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Totals {
    pub(crate) tx_frames: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_frames: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) lost: Option<u64>,
    pub(crate) out_of_order: Option<u64>,
    pub(crate) duplicated: Option<u64>,
    pub(crate) corrupt: Option<u64>,
    /// Frames that are no test frames.
    pub(crate) foreign: u64,
    /// Frames that we could not send: too large, or more at once than the ring holds.
    pub(crate) dropped: u64,
    /// From the first frame to the last; without two moments of traffic the whole job's time.
    pub(crate) seconds: f64,
    pub(crate) tx_pps: f64,
    pub(crate) rx_pps: f64,
    pub(crate) kicks: u64,
    pub(crate) calls: u64,
    pub(crate) latency: Option<Latency>,
    /// Frames per second that arrived at the neighbour's second port.
    pub(crate) neighbour_pps: Option<f64>,
    pub(crate) features: Agreed,
    pub(crate) ports: Vec<PortTotals>,
}

/// Counts while a run goes on.
#[derive(Debug)]
pub(crate) struct Meter {
    pub(crate) ports: Vec<PortTotals>,
    pub(crate) foreign: u64,
    pub(crate) dropped: u64,
    pub(crate) corrupt: u64,
    begin: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Meter {
    pub(crate) fn new(ports: &[GuestPort], sockets: &[std::path::PathBuf]) -> Self {
        let totals = ports.iter().zip(sockets).map(|(port, path)| PortTotals {
            socket: path.display().to_string(),
            mac: port.mac.to_string(),
            tx_frames: 0,
            tx_bytes: 0,
            rx_frames: 0,
            rx_bytes: 0,
        });
        let ports = totals.collect();
        let begin = Instant::now();
        Self { ports, foreign: 0, dropped: 0, corrupt: 0, begin, first: None, last: None }
    }

    /// Notes that frames moved at `now`.
    pub(crate) fn active(&mut self, now: Instant) {
        let _ = self.first.get_or_insert(now);
        self.last = Some(now);
    }

    #[inline]
    pub(crate) fn sent(&mut self, port: usize, frames: u64, bytes: u64) {
        if let Some(port) = self.ports.get_mut(port) {
            port.tx_frames = port.tx_frames.wrapping_add(frames);
            port.tx_bytes = port.tx_bytes.wrapping_add(bytes);
        }
    }

    #[inline]
    pub(crate) fn received(&mut self, port: usize, bytes: u64) {
        if let Some(port) = self.ports.get_mut(port) {
            port.rx_frames = port.rx_frames.wrapping_add(1);
            port.rx_bytes = port.rx_bytes.wrapping_add(bytes);
        }
    }

    /// Frames that arrived at all ports.
    pub(crate) fn rx_frames(&self) -> u64 {
        self.ports.iter().map(|p| p.rx_frames).sum()
    }

    /// Frames that all ports sent.
    pub(crate) fn tx_frames(&self) -> u64 {
        self.ports.iter().map(|p| p.tx_frames).sum()
    }

    fn duration(&self, now: Instant) -> Duration {
        match (self.first, self.last) {
            (Some(first), Some(last)) if last > first => last.duration_since(first),
            _ => now.duration_since(self.begin),
        }
    }

    /// The result.
    pub(crate) fn totals(self, ports: &[GuestPort], calls: u64) -> Option<Totals> {
        let seconds = self.duration(Instant::now()).as_secs_f64();
        let per_second = |frames: u64| if seconds > 0.0 { to_f64(frames) / seconds } else { 0.0 };
        let (tx_frames, rx_frames) = (self.tx_frames(), self.rx_frames());
        let pairs = ports.iter().flat_map(|p| &p.pairs);
        Some(Totals {
            tx_frames,
            tx_bytes: self.ports.iter().map(|p| p.tx_bytes).sum(),
            rx_frames,
            rx_bytes: self.ports.iter().map(|p| p.rx_bytes).sum(),
            lost: None,
            out_of_order: None,
            duplicated: None,
            corrupt: None,
            foreign: self.foreign,
            dropped: self.dropped,
            seconds,
            tx_pps: per_second(tx_frames).round(),
            rx_pps: per_second(rx_frames).round(),
            kicks: pairs.map(|p| p.rx.kicks().wrapping_add(p.tx.kicks())).sum(),
            calls,
            latency: None,
            neighbour_pps: None,
            features: ports.first()?.features,
            ports: self.ports,
        })
    }
}

impl Latency {
    /// None without samples.
    pub(crate) fn from_histogram(times: &Histogram<u64>) -> Option<Self> {
        let at = |quantile| times.value_at_quantile(quantile);
        (!times.is_empty()).then(|| Self {
            samples: times.len(),
            min_ns: times.min(),
            mean_ns: from_f64(times.mean()),
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            p99_9_ns: at(0.999),
            max_ns: times.max(),
        })
    }
}

impl Totals {
    /// Adds what a tracker found.
    pub(crate) fn with_losses(self, losses: Losses) -> Self {
        Self {
            lost: Some(losses.lost),
            out_of_order: Some(losses.out_of_order),
            duplicated: Some(losses.duplicated),
            ..self
        }
    }

    /// What is wrong, if anything: for `--verify`.
    pub(crate) fn complaint(&self) -> Option<String> {
        if self.rx_frames == 0 {
            return Some("no test frame arrived".into());
        }
        let counts = [
            ("lost", self.lost),
            ("out of order", self.out_of_order),
            ("duplicated", self.duplicated),
            ("corrupt", self.corrupt),
        ];
        let wrong = counts
            .iter()
            .filter_map(|(name, count)| count.filter(|n| *n > 0).map(|n| format!("{n} {name}")));
        let wrong: Vec<_> = wrong.collect();
        (!wrong.is_empty()).then(|| format!("frames are wrong: {}", wrong.join(", ")))
    }

    /// The table for people.
    pub(crate) fn table(&self) -> String {
        let number = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let mut rows = vec![
            ("tx frames", self.tx_frames.to_string()),
            ("tx bytes", self.tx_bytes.to_string()),
            ("rx frames", self.rx_frames.to_string()),
            ("rx bytes", self.rx_bytes.to_string()),
            ("lost", number(self.lost)),
            ("out of order", number(self.out_of_order)),
            ("duplicated", number(self.duplicated)),
            ("corrupt", number(self.corrupt)),
            ("foreign", self.foreign.to_string()),
            ("dropped", self.dropped.to_string()),
            ("seconds", format!("{:.3}", self.seconds)),
            ("tx frames/s", format!("{:.0}", self.tx_pps)),
            ("rx frames/s", format!("{:.0}", self.rx_pps)),
            ("kicks", self.kicks.to_string()),
            ("calls", self.calls.to_string()),
        ];
        if let Some(times) = &self.latency {
            let us = |ns: u64| format!("{:.1} us", to_f64(ns) / 1000.0);
            rows.push(("latency p50", us(times.p50_ns)));
            rows.push(("latency p99", us(times.p99_ns)));
            rows.push(("latency p99.9", us(times.p99_9_ns)));
            rows.push(("latency max", us(times.max_ns)));
        }
        let lines = rows.iter().map(|(name, value)| format!("{name:<14}{value:>16}\n"));
        lines.collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a mean of u64 values")]
fn from_f64(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hdrhistogram::Histogram;

    use super::{Agreed, Latency, Meter, Totals};

    fn totals() -> Totals {
        let off = Agreed {
            packed: false,
            mrg_rxbuf: false,
            event_idx: false,
            indirect: false,
            in_order: false,
            offloads: crate::offloads::Offloads::default(),
        };
        Totals {
            tx_frames: 10,
            tx_bytes: 640,
            rx_frames: 9,
            rx_bytes: 576,
            lost: None,
            out_of_order: None,
            duplicated: None,
            corrupt: None,
            foreign: 0,
            dropped: 0,
            seconds: 0.5,
            tx_pps: 20.0,
            rx_pps: 18.0,
            kicks: 0,
            calls: 0,
            latency: None,
            neighbour_pps: None,
            features: off,
            ports: Vec::new(),
        }
    }

    #[test]
    fn a_complaint_names_what_is_wrong() {
        assert_eq!(totals().complaint(), None);
        let wrong = Totals { lost: Some(1), corrupt: Some(2), out_of_order: Some(0), ..totals() };
        assert_eq!(wrong.complaint().unwrap(), "frames are wrong: 1 lost, 2 corrupt");
        let silent = Totals { rx_frames: 0, lost: Some(0), ..totals() };
        assert_eq!(silent.complaint().unwrap(), "no test frame arrived");
    }

    #[test]
    fn a_job_without_traffic_lasts_as_long_as_it_ran() {
        let mut meter = Meter::new(&[], &[]);
        let at = |seconds| meter.begin + Duration::from_secs(seconds);
        let (first, last, now) = (at(1), at(3), at(9));
        assert_eq!(meter.duration(now), Duration::from_secs(9));
        meter.active(first);
        assert_eq!(meter.duration(now), Duration::from_secs(9));
        meter.active(last);
        assert_eq!(meter.duration(now), Duration::from_secs(2));
    }

    #[test]
    fn json_has_the_fields_of_the_contract() {
        let mut times = Histogram::<u64>::new(3).unwrap();
        times.record(1000).unwrap();
        let totals = Totals { latency: Latency::from_histogram(&times), ..totals() };
        let json = serde_json::to_value(&totals).unwrap();
        for key in [
            "tx_frames",
            "tx_bytes",
            "rx_frames",
            "rx_bytes",
            "lost",
            "out_of_order",
            "corrupt",
            "seconds",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["latency"]["p99_9_ns"], 1000);
        assert!(json["lost"].is_null());
        assert!(totals.table().contains("p99.9"));
    }
}
