//! The delivery loops: frames into popped chains.

use packet::ReceiveHash;
use port::{Batch, DropReason, EgressCounters, Finish, Frame, Gso, Offload, finish_checksum};
use virtq::Chains;
use virtq::mem::{WritePiece, Writer};

use crate::OffloadSet;
use crate::header::{self, V1_LEN};

/// Frames whose bodies are asked for ahead of the one that is copied.
const BODY_AHEAD: usize = virtq::swept!("BODY_AHEAD", 2);
/// Lines of a body that are asked for; the hardware goes on from there.
const BODY_LINES: usize = virtq::swept!("BODY_LINES", 4);

/// The header of a frame that leaves nothing to do, in one buffer.
const PLAIN: [u8; V1_LEN] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Where frames come from and go to.
pub(super) struct Job<'a> {
    pub(super) chains: Chains<'a>,
    pub(super) batch: &'a Batch<'a>,
    pub(super) to_driver: OffloadSet,
    /// What the driver wants to be told of each frame.
    pub(super) hash: Option<ReceiveHash>,
}

impl Job<'_> {
    /// Writes the header of `H` bytes of a frame that takes `num_buffers` buffers.
    #[inline(always)]
    fn write_header<const H: usize>(
        &self,
        frame: &Frame,
        num_buffers: u16,
        writer: &mut Writer<'_>,
    ) {
        let header = self.header(frame, num_buffers);
        let _ = match header.first_chunk::<H>() {
            Some(header) => writer.write_if_different(header),
            None => {
                let hash = self.hash.as_ref().and_then(|hash| hash.of(frame.head()));
                writer.write(&header::with_hash(header, hash))
            }
        };
    }
}

impl Job<'_> {
    /// Whether the frame can be delivered as it is, or with a checksum finished on the way.
    fn fits(&self, frame: &Frame) -> bool {
        self.to_driver.takes(&frame.offload)
            || (frame.offload.gso == Gso::None && Finish::is_possible(frame))
    }

    /// Writes a frame that fits behind its header, all into one chain.
    fn write(&self, frame: &Frame, writer: &mut Writer<'_>) {
        if self.finishes(frame) && Finish::write(frame, self.batch, *writer) {
            return;
        }
        let _ = writer.write(frame.head());
        let _ = writer.copy_from(&mut self.batch.body(frame), frame.body.len);
    }

    /// Whether its checksum is to be finished.
    fn finishes(&self, frame: &Frame) -> bool {
        frame.offload.needs_csum && !self.to_driver.csum
    }

    /// The virtio-net header of a frame that fits.
    fn header(&self, frame: &Frame, buffers: u16) -> [u8; V1_LEN] {
        let offload = if self.finishes(frame) { Offload::default() } else { frame.offload };
        header::encode(&offload, self.to_driver, buffers)
    }
}

/// What the deliveries of one burst did.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Bytes written into the chains of this look at the ring, in their order.
    written: Vec<u32>,
    /// How many of them are used up.
    used: usize,
    /// Chains that earlier looks of the burst used up.
    chains: usize,
    frames: usize,
    bytes: u64,
    too_large: u64,
    /// The next frame is not what the driver takes.
    adapt: bool,
}

impl Turn {
    pub(super) fn with_capacity(chains: usize) -> Self {
        Self { written: vec![0; chains], ..Self::default() }
    }

    /// Begins a burst.
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        (self.used, self.chains, self.frames, self.bytes) = (0, 0, 0, 0);
        self.too_large = 0;
    }

    /// Begins a look at the ring that found `count` chains.
    #[inline(always)]
    pub(super) fn start(&mut self, count: usize) {
        self.chains = self.chains.wrapping_add(self.used);
        self.used = 0;
        self.adapt = false;
        if self.written.len() < count {
            self.written.resize(count, 0);
        }
    }

    /// Chains of this look that are used up.
    #[inline(always)]
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Whether the look ended at a frame that is not what the driver takes.
    #[inline(always)]
    pub(super) fn wants_adaptation(&self) -> bool {
        self.adapt
    }

    #[inline(always)]
    pub(super) fn written(&self) -> &[u32] {
        self.written.get(..self.used).unwrap_or_default()
    }

    /// Chains that a frame of this burst took, rounded up; none if no frame was delivered.
    #[inline(always)]
    pub(super) fn chains_per_frame(&self) -> Option<usize> {
        let chains = self.chains.wrapping_add(self.used);
        if chains == self.frames && chains > 0 {
            return Some(1);
        }
        (self.frames > 0).then(|| chains.div_ceil(self.frames))
    }

    /// Uses the next chain up.
    fn push(&mut self, written: u32) {
        if let Some(place) = self.written.get_mut(self.used) {
            *place = written;
        }
        self.used = self.used.wrapping_add(1);
    }

    fn sent(&mut self, frame: &Frame) {
        self.frames = self.frames.wrapping_add(1);
        self.bytes = self.bytes.wrapping_add(u64::from(frame.len()));
    }

    /// Moves the sums to the counters.
    #[inline(always)]
    pub(super) fn count(&self, counters: &EgressCounters) {
        counters.sent(self.frames as u64, self.bytes);
        if self.too_large != 0 {
            counters.dropped(DropReason::TooLarge, self.too_large);
        }
    }
}

