//! An adapter: `vhost-user-backend`'s `VhostUserDaemon` serves our device.
//!
//! ```text
//!  front end ◄─ socket ─► VhostUserDaemon ─ event of ring 2i or 2i+1 ─► NetBackend ─► handler
//!                         (its threads, its rings' state)                (our queues, one event)
//! ```
//!
//! The daemon keeps the rings' state in its own queue type, and may change it between two events.
//! So each event starts our queues from that state and gives the positions back at its end: the
//! price is a call more than needed with `EVENT_IDX`, after which nothing is remembered.
//!
//! **Not supported.** Packed rings and the reset of a single ring (the daemon has neither),
//! in-flight records, and frames that come to a guest at another time than during an event of the
//! same pair.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Ingress, QueueCounters, QueueFault};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_queue::QueueT;
use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{Layout, QueueConfig, RingPosition, Virtq};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::{Receiveq, ReceiveqParts, Transmitq, TransmitqParts, features};

/// The most pairs: the daemon watches 32 rings.
pub const PAIRS_MAX: u16 = 16;
/// What the daemon's rings cannot do. Front ends that offer `RING_RESET` may reset a ring without
/// telling the back end.
const NOT_WITH_THE_DAEMON: u64 = features::RING_PACKED | features::RING_RESET;

/// Works on a pair when something happened to it: takes frames from the transmitq, puts frames
/// into the receiveq.
pub trait PairHandler: Send + Sync {
    /// Handles what is there; called again while there is more.
    ///
    /// # Errors
    ///
    /// A fault ends the event; the daemon logs it.
    fn handle(&mut self, tx: &mut Transmitq, rx: &mut Receiveq) -> Result<(), QueueFault>;
}

/// A net device for `VhostUserDaemon`.
#[derive(Debug)]
pub struct NetBackend<H> {
    handler: H,
    pairs: u16,
    mtu: u16,
    acked: u64,
    memory: Option<GuestMap>,
    counters: Vec<Arc<QueueCounters>>,
}

impl<H: PairHandler> NetBackend<H> {
    /// A device of 1 to [`PAIRS_MAX`] pairs.
    pub fn new(pairs: u16, mtu: u16, handler: H) -> Self {
        let pairs = pairs.clamp(1, PAIRS_MAX);
        let counters = (0..pairs).map(|_| Arc::default()).collect();
        Self { handler, pairs, mtu, acked: 0, memory: None, counters }
    }

    /// The counters of a pair.
    pub fn counters(&self, pair: u16) -> Option<&Arc<QueueCounters>> {
        self.counters.get(usize::from(pair))
    }

    fn start(&self, vring: &VringRwLock) -> io::Result<Option<Virtq>> {
        let vring = vring.get_ref();
        let queue = vring.get_queue();
        let Some(memory) = self.memory.as_ref().filter(|_| queue.ready()) else {
            return Ok(None);
        };
        let config = QueueConfig {
            layout: Layout::Split,
            size: queue.size(),
            desc: GuestPhysAddr(queue.desc_table()),
            driver: GuestPhysAddr(queue.avail_ring()),
            device: GuestPhysAddr(queue.used_ring()),
            features: features::ring_features(self.acked),
            position: RingPosition::Split { avail: queue.next_avail(), used: queue.next_used() },
        };
        config.activate(memory).map(Some).map_err(io::Error::other)
    }

    fn serve(&mut self, pair: usize, rx: &VringRwLock, tx: &VringRwLock) -> io::Result<()> {
        let (Some(receive), Some(transmit)) = (self.start(rx)?, self.start(tx)?) else {
            return Ok(());
        };
        let counters = self.counters.get(pair).cloned().unwrap_or_default();
        let options = features::queue_options(self.acked, self.mtu);
        let mut receiveq = Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue: receive,
            kick: None,
            call: None,
            counters: Arc::clone(&counters),
            options: crate::QueueOptions { enabled: rx.get_ref().is_enabled(), ..options },
        });
        let options = crate::QueueOptions { enabled: tx.get_ref().is_enabled(), ..options };
        let queue = transmit;
        let parts = TransmitqParts {
            watch: Default::default(),
            queue,
            kick: None,
            call: None,
            counters,
            options,
        };
        let mut transmitq = Transmitq::new(parts);
        let result = self.work((&mut receiveq, rx), (&mut transmitq, tx));
        keep_position(rx, receiveq.into_parts().queue);
        keep_position(tx, transmitq.into_parts().queue);
        result
    }

    fn work(
        &mut self,
        (receiveq, rx): (&mut Receiveq, &VringRwLock),
        (transmitq, tx): (&mut Transmitq, &VringRwLock),
    ) -> io::Result<()> {
        loop {
            let handled = self.handler.handle(transmitq, receiveq);
            transmitq.release();
            // ORDERING: between the publications of both queues and the looks at what the driver
            // wants; pairs with the driver's fence in its own arming.
            fence(Ordering::SeqCst);
            if receiveq.wants_call() {
                rx.signal_used_queue()?;
            }
            if transmitq.wants_call() {
                tx.signal_used_queue()?;
            }
            handled.map_err(io::Error::other)?;
            if !transmitq.arm() {
                return Ok(());
            }
        }
    }
}

/// Gives a ring's position back to the daemon.
fn keep_position(vring: &VringRwLock, queue: Virtq) {
    if let RingPosition::Split { avail, used } = queue.stop().position {
        vring.set_queue_next_avail(avail);
        vring.set_queue_next_used(used);
    }
}

impl<H: PairHandler> VhostUserBackendMut for NetBackend<H> {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(self.pairs).saturating_mul(2)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(crate::device::QUEUE_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        let vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        features::DEVICE_FEATURES & !NOT_WITH_THE_DAEMON | vhost
    }

    fn acked_features(&mut self, features: u64) {
        self.acked = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {
        // Known from the features.
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let map = GuestMap::new(memory.memory().into_inner()).map_err(io::Error::other)?;
        self.memory = Some(map);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread_id: usize,
    ) -> io::Result<()> {
        let pair = usize::from(device_event / 2);
        match vrings.as_chunks::<2>().0.get(pair) {
            Some([rx, tx]) => self.serve(pair, rx, tx),
            None => Ok(()),
        }
    }
}
