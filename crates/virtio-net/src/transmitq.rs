//! A guest's transmitq: where the switch's frames come from.
//!
//! ```text
//!  pop ≤ 64 chains ─► header ─► Offload        ┐
//!                  └► 128 B  ─► Frame's head   ├─► Batch ─► (switch) ─► release: complete, publish
//!                     rest   ─► SegSpan        ┘
//! ```
//!
//! **Trust.** Header and head are copied once and used from the copy.
//! **Limits.** Frames of 14 bytes (an Ethernet header) to [`QueueOptions::max_frame`]; a frame that
//! is to be cut may be of 64 KiB, if its segments are not larger than that. Every chain is a frame
//! and is counted, even one that is shorter than its header (`runt`).
//! A writable part, which no driver should add, is left alone.
//! **Kicks** are not read: who waits for them waits for edges ([`Ingress::wake_fd`]). A read of an
//! eventfd wakes all that wait until it can be written, and its other owner can hang up a million.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use port::{
    BURST_BYTES, BURST_MAX, Batch, DropReason, Frame, FrameBuf, Gso, Ingress, Notified,
    QueueCounters, QueueFault,
};
use virtq::mem::ReadPiece;
use virtq::{ChainBuf, Chains, Virtq};

use crate::header::{self, HASH_LEN, LEGACY_LEN, V1_LEN};
use crate::notify::CallWatch;
use crate::{HeaderLen, QueueOptions, notify};

/// Flags and segmentation type of a header that leaves nothing to do.
const PLAIN: [u8; 2] = [0, 0];
/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// The most bytes of a frame that is to be cut: the largest IPv6 packet behind two tags.
const LARGE_MAX: u32 = 65_535 + 40 + 14 + 8;

/// What a [`Transmitq`] is made of.
#[derive(Debug)]
pub struct TransmitqParts {
    /// The ring.
    pub queue: Virtq,
    /// The eventfd that the driver writes when it wants the device to look.
    pub kick: Option<Arc<OwnedFd>>,
    /// The eventfd that the device writes when it gave buffers back.
    pub call: Option<Arc<OwnedFd>>,
    /// Where frames and drops are counted.
    pub counters: Arc<QueueCounters>,
    /// How long calls take.
    pub watch: Arc<CallWatch>,
    /// What was negotiated.
    pub options: QueueOptions,
}

/// The device side of a transmitq: an [`Ingress`] of the switch. In cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Transmitq {
    parts: TransmitqParts,
    chains: ChainBuf,
    /// Whether the chains of the last burst are still to be given back.
    held: bool,
    /// How many of them were taken, if not all.
    kept: Option<usize>,
}

impl Transmitq {
    /// Starts with kicks suppressed.
    pub fn new(parts: TransmitqParts) -> Self {
        let mut this = Self::untouched(parts);
        this.parts.queue.disable_kicks();
        this.parts.queue.look_ahead();
        this
    }