/// Asks for the body of frame `n` of `picked`.
#[inline(always)]
fn prefetch_body(batch: &Batch<'_>, picked: &[u16], n: usize) {
    let index = picked.get(n).map(|index| usize::from(*index));
    if let Some(frame) = index.and_then(|index| batch.frames().get(index))
        && let Some(piece) = batch.body_piece(frame)
    {
        piece.prefetch(BODY_LINES);
    }
}

/// Writes a frame with a body in one piece, as [`Run::one`]. Of its own, so that the loop keeps its
/// registers.
#[inline(never)]
fn with_body<const H: usize>(
    batch: &Batch<'_>,
    (picked, next): (&[u16], usize),
    frame: &Frame,
    (buffer, header): (WritePiece<'_>, &[u8; H]),
) -> bool {
    prefetch_body(batch, picked, next);
    let body = batch.body_piece(frame);
    body.is_some() && buffer.write_frame(header, frame.head(), body)
}

/// A run of deliveries that go the straight way.
struct Run<'a> {
    batch: &'a Batch<'a>,
    picked: &'a [u16],
    done: usize,
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "at most 144 bytes")]
fn head_len(head: &[u8]) -> u32 {
    head.len() as u32
}

impl Run<'_> {
    /// Writes an ordinary frame with its header into one buffer that has room for it. Returns
    /// false, and has written nothing, if it does not go so.
    #[inline(always)]
    fn one<const H: usize>(
        &mut self,
        frame: &Frame,
        buffer: WritePiece<'_>,
        place: &mut u32,
    ) -> bool {
        let Some(head) = frame.head_bytes() else { return false };
        let Some(header) = PLAIN.first_chunk::<H>() else { return false };
        let header_len = const { header::len_u32(H) };
        if !frame.offload.is_plain() {
            return false;
        }
        // In each branch of its own: the length is known there.
        if frame.body.len == 0 {
            *place = header_len.wrapping_add(head_len(head));
            if !buffer.write_frame(header, head, None) {
                return false;
            }
        } else {
            *place = header_len.wrapping_add(frame.len());
            let next = self.done.wrapping_add(BODY_AHEAD);
            if !with_body(self.batch, (self.picked, next), frame, (buffer, header)) {
                return false;
            }
        }
        self.done = self.done.wrapping_add(1);
        true
    }

    /// Delivers frames until one does not go the straight way.
    #[inline(always)]
    fn all<'f, const H: usize>(
        &mut self,
        frames: impl Iterator<Item = &'f Frame>,
        (chains, first): (&Chains<'_>, usize),
        places: &mut [u32],
    ) {
        let buffers = chains.write_pieces(first);
        for ((frame, (buffer, later)), place) in frames.zip(buffers).zip(places) {
            later.prefetch(2);
            if !self.one::<H>(frame, buffer, place) {
                return;
            }
        }
    }
}

/// The frames of `picked` if they are one after the other: bursts to one guest mostly are.
#[inline(always)]
fn in_a_row<'f>(frames: &'f [Frame], picked: &[u16]) -> Option<&'f [Frame]> {
    let first = *picked.first()?;
    let wrong = (first..).zip(picked).fold(0, |wrong, (want, have)| wrong | (want ^ have));
    let first = usize::from(first);
    frames.get(first..first.wrapping_add(picked.len())).filter(|_| wrong == 0)
}

/// Delivers frames as long as each one goes the straight way; returns how many.
#[inline(always)]
fn deliver_run<const H: usize>(job: &Job<'_>, picked: &[u16], turn: &mut Turn) -> usize {
    let first = turn.used;
    let places = turn.written.get_mut(first..).unwrap_or_default();
    let frames = job.batch.frames();
    let mut run = Run { batch: job.batch, picked, done: 0 };
    match in_a_row(frames, picked) {
        Some(row) => run.all::<H>(row.iter(), (&job.chains, first), places),
        None => {
            let frames = picked.iter().map_while(|index| frames.get(usize::from(*index)));
            run.all::<H>(frames, (&job.chains, first), places);
        }
    }
    turn.used = first.wrapping_add(run.done);
    turn.frames = turn.frames.wrapping_add(run.done);
    let written = turn.written.get(first..turn.used).unwrap_or_default();
    let bytes = written.iter().fold(0u64, |sum, len| sum.wrapping_add(u64::from(*len)));
    let headers = (run.done as u64).wrapping_mul(const { header::len_u32(H) as u64 });
    turn.bytes = turn.bytes.wrapping_add(bytes.wrapping_sub(headers));
    run.done
}

