//! What a ring of either layout does behind a vIOMMU, before and after a burst.

use super::RingIotlb;
use crate::ChainError;
use crate::chain::ChainBuf;
use crate::mem::{GuestPhysAddr, Hit, RawDesc, RawSeg, Simple};

/// Ring entries whose addresses are asked for before their turn comes.
const LOOK_AHEAD: u16 = 64;

/// What a ring knows of where its buffers are, and whether it goes on.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// What the last buffer was in.
    pub(crate) hit: Hit,
    /// Set by the first broken chain; then nothing is popped any more.
    pub(crate) fault: Option<ChainError>,
    /// How addresses are translated behind a vIOMMU.
    pub(crate) iotlb: Option<Box<RingIotlb>>,
}

impl Lookup {
    pub(crate) fn new() -> Self {
        Self { hit: Hit::none(), fault: None, iotlb: None }
    }

    /// Whether chains may be popped: the ring is not broken, and the next one does not wait for the
    /// front end.
    #[inline(always)]
    pub(crate) fn is_open(&self) -> bool {
        self.fault.is_none() && !self.is_waiting()
    }

    /// Whether the next chain waits for the front end.
    #[inline(always)]
    pub(crate) fn is_waiting(&self) -> bool {
        self.iotlb.as_ref().is_some_and(|iotlb| iotlb.is_waiting())
    }

    /// The buffer of a descriptor in one piece, if it is as `simple` wants it.
    #[inline]
    pub(crate) fn resolve<const BEHIND: bool>(
        &mut self,
        simple: &Simple,
        desc: RawDesc,
    ) -> Option<RawSeg> {
        if !simple.is_like(desc) {
            return None;
        }
        let found = self.hit.resolve(GuestPhysAddr(desc.addr), desc.len());
        if !BEHIND {
            return found;
        }
        found.or_else(|| self.iotlb.as_mut()?.resolve_one(&mut self.hit, desc))
    }

    /// Forgets what is not so any more.
    fn refresh(&mut self) {
        if self.iotlb.as_mut().is_some_and(|iotlb| iotlb.refresh()) {
            self.hit = Hit::none();
        }
    }
}

/// A ring of either layout.
pub(crate) trait Ring {
    fn lookup(&mut self) -> &mut Lookup;

    /// Ring entries of chains that were popped and not completed.
    fn outstanding(&self) -> u16;

    /// Pops chains, behind a vIOMMU.
    ///
    /// # Errors
    ///
    /// What is wrong with the chain after them.
    fn burst(&mut self, buf: &mut ChainBuf, max: usize) -> Result<(), ChainError>;

    /// Shows the descriptors of chains that will be popped later, each with whether it is a table:
    /// of the ring's next `most` entries those after `skip`. Returns how many of `most` there are.
    fn upcoming(&self, skip: u16, most: u16, look: impl FnMut(RawDesc, bool)) -> u16;
}

/// Pops chains whose addresses are known. One with an unknown address waits, it is no fault.
#[inline(never)]
pub(crate) fn pop(ring: &mut impl Ring, buf: &mut ChainBuf, max: usize) -> Option<ChainError> {
    ring.lookup().refresh();
    if !ring.lookup().is_open() {
        return ring.lookup().fault;
    }
    let before = ring.outstanding();
    let fault = ring.burst(buf, max).err();
    let popped = ring.outstanding().wrapping_sub(before);
    let lookup = ring.lookup();
    if let Some(iotlb) = lookup.iotlb.as_mut() {
        iotlb.looked = iotlb.looked.saturating_sub(popped);
        lookup.fault = fault.and_then(|fault| iotlb.judge(fault));
    }
    look_ahead(ring);
    ring.lookup().fault
}

/// Begins or ends translation. Touches nothing of the ring.
pub(crate) fn set_iotlb(ring: &mut impl Ring, iotlb: Option<Box<RingIotlb>>) {
    ring.lookup().iotlb = iotlb;
    ring.lookup().hit = Hit::none();
    ring.lookup().refresh();
}

/// Asks the front end for addresses of the next chains: of each once, until it is popped or
/// something was lost.
pub(crate) fn look_ahead(ring: &mut impl Ring) {
    let hit = ring.lookup().hit;
    let Some(mut iotlb) = ring.lookup().iotlb.take() else { return };
    iotlb.looked = ring.upcoming(iotlb.looked, LOOK_AHEAD, |desc, is_table| {
        if is_table || !(hit.holds(desc) || iotlb.knows(desc)) {
            iotlb.look_at(desc, is_table);
        }
    });
    ring.lookup().iotlb = Some(iotlb);
}