    /// As [`Self::new`], and the ring is neither read nor written before [`Ingress::disarm`]: for
    /// who must not touch the guest's memory, but hands the queue to somebody who may.
    pub fn untouched(mut parts: TransmitqParts) -> Self {
        parts.queue.read_only();
        Self { parts, chains: ChainBuf::with_capacity(BURST_MAX), held: false, kept: None }
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

    /// Gives everything back; chains of a batch that was not released are completed.
    pub fn into_parts(mut self) -> TransmitqParts {
        self.release();
        self.parts
    }
}

/// Sums of one burst.
#[derive(Debug, Default)]
struct Burst {
    bytes: u64,
    runt: u64,
    oversize: u64,
    bad_offload: u64,
}

impl Burst {
    #[inline(always)]
    fn count(&self, counters: &QueueCounters, frames: u64) {
        let ingress = &counters.ingress;
        ingress.received(frames, self.bytes);
        if self.runt | self.oversize | self.bad_offload != 0 {
            for (reason, count) in [
                (DropReason::Runt, self.runt),
                (DropReason::Oversize, self.oversize),
                (DropReason::BadOffload, self.bad_offload),
            ] {
                ingress.dropped(reason, count);
            }
        }
    }
}

impl Burst {
    /// If the chains have more bytes than a burst may: how many of them are within the bound, fewer
    /// than there are and at least one.
    #[inline(always)]
    fn too_much_for(&self, chains: &Chains<'_>) -> Option<usize> {
        if self.bytes <= BURST_BYTES { None } else { within_bound(chains) }
    }
}

#[cold]
fn within_bound(chains: &Chains<'_>) -> Option<usize> {
    let mut bytes = 0u64;
    let fits = |index: &usize| {
        bytes = bytes.saturating_add(u64::from(chains.span(*index, 0).len));
        bytes <= BURST_BYTES
    };
    let fewer = (0..chains.len()).take_while(fits).count().max(1);
    (fewer < chains.len()).then_some(fewer)
}

impl Ingress for Transmitq {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        let most = frames.begin();
        self.release();
        let parts = &mut self.parts;
        let mut chains = parts.queue.pop(&mut self.chains, most);
        if chains.is_empty() {
            let fault = chains.fault().map(QueueFault::Ring);
            return frames.batch(chains.store(), fault);
        }
        let mut burst = take_all(&chains, &parts.options, frames);
        let mut fault = chains.fault().map(QueueFault::Ring);
        if let Some(fewer) = burst.too_much_for(&chains) {
            // Others are waiting: the rest comes in the next turn, and with it its fault.
            chains.keep_first(fewer);
            frames.clear();
            burst = take_all(&chains, &parts.options, frames);
            self.kept = Some(fewer);
            fault = None;
        }
        let count = chains.len();
        self.held = true;
        if parts.options.enabled {
            burst.count(&parts.counters, count as u64);
        } else {
            frames.clear();
            parts.counters.ingress.received(count as u64, burst.bytes);
            parts.counters.ingress.dropped(DropReason::RingDisabled, count as u64);
        }
        frames.batch(chains.store(), fault)
    }

    fn release(&mut self) {
        if self.held {
            self.held = false;
            match self.kept.take() {
                None => self.parts.queue.complete_read(&self.chains),
                Some(kept) => self.parts.queue.complete_read_first(&self.chains, kept),
            }
            self.parts.queue.publish();
        }
    }

    fn notify(&mut self) -> Notified {
        let wanted = self.wants_call();
        let fds = (self.parts.queue.log_call(), self.parts.call.as_ref());
        let watch = (&self.parts.counters.ingress.calls, &*self.parts.watch);
        notify::call(fds, wanted, watch)
    }

    fn arm(&mut self) -> bool {
        self.parts.queue.enable_kicks()
    }