/// Delivers frames, `one` those that do not go the straight way. Returns how many are done; the
/// next one needs more chains than there are.
#[inline(always)]
fn deliver<const H: usize>(
    job: &Job<'_>,
    picked: &[u16],
    turn: &mut Turn,
    one: impl Fn(&Job<'_>, &Frame, &mut Turn) -> bool,
) -> usize {
    job.chains.prefetch_write();
    let mut done = 0usize;
    while let Some(left) = picked.get(done..).filter(|left| !left.is_empty()) {
        done = done.wrapping_add(deliver_run::<H>(job, left, turn));
        let Some(index) = picked.get(done) else { break };
        if let Some(frame) = job.batch.frames().get(usize::from(*index)) {
            if !job.fits(frame) {
                turn.adapt = true;
                break;
            }
            if !one(job, frame, turn) {
                break;
            }
        }
        done = done.wrapping_add(1);
    }
    done
}

/// Delivers frames, each in as many chains as it needs. Returns how many are done; the next one
/// needs more chains than there are, or an adaptation.
pub(super) fn deliver_mergeable<const H: usize>(
    job: &Job<'_>,
    picked: &[u16],
    turn: &mut Turn,
) -> usize {
    deliver::<H>(job, picked, turn, spread::<H>)
}

/// Delivers frames, each in one chain. Returns how many are done; there is no chain for the next,
/// or it needs an adaptation.
pub(super) fn deliver_single<const H: usize>(
    job: &Job<'_>,
    picked: &[u16],
    turn: &mut Turn,
) -> usize {
    deliver::<H>(job, picked, turn, put_in_one::<H>)
}

/// Delivers a frame in one chain, or drops it as too large. Returns false if there is no chain.
#[inline(never)]
fn put_in_one<const H: usize>(job: &Job<'_>, frame: &Frame, turn: &mut Turn) -> bool {
    let header_len = const { header::len_u32(H) };
    let need = frame.len().wrapping_add(header_len);
    skip_useless(job, header_len, turn);
    let chain = turn.used;
    if chain >= job.chains.len() {
        return false;
    }
    if job.chains.writable(chain).len() < need {
        if frame.offload.gso != Gso::None {
            // Its segments may fit.
            turn.adapt = true;
            return false;
        }
        turn.too_large = turn.too_large.wrapping_add(1);
        return true;
    }
    let mut writer = job.chains.writable(chain).writer();
    job.write_header::<H>(frame, 1, &mut writer);
    job.write(frame, &mut writer);
    turn.push(need);
    turn.sent(frame);
    true
}

/// Gives chains back that cannot hold a header of `header_len` bytes.
#[cold]
fn skip_useless(job: &Job<'_>, header_len: u32, turn: &mut Turn) {
    while turn.used() < job.chains.len() && job.chains.writable(turn.used()).len() <= header_len {
        turn.push(0);
    }
}

/// Spreads a frame over several chains, all or nothing. Returns false if there are too few.
#[inline(never)]
fn spread<const H: usize>(job: &Job<'_>, frame: &Frame, turn: &mut Turn) -> bool {
    let header_len = const { header::len_u32(H) };
    let need = frame.len().wrapping_add(header_len);
    skip_useless(job, header_len, turn);
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
    if count == 1 {
        let mut writer = job.chains.writable(first).writer();
        job.write_header::<H>(frame, count, &mut writer);
        job.write(frame, &mut writer);
        turn.push(need);
        turn.sent(frame);
        return true;
    }
    // Over several chains the sum is taken before.
    let mut finished;
    let mut frame = frame;
    if job.finishes(frame) {
        finished = frame.clone();
        let _in_head = finish_checksum(&mut finished, job.batch.body(frame));
        frame = &finished;
    }
    let mut head = frame.head();
    let mut body = job.batch.body(frame);
    for chain in first..end {
        let mut writer = job.chains.writable(chain).writer();
        let room = writer.remaining();
        if chain == first {
            job.write_header::<H>(frame, count, &mut writer);
        }
        let written = writer.write(head);
        head = head.get(written..).unwrap_or_default();
        if head.is_empty() {
            let _ = writer.copy_from(&mut body, writer.remaining());
        }
        turn.push(room.wrapping_sub(writer.remaining()));
    }
    turn.sent(frame);
    true
}
