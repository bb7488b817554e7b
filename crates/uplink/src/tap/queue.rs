//! One queue of a tap as the two halves of a queue pair.
//!
//! ```text
//!  kernel ── read ──► private buffer ──► Frame (head copied, body stays in the buffer)
//!  kernel ◄─ write ── vnet header, head and body, put together: an ordinary frame
//!  kernel ◄─ writev ─ vnet header | private head | body, from the sender's memory: a larger one
//! ```
//!
//! **Trust.** What the kernel gives came from the network. Bodies that are written may belong to a
//! hostile guest: they are copied, or only their addresses are handed on.
//! **Limits.** A frame has at most [`FRAME_MAX`] bytes, and at most 62 pieces of body. The frames
//! of a burst stand one behind the other in [`BUFFER_BYTES`], which are all the memory that a queue
//! takes: a burst ends where the largest frame has no room any more.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use port::{
    Adapter, BURST_BYTES, Batch, DropReason, Egress, Frame, FrameBuf, HEAD_MAX, HEAD_ROOM, Ingress,
    Notified, OffloadSet, QueueCounters, QueueFault, Way,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtq::mem::{MapError, Pool, Reader};

use crate::sys::{PIECES_MAX, Pieces};
use crate::vnet::{self, HEADER, segment_bytes};

use super::found::Found;

/// The most bytes of a frame: the largest MTU, an Ethernet header and two tags.
const FRAME_MAX: u32 = 65_535 + 14 + 8;
/// Room for a header and the largest frame.
const ROOM: usize = FRAME_MAX as usize + HEADER;
/// Bytes of a queue's buffer: seven frames of 64 KiB, or a burst of what fits into jumbo frames.
const BUFFER_BYTES: u32 = 512 * 1024;
const _: () = assert!(ROOM <= BUFFER_BYTES as usize);
/// Where frames begin in the buffer: on a cache line of their own.
const LINE: usize = 64;
/// Pieces of an ordinary frame: header, head, and a body of few buffers.
const FEW: usize = 4;
const FEW_PIECES: u32 = 2;
/// Up to so many bytes of header and frame are put together for the kernel: an ordinary frame.
const WHOLE: usize = 2048;
const _: () = assert!(HEADER + HEAD_ROOM + HEAD_MAX <= WHOLE);
/// How often a frame is offered to a kernel whose queue is full.
const TRIES: u32 = 4;
/// Bytes before the payload that an MTU counts.
const ETHERNET: u32 = 14;
const TAG: u32 = 4;

/// What both halves share.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) name: Arc<str>,
    pub(super) mtu: Arc<AtomicU32>,
    pub(super) counters: Arc<QueueCounters>,
    /// What the kernel's side takes unfinished.
    pub(super) takes: OffloadSet,
    /// What is put back when the last queue goes.
    pub(super) found: Option<Arc<Found>>,
}

impl Queue {
    fn fault(&self, what: &str, error: &io::Error) -> QueueFault {
        QueueFault::Host { what: format!("{what} {}", self.name), error: error.to_string() }
    }
}

/// Frames from the host.
#[derive(Debug)]
pub struct TapIngress {
    pub(super) queue: Queue,
    /// One slot: the buffer.
    pool: Pool,
}

impl TapIngress {
    pub(super) fn new(queue: Queue) -> Result<Self, MapError> {
        Ok(Self { queue, pool: Pool::new(1, BUFFER_BYTES)? })
    }

