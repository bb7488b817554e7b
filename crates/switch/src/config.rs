//! What a switch and its ports are made from.

use std::fmt;
use std::sync::Arc;

use packet::{MacAddr, VlanId};

use crate::{FdbLimits, PortLimits, VlanRule};

/// How a switch works.
#[derive(Debug, Clone)]
pub struct SwitchConfig {
    /// The threads that move frames.
    pub workers: Workers,
    /// What they do when there is nothing to do.
    pub poll: PollMode,
    /// Microseconds without work after which an adaptive worker arms a queue's notification.
    pub poll_us: u32,
    /// Bounds of the forwarding database.
    pub fdb: FdbLimits,
    /// Whether frames to 01:80:c2:00:00:00 to 0f are forwarded.
    pub forward_reserved: bool,
    /// What every worker thread runs before it serves anything.
    pub at_start: AtStart,
}

/// What every worker thread runs once, on itself, before it serves anything: it may give up rights
/// that a worker does not need. By default nothing.
#[derive(Clone, Default)]
pub struct AtStart(pub Option<Arc<dyn Fn() + Send + Sync>>);

impl AtStart {
    pub(crate) fn run(&self) {
        if let Some(work) = &self.0 {
            work();
        }
    }
}

impl fmt::Debug for AtStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AtStart").field(&self.0.is_some()).finish()
    }
}

impl Default for SwitchConfig {
    fn default() -> Self {
        Self {
            workers: Workers::Unpinned(1),
            poll: PollMode::Adaptive,
            poll_us: 50,
            fdb: FdbLimits::default(),
            forward_reserved: false,
            at_start: AtStart::default(),
        }
    }
}

/// The threads that move frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workers {
    /// One thread on each of these CPUs; ingress queues go to the least loaded one.
    Cpus(Vec<usize>),
    /// So many threads, wherever the kernel puts them.
    Unpinned(usize),
    /// Every queue pair has a thread of its own.
    PerQueue,
    /// No threads: so many workers, each of which takes a turn when [`crate::Switch::turn`] is
    /// called. They share the ingress queues as threads do, and never sleep.
    Manual(usize),
}

/// What a worker does when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PollMode {
    /// Spins while there is work and a little longer, then sleeps.
    #[default]
    Adaptive,
    /// Never sleeps.
    Busy,
    /// Never spins: sleeps as soon as there is no work.
    Interrupt,
}

/// A port to be.
#[derive(Debug, Clone)]
pub struct PortConfig {
    /// Its name, unique in the switch.
    pub name: String,
    /// Which VLANs it carries.
    pub vlan: VlanRule,
    /// Stations that are known to be behind it.
    pub stations: Vec<(VlanId, MacAddr)>,
    /// The most queue pairs that may be attached to it.
    pub pairs: u16,
    /// The workers, by index, that serve its pairs in turn; if it is empty, any of them does. Not
    /// with [`Workers::PerQueue`].
    pub workers: Vec<usize>,
    /// Whether the flows that arrive on one pair are spread over all workers. Nothing is spread
    /// where there is one worker only; not with [`Workers::PerQueue`].
    pub spread: bool,
    /// Whether other hosts are behind it: a station that is fixed to a port without queues is then
    /// behind this one once it was seen here, until that port has queues again. So a guest can move
    /// away, and come, while nobody but other hosts can take its address.
    pub outward: bool,
    /// What it may send into the switch.
    pub limits: PortLimits,
}

impl PortConfig {
    /// A port that carries all VLANs and has one queue pair.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            vlan: VlanRule::Any,
            stations: Vec::new(),
            pairs: 1,
            workers: Vec::new(),
            spread: false,
            outward: false,
            limits: PortLimits::default(),
        }
    }
}
