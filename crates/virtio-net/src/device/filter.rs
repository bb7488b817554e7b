//! What the driver wants to receive (virtio 1.3, sections 5.1.6.5.1 to 5.1.6.5.3).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// Addresses in each table; longer tables let everything of their kind pass.
pub const FILTER_ENTRIES: usize = 64;

const VLANS: usize = 4096;
const ETHERTYPE_AT: usize = 12;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Whether it is a group address (broadcast too).
    #[inline]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it can be a station's address.
    pub fn is_unicast(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The filter of one device. After a reset it is promiscuous: a driver without `CTRL_RX` gets
/// everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RxFilter {
    /// The device's own address.
    pub mac: Mac,
    /// Everything passes.
    pub promiscuous: bool,
    /// All multicast passes.
    pub all_multicast: bool,
    /// All unicast passes.
    pub all_unicast: bool,
    /// No multicast passes.
    pub no_multicast: bool,
    /// No unicast passes.
    pub no_unicast: bool,
    /// No broadcast passes.
    pub no_broadcast: bool,
    /// Tagged frames pass only in VLANs that the driver added.
    pub vlan_filter: bool,
    pub(super) unicast: Table,
    pub(super) multicast: Table,
    vlans: Box<[bool]>,
}

/// A table of addresses; none means that it was too long: all pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table(Option<Vec<Mac>>);

impl Table {
    pub(super) fn new(entries: Vec<Mac>) -> Self {
        Self((entries.len() <= FILTER_ENTRIES).then_some(entries))
    }

    fn passes(&self, mac: Mac) -> bool {
        self.0.as_ref().is_none_or(|entries| entries.contains(&mac))
    }
}

impl RxFilter {
    /// The filter after a reset.
    pub fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            vlan_filter: false,
            unicast: Table::new(Vec::new()),
            multicast: Table::new(Vec::new()),
            vlans: vec![false; VLANS].into(),
        }
    }

    /// Adds or removes a VLAN. Returns false if there is no such VLAN.
    pub fn set_vlan(&mut self, vlan: u16, passes: bool) -> bool {
        let Some(place) = self.vlans.get_mut(usize::from(vlan)) else { return false };
        *place = passes;
        true
    }

    /// Whether a frame that starts with `head` is for the driver.
    pub fn passes(&self, head: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(destination) = head.first_chunk::<6>() else { return false };
        self.passes_vlan(head) && self.passes_destination(Mac(*destination))
    }

    fn passes_vlan(&self, head: &[u8]) -> bool {
        let tag = head.get(ETHERTYPE_AT..).and_then(|rest| rest.first_chunk::<4>());
        match tag {
            Some([0x81, 0x00, hi, lo]) if self.vlan_filter => {
                let vlan = u16::from_be_bytes([*hi, *lo]) & 0xfff;
                self.vlans.get(usize::from(vlan)).copied().unwrap_or(false)
            }
            _ => true,
        }
    }

    fn passes_destination(&self, mac: Mac) -> bool {
        if mac.0 == [0xff; 6] {
            !self.no_broadcast
        } else if mac.is_group() {
            !self.no_multicast && (self.all_multicast || self.multicast.passes(mac))
        } else {
            !self.no_unicast && (self.all_unicast || mac == self.mac || self.unicast.passes(mac))
        }
    }
}

/// A filter that the control queue writes and receiveqs read, once per burst.
#[derive(Debug, Clone)]
pub struct SharedFilter(Arc<RwLock<RxFilter>>);

impl SharedFilter {
    /// Shares `filter`.
    pub fn new(filter: RxFilter) -> Self {
        Self(Arc::new(RwLock::new(filter)))
    }

    /// Looks at it.
    pub fn read<T>(&self, look: impl FnOnce(&RxFilter) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes it.
    pub fn update<T>(&self, change: impl FnOnce(&mut RxFilter) -> T) -> T {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}
