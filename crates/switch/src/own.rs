//! Frames of our own, sent from the control thread.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Counter, FrameBuf, PortId, QueueCounters};
use virtq::mem::SegStore;

use crate::event::Way;
use crate::pipeline::{Env, Origin, Pipeline};
use crate::shared::Shared;
use crate::steering::ticks;
use crate::table::Table;

/// What it takes to send frames of our own.
#[derive(Debug)]
pub(crate) struct Own {
    pipeline: Pipeline,
    frames: FrameBuf,
    table: Arc<Table>,
    generation: u64,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) flood_copies: Counter,
}

impl Own {
    pub(crate) fn new(shared: &Shared) -> Self {
        let (table, generation) = shared.tables.current();
        Self {
            pipeline: Pipeline::default(),
            frames: FrameBuf::default(),
            table,
            generation,
            counters: Arc::default(),
            flood_copies: Counter::default(),
        }
    }

    /// Sends a frame as if it had come from `from`, and so under an address that is its own, if
    /// that is checked. Frames that find no destination are counted as drops of our own, and so not
    /// as originated.
    pub(crate) fn originate(&mut self, shared: &Shared, from: PortId, frame: &[u8]) {
        if shared.tables.generation() != self.generation {
            (self.table, self.generation) = shared.tables.current();
        }
        self.pipeline.fit(&self.table);
        self.frames.clear();
        let Some(slot) = self.frames.slot() else { return };
        slot.fill_private(frame);
        self.frames.keep();
        self.counters.ingress.received(1, frame.len() as u64);
        let mut origin = Origin::new(from, None, Arc::clone(&self.counters));
        let env = Env {
            fdb: &shared.fdb,
            table: &self.table,
            now: shared.now_secs(),
            ticks: ticks(shared.now_ns()),
            now_ns: shared.now_ns(),
            forward_reserved: shared.forward_reserved,
            flood_copies: &self.flood_copies,
        };
        let mut batch = self.frames.batch(SegStore::empty(), None);
        if let Some(guard) = self.table.entry(from).and_then(|entry| entry.guard.as_deref()) {
            guard.check_sources(&mut batch, &self.counters, None);
        }
        if batch.is_empty() {
            return;
        }
        self.pipeline.forward(&env, &mut origin, &mut batch);
        // ORDERING: SeqCst: as in a worker's turn, used entries before the reads of whether the
        // drivers want to be notified.
        fence(Ordering::SeqCst);
        self.pipeline.notify(&self.table, |_| ());
        for failure in std::mem::take(self.pipeline.failures()) {
            shared.report(failure.at, Way::Egress, failure.what);
        }
    }
}
