//! A running virtqueue, device side.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::ChainError;
use crate::chain::{ChainBuf, Chains, Token};
use crate::config::{Layout, QueueConfig, RingPosition};
use crate::dirty::RingLog;
use crate::inflight::Inflight;
use crate::iotlb::RingIotlb;
use crate::mem::RecordPage;
use crate::packed::Packed;
use crate::record::Record;
use crate::split::Split;

/// What the driver was told about kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kicks {
    /// Nothing since the start: whatever a predecessor left in the ring.
    Unknown,
    /// To send them.
    Enabled,
    /// To save them.
    Disabled,
}

/// A running virtqueue. An enum, not a trait object: one branch per burst. This branch is also
/// where further variants of the hot loops are chosen.
#[derive(Debug)]
pub enum Virtq {
    /// Descriptor table, available ring, used ring.
    Split(Split),
    /// One descriptor ring.
    Packed(Packed),
}

/// Runs one expression on whichever queue it is.
macro_rules! either {
    ($self:expr, $queue:ident => $do:expr) => {
        match $self {
            Virtq::Split($queue) => $do,
            Virtq::Packed($queue) => $do,
        }
    };
}

impl Virtq {
    /// Reads up to `max` chains with one look at the available ring. Chains before a broken one
    /// are returned, the fault with them; a broken queue returns its fault and nothing else, but
    /// what was popped before can still be completed.
    pub fn pop<'a>(&'a mut self, buf: &'a mut ChainBuf, max: usize) -> Chains<'a> {
        if self.is_tracked() {
            return self.pop_tracked(buf, max);
        }
        let fault = either!(self, queue => queue.pop(buf, max));
        buf.chains.pad();
        Chains::new(buf, fault)
    }

    /// Says that the device only reads from this queue: entries of indirect tables in packed rings
    /// are readable then, whatever their flags. DPDK 22.11 leaves WRITE on entries of what it
    /// transmits, now here, now there. Direct descriptors, and split rings, stay as strict.
    pub fn read_only(&mut self) {
        if let Self::Packed(queue) = self {
            queue.read_only();
        }
    }

    /// Keeps `page` up to date from now on, so that [`QueueConfig::recover`] finds the position
    /// after a death at any instruction. Chains must be completed in the order in which they were
    /// popped, and those of one call of a `complete` are published together: with a record, each
    /// call publishes what earlier ones completed.
    pub fn set_record(&mut self, page: RecordPage) {
        let record = Record::new(page);
        either!(self, queue => queue.set_record(record));
    }

    /// Takes back the last `tokens` popped and not completed, newest last: they come again.
    pub fn unpop(&mut self, tokens: &[Token]) {
        if !self.is_tracked() {
            return either!(self, queue => queue.unpop(tokens));
        }
        self.publish();
        let before = either!(self, queue => queue.outstanding());
        either!(self, queue => queue.unpop(tokens));
        let after = either!(self, queue => queue.outstanding());
        if let Some(inflight) = either!(self, queue => queue.inflight()) {
            inflight.returned(before.wrapping_sub(after));
        }
    }

    /// Notes in the front end's region what is in flight, from now on, when nothing is. As with a
    /// record, chains must be completed in their order, and each call of a `complete`, `pop` or
    /// `unpop` publishes what earlier ones completed.
    pub fn set_inflight(&mut self, mut inflight: Inflight) {
        inflight.begin(self.position().refetch());
        *either!(self, queue => queue.inflight()) = Some(Box::new(inflight));
    }

    #[inline(always)]
    fn is_tracked(&self) -> bool {
        either!(self, queue => queue.is_tracked())
    }

    /// Pops chains and notes them; what was completed before is published first.
    #[inline(never)]
    fn pop_tracked<'a>(&'a mut self, buf: &'a mut ChainBuf, max: usize) -> Chains<'a> {
        self.publish();
        let fault = either!(self, queue => queue.pop(buf, max));
        either!(self, queue => queue.track(buf));
        buf.chains.pad();
        Chains::new(buf, fault)
    }

    /// Completes chains that are tracked.
    #[inline(never)]
    fn complete_tracked(&mut self, complete: impl FnOnce(&mut Self)) {
        self.publish();
        let before = either!(self, queue => queue.outstanding());
        complete(self);
        let after = either!(self, queue => queue.outstanding());
        if let Some(inflight) = either!(self, queue => queue.inflight()) {
            inflight.completing(before.wrapping_sub(after));
        }
    }

    #[inline(never)]
    fn publish_tracked(&mut self) {
        let position = self.position();
        let Some(inflight) = either!(self, queue => queue.inflight()) else { return };
        if inflight.has_batch() {
            inflight.publishing(position);
            either!(self, queue => queue.publish());
            if let Some(inflight) = either!(self, queue => queue.inflight()) {
                inflight.published(position);
            }
        }
    }

    /// Asks the CPU for what the next burst of `count` chains needs. For queues whose driver keeps
    /// many chains available (receiveqs): asked for too early, their lines would have to go back.
    #[inline]
    pub fn prefetch(&mut self, count: usize) {
        either!(self, queue => queue.prefetch(count));
    }

    /// Writes the used entry of one chain; the driver sees it after [`Self::publish`].
    #[inline]
    pub fn complete(&mut self, token: Token, written: u32) {
        if self.is_tracked() {
            return self
                .complete_tracked(|this| either!(this, queue => queue.complete(token, written)));
        }
        either!(self, queue => queue.complete(token, written));
    }

