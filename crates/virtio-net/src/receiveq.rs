//! A guest's receiveq: where the switch's frames go, with the one copy of their bodies.
//!
//! ```text
//!  pop as many chains as frames ─► header │ head from the private copy │ body from the sender
//!                               ─► used entries ─► publish once;  what was not used: unpop
//! ```
//!
//! **Trust.** The source of a body is another guest, the destination this one: both hostile, only
//! copied. The head is private.
//! **Offloads.** What the driver does not take is adapted; a large frame for which there is no room
//! in one piece is cut, and as many of its segments are delivered as find some.
//! **Limits.** With `MRG_RXBUF` a frame takes as many buffers as it needs, all or nothing; without
//! it one buffer, or it is dropped as `too_large`. A buffer that cannot hold the header breaks the
//! specification and goes back with nothing written. Kicks stay suppressed. Who sends pays for
//! what is looked at here: when that were [`PIECES_MAX`] pieces, what is left of the burst is
//! dropped as `no_buffer`.
//! No room: the ring is looked at again [`QueueOptions::retries`] times per burst, then frames are
//! dropped as `no_buffer`; a guest that gave nothing in the last burst gets no second look. Behind
//! a vIOMMU frames wait for the address of the next buffer (`waiting`), and are dropped as
//! `not_translated` when there are too many.

mod deliver;
mod waiting;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use port::backlog::Backlog;
use port::{
    Adapter, BURST_MAX, Batch, Coalescer, DropReason, Egress, Gso, Notified, OffloadSet,
    QueueCounters, QueueFault, Way,
};
use virtq::{ChainBuf, Virtq};

use crate::device::{SharedFilter, SharedHash, SharedOffloads};
use crate::notify::CallWatch;
use crate::{HeaderLen, QueueOptions, features, notify};
use deliver::{Job, Turn, deliver_mergeable, deliver_single};

/// The most chains that are popped for a burst at first; one frame may then take more.
const POP_MAX: usize = 4 * BURST_MAX;

/// Pieces of chains that one `send` may look at before it gives up: frames of 144 KiB (a burst) in
/// buffers of 64 bytes take a quarter, with the looks that found too few of them.
const PIECES_MAX: usize = 1 << 15;

/// How often one look at the ring may find that translations have changed meanwhile.
const CHANGES_MAX: u32 = 4;

/// What a [`Receiveq`] is made of.
#[derive(Debug)]
pub struct ReceiveqParts {
    /// The ring.
    pub queue: Virtq,
    /// The eventfd that the driver writes; kept only to be given back.
    pub kick: Option<Arc<OwnedFd>>,
    /// The eventfd that the device writes when it filled buffers.
    pub call: Option<Arc<OwnedFd>>,
    /// Where frames and drops are counted.
    pub counters: Arc<QueueCounters>,
    /// How long calls take.
    pub watch: Arc<CallWatch>,
    /// What was negotiated.
    pub options: QueueOptions,
}

/// The device side of a receiveq: an [`Egress`] of the switch. In cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Receiveq {
    parts: ReceiveqParts,
    chains: ChainBuf,
    turn: Turn,
    /// Chains that a frame took on average in the last burst, rounded up.
    chains_per_frame: usize,
    /// The last burst found no room: no second look until there is some.
    starved: bool,
    /// Pieces of chains that this `send` may still look at.
    budget: usize,
    /// What the driver of an embedded device wants; none over vhost-user.
    filter: Option<SharedFilter>,
    /// The hash that the driver wants to be told of each frame.
    hash: Option<SharedHash>,
    /// Offloads that it switched on; with the filter only.
    offloads: Option<SharedOffloads>,
    /// Frames of a burst that pass the filter.
    wanted: Vec<u16>,
    adapter: Adapter,
    coalescer: Coalescer,
    /// Segments may be made into large frames.
    coalesces: bool,
    /// Where frames wait for translations; behind a vIOMMU only.
    backlog: Option<Backlog>,
    /// Frames wait there, because the next chain does.
    stalled: bool,
}

/// How a look at the ring ended.
enum Look {
    /// All frames are done.
    Done,
    /// The ring gave all chains that it was asked for, or as many as it gives at once and some were
    /// used up, and the next frame needs more.
    Short,
    /// The ring has no more chains, or the next frame needs more than it gives at once. The number
    /// of those that are left.
    Dry(usize),
    /// The ring is broken.
    Broken(QueueFault),
    /// The next frame is not what the driver takes.
    Adapt,
}

impl Receiveq {
    /// Starts with kicks suppressed.
    pub fn new(parts: ReceiveqParts) -> Self {
        let mut this = Self::untouched(parts);
        this.begin();
        this
    }

