//! What workers tell the control thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use port::{QueueFault, QueueId};
use rustix::event::{EventfdFlags, eventfd};

/// Something happened to a queue that its owner must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwitchEvent {
    /// An ingress or egress faulted and is served no more, until it is detached and attached. The
    /// switch does not log it: its owner does, as often as is good.
    Faulted {
        /// The pair.
        queue: QueueId,
        /// Which way of it.
        way: Way,
        /// Why.
        fault: QueueFault,
    },
    /// A bug: the half is gone, and all of its port is in quarantine until
    /// [`crate::Switch::reset_port`].
    Panicked {
        /// The pair.
        queue: QueueId,
        /// Which way of it.
        way: Way,
        /// What the panic said.
        text: String,
    },
}

/// A half of a queue pair, as the switch sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Into the switch: a guest's transmitq.
    Ingress,
    /// Out of the switch: a guest's receiveq.
    Egress,
}

/// The control thread's end: readable while there are events.
#[derive(Debug)]
pub struct Events {
    receiver: Mutex<Receiver<SwitchEvent>>,
    fd: OwnedFd,
}

impl Events {
    /// The next event, if one is there.
    pub fn next(&self) -> Option<SwitchEvent> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        receiver.try_recv().ok().or_else(|| {
            // Cleared first and looked at again, so that no event is left behind a cleared fd.
            let _ = rustix::io::read(&self.fd, &mut [0; 8]);
            receiver.try_recv().ok()
        })
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The workers' end.
#[derive(Debug)]
pub(crate) struct EventSender {
    sender: Sender<SwitchEvent>,
    fd: OwnedFd,
}

impl EventSender {
    pub(crate) fn send(&self, event: SwitchEvent) {
        // Nobody may be listening any more while the switch ends.
        let _ = self.sender.send(event);
        signal(&self.fd);
    }
}

/// Both ends.
pub(crate) fn events() -> std::io::Result<(EventSender, Events)> {
    let (sender, receiver) = channel();
    let fd = wake_fd()?;
    let events = Events { receiver: Mutex::new(receiver), fd: fd.try_clone()? };
    Ok((EventSender { sender, fd }, events))
}

/// An eventfd that never blocks.
pub(crate) fn wake_fd() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an eventfd readable.
pub(crate) fn signal(fd: &OwnedFd) {
    // It fails only when the count is full, and then the fd is readable.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}