    /// Completes chains that were popped in this order and that had nothing written
    /// (transmitq): one used entry for all of them with `VIRTIO_F_IN_ORDER`.
    #[inline]
    pub fn complete_all(&mut self, tokens: &[Token]) {
        if self.is_tracked() {
            return self
                .complete_tracked(|this| either!(this, queue => queue.complete_all(tokens)));
        }
        either!(self, queue => queue.complete_all(tokens));
    }

    /// Completes the first `written.len()` chains of the burst in `buf`, the last one popped, with
    /// the bytes written into each.
    #[inline]
    pub fn complete_written(&mut self, buf: &ChainBuf, written: &[u32]) {
        // They were written already, and noted before a successor could take them as done.
        if self.log().is_some() {
            self.log_buffers(buf, written);
        }
        if self.is_tracked() {
            self.complete_tracked(
                |this| either!(this, queue => queue.complete_written(buf, written)),
            );
        } else {
            either!(self, queue => queue.complete_written(buf, written));
        }
    }

    /// Notes writes in `log` from now on, or no more. To be called before anything else: buffers
    /// that were written before are not noted. All of the ring itself is: a predecessor may have
    /// ended between a store and its note, and recovery may have written to it.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        let log = log.map(Box::new);
        either!(self, queue => queue.set_log(log));
    }

    /// Takes addresses of buffers for those behind a vIOMMU. The ring's own addresses are those
    /// that it was activated with: it has to stop before they mean something else. Does not touch
    /// the ring.
    pub fn set_iotlb(&mut self, iotlb: Option<RingIotlb>) {
        let iotlb = iotlb.map(Box::new);
        either!(self, queue => queue.set_iotlb(iotlb));
    }

    /// Whether its addresses are those of a vIOMMU.
    pub fn is_translated(&self) -> bool {
        either!(self, queue => queue.is_translated())
    }

    /// Reads the next chains that are available, and asks for addresses in them that are not known:
    /// they will be needed soon. Each burst does so at its end.
    pub fn look_ahead(&mut self) {
        either!(self, queue => queue.look_ahead());
    }

    /// Whether the next chain is left in the ring until an address in it is known: the front end
    /// was asked for it.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        either!(self, queue => queue.is_waiting())
    }

    /// What is to be signalled after writes were noted, if they are.
    #[inline]
    pub fn log_call(&self) -> Option<&Arc<OwnedFd>> {
        self.log()?.call.as_ref()
    }

    #[inline(always)]
    fn log(&self) -> Option<&RingLog> {
        either!(self, queue => queue.log())
    }

    #[cold]
    fn log_buffers(&self, buf: &ChainBuf, written: &[u32]) {
        if let Some(log) = self.log() {
            log.buffers(buf, written);
        }
    }

    /// Completes all chains of the burst in `buf`, the last one popped, with nothing written: as
    /// [`Self::complete_all`].
    #[inline]
    pub fn complete_read(&mut self, buf: &ChainBuf) {
        if self.is_tracked() {
            return self.complete_tracked(|this| either!(this, queue => queue.complete_burst(buf)));
        }
        either!(self, queue => queue.complete_burst(buf));
    }

    /// Completes the first `count` chains of the burst in `buf`, the last one popped, with nothing
    /// written, and takes the others back: they come again.
    #[cold]
    pub fn complete_read_first(&mut self, buf: &ChainBuf, count: usize) {
        self.unpop_after(buf, count);
        let tokens: Vec<Token> = buf.tokens().take(count).collect();
        self.complete_all(&tokens);
    }

    /// Takes back the chains of the burst in `buf`, the last one popped, after the first `kept`.
    #[inline]
    pub fn unpop_after(&mut self, buf: &ChainBuf, kept: usize) {
        for token in buf.tokens().skip(kept).rev() {
            self.unpop(&[token]);
        }
    }

    /// Publishes all completions with one store. Does not notify.
    #[inline]
    pub fn publish(&mut self) {
        if self.is_tracked() {
            return self.publish_tracked();
        }
        either!(self, queue => queue.publish());
    }

    /// Whether the driver wants a call for what was published since the last look.
    /// A full fence must stand between [`Self::publish`] and this: one fence serves many queues.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        either!(self, queue => queue.needs_call())
    }

    /// Asks the driver for kicks, then looks once more: true if chains are already available
    /// (the caller must not sleep). Contains the full fence that makes this safe.
    pub fn enable_kicks(&mut self) -> bool {
        either!(self, queue => queue.enable_kicks())
    }

    /// Tells the driver that kicks are not needed. Costs nothing when it was told already.
    #[inline]
    pub fn disable_kicks(&mut self) {
        either!(self, queue => queue.disable_kicks());
    }

    /// Whether at least one chain is available right now. A broken queue has none.
    #[inline]
    pub fn has_available(&self) -> bool {
        either!(self, queue => queue.has_available())
    }

    /// The fault that broke the queue, if one did.
    pub fn fault(&self) -> Option<ChainError> {
        either!(self, queue => queue.fault())
    }

    /// The ring format.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Split(_) => Layout::Split,
            Self::Packed(_) => Layout::Packed,
        }
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        either!(self, queue => queue.size())
    }

    /// Where the device is now: popped but uncompleted chains count as fetched.
    pub fn position(&self) -> RingPosition {
        either!(self, queue => queue.position())
    }

    /// Ends the queue and gives back its configuration with the position to go on from: chains
    /// popped and not completed are handed back, so that avail equals used. Completions that were
    /// not published are published. (If chains were completed in another order than popped, those
    /// handed back are as many as were not completed, from the end: complete all of them first.)
    pub fn stop(mut self) -> QueueConfig {
        self.publish();
        either!(self, queue => queue.stop())
    }
}

#[cfg(test)]
mod tests;
