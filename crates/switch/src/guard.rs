//! What a port may send into the switch: how much, how many floods, and under which addresses.
//!
//! ```text
//!  before a burst:   rate ──► frames may be taken, so many │ or the queue rests until then
//!  of each frame:    sources ──► its own addresses         │ or it is dropped as `spoofed`
//!  before a flood:   storm ──► passes                      │ or it is dropped as `storm`
//! ```
//!
//! **A rate loses nothing.** Frames beyond it stay where they are: in a guest's ring its driver
//! sees a full queue and waits, in an uplink the kernel's queue fills. The queue is not looked at
//! meanwhile, and its kicks stay suppressed, so that it costs nothing.
//!
//! **Units.** Bytes of frames without checksum, preamble and virtio-net header; a large frame
//! counts as it is sent, unsegmented. The ports of a guest with several pairs share one rate.

mod sources;

use packet::MacAddr;
use port::capture::Fates;
use port::{BURST_MAX, Batch, DropReason, QueueCounters};

pub use sources::Sources;

use crate::table::ShortLock;

const SECOND_NS: u64 = 1_000_000_000;
/// A queue that used its rate up rests at least so long, if the burst bears it: that it takes
/// several frames then.
const REST_NS: u64 = 500_000;

/// A rate and how far it may be exceeded for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units per second, at least 1.
    pub per_second: u64,
    /// Units that may come at once after a pause, at least 1.
    pub burst: u64,
}

/// What a port may send into the switch; everything, if nothing is given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortLimits {
    /// Bytes.
    pub bytes: Option<Rate>,
    /// Frames.
    pub frames: Option<Rate>,
    /// Frames to groups and to stations that nobody knows: those that are flooded.
    pub storm: Option<Rate>,
    /// Addresses under which it may send.
    pub sources: Option<Sources>,
}

/// Bits of [`Bucket::unit`] behind the point.
const POINT: u32 = 32;

/// A rate in use: when all that was sent so far would be over at that rate.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: u64,
    /// Nanoseconds of a unit, a fixed-point number: nothing is divided on the way of frames.
    unit: u64,
    /// The burst as time.
    tolerance_ns: u64,
    over_ns: u64,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        let per_second = rate.per_second.max(1);
        // At least one a second: it fits in.
        let unit = (SECOND_NS << POINT).div_euclid(per_second);
        let mut bucket = Self { per_second, unit, tolerance_ns: 0, over_ns: 0 };
        // Rounded up, so that the burst fits in.
        bucket.tolerance_ns = bucket.time(rate.burst).saturating_add(1);
        bucket
    }

    /// How long so many units take.
    fn time(&self, units: u64) -> u64 {
        let product = u128::from(units).saturating_mul(u128::from(self.unit));
        u64::try_from(product >> POINT).unwrap_or(u64::MAX)
    }

    /// For how long frames may come at once now.
    fn left_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_add(self.tolerance_ns).saturating_sub(self.over_ns.max(now_ns))
    }

    /// Whether more than so many units may come now: quicker to tell than how many.
    fn has_more_than(&self, units: u64, now_ns: u64) -> bool {
        self.left_ns(now_ns) > self.time(units)
    }

    /// Units that may come now.
    fn credit(&self, now_ns: u64) -> u64 {
        let product = u128::from(self.left_ns(now_ns)).saturating_mul(u128::from(self.per_second));
        u64::try_from(product.div_euclid(u128::from(SECOND_NS))).unwrap_or(u64::MAX)
    }

    /// Takes units off the credit; they may be more than there are.
    fn spend(&mut self, now_ns: u64, units: u64) {
        self.over_ns = self.over_ns.max(now_ns).saturating_add(self.time(units));
    }

    /// What was sent beyond the rate and is not over yet, as time.
    fn debt_ns(&self, now_ns: u64) -> u64 {
        self.over_ns.saturating_sub(now_ns)
    }

    /// Goes on with what another bucket had sent. At another rate that is as long, but not more
    /// than what empties this one.
    fn owe(&mut self, now_ns: u64, debt_ns: u64) {
        let most = self.tolerance_ns.saturating_add(REST_NS);
        self.over_ns = self.over_ns.max(now_ns.saturating_add(debt_ns.min(most)));
    }

    /// When there is credit again, and a little more.
    fn ready_ns(&self) -> u64 {
        let unit = self.time(1).saturating_add(1);
        let rest = REST_NS.min(self.tolerance_ns / 2).max(unit);
        self.over_ns.saturating_sub(self.tolerance_ns).saturating_add(rest)
    }
}

/// The rates of a port, over all its queues.
#[derive(Debug)]
struct Pace {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

/// How much of its limits a port has used up, as time in which it would not have sent: for another
/// switch that goes on with the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortDebt {
    /// In bytes.
    pub bytes_ns: u64,
    /// In frames.
    pub frames_ns: u64,
    /// In floods.
    pub storm_ns: u64,
}

/// The limits of a port in use.
#[derive(Debug)]
pub(crate) struct Guard {
    pace: Option<ShortLock<Pace>>,
    storm: Option<ShortLock<Bucket>>,
    sources: Option<Sources>,
}

