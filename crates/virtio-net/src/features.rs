//! Feature bits of the net device, and what a set of negotiated bits means for a queue.
//!
//! **Who answers for which bit.** A vhost-user back end offers only what the data path does.
//! `MAC` and `STATUS` describe the configuration space: the front end owns that and offers them
//! itself (QEMU does not even ask the back end); only a device that is embedded in a VMM offers
//! them. `CTRL_VQ`, `MQ` and `GUEST_ANNOUNCE` are served by the front end too, but front ends
//! mask what the back end does not offer (QEMU masks `MQ` and `GUEST_ANNOUNCE`, cloud-hypervisor
//! `CTRL_VQ` and `MQ`), so they must be offered here.
//!
//! **Offloads** are offered whatever the other ports can do: what an egress cannot take is made up
//! for in software (`port::Adapter`), which costs less than if each guest did it for itself.
//!
//! **Hashes.** `RSS` and `HASH_REPORT` are offered by embedded devices only: key and table come
//! through the control queue, which a vhost-user front end keeps to itself.
//!
//! **Not supported.** `NOTIFICATION_DATA`: it is the transport that reads notifications, and an
//! eventfd carries no data.

use virtio_bindings::{virtio_config as config, virtio_net as net, virtio_ring as ring};
use virtq::{Layout, RingFeatures};

use crate::{HeaderLen, OffloadSet, QueueOptions, options::DEFAULT_RETRIES};

