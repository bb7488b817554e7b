//! The delivery loops: frames into popped chains.

use port::{Batch, DropReason, EgressCounters, Frame};
use virtq::mem::Writable;
use virtq::{Chains, Token};

use crate::OffloadSet;
use crate::header::{self, V1_LEN};

/// Chains whose first lines are asked for ahead of the one that is written.
const AHEAD: usize = 8;
/// Frames whose bodies are asked for ahead of the one that is copied.
const BODY_AHEAD: usize = 2;
/// Lines of a body that are asked for; the hardware goes on from there.
const BODY_LINES: usize = 4;

/// Bytes of the header before a frame that may take several buffers.
const V1: u32 = header::len_u32(V1_LEN);

/// Where frames come from and go to.
pub(super) struct Job<'a> {
    pub(super) chains: Chains<'a>,
    pub(super) batch: &'a Batch<'a>,
    pub(super) to_driver: OffloadSet,
}

/// What the deliveries of one burst did.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Chains of this look at the ring, in order, with the bytes written.
    done: Vec<(Token, u32)>,
    /// Chains of the burst.
    chains: usize,
    frames: u64,
    bytes: u64,
    too_large: u64,
    bad_offload: u64,
}

impl Turn {
    pub(super) fn with_capacity(chains: usize) -> Self {
        Self { done: Vec::with_capacity(chains), ..Self::default() }
    }

    /// Begins a burst.
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        self.done.clear();
        (self.chains, self.frames, self.bytes) = (0, 0, 0);
        (self.too_large, self.bad_offload) = (0, 0);
    }

    /// Begins a look at the ring.
    #[inline(always)]
    pub(super) fn start(&mut self) {
        self.chains = self.chains.wrapping_add(self.done.len());
        self.done.clear();
    }

    /// Chains of this look that are used up.
    #[inline(always)]
    pub(super) fn used(&self) -> usize {
        self.done.len()
    }

    #[inline(always)]
    pub(super) fn completions(&self) -> &[(Token, u32)] {
        &self.done
    }

    /// Chains that a frame of this burst took, rounded up; none if no frame was delivered.
    #[inline(always)]
    pub(super) fn chains_per_frame(&self) -> Option<usize> {
        let frames = usize::try_from(self.frames).unwrap_or(usize::MAX);
        let chains = self.chains.wrapping_add(self.done.len());
        if chains == frames && frames > 0 {
            return Some(1);
        }
        (frames > 0).then(|| chains.div_ceil(frames))
    }

    #[inline(always)]
    fn push(&mut self, token: Token, written: u32) {
        self.done.push((token, written));
    }

    #[inline(always)]
    fn sent(&mut self, frame: &Frame) {
        self.frames = self.frames.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(u64::from(frame.len()));
    }

    /// Moves the sums to the counters.
    #[inline(always)]
    pub(super) fn count(&self, counters: &EgressCounters) {
        counters.sent(self.frames, self.bytes);
        if self.too_large | self.bad_offload != 0 {
            counters.dropped(DropReason::TooLarge, self.too_large);
            counters.dropped(DropReason::BadOffload, self.bad_offload);
        }
    }
}

/// Asks for the lines that are needed soon.
#[inline(always)]
fn prefetch(job: &Job<'_>, picked: &[u16], n: usize, chain: usize) {
    job.chains.writable(chain.wrapping_add(AHEAD)).prefetch();
    let soon = picked.get(n.wrapping_add(BODY_AHEAD)).map(|index| usize::from(*index));
    if let Some(frame) = soon.and_then(|index| job.batch.frames().get(index))
        && frame.body.len > 0
    {
        job.batch.body(frame).prefetch(BODY_LINES);
    }
}

/// Writes the whole frame into one buffer that has room for it: the straight way.
#[inline(always)]
fn write_whole<const H: usize>(job: &Job<'_>, frame: &Frame, buffer: &Writable<'_>) {
    let header = header::encode(&frame.offload, job.to_driver, 1);
    let mut writer = buffer.writer();
    if let Some(header) = header.first_chunk::<H>() {
        let _ = writer.write_if_different(header);
    }
    let _ = writer.write(frame.head());
    if frame.body.len > 0 {
        let _ = writer.copy_from(&mut job.batch.body(frame), frame.body.len);
    }
}

