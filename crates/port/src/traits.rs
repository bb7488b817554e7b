//! The two halves of a queue pair as the switch sees them, and the switch as a port sees it.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use virtq::ChainError;

use crate::{Batch, FrameBuf, PortSnapshot, QueueCounters, Restored};

/// A port of the switch; never reused while the process lives, unless the port is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u16);

/// One queue pair of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId {
    /// The port.
    pub port: PortId,
    /// The pair: rings `2 * pair` and `2 * pair + 1` of a guest.
    pub pair: u16,
}

/// What takes a queue out of service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// A guest fault: its driver broke the ring.
    #[error("the driver broke the ring: {0}")]
    Ring(#[from] ChainError),
    /// A host fault: a system call of an uplink failed for good.
    #[error("{what}: {error}")]
    Host {
        /// What was tried on what.
        what: String,
        /// The kernel's answer.
        error: String,
    },
}

/// How a notification was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notified {
    /// The other side was called.
    Called,
    /// It did not ask for a call, or cannot be called.
    Suppressed,
    /// This kind of port has nobody to call.
    Nobody,
}

/// Where frames come from: a guest's transmitq, an uplink's receive side. One worker owns it.
pub trait Ingress: Send {
    /// Takes up to `BURST_MAX` frames. Counts them as received before it returns. The frames'
    /// bodies stay where they are until [`Self::release`].
    fn receive<'a>(&'a mut self, frames: &'a mut FrameBuf) -> Batch<'a>;

    /// Gives the buffers of the last batch back and publishes that; does not notify.
    fn release(&mut self);

    /// Notifies the other side of what was released, if it wants that, and counts how that was
    /// decided. The worker has executed a full fence since.
    fn notify(&mut self) -> Notified;

    /// Arms the wake-up: from now on [`Self::wake_fd`] becomes readable, or does so once more, when
    /// frames arrive. Returns true if there are frames already: the caller must not sleep.
    fn arm(&mut self) -> bool;

    /// Ends [`Self::arm`].
    fn disarm(&mut self);

    /// What becomes readable; none if this side can only be polled. It may stay readable: wait for
    /// edges (`EPOLLET`), or read it if it is an eventfd of your own.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Where drops on this way are counted.
    fn counters(&self) -> &Arc<QueueCounters>;

    /// Gives the concrete type back to who attached it.
    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send>;
}

/// Where frames go: a guest's receiveq, an uplink's transmit side. Used under a short lock.
pub trait Egress: Send {
    /// Sends the frames `picked` (indexes into `batch`), in that order. Each one is counted as
    /// sent or, with its reason, as dropped. Publishes; does not notify.
    ///
    /// # Errors
    ///
    /// A fault: the queue takes nothing more. Frames not sent are counted as dropped.
    fn send(&mut self, batch: &Batch<'_>, picked: &[u16]) -> Result<(), QueueFault>;

    /// Frames that [`Self::send`] keeps because the other side has something to say first.
    fn held(&self) -> u64 {
        0
    }

    /// Sends what is held, as far as that is possible by now; the other side has said something.
    /// Publishes; does not notify.
    ///
    /// # Errors
    ///
    /// A fault, as of [`Self::send`].
    fn resume(&mut self) -> Result<(), QueueFault> {
        Ok(())
    }

    /// Notifies the other side, if it wants that, and counts how that was decided. The worker has
    /// executed a full fence since.
    fn notify(&mut self) -> Notified;

    /// Where this way is counted.
    fn counters(&self) -> &Arc<QueueCounters>;

    /// Gives the concrete type back to who attached it.
    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any + Send>;
}

impl fmt::Debug for dyn Ingress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ingress")
    }
}

impl fmt::Debug for dyn Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Egress")
    }
}

/// What a port's owner (a vhost-user session, a tap, an embedding VMM) asks of the switch.
pub trait Fabric: Send + Sync {
    /// Hands an ingress to a worker. It must be disarmed; the worker looks at it at once, kick or
    /// not.
    fn attach_ingress(&self, at: QueueId, ingress: Box<dyn Ingress>);

    /// Takes an ingress back. When this returns, no worker touches it, nor the memory that its
    /// frames were in.
    fn detach_ingress(&self, at: QueueId) -> Option<Box<dyn Ingress>>;

    /// Opens a way out. From now on frames may be sent to this pair.
    fn attach_egress(&self, at: QueueId, egress: Box<dyn Egress>);

    /// Puts another way out in the place of one, and no frame finds none there: `change` is called
    /// once, under its lock, and must not wait. When this returns, no worker touches the old one,
    /// nor its memory. Returns whether there was one.
    fn exchange_egress(
        &self,
        at: QueueId,
        change: &mut dyn FnMut(Box<dyn Egress>) -> Box<dyn Egress>,
    ) -> bool;

    /// Closes a way out. When this returns, no worker touches it, nor its memory.
    fn detach_egress(&self, at: QueueId) -> Option<Box<dyn Egress>>;

    /// The other side of a way out has said something that frames may wait for there: those are
    /// sent. See [`Egress::resume`].
    fn resume_egress(&self, at: QueueId);

    /// Returns when nobody uses any more what was taken from a queue, its chains and frames, before
    /// this was called: every worker has ended the turn that it was in.
    fn quiesce(&self);

    /// For how long workers have moved frames so far, all together.
    fn busy(&self) -> Duration;

    /// Sends a frame of our own as if it had come from `from` (at most `HEAD_MAX` bytes).
    fn originate(&self, from: PortId, frame: &[u8]);

    /// What is known of a port's guest, for the switch that it moves to.
    fn snapshot(&self, port: PortId) -> PortSnapshot;

    /// Goes on with what another switch knew of a port's guest. It may be anything: a station that
    /// the port may not have is refused.
    fn restore(&self, port: PortId, snapshot: &PortSnapshot) -> Restored;
}