/// The feature word with the bit of number `number` set.
const fn bit(number: u32) -> u64 {
    1 << number
}

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $from:ident :: $constant:ident;)+) => {
        $($(#[$doc])* pub const $name: u64 = bit($from::$constant);)+
    };
}

bits! {
    /// Device handles frames with a partial checksum.
    CSUM = net::VIRTIO_NET_F_CSUM;
    /// Driver handles frames with a partial checksum.
    GUEST_CSUM = net::VIRTIO_NET_F_GUEST_CSUM;
    /// Offloads towards the driver can be changed through the control queue.
    CTRL_GUEST_OFFLOADS = net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    /// The device says the largest MTU.
    MTU = net::VIRTIO_NET_F_MTU;
    /// The device has a MAC address.
    MAC = net::VIRTIO_NET_F_MAC;
    /// Driver can receive `TSOv4`.
    GUEST_TSO4 = net::VIRTIO_NET_F_GUEST_TSO4;
    /// Driver can receive `TSOv6`.
    GUEST_TSO6 = net::VIRTIO_NET_F_GUEST_TSO6;
    /// Driver can receive TSO with ECN.
    GUEST_ECN = net::VIRTIO_NET_F_GUEST_ECN;
    /// Device can receive `TSOv4`.
    HOST_TSO4 = net::VIRTIO_NET_F_HOST_TSO4;
    /// Device can receive `TSOv6`.
    HOST_TSO6 = net::VIRTIO_NET_F_HOST_TSO6;
    /// Device can receive TSO with ECN.
    HOST_ECN = net::VIRTIO_NET_F_HOST_ECN;
    /// Driver can receive USO over IPv4.
    GUEST_USO4 = net::VIRTIO_NET_F_GUEST_USO4;
    /// Driver can receive USO over IPv6.
    GUEST_USO6 = net::VIRTIO_NET_F_GUEST_USO6;
    /// Device can receive USO.
    HOST_USO = net::VIRTIO_NET_F_HOST_USO;
    /// A received frame may take several buffers.
    MRG_RXBUF = net::VIRTIO_NET_F_MRG_RXBUF;
    /// The configuration space has the link status.
    STATUS = net::VIRTIO_NET_F_STATUS;
    /// There is a control queue.
    CTRL_VQ = net::VIRTIO_NET_F_CTRL_VQ;
    /// Receive modes through the control queue.
    CTRL_RX = net::VIRTIO_NET_F_CTRL_RX;
    /// VLAN filter through the control queue.
    CTRL_VLAN = net::VIRTIO_NET_F_CTRL_VLAN;
    /// More receive modes through the control queue.
    CTRL_RX_EXTRA = net::VIRTIO_NET_F_CTRL_RX_EXTRA;
    /// The device can ask the driver to announce itself.
    GUEST_ANNOUNCE = net::VIRTIO_NET_F_GUEST_ANNOUNCE;
    /// Several queue pairs.
    MQ = net::VIRTIO_NET_F_MQ;
    /// MAC address through the control queue.
    CTRL_MAC_ADDR = net::VIRTIO_NET_F_CTRL_MAC_ADDR;
    /// The device reports the hash of a received frame.
    HASH_REPORT = net::VIRTIO_NET_F_HASH_REPORT;
    /// The driver says by a hash which receiveq frames go to.
    RSS = net::VIRTIO_NET_F_RSS;
    /// Indirect descriptor tables.
    INDIRECT_DESC = ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Event indexes for notification suppression.
    EVENT_IDX = ring::VIRTIO_RING_F_EVENT_IDX;
    /// Virtio 1.0 and later.
    VERSION_1 = config::VIRTIO_F_VERSION_1;
    /// Packed rings.
    RING_PACKED = config::VIRTIO_F_RING_PACKED;
    /// Buffers are used in the order in which they were made available.
    IN_ORDER = config::VIRTIO_F_IN_ORDER;
    /// The device is behind an IOMMU that the platform has.
    ACCESS_PLATFORM = config::VIRTIO_F_ACCESS_PLATFORM;
    /// Single queues can be reset.
    RING_RESET = config::VIRTIO_F_RING_RESET;
}

/// The bits that have an effect on the data path: offered by both kinds of device.
const DATA_PATH: u64 =
    VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT_DESC | RING_PACKED | IN_ORDER | RING_RESET;

/// Checksum and segmentation offloads of both directions.
pub const OFFLOADS: u64 = offload_features(OffloadSet::ALL);

/// Offloads towards the driver.
pub const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// The bits of `offloads` in both directions.
pub const fn offload_features(offloads: OffloadSet) -> u64 {
    let mut bits = 0;
    if offloads.csum {
        bits |= CSUM | GUEST_CSUM;
    }
    if offloads.tso4 {
        bits |= HOST_TSO4 | GUEST_TSO4;
    }
    if offloads.tso6 {
        bits |= HOST_TSO6 | GUEST_TSO6;
    }
    if offloads.ecn {
        bits |= HOST_ECN | GUEST_ECN;
    }
    if offloads.uso {
        bits |= HOST_USO | GUEST_USO4 | GUEST_USO6;
    }
    bits
}

/// Whether each offload comes with those that it needs (virtio 1.3, section 5.1.3.1).
pub fn offloads_go_together(negotiated: u64) -> bool {
    let has = |bits: u64| negotiated & bits != 0;
    let from_driver = has(CSUM) || !has(HOST_TSO4 | HOST_TSO6 | HOST_USO);
    let to_driver = has(GUEST_CSUM) || !has(GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6);
    let ecn = (has(HOST_TSO4 | HOST_TSO6) || !has(HOST_ECN))
        && (has(GUEST_TSO4 | GUEST_TSO6) || !has(GUEST_ECN));
    from_driver && to_driver && ecn
}

/// What the device offers through vhost-user (`VHOST_USER_F_PROTOCOL_FEATURES` comes on top).
pub const DEVICE_FEATURES: u64 = DATA_PATH | OFFLOADS | MQ | CTRL_VQ | GUEST_ANNOUNCE | MTU;

/// What a device offers that is embedded in a VMM and owns its configuration space.
pub const EMBEDDED_FEATURES: u64 = DEVICE_FEATURES
    | MAC
    | STATUS
    | CTRL_RX
    | CTRL_RX_EXTRA
    | CTRL_VLAN
    | CTRL_MAC_ADDR
    | RSS
    | HASH_REPORT
    | CTRL_GUEST_OFFLOADS;

/// The most bytes of headers before the MTU: Ethernet and one 802.1Q tag.
const LINK_HEADER: u32 = 18;

/// The ring format.
pub fn layout(negotiated: u64) -> Layout {
    if negotiated & RING_PACKED == 0 { Layout::Split } else { Layout::Packed }
}

/// The features that change how a ring is read and written.
pub fn ring_features(negotiated: u64) -> RingFeatures {
    RingFeatures {
        event_idx: negotiated & EVENT_IDX != 0,
        indirect: negotiated & INDIRECT_DESC != 0,
        in_order: negotiated & IN_ORDER != 0,
    }
}

/// What the negotiated features and the MTU mean for a queue; it is enabled, coalesces, and has the
/// default of retries.
pub fn queue_options(negotiated: u64, mtu: u16) -> QueueOptions {
    let has = |bit: u64| negotiated & bit != 0;
    QueueOptions {
        header_len: match (has(HASH_REPORT), has(VERSION_1 | MRG_RXBUF)) {
            (true, _) => HeaderLen::Hash,
            (false, true) => HeaderLen::V1,
            (false, false) => HeaderLen::Legacy,
        },
        mergeable: has(MRG_RXBUF),
        max_frame: u32::from(mtu).saturating_add(LINK_HEADER),
        enabled: true,
        retries: DEFAULT_RETRIES,
        from_driver: from_driver(negotiated),
        to_driver: to_driver(negotiated),
        coalesce: true,
    }
}

/// What the driver may leave to us. What lacks an offload that it needs does not count.
fn from_driver(negotiated: u64) -> OffloadSet {
    let csum = negotiated & CSUM != 0;
    let has = |bit: u64| csum && negotiated & bit != 0;
    OffloadSet {
        csum,
        tso4: has(HOST_TSO4),
        tso6: has(HOST_TSO6),
        ecn: has(HOST_ECN),
        uso: has(HOST_USO),
    }
}

/// What we may leave to the driver. What lacks an offload that it needs does not count, and UDP
/// segments must be welcome over both kinds of IP.
pub fn to_driver(negotiated: u64) -> OffloadSet {
    let csum = negotiated & GUEST_CSUM != 0;
    let has = |bit: u64| csum && negotiated & bit != 0;
    OffloadSet {
        csum,
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        uso: has(GUEST_USO4) && has(GUEST_USO6),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_USO4, GUEST_USO6, HOST_TSO4, MRG_RXBUF, OFFLOADS,
        RING_PACKED, VERSION_1, layout, queue_options,
    };
    use crate::{HeaderLen, OffloadSet};
    use virtq::Layout;

    #[test]
    fn the_header_is_short_only_for_legacy_drivers_without_mergeable_buffers() {
        assert_eq!(queue_options(0, 1500).header_len, HeaderLen::Legacy);
        assert_eq!(queue_options(VERSION_1, 1500).header_len, HeaderLen::V1);
        assert_eq!(queue_options(MRG_RXBUF, 1500).header_len, HeaderLen::V1);
        assert!(queue_options(MRG_RXBUF, 1500).mergeable);
        assert!(!queue_options(VERSION_1, 1500).mergeable);
    }

    #[test]
    fn the_mtu_bounds_a_tagged_frame() {
        assert_eq!(queue_options(0, 1500).max_frame, 1518);
        assert_eq!(queue_options(0, 65535).max_frame, 65553);
    }

    #[test]
    fn packed_is_negotiated() {
        assert_eq!(layout(VERSION_1), Layout::Split);
        assert_eq!(layout(VERSION_1 | RING_PACKED), Layout::Packed);
    }

    #[test]
    fn an_offload_counts_with_those_that_it_needs() {
        let none = OffloadSet::NONE;
        let csum = OffloadSet { csum: true, ..none };
        for (negotiated, from, to) in [
            (OFFLOADS, OffloadSet::ALL, OffloadSet::ALL),
            (CSUM, csum, none),
            (GUEST_CSUM, none, csum),
            (HOST_TSO4 | GUEST_CSUM, none, csum),
            (CSUM | HOST_TSO4 | GUEST_TSO4, OffloadSet { tso4: true, ..csum }, none),
            (GUEST_CSUM | GUEST_USO4, none, csum),
            (GUEST_CSUM | GUEST_USO4 | GUEST_USO6, none, OffloadSet { uso: true, ..csum }),
        ] {
            let options = queue_options(negotiated, 1500);
            assert_eq!((options.from_driver, options.to_driver), (from, to), "{negotiated:#x}");
        }
    }
}