    /// Reads one frame to `at`; its length with the header, or `None` if there is none now or no
    /// room for the largest.
    #[inline]
    fn read(&mut self, at: usize) -> Result<Option<usize>, QueueFault> {
        let Some(buffer) = self.pool.slot_mut(0) else { return Ok(None) };
        let Some(room) = buffer.get_mut(at..at.saturating_add(ROOM)) else { return Ok(None) };
        loop {
            match rustix::io::read(&self.queue.fd, &mut *room) {
                Ok(len) => return Ok(Some(len)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(self.queue.fault("read from interface", &errno.into())),
            }
        }
    }

    /// Makes a frame of `len` bytes that were read to `at`.
    #[inline]
    fn parse(&self, at: usize, len: usize, frame: &mut Frame) -> Result<(), DropReason> {
        let bytes = |count: usize| u32::try_from(count).unwrap_or(0);
        let mut header = [0; HEADER];
        let span = Pool::span(0, bytes(at), bytes(HEADER));
        let _ = self.pool.store().reader(span).read(&mut header);
        let offload = vnet::decode(&header).ok_or(DropReason::BadOffload)?;
        let body = bytes(len.saturating_sub(HEADER));
        let span = Pool::span(0, bytes(at.saturating_add(HEADER)), body);
        if !frame.fill(self.pool.store().reader(span), span, offload) {
            return Err(DropReason::Runt);
        }
        let checked = frame.offload.checked(frame.head(), frame.len());
        frame.offload = checked.ok_or(DropReason::BadOffload)?;
        Ok(())
    }
}

impl Ingress for TapIngress {
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a> {
        let most = frames.begin();
        let mut fault = None;
        let (mut count, mut bytes) = (0u64, 0u64);
        let mut at = 0;
        for _ in 0..most {
            if bytes >= BURST_BYTES {
                break;
            }
            let len = match self.read(at) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            };
            count = count.wrapping_add(1);
            bytes = bytes.wrapping_add(len.saturating_sub(HEADER) as u64);
            let Some(frame) = frames.slot() else { break };
            match self.parse(at, len, frame) {
                Ok(()) => frames.keep(),
                Err(reason) => self.queue.counters.ingress.dropped(reason, 1),
            }
            at = at.saturating_add(len.next_multiple_of(LINE));
        }
        if count > 0 {
            self.queue.counters.ingress.received(count, bytes);
        }
        frames.batch(self.pool.store(), fault)
    }

    fn release(&mut self) {}

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn arm(&mut self) -> bool {
        let mut fds = [PollFd::new(&self.queue.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An interrupted or failed look counts as "maybe": the next burst tells.
        poll(&mut fds, Some(&now)).map_or(true, |ready| ready > 0)
    }

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.queue.fd.as_fd())
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.queue.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// Frames to the host.
#[derive(Debug)]
pub struct TapEgress {
    queue: Queue,
    adapter: Adapter,
    /// Where an ordinary frame is put together.
    whole: Box<[u8; WHOLE]>,
}

impl TapEgress {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue, adapter: Adapter::default(), whole: Box::new([0; WHOLE]) }
    }
}

impl Queue {
    /// Sends frames that the kernel takes as they are.
    fn send(
        &self,
        batch: &Batch<'_>,
        picked: &[u16],
        whole: &mut [u8; WHOLE],
    ) -> Result<(), QueueFault> {
        // ORDERING: a number of its own; a frame beside a change of the MTU may see either.
        let mtu = self.mtu.load(Ordering::Relaxed);
        let egress = &self.counters.egress;
        let (mut count, mut bytes) = (0u64, 0u64);
        let mut result = Ok(());
        for (done, index) in picked.iter().enumerate() {
            let Some(frame) = batch.frames().get(usize::from(*index)) else { continue };
            match self.send_one(batch, frame, (mtu, whole)) {
                Outcome::Sent => {
                    count = count.wrapping_add(1);
                    bytes = bytes.wrapping_add(u64::from(frame.len()));
                }
                Outcome::Dropped(reason) => egress.dropped(reason, 1),
                Outcome::Gone(error) => {
                    let left = picked.len().saturating_sub(done) as u64;
                    egress.dropped(DropReason::UplinkError, left);
                    result = Err(self.fault("write to interface", &error));
                    break;
                }
            }
        }
        if count > 0 {
            egress.sent(count, bytes);
        }
        result
    }

