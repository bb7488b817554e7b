//! A running virtqueue, device side.

use crate::chain::{ChainBuf, Chains, Token};
use crate::config::{Layout, QueueConfig, RingPosition};

/// A running virtqueue. An enum, not a trait object: one branch per burst.
#[derive(Debug)]
pub enum Virtq {}

impl Virtq {
    /// Reads up to `max` chains with one look at the available ring. Chains before a broken one
    /// are returned, the fault with them; a broken queue returns its fault and nothing else.
    pub fn pop<'a>(&'a mut self, buf: &'a mut ChainBuf, max: usize) -> Chains<'a> {
        let _ = (buf, max);
        todo!()
    }

    /// Takes back the last `tokens` popped and not completed, newest last: they come again.
    pub fn unpop(&mut self, tokens: &[Token]) {
        let _ = tokens;
        todo!()
    }

    /// Writes the used entry of one chain; the driver sees it after [`Self::publish`].
    pub fn complete(&mut self, token: Token, written: u32) {
        let _ = (token, written);
        todo!()
    }

    /// Completes chains that were popped in this order and that had nothing written
    /// (transmitq): one used entry for all of them with `VIRTIO_F_IN_ORDER`.
    pub fn complete_all(&mut self, tokens: &[Token]) {
        let _ = tokens;
        todo!()
    }

    /// Publishes all completions with one store. Does not notify.
    pub fn publish(&mut self) {
        todo!()
    }

    /// Whether the driver wants a call for what was published since the last look.
    /// A full fence must stand between [`Self::publish`] and this: one fence serves many queues.
    pub fn needs_call(&mut self) -> bool {
        todo!()
    }

    /// Asks the driver for kicks, then looks once more: true if chains are already available
    /// (the caller must not sleep). Contains the full fence that makes this safe.
    pub fn enable_kicks(&mut self) -> bool {
        todo!()
    }

    /// Tells the driver that kicks are not needed.
    pub fn disable_kicks(&mut self) {
        todo!()
    }

    /// Whether at least one chain is available right now.
    pub fn has_available(&self) -> bool {
        todo!()
    }

    /// The ring format.
    pub fn layout(&self) -> Layout {
        todo!()
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        todo!()
    }

    /// Where the device is now: popped but uncompleted chains count as fetched.
    pub fn position(&self) -> RingPosition {
        todo!()
    }

    /// Ends the queue and gives back its configuration with the position to go on from: chains
    /// popped and not completed are handed back, so that avail equals used.
    pub fn stop(self) -> QueueConfig {
        todo!()
    }
}