    fn disarm(&mut self) {
        self.parts.queue.disable_kicks();
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.parts.kick.as_ref().map(|fd| fd.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.parts.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send> {
        self
    }
}

/// Turns chains into frames.
#[inline(always)]
fn take_all(chains: &Chains<'_>, options: &QueueOptions, frames: &mut FrameBuf) -> Burst {
    let mut burst = Burst::default();
    match options.header_len {
        HeaderLen::Hash => take::<HASH_LEN>(chains, options, frames, &mut burst),
        HeaderLen::V1 => take::<V1_LEN>(chains, options, frames, &mut burst),
        HeaderLen::Legacy => take::<LEGACY_LEN>(chains, options, frames, &mut burst),
    }
    burst
}

/// Turns chains with a header of `H` bytes into frames.
#[inline(always)]
fn take<const H: usize>(
    chains: &Chains<'_>,
    options: &QueueOptions,
    frames: &mut FrameBuf,
    burst: &mut Burst,
) {
    chains.prefetch_read();
    let mut next = 0;
    while next < chains.len() {
        let run = take_run::<H>((chains, next), options, frames.room());
        frames.keep_many(run.frames);
        burst.bytes = burst.bytes.wrapping_add(run.bytes);
        next = next.wrapping_add(run.frames);
        if next < chains.len() {
            take_any::<H>((chains, next), options, frames, burst);
            next = next.wrapping_add(1);
        }
    }
}

/// What [`take_run`] did.
struct Run {
    frames: usize,
    bytes: u64,
}

/// Turns chains from `first` on into frames, as long as each is one segment and leaves nothing to
/// do: nearly all of them.
#[inline(always)]
fn take_run<const H: usize>(
    (chains, first): (&Chains<'_>, usize),
    options: &QueueOptions,
    room: &mut [Frame],
) -> Run {
    let mut run = Run { frames: 0, bytes: 0 };
    let Some(spread) = options.max_frame.checked_sub(ETHERNET) else { return run };
    for ((piece, later), frame) in chains.read_pieces(first).zip(room) {
        later.prefetch(2);
        if !take_one::<H>(piece, first, spread, (frame, &mut run)) {
            break;
        }
    }
    run
}

/// Turns a chain into a frame, if it is an ordinary one of at most `spread` bytes more than an
/// Ethernet header.
#[inline(always)]
fn take_one<const H: usize>(
    piece: ReadPiece<'_>,
    first: usize,
    spread: u32,
    (frame, run): (&mut Frame, &mut Run),
) -> bool {
    let header_len = const { header::len_u32(H) };
    let Some(over) = piece.len_u32().checked_sub(header_len.wrapping_add(ETHERNET)) else {
        return false;
    };
    let len = piece.len_u32().wrapping_sub(header_len);
    let plain = over <= spread
        && piece.first::<2>() == Some(PLAIN)
        && frame.fill_piece(piece, header_len, index_u32(first.wrapping_add(run.frames)));
    if plain {
        run.bytes = run.bytes.wrapping_add(u64::from(len));
        run.frames = run.frames.wrapping_add(1);
    }
    plain
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a burst has at most 64 chains")]
fn index_u32(index: usize) -> u32 {
    index as u32
}

/// Turns chain `index` into a frame, whatever it looks like.
#[inline(never)]
fn take_any<const H: usize>(
    (chains, index): (&Chains<'_>, usize),
    options: &QueueOptions,
    frames: &mut FrameBuf,
    burst: &mut Burst,
) {
    let whole = chains.span(index, const { header::len_u32(H) });
    burst.bytes = burst.bytes.wrapping_add(u64::from(whole.len));
    if whole.len < ETHERNET {
        burst.runt = burst.runt.wrapping_add(1);
        return;
    }
    if whole.len > options.max_frame.max(LARGE_MAX) {
        burst.oversize = burst.oversize.wrapping_add(1);
        return;
    }
    let mut reader = chains.readable(index).reader();
    let mut raw = [0u8; H];
    let _ = reader.read(&mut raw);
    let parsed =
        raw.first_chunk::<LEGACY_LEN>().and_then(|raw| header::parse(raw, options.from_driver));
    let Some(frame) = frames.slot() else { return };
    let filled = frame.fill(reader, whole, parsed.unwrap_or_default());
    let good = parsed.is_some() && frame.check_offload();
    if !filled {
        burst.runt = burst.runt.wrapping_add(1);
    } else if !good {
        burst.bad_offload = burst.bad_offload.wrapping_add(1);
    } else if largest_segment(frame) > options.max_frame {
        burst.oversize = burst.oversize.wrapping_add(1);
    } else {
        frames.keep();
    }
}

/// Bytes of the frame, or of the largest segment that it will be cut into.
#[inline]
fn largest_segment(frame: &Frame) -> u32 {
    match frame.offload.gso {
        Gso::None => frame.len(),
        Gso::TcpV4 | Gso::TcpV6 | Gso::UdpL4 => {
            u32::from(frame.offload.hdr_len).saturating_add(u32::from(frame.offload.gso_size))
        }
    }
}

#[cfg(test)]
mod tests;