    /// As [`Self::new`], and the ring is neither read nor written before [`Self::begin`]: for who
    /// must not touch the guest's memory, but hands the queue to somebody who may.
    pub fn untouched(parts: ReceiveqParts) -> Self {
        let coalesces = coalesces(&parts.options);
        Self {
            parts,
            chains: ChainBuf::with_capacity(POP_MAX),
            turn: Turn::with_capacity(POP_MAX),
            chains_per_frame: 1,
            starved: false,
            budget: PIECES_MAX,
            filter: None,
            offloads: None,
            hash: None,
            wanted: Vec::new(),
            adapter: Adapter::default(),
            coalescer: Coalescer::default(),
            coalesces,
            backlog: None,
            stalled: false,
        }
    }

    /// Tells the driver not to kick when it gives buffers, and asks for the addresses of those that
    /// are there.
    pub fn begin(&mut self) {
        self.parts.queue.disable_kicks();
        self.parts.queue.look_ahead();
    }

    /// Sets what the driver wants to receive.
    pub fn set_filter(&mut self, filter: Option<SharedFilter>) {
        self.filter = filter;
    }

    /// Reports this hash of each frame, if that was negotiated.
    pub(crate) fn report_hash(&mut self, hash: SharedHash) {
        self.hash = Some(hash).filter(|_| self.parts.options.header_len == HeaderLen::Hash);
    }

    /// Follows what the driver switches on and off.
    pub(crate) fn follow_offloads(&mut self, offloads: SharedOffloads) {
        self.offloads = Some(offloads);
    }

    /// What was negotiated.
    pub fn options(&self) -> &QueueOptions {
        &self.parts.options
    }

    /// The ring.
    pub fn queue(&self) -> &Virtq {
        &self.parts.queue
    }