impl Guard {
    /// None, if there is nothing to guard.
    pub(crate) fn new(limits: &PortLimits) -> Option<Self> {
        if *limits == PortLimits::default() {
            return None;
        }
        let bucket = |rate: Option<Rate>| rate.map(Bucket::new);
        let pace = Pace { bytes: bucket(limits.bytes), frames: bucket(limits.frames) };
        let paced = pace.bytes.is_some() || pace.frames.is_some();
        Some(Self {
            pace: paced.then(|| ShortLock::new(pace)),
            storm: bucket(limits.storm).map(ShortLock::new),
            sources: limits.sources.clone(),
        })
    }

    /// What is used up.
    pub(crate) fn debt(&self, now_ns: u64) -> PortDebt {
        let of = |bucket: &Bucket| bucket.debt_ns(now_ns);
        let pace = self.pace.as_ref().map(|pace| {
            let pace = pace.lock();
            [&pace.bytes, &pace.frames].map(|bucket| bucket.as_ref().map_or(0, of))
        });
        let [bytes_ns, frames_ns] = pace.unwrap_or_default();
        let storm_ns = self.storm.as_ref().map_or(0, |storm| of(&storm.lock()));
        PortDebt { bytes_ns, frames_ns, storm_ns }
    }

    /// Goes on with what was used up elsewhere.
    pub(crate) fn owe(&self, now_ns: u64, debt: &PortDebt) {
        if let Some(pace) = &self.pace {
            let mut pace = pace.lock();
            if let Some(bucket) = &mut pace.bytes {
                bucket.owe(now_ns, debt.bytes_ns);
            }
            if let Some(bucket) = &mut pace.frames {
                bucket.owe(now_ns, debt.frames_ns);
            }
        }
        if let Some(storm) = &self.storm {
            storm.lock().owe(now_ns, debt.storm_ns);
        }
    }

    /// Whether a queue may take a whole burst now. The time may be past, as a worker's clock is:
    /// then there is less credit than there would be.
    #[inline]
    pub(crate) fn admits_all(&self, now_ns: u64) -> bool {
        let Some(pace) = &self.pace else { return true };
        let pace = pace.lock();
        pace.frames.is_none_or(|frames| frames.has_more_than(BURST_MAX as u64, now_ns))
            && pace.bytes.is_none_or(|bytes| bytes.has_more_than(1, now_ns))
    }

    /// How many frames a queue may take now.
    ///
    /// # Errors
    ///
    /// None: when it may be asked again.
    #[cold]
    pub(crate) fn admit(&self, now_ns: u64) -> Result<usize, u64> {
        let Some(pace) = &self.pace else { return Ok(BURST_MAX) };
        let pace = pace.lock();
        let buckets = [pace.bytes, pace.frames];
        let empty = buckets.iter().flatten().filter(|bucket| bucket.credit(now_ns) == 0);
        if let Some(ready_ns) = empty.map(Bucket::ready_ns).max() {
            return Err(ready_ns.max(now_ns.saturating_add(1)));
        }
        let most = pace.frames.map_or(u64::MAX, |frames| frames.credit(now_ns));
        Ok(usize::try_from(most).unwrap_or(BURST_MAX).min(BURST_MAX))
    }

    /// Notes what was taken.
    #[inline]
    pub(crate) fn spend(&self, now_ns: u64, frames: u64, bytes: u64) {
        let Some(pace) = &self.pace else { return };
        let mut pace = pace.lock();
        if let Some(bucket) = &mut pace.frames {
            bucket.spend(now_ns, frames);
        }
        if let Some(bucket) = &mut pace.bytes {
            bucket.spend(now_ns, bytes);
        }
    }

    /// Whether one more frame may be flooded.
    pub(crate) fn may_flood(&self, now_ns: u64) -> bool {
        let Some(storm) = &self.storm else { return true };
        let mut storm = storm.lock();
        let may = storm.credit(now_ns) > 0;
        if may {
            storm.spend(now_ns, 1);
        }
        may
    }

    /// Whether a station with this address may be behind the port.
    pub(crate) fn is_source(&self, mac: MacAddr) -> bool {
        self.sources.as_ref().is_none_or(|sources| sources.mac == mac)
    }

    /// Takes the frames out of `batch` that claim to come from somebody else.
    pub(crate) fn check_sources(
        &self,
        batch: &mut Batch<'_>,
        counters: &QueueCounters,
        fates: Option<&Fates>,
    ) {
        let Some(sources) = &self.sources else { return };
        let all = |frame: &port::Frame| sources.allow(frame.head());
        if batch.frames().iter().all(all) {
            return;
        }
        let mut spoofed = 0u64;
        let mut kept = [0u8; BURST_MAX];
        let mut places = kept.iter_mut();
        batch.retain(|index, frame| {
            let keep = sources.allow(frame.head());
            if keep {
                if let Some(place) = places.next() {
                    *place = u8::try_from(index).unwrap_or(u8::MAX);
                }
            } else {
                spoofed = spoofed.wrapping_add(1);
                if let Some(fates) = fates {
                    fates.dropped(index, DropReason::Spoofed);
                }
            }
            keep
        });
        counters.ingress.dropped(DropReason::Spoofed, spoofed);
        if let Some(fates) = fates {
            fates.moved(kept.get(..batch.len()).unwrap_or_default());
        }
    }
}

impl Sources {
    /// This station and no other, with any IP address if `addresses` is empty.
    pub fn new(mac: MacAddr, addresses: impl IntoIterator<Item = std::net::IpAddr>) -> Self {
        Self { mac, addresses: addresses.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests;