    /// Sends one frame; what became of it.
    #[inline]
    fn send_one(
        &self,
        batch: &Batch<'_>,
        frame: &Frame,
        (mtu, whole): (u32, &mut [u8; WHOLE]),
    ) -> Outcome {
        let room = mtu.saturating_add(ETHERNET);
        let room = if frame.tag().is_some() { room.saturating_add(TAG) } else { room };
        if segment_bytes(frame) > room {
            return Outcome::Dropped(DropReason::Oversize);
        }
        let header = vnet::encode(&frame.offload);
        let head = frame.head();
        // One buffer costs the kernel less than pieces, by more than a copy of an ordinary frame.
        let end = HEADER.saturating_add(frame.len() as usize);
        let Some(place) = whole.get_mut(..end) else {
            let parts = (&header, head);
            return if frame.body.count <= FEW_PIECES {
                self.send_pieces::<FEW>(batch, frame, parts)
            } else {
                self.send_pieces::<PIECES_MAX>(batch, frame, parts)
            };
        };
        if !put_together(place, (&header, head), batch.body(frame)) {
            return Outcome::Dropped(DropReason::UplinkError);
        }
        let bytes = &*place;
        self.offer(|| rustix::io::write(&self.fd, bytes).map(drop).map_err(io::Error::from))
    }

    /// Sends a frame from where its parts are.
    fn send_pieces<const N: usize>(
        &self,
        batch: &Batch<'_>,
        frame: &Frame,
        (header, head): (&[u8; HEADER], &[u8]),
    ) -> Outcome {
        let whole;
        let mut pieces = Pieces::<N>::new();
        let mut fits = pieces.private(header) && pieces.private(head);
        let mut body = batch.body(frame);
        while let Some(piece) = body.next_piece(u32::MAX) {
            fits &= pieces.guest(piece);
        }
        if !fits {
            whole = vnet::in_one_piece(header, head, batch.body(frame));
            pieces = Pieces::new();
            let _fits = pieces.private(&whole);
        }
        self.offer(|| pieces.write(self.fd.as_fd()))
    }

    /// Offers a frame to the kernel.
    #[inline]
    fn offer(&self, write: impl Fn() -> io::Result<()>) -> Outcome {
        let mut tries = TRIES;
        loop {
            let Err(error) = write() else { return Outcome::Sent };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::ENOBUFS) if tries > 1 => {
                    tries = tries.wrapping_sub(1);
                    std::hint::spin_loop();
                }
                Some(libc::EAGAIN | libc::ENOBUFS) => {
                    return Outcome::Dropped(DropReason::UplinkBusy);
                }
                Some(libc::EBADFD | libc::EBADF) => return Outcome::Gone(error),
                _ => return Outcome::Dropped(DropReason::UplinkError),
            }
        }
    }
}

/// Fills `place` with the parts of a frame; false if there are fewer bytes.
#[inline]
fn put_together(place: &mut [u8], (header, head): (&[u8], &[u8]), mut body: Reader<'_>) -> bool {
    let Some((start, rest)) = place.split_at_mut_checked(header.len()) else { return false };
    let Some((next, rest)) = rest.split_at_mut_checked(head.len()) else { return false };
    start.copy_from_slice(header);
    next.copy_from_slice(head);
    body.read(rest) == rest.len()
}

/// What became of a frame.
enum Outcome {
    Sent,
    Dropped(DropReason),
    /// The interface does not exist any more.
    Gone(io::Error),
}

impl Egress for TapEgress {
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault> {
        let Self { queue, adapter, whole } = self;
        let counters = &queue.counters.egress;
        let way = Way { takes: queue.takes, lost: DropReason::UplinkError, counters };
        adapter.send(batch, picked, &way, |batch, picked| queue.send(batch, picked, whole))
    }

    fn notify(&mut self) -> Notified {
        Notified::Nobody
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        &self.queue.counters
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

#[cfg(test)]
mod tests;
