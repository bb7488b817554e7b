//! Frames that go round between two ports of a guest, through a back end: one run.
//!
//! The guest is DPDK's testpmd with two virtio-user ports on CPU 1.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use conformance::{Environment, Scratch, VirtioUser};
use serde::{Deserialize, Serialize};

use super::back_end::{BackEnd, Setup, Top, sockets};
use super::case::Case;
use super::machine::Versions;
use super::regime::{Regime, round_trip_ns};
use super::summary::{Sample, median};
use super::turn::Measured;
use super::watch::{SpentPerFrame, Watch};

const WARM_UP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(1);
const LOOKS: u32 = 3;

/// One run of one back end.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    pub(crate) case: String,
    /// The back end, or how it was set up.
    pub(crate) subject: String,
    pub(crate) regime: Regime,
    pub(crate) before_ns: f64,
    pub(crate) after_ns: f64,
    /// The share of the time for which the guest or the back end, whichever did longer, waited
    /// for its CPU.
    pub(crate) waited: f64,
    /// The share of the time for which the host had one of their CPUs.
    pub(crate) stolen: f64,
    /// Frames per second that a port of the guest receives, in millions: the median of the looks.
    pub(crate) mpps: f64,
    pub(crate) looks: Vec<f64>,
    pub(crate) cycles_per_frame: Option<f64>,
    pub(crate) guest_cycles_per_frame: Option<f64>,
    pub(crate) busy_ratio: Option<f64>,
    /// Frames that the back end dropped while frames went round.
    pub(crate) dropped: u64,
    /// Frames that the guest could not send on, or missed.
    pub(crate) guest_dropped: u64,
    /// Where the back end's time went, if that was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) spent: Option<SpentPerFrame>,
}

/// Lets the frames of `case` go round through a back end that is called `subject`.
pub(crate) fn measure(
    environment: &Environment,
    setup: &Setup,
    (subject, case): (&str, Case),
    versions: &mut Versions,
) -> Result<Run> {
    let mut scratch = Scratch::new("round")?;
    match measure_in(environment, setup, case, &scratch) {
        Ok((run, dpdk)) => {
            versions.dpdk = versions.dpdk.take().or(dpdk);
            Ok(Run { subject: subject.to_owned(), ..run })
        }
        Err(error) => Err(error.context(format!("logs in {}", scratch.keep().display()))),
    }
}

fn measure_in(
    environment: &Environment,
    setup: &Setup,
    case: Case,
    scratch: &Scratch,
) -> Result<(Run, Option<String>)> {
    let mut back_end = BackEnd::start(setup, environment, scratch)?;
    let spec = case.guest(sockets(scratch).into(), setup.subject.guest_listens());
    let mut guest = VirtioUser::start(environment, &spec, scratch.folder())?;
    guest.wait_up()?;
    back_end.wait_connected()?;
    let before_ns = round_trip_ns()?;
    back_end.begin()?;
    guest.circulate(case.size.into(), case.bursts())?;
    sleep(WARM_UP);
    // The first look has the start in it.
    let _ = guest.rates()?;
    let watch = Watch::start(&[guest.id(), back_end.id()])?;
    let (looks, top) = look(&mut guest, &back_end)?;
    let disturbance = watch.finish();
    let said = guest.stop_forwarding()?;
    let after_ns = round_trip_ns()?;
    let account = back_end.account(top.as_ref(), said.cycles.map(|cycles| cycles.mhz))?;
    let dpdk = guest.version()?;
    guest.quit()?;
    back_end.stop()?;
    let regime = Regime::of_run(before_ns, after_ns)
        .unless_disturbed(disturbance.share())
        .unless_starved(account.dropped.saturating_add(said.dropped));
    let run = Run {
        case: case.name(),
        subject: String::new(),
        regime,
        before_ns: before_ns.round(),
        after_ns: after_ns.round(),
        waited: disturbance.waited,
        stolen: disturbance.stolen,
        mpps: median(&looks).filter(|mpps| *mpps > 0.0).context("no frames came back")?,
        looks,
        cycles_per_frame: account.cycles_per_frame,
        guest_cycles_per_frame: said.cycles.map(|cycles| cycles.per_frame),
        busy_ratio: account.busy_ratio,
        dropped: account.dropped,
        guest_dropped: said.dropped,
        spent: None,
    };
    Ok((run, dpdk))
}

/// The guest's rates while the frames go round, the mean of its ports in millions, and what the
/// switch's worker did meanwhile.
fn look(guest: &mut VirtioUser, back_end: &BackEnd) -> Result<(Vec<f64>, Option<Top>)> {
    std::thread::scope(|scope| {
        let top = scope.spawn(|| back_end.top(LOOK.saturating_mul(LOOKS)));
        let mut looks = Vec::new();
        for _ in 0..LOOKS {
            sleep(LOOK);
            looks.push(mean_in_millions(&guest.rates()?));
        }
        let top = top.join().map_err(|_| anyhow!("the look at the switch panicked"))??;
        Ok((looks, top))
    })
}

#[expect(clippy::cast_precision_loss, reason = "rates are far below 2^52")]
fn mean_in_millions(rates: &[u64]) -> f64 {
    let sum: u64 = rates.iter().sum();
    sum as f64 / rates.len().max(1) as f64 / 1e6
}

impl Measured for Run {
    fn regime(&self) -> Regime {
        self.regime
    }

    fn line(&self) -> String {
        let cycles = |cycles: Option<f64>| cycles.map_or_else(|| "-".into(), |c| format!("{c:.0}"));
        let mut line = format!(
            "{:.2} Mpps, {} ({:.0}/{:.0} ns, waited {:.1} %, stolen {:.1} %), {} cycles a frame, \
             the guest {}",
            self.mpps,
            self.regime.name(),
            self.before_ns,
            self.after_ns,
            100.0 * self.waited,
            100.0 * self.stolen,
            cycles(self.cycles_per_frame),
            cycles(self.guest_cycles_per_frame),
        );
        for (who, dropped) in [("", self.dropped), (" by the guest", self.guest_dropped)] {
            if dropped > 0 {
                line.push_str(&format!(", {dropped} frames dropped{who}"));
            }
        }
        line
    }
}

impl Run {
    pub(crate) fn sample(&self) -> Sample {
        Sample {
            case: self.case.clone(),
            regime: self.regime,
            subject: self.subject.clone(),
            value: self.mpps,
            cycles: self.cycles_per_frame,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_per_port() {
        assert!((mean_in_millions(&[15_000_000, 14_000_000]) - 14.5).abs() < 1e-9);
        assert!(mean_in_millions(&[]).abs() < 1e-9);
    }
}