/// Delivers frames, each in as many chains as it needs. Returns how many are done; the next one
/// needs more chains than there are.
#[inline]
pub(super) fn deliver_mergeable(job: &Job<'_>, picked: &[u16], turn: &mut Turn) -> usize {
    for chain in 0..AHEAD {
        job.chains.writable(chain).prefetch();
    }
    for (n, index) in picked.iter().enumerate() {
        let Some(frame) = job.batch.frames().get(usize::from(*index)) else { continue };
        let chain = turn.used();
        prefetch(job, picked, n, chain);
        if !header::accepts(job.to_driver, &frame.offload) {
            turn.bad_offload = turn.bad_offload.wrapping_add(1);
            continue;
        }
        let need = frame.len().saturating_add(V1);
        let buffer = job.chains.writable(chain);
        if buffer.len() >= need {
            write_whole::<V1_LEN>(job, frame, &buffer);
            turn.push(job.chains.token(chain), need);
        } else if !spread(job, frame, need, turn) {
            return n;
        }
        turn.sent(frame);
    }
    picked.len()
}

/// Delivers frames, each in one chain. Returns how many are done; there is no chain for the next.
#[inline]
pub(super) fn deliver_single<const H: usize>(
    job: &Job<'_>,
    picked: &[u16],
    turn: &mut Turn,
) -> usize {
    for chain in 0..AHEAD {
        job.chains.writable(chain).prefetch();
    }
    for (n, index) in picked.iter().enumerate() {
        let Some(frame) = job.batch.frames().get(usize::from(*index)) else { continue };
        prefetch(job, picked, n, turn.used());
        if !header::accepts(job.to_driver, &frame.offload) {
            turn.bad_offload = turn.bad_offload.wrapping_add(1);
            continue;
        }
        let need = frame.len().saturating_add(const { header::len_u32(H) });
        if job.chains.writable(turn.used()).len() < need {
            skip_useless(job, const { header::len_u32(H) }, turn);
            if turn.used() >= job.chains.len() {
                return n;
            }
            if job.chains.writable(turn.used()).len() < need {
                turn.too_large = turn.too_large.wrapping_add(1);
                continue;
            }
        }
        let chain = turn.used();
        write_whole::<H>(job, frame, &job.chains.writable(chain));
        turn.push(job.chains.token(chain), need);
        turn.sent(frame);
    }
    picked.len()
}

/// Gives chains back that cannot hold a header of `header_len` bytes.
#[cold]
fn skip_useless(job: &Job<'_>, header_len: u32, turn: &mut Turn) {
    while turn.used() < job.chains.len() && job.chains.writable(turn.used()).len() <= header_len {
        turn.push(job.chains.token(turn.used()), 0);
    }
}

/// Spreads a frame over several chains, all or nothing. Returns false if there are too few.
#[cold]
fn spread(job: &Job<'_>, frame: &Frame, need: u32, turn: &mut Turn) -> bool {
    skip_useless(job, V1, turn);
    let first = turn.used();
    let mut room = 0u32;
    let mut end = first;
    while room < need {
        if end >= job.chains.len() {
            return false;
        }
        room = room.saturating_add(job.chains.writable(end).len());
        end = end.wrapping_add(1);
    }
    let count = u16::try_from(end.wrapping_sub(first)).unwrap_or(u16::MAX);
    let header = header::encode(&frame.offload, job.to_driver, count);
    let mut head = frame.head();
    let mut body = job.batch.body(frame);
    for chain in first..end {
        let mut writer = job.chains.writable(chain).writer();
        let room = writer.remaining();
        if chain == first {
            let _ = writer.write_if_different(&header);
        }
        let written = writer.write(head);
        head = head.get(written..).unwrap_or_default();
        if head.is_empty() {
            let _ = writer.copy_from(&mut body, writer.remaining());
        }
        turn.push(job.chains.token(chain), room.wrapping_sub(writer.remaining()));
    }
    true
}