    /// Tells whether the driver enabled the queue.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.parts.options.enabled = enabled;
    }

    /// Replaces the call eventfd.
    pub fn set_call(&mut self, call: Option<Arc<OwnedFd>>) {
        self.parts.call = call;
    }

    /// Whether the driver wants a call for what was published since this was asked last: for who
    /// calls it in another way than by the eventfd. A full fence must stand before it.
    pub fn wants_call(&mut self) -> bool {
        self.parts.queue.needs_call()
    }

    /// Gives everything back.
    pub fn into_parts(self) -> ReceiveqParts {
        self.parts
    }

    /// Sends to a ring in which nothing waits.
    #[inline(always)]
    fn send_now(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if self.filter.is_none() {
            return self.deliver(batch, picked);
        }
        self.send_embedded(batch, picked)
    }

    /// Delivers frames, put together where the driver takes large ones.
    #[inline(always)]
    fn deliver(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if self.coalesces {
            return self.coalesce(batch, picked);
        }
        self.deliver_or_hold(batch, picked)
    }

    /// Delivers frames; those wait for which the ring asks for an address.
    #[inline(always)]
    fn deliver_or_hold(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let left = self.deliver_each(batch, picked)?;
        if left > 0 {
            let done = picked.len().saturating_sub(left);
            self.hold(batch, picked.get(done..).unwrap_or_default());
        }
        Ok(())
    }

    #[inline(never)]
    fn coalesce(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if !self.coalescer.wants(batch, picked) {
            return self.deliver_or_hold(batch, picked);
        }
        let mut coalescer = std::mem::take(&mut self.coalescer);
        let counters = Arc::clone(&self.parts.counters);
        let way = (self.parts.options.to_driver, &*counters.egress);
        let result =
            coalescer.send(batch, picked, way, |batch, picked| self.deliver_or_hold(batch, picked));
        self.coalescer = coalescer;
        result
    }

    /// Delivers frames; what the driver does not take is adapted on the way. Returns how many of
    /// the last ones have to wait.
    #[inline(always)]
    fn deliver_each(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<usize, QueueFault> {
        let mut left = picked;
        self.deliver_fitting(batch, &mut left)?;
        if left.is_empty() { Ok(0) } else { self.deliver_others(batch, left) }
    }

    /// As [`Self::deliver_each`], where the first frame must be adapted.
    #[cold]
    fn deliver_others(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<usize, QueueFault> {
        let mut left = picked;
        while !left.is_empty() && !self.stalled {
            left = self.adapt(batch, left)?;
            self.deliver_more(batch, &mut left)?;
        }
        Ok(left.len())
    }

    /// As [`Self::deliver_fitting`], unless enough was looked at.
    fn deliver_more(&mut self, batch: &Batch<'_>, left: &mut &[u16]) -> Result<(), QueueFault> {
        if left.is_empty() {
            return Ok(());
        }
        if self.budget == 0 {
            *left = self.give_up(left);
            return Ok(());
        }
        let result = self.deliver_fitting(batch, left);
        // A look that was enough is not spent there.
        if left.is_empty() {
            self.spend();
        }
        result
    }

    /// Delivers adapted what the driver does not take at the beginning of `picked`. Returns what is
    /// left.
    fn adapt<'p>(&mut self, batch: &Batch<'_>, picked: &'p [u16]) -> Result<&'p [u16], QueueFault> {
        let mut adapter = std::mem::take(&mut self.adapter);
        let counters = Arc::clone(&self.parts.counters);
        let to_driver = self.parts.options.to_driver;
        let first = picked.first().and_then(|index| batch.frames().get(usize::from(*index)));
        // Checksums of segments are finished on the way of the copy.
        let large = first.is_some_and(|frame| frame.offload.gso != Gso::None);
        let csum = to_driver.csum || large;
        // It would take the frame, but has no room for it in one piece.
        let tight = large && first.is_some_and(|frame| to_driver.takes(&frame.offload));
        let whole = if tight { OffloadSet::NONE } else { to_driver };
        let takes = OffloadSet { csum, ..whole };
        let way = Way { takes, lost: DropReason::PortDown, counters: &counters.egress };
        let (done, result) = adapter.adapt(batch, picked, &way, |batch, mut picked| {
            self.deliver_more(batch, &mut picked)?;
            if self.stalled {
                self.hold(batch, picked);
            }
            Ok(())
        });
        self.adapter = adapter;
        let left = picked.get(done..).unwrap_or_default();
        if result.is_err() {
            way.counters.dropped(way.lost, left.len() as u64);
        }
        result.map(|()| left)
    }

    /// Delivers the first of `left`, up to one that the driver does not take or for which the ring
    /// asks for an address, and leaves the rest.
    #[inline(never)]
    fn deliver_fitting(&mut self, batch: &Batch<'_>, left: &mut &[u16]) -> Result<(), QueueFault> {
        self.turn.clear();
        let mut retries = self.parts.options.retries;
        let mut want = left.len().saturating_mul(self.chains_per_frame).min(POP_MAX);
        let mut result = Ok(());
        let mut changes = CHANGES_MAX;
        while !left.is_empty() && !self.stalled {
            let (frames, look) = self.look(batch, left, want);
            *left = left.get(frames..).unwrap_or_default();
            if matches!(look, Look::Done) {
                break;
            }
            self.spend();
            match look {
                Look::Done | Look::Adapt => break,
                Look::Dry(_) if self.stalls() => break,
                Look::Short | Look::Dry(_) if self.budget == 0 => *left = self.give_up(left),
                Look::Short => want = want.saturating_mul(2).max(BURST_MAX).min(self.budget),
                Look::Dry(_) if changes > 0 && self.has_changed() => {
                    changes = changes.saturating_sub(1);
                }
                Look::Dry(1..) if (retries == 0 || self.starved) && is_large(batch, left) => break,
                Look::Dry(available) => *left = self.starve(left, available, &mut retries),
                Look::Broken(fault) => {
                    let lost = left.len() as u64;
                    self.parts.counters.egress.dropped(DropReason::PortDown, lost);
                    *left = &[];
                    result = Err(fault);
                }
            }
        }
        self.parts.queue.publish();
        self.turn.count(&self.parts.counters.egress);
        if let Some(average) = self.turn.chains_per_frame() {
            self.chains_per_frame = average;
            self.starved = false;
            self.parts.queue.prefetch(want);
        }
        result
    }

    /// Sends to the driver of an embedded device, which says through its control queue what it
    /// wants.
    #[inline(never)]
    fn send_embedded(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let mut wanted = std::mem::take(&mut self.wanted);
        self.keep_wanted(batch, picked, &mut wanted);
        let result = match self.offloads.take() {
            Some(offloads) => {
                let result = offloads.during(|bits| {
                    self.parts.options.to_driver = features::to_driver(bits);
                    self.coalesces = coalesces(&self.parts.options);
                    self.deliver(batch, &wanted)
                });
                self.offloads = Some(offloads);
                result
            }
            None => self.deliver(batch, &wanted),
        };
        self.wanted = wanted;
        result
    }

    /// Leaves in `wanted` what the driver's filter lets pass.
    fn keep_wanted(&mut self, batch: &Batch<'_>, picked: &[u16], wanted: &mut Vec<u16>) {
        wanted.clear();
        let Some(filter) = &self.filter else { return };
        let frame = |index: &u16| batch.frames().get(usize::from(*index));
        filter.read(|filter| {
            let passes = |index: &&u16| frame(index).is_some_and(|f| filter.passes(f.head()));
            wanted.extend(picked.iter().filter(passes));
        });
        let unwanted = picked.len().saturating_sub(wanted.len());
        if unwanted > 0 {
            self.parts.counters.egress.dropped(DropReason::RxFiltered, unwanted as u64);
        }
    }

    /// Pops up to `want` chains and delivers the first of `picked` into them. Returns how many
    /// frames are done (delivered or dropped for a reason of their own).
    #[inline]
    fn look(&mut self, batch: &Batch<'_>, picked: &[u16], want: usize) -> (usize, Look) {
        let parts = &mut self.parts;
        let chains = parts.queue.pop(&mut self.chains, want);
        let fault = chains.fault();
        let count = chains.len();
        self.turn.start(count);
        let hash = self.hash.as_ref().and_then(SharedHash::get);
        let job = Job { chains, batch, to_driver: parts.options.to_driver, hash };
        let turn = &mut self.turn;
        let frames = match (parts.options.mergeable, parts.options.header_len) {
            (true, HeaderLen::Hash) => deliver_mergeable::<20>(&job, picked, turn),
            (true, _) => deliver_mergeable::<12>(&job, picked, turn),
            (false, HeaderLen::Hash) => deliver_single::<20>(&job, picked, turn),
            (false, HeaderLen::V1) => deliver_single::<12>(&job, picked, turn),
            (false, HeaderLen::Legacy) => deliver_single::<10>(&job, picked, turn),
        };
        let used = turn.used();
        parts.queue.complete_written(&self.chains, turn.written());
        if used < count {
            parts.queue.unpop_after(&self.chains, used);
        }
        let look = if frames == picked.len() {
            Look::Done
        } else if turn.wants_adaptation() {
            Look::Adapt
        } else if let Some(fault) = fault {
            Look::Broken(QueueFault::Ring(fault))
        } else if count == want || (used > 0 && self.chains.is_full()) {
            Look::Short
        } else {
            Look::Dry(count.saturating_sub(used))
        };
        (frames, look)
    }

    /// The chains of the last look are paid for.
    #[cold]
    fn spend(&mut self) {
        self.budget = self.budget.saturating_sub(self.chains.pieces());
    }

    /// Drops `left`, because enough was looked at. Returns what is left.
    #[cold]
    fn give_up<'p>(&mut self, left: &[u16]) -> &'p [u16] {
        self.parts.counters.egress.dropped(DropReason::NoBuffer, left.len() as u64);
        &[]
    }

    /// What to do with `left`, for which the ring has no room: the frames that are left after.
    #[cold]
    fn starve<'p>(&mut self, left: &'p [u16], available: usize, retries: &mut u32) -> &'p [u16] {
        if *retries > 0 && !self.starved {
            *retries = retries.saturating_sub(1);
            // The driver may wait for what was filled before it gives more.
            self.parts.queue.publish();
            std::hint::spin_loop();
            return left;
        }
        // Some chains are there, but not enough for this frame: a smaller one may fit.
        let drop = if available == 0 { left.len() } else { 1 };
        self.starved |= available == 0;
        self.parts.counters.egress.dropped(DropReason::NoBuffer, drop as u64);
        left.get(drop..).unwrap_or_default()
    }
}

