//! Frames that wait because the guest's vIOMMU has not translated the next buffer yet.
//!
//! The ring asks for its address, and the frames go into a [`Backlog`], in their order: whoever
//! sends meanwhile is behind them. When the answer has come ([`Egress::resume`](port::Egress), or
//! the next send) they are delivered. Nobody waits for them.

use port::backlog::Backlog;
use port::{BURST_MAX, Batch, DropReason, FrameBuf, QueueFault};

use super::Receiveq;

impl Receiveq {
    /// Gives it a place for frames that wait for translations, with those that wait already. A
    /// queue without one drops them. One that is not behind a vIOMMU keeps it only until what
    /// waits is sent.
    pub fn set_backlog(&mut self, backlog: Backlog) {
        self.stalled = !backlog.is_empty();
        self.backlog = Some(backlog);
        self.drop_if_done();
    }

    fn drop_if_done(&mut self) {
        if !self.stalled && !self.parts.queue.is_translated() {
            self.backlog = None;
        }
    }

    /// Takes that place, with what waits.
    pub fn take_backlog(&mut self) -> Option<Backlog> {
        self.stalled = false;
        self.backlog.take()
    }

    /// Whether frames wait from now on: the ring has no room because it asked for an address.
    #[cold]
    pub(super) fn stalls(&mut self) -> bool {
        self.stalled = self.backlog.is_some() && self.parts.queue.is_waiting();
        self.stalled
    }

    /// Whether an address that was missing may be known by now: something has changed since the
    /// ring was looked at.
    #[cold]
    pub(super) fn has_changed(&self) -> bool {
        self.backlog.is_some() && self.parts.queue.has_available()
    }

    /// Keeps frames until the ring has room.
    #[cold]
    pub(super) fn hold(&mut self, batch: &Batch<'_>, picked: &[u16]) {
        let all = picked.len() as u64;
        let lost = self.backlog.as_mut().map_or(all, |backlog| backlog.put_picked(batch, picked));
        if lost > 0 {
            self.parts.counters.egress.dropped(DropReason::NotTranslated, lost);
        }
    }

    /// Sends behind what waits.
    #[cold]
    pub(super) fn send_behind(
        &mut self,
        batch: &Batch<'_>,
        picked: &[u16],
    ) -> Result<(), QueueFault> {
        if let Err(fault) = self.deliver_held() {
            self.parts.counters.egress.dropped(DropReason::PortDown, picked.len() as u64);
            return Err(fault);
        }
        if self.stalled {
            self.hold(batch, picked);
            return Ok(());
        }
        self.send_now(batch, picked)
    }

    /// Delivers what waits, as far as the ring has room by now.
    pub(super) fn deliver_held(&mut self) -> Result<(), QueueFault> {
        if !self.stalled || self.parts.queue.is_waiting() {
            return Ok(());
        }
        self.stalled = false;
        let mut frames = FrameBuf::default();
        let mut all = [0u16; BURST_MAX];
        (0..).zip(&mut all).for_each(|(index, place)| *place = index);
        while let Some(waiting) = self.backlog.as_mut().and_then(Backlog::take) {
            let batch = waiting.batch(&mut frames);
            let count = batch.len();
            let result = self.deliver_each(&batch, all.get(..count).unwrap_or(&all));
            drop(batch);
            let done = count.saturating_sub(*result.as_ref().unwrap_or(&0));
            let Some(backlog) = &mut self.backlog else { break };
            backlog.give_back(waiting, done);
            if let Err(fault) = result {
                let lost = backlog.clear();
                self.parts.counters.egress.dropped(DropReason::PortDown, lost);
                return Err(fault);
            }
            if self.stalled {
                break;
            }
        }
        self.drop_if_done();
        Ok(())
    }
}
