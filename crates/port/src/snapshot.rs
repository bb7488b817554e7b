//! What a switch knows of a port's guest, for the switch that the guest moves to.

use packet::{MacAddr, VlanId};

/// A station that was learned behind the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station {
    /// Its VLAN.
    pub vlan: VlanId,
    /// Its address.
    pub mac: MacAddr,
    /// Seconds since it was seen.
    pub age_secs: u32,
}

/// A flow, and the pair on which the guest last sent frames of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowPlace {
    /// [`packet::flow_hash`].
    pub hash: u32,
    /// The pair.
    pub pair: u16,
    /// Milliseconds since it was noted, nearly.
    pub age_ms: u32,
}

/// What a port has counted, of all its pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortTotals {
    /// Frames from the guest.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames to the guest.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that were dropped, both ways.
    pub drops: u64,
}

impl PortTotals {
    /// The numbers, in the order of the fields.
    pub fn to_array(self) -> [u64; 5] {
        [self.rx_frames, self.rx_bytes, self.tx_frames, self.tx_bytes, self.drops]
    }

    /// From the numbers, in the order of the fields.
    pub fn from_array([rx_frames, rx_bytes, tx_frames, tx_bytes, drops]: [u64; 5]) -> Self {
        Self { rx_frames, rx_bytes, tx_frames, tx_bytes, drops }
    }

    /// The sum of both, number by number.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        let (mut sum, more) = (self.to_array(), more.to_array());
        for (to, from) in sum.iter_mut().zip(more) {
            *to = to.wrapping_add(from);
        }
        Self::from_array(sum)
    }
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortSnapshot {
    /// Stations behind the port.
    pub stations: Vec<Station>,
    /// Where the guest's flows are.
    pub flows: Vec<FlowPlace>,
    /// What was counted here and at all places where the guest was before.
    pub totals: PortTotals,
}

/// What a switch took of a [`PortSnapshot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restored {
    /// Stations that are behind the port now.
    pub stations: usize,
    /// Stations that may not be there, or for which there is no room.
    pub refused: usize,
    /// Flows.
    pub flows: usize,
}
