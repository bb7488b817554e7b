//! From what the driver set up to running queues.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::QueueCounters;
use virtq::mem::{GuestMap, MapError};
use virtq::{ChainBuf, QueueConfig, QueueError, RingPosition, Virtq};
use vm_memory::GuestMemoryBackend;

use super::{DRIVER_OK, Device};
use crate::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts, features, notify};

/// The notifications of one queue.
#[derive(Debug, Clone, Default)]
pub struct QueueEvents {
    /// Becomes readable when the driver kicks. Only that of the control queue is read here, so it
    /// must be the VMM's own; wait for edges of the others, or read them: see
    /// [`port::Ingress::wake_fd`].
    pub kick: Option<Arc<OwnedFd>>,
    /// Written to call the driver.
    pub call: Option<Arc<OwnedFd>>,
}

/// Both halves of a pair; a queue that the driver did not enable is absent.
#[derive(Debug)]
pub struct QueuePair {
    /// Towards the driver.
    pub receiveq: Option<Receiveq>,
    /// From the driver.
    pub transmitq: Option<Transmitq>,
}

/// The control queue, for [`Device::serve_control`].
#[derive(Debug)]
pub struct ControlQueue {
    pub(super) queue: Virtq,
    pub(super) chains: ChainBuf,
    pub(super) events: QueueEvents,
}

impl ControlQueue {
    pub(super) fn publish_and_call(&mut self) {
        self.queue.publish();
        // ORDERING: between the publication and the look at what the driver wants, as
        // `Virtq::needs_call` asks for; pairs with the driver's fence in its own arming.
        fence(Ordering::SeqCst);
        if self.queue.needs_call() {
            self.events.call.iter().for_each(|call| notify::signal(call));
        }
    }
}

/// The running queues of a device.
#[derive(Debug)]
pub struct Activated {
    /// All pairs that may be used; those above the active number are disabled.
    pub pairs: Vec<QueuePair>,
    /// The control queue, if it was negotiated and set up.
    pub control: Option<ControlQueue>,
}

/// Why a device could not be activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// The driver is not ready.
    #[error("the driver has not set DRIVER_OK")]
    NotReady,
    /// The guest's memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// The driver set a queue up in a way that is not allowed.
    #[error("queue {index}: {error}")]
    Queue {
        /// Index of the queue.
        index: usize,
        /// What is wrong with it.
        error: QueueError,
    },
}

impl Device {
    /// Starts the queues that the driver enabled. `events` gives the notifications of each queue,
    /// `counters` those of each pair.
    ///
    /// # Errors
    ///
    /// [`ActivateError`]; see [`Device::needs_reset`] for what to tell the driver.
    pub fn activate<M>(
        &mut self,
        memory: &Arc<M>,
        mut events: impl FnMut(usize) -> QueueEvents,
        mut counters: impl FnMut(u16) -> Arc<QueueCounters>,
    ) -> Result<Activated, ActivateError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        if self.status & DRIVER_OK == 0 {
            return Err(ActivateError::NotReady);
        }
        let map = GuestMap::new(Arc::clone(memory))?;
        let usable = if self.has_pairs() { self.settings.queue_pairs } else { 1 };
        let mut pairs = Vec::new();
        for pair in 0..usable {
            let receive = usize::from(pair).saturating_mul(2);
            let transmit = receive.saturating_add(1);
            let counters = counters(pair);
            let rx = self.start(receive, &map)?;
            let tx = self.start(transmit, &map)?;
            pairs.push(QueuePair {
                receiveq: rx.map(|q| self.receiveq(receive, q, events(receive), &counters)),
                transmitq: tx.map(|q| self.transmitq(transmit, q, events(transmit), &counters)),
            });
        }
        let control = match self.control_index() {
            Some(index) => self.start(index, &map)?.map(|queue| {
                let events = events(index);
                ControlQueue { queue, chains: ChainBuf::default(), events }
            }),
            None => None,
        };
        Ok(Activated { pairs, control })
    }

    /// Starts one pair again after the driver reset a queue of it ([`Device::reset_queue`]) and
    /// enabled it anew: only queue `index` is started, the other half of the pair is absent.
    ///
    /// # Errors
    ///
    /// As [`Device::activate`].
    pub fn activate_queue<M>(
        &mut self,
        index: usize,
        memory: &Arc<M>,
        events: QueueEvents,
        counters: &Arc<QueueCounters>,
    ) -> Result<QueuePair, ActivateError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        if self.status & DRIVER_OK == 0 {
            return Err(ActivateError::NotReady);
        }
        let map = GuestMap::new(Arc::clone(memory))?;
        let queue = self.start(index, &map)?;
        let mut pair = QueuePair { receiveq: None, transmitq: None };
        if index.is_multiple_of(2) {
            pair.receiveq = queue.map(|q| self.receiveq(index, q, events, counters));
        } else {
            pair.transmitq = queue.map(|q| self.transmitq(index, q, events, counters));
        }
        Ok(pair)
    }

    fn start(&self, index: usize, map: &GuestMap) -> Result<Option<Virtq>, ActivateError> {
        let Some(setup) = self.queues.get(index).filter(|setup| setup.ready) else {
            return Ok(None);
        };
        let layout = features::layout(self.acked);
        let config = QueueConfig {
            layout,
            size: setup.size,
            desc: setup.desc,
            driver: setup.driver,
            device: setup.device,
            features: features::ring_features(self.acked),
            position: RingPosition::start(layout),
        };
        config.activate(map).map(Some).map_err(|error| ActivateError::Queue { index, error })
    }

    fn options(&self, index: usize) -> QueueOptions {
        let enabled = index < usize::from(self.active_pairs).saturating_mul(2);
        let mtu = self.settings.mtu.unwrap_or(u16::MAX);
        QueueOptions { enabled, ..features::queue_options(self.acked, mtu) }
    }

    fn receiveq(
        &self,
        index: usize,
        queue: Virtq,
        events: QueueEvents,
        counters: &Arc<QueueCounters>,
    ) -> Receiveq {
        let mut receiveq = Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue,
            kick: events.kick,
            call: events.call,
            counters: Arc::clone(counters),
            options: self.options(index),
        });
        receiveq.set_filter(Some(self.filter.clone()));
        receiveq.report_hash(self.hash.clone());
        receiveq.follow_offloads(self.guest_offloads.clone());
        receiveq
    }

    fn transmitq(
        &self,
        index: usize,
        queue: Virtq,
        events: QueueEvents,
        counters: &Arc<QueueCounters>,
    ) -> Transmitq {
        Transmitq::new(TransmitqParts {
            watch: Default::default(),
            queue,
            kick: events.kick,
            call: events.call,
            counters: Arc::clone(counters),
            options: self.options(index),
        })
    }
}