fn coalesces(options: &QueueOptions) -> bool {
    let OffloadSet { tso4, tso6, uso, .. } = options.to_driver;
    options.coalesce && (tso4 || tso6 || uso)
}

/// Whether the first of `picked` is still to be cut into segments.
fn is_large(batch: &Batch<'_>, picked: &[u16]) -> bool {
    let first = picked.first().and_then(|index| batch.frames().get(usize::from(*index)));
    first.is_some_and(|frame| frame.offload.gso != Gso::None)
}

impl Egress for Receiveq {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        if !self.parts.options.enabled {
            self.parts.counters.egress.dropped(DropReason::PortDown, picked.len() as u64);
            return Ok(());
        }
        self.budget = PIECES_MAX;
        if self.stalled {
            return self.send_behind(batch, picked);
        }
        self.send_now(batch, picked)
    }

    fn held(&self) -> u64 {
        self.backlog.as_ref().map_or(0, Backlog::frames)
    }

    fn resume(&mut self) -> Result<(), QueueFault> {
        self.budget = PIECES_MAX;
        self.deliver_held()
    }

    fn notify(&mut self) -> Notified {
        let wanted = self.wants_call();
        let fds = (self.parts.queue.log_call(), self.parts.call.as_ref());
        let watch = (&self.parts.counters.egress.calls, &*self.parts.watch);
        notify::call(fds, wanted, watch)
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.parts.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send> {
        self
    }
}

#[cfg(test)]
mod tests;
