//! What real front ends send, in their order.

use virtio_net::features::{RING_PACKED, VERSION_1};
use virtq::RingPosition;

use super::front::{
    Event, Front, GUEST, PACKED, PLAIN, REGION_BYTES, event, memory, region, ring_addr, socket,
};
use crate::codec::{Request, VringFd, VringState};
use crate::session::{FEATURES, PROTOCOL_FEATURES, Unready};

fn call(ring: u32) -> Request {
    Request::SetVringCall(VringFd { ring, has_fd: true })
}

/// QEMU: features first, calls and errs before `SET_FEATURES`, each pair a device of its own.
fn qemu_start(front: &mut Front, features: u64, pairs: u32, base: u32) {
    for pair in 0..pairs {
        front.say(Request::SetFeatures(features));
        if pair == 0 {
            let table = Request::SetMemTable(vec![region(0)]);
            assert_eq!(front.ack(table, vec![memory(REGION_BYTES)]), 0);
        }
        for ring in [2 * pair, 2 * pair + 1] {
            front.say(Request::SetVringNum(VringState { ring, num: 256 }));
            front.say(Request::SetVringBase(VringState { ring, num: base }));
            front.say(Request::SetVringAddr(ring_addr(ring)));
            front.kick(ring);
            front.say_fd(call(ring), event());
        }
        front.enable(2 * pair, true);
        front.enable(2 * pair + 1, true);
        front.say(Request::SetStatus(0xf));
    }
}

fn qemu_connect(front: &mut Front, pairs: u32) {
    assert_eq!(front.get(Request::GetFeatures), FEATURES);
    assert_eq!(front.get(Request::GetProtocolFeatures), PROTOCOL_FEATURES);
    front.say(Request::SetProtocolFeatures(PROTOCOL_FEATURES));
    assert_eq!(front.get(Request::GetQueueNum), 4);
    assert_eq!(front.get(Request::GetMaxMemSlots), 509);
    front.say_fd(Request::SetBackendReqFd, socket());
    front.say(Request::SetOwner);
    for ring in 0..pairs * 2 {
        front.say_fd(call(ring), event());
        front.say_fd(Request::SetVringErr(VringFd { ring, has_fd: true }), event());
    }
    // QEMU enables the first pair when the device is made, long before it starts.
    front.enable(0, true);
    front.enable(1, true);
}

fn qemu_stop(front: &mut Front, pairs: u32) -> Vec<u32> {
    front.say(Request::SetStatus(0));
    (0..pairs * 2).map(|ring| front.base(ring)).collect()
}

#[test]
fn qemu_boots_and_reboots_with_one_and_four_pairs() {
    for pairs in [1, 4] {
        for (features, base) in [(PLAIN, 0), (PACKED, 0x8000_8000)] {
            let mut front = Front::new();
            qemu_connect(&mut front, pairs);
            assert_eq!(front.session.ready(), Err(Unready::NotSetUp));
            for _ in 0..3 {
                qemu_start(&mut front, features, pairs, base);
                assert_eq!(front.running().len(), usize::try_from(pairs).unwrap() * 2);
                assert_eq!(front.session.ready(), Ok(()));
                let bases = qemu_stop(&mut front, pairs);
                assert!(bases.iter().all(|b| *b == base), "{bases:x?}");
                assert!(front.running().is_empty());
                assert_eq!(front.session.ready(), Err(Unready::NotSetUp));
            }
        }
    }
}

#[test]
fn status_zero_keeps_ring_positions() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.describe(1, 300);
    front.enable(1, false);
    front.kick(1);
    assert_eq!(front.running(), [1]);
    front.say(Request::SetStatus(0));
    assert_eq!(front.get(Request::GetStatus), 0);
    assert_eq!(front.base(1), 300);
}

/// DPDK's virtio-user: calls first, one message that wants an acknowledgement, enable at last,
/// packed positions without their high half, no enable of its own for stopped rings.
#[test]
fn virtio_user_starts_stops_and_starts_again() {
    for (features, sent, kept) in [(PLAIN, 0, 0), (PACKED, 0x8000, 0x8000_8000)] {
        let mut front = Front::new();
        front.say(Request::SetOwner);
        let _ = front.get(Request::GetFeatures);
        let _ = front.get(Request::GetProtocolFeatures);
        front.say(Request::SetProtocolFeatures(PROTOCOL_FEATURES));
        for round in 0..2 {
            for ring in 0..4 {
                front.say_fd(call(ring), event());
            }
            assert_eq!(front.ack(Request::SetFeatures(features), Vec::new()), 0);
            let table = Request::SetMemTable(vec![region(0)]);
            assert_eq!(front.ack(table, vec![memory(REGION_BYTES)]), 0);
            for ring in 0..4 {
                front.describe(ring, sent);
                front.kick(ring);
            }
            // At first nothing was said about them; later they are known to be disabled, and
            // transmitqs are emptied.
            assert_eq!(front.running(), [[].as_slice(), &[1, 3]][round]);
            (0..4).for_each(|ring| front.enable(ring, true));
            assert_eq!(front.running(), [0, 1, 2, 3]);
            (0..4).for_each(|ring| front.enable(ring, false));
            assert_eq!(front.running(), [1, 3]);
            assert!((0..4).all(|ring| front.base(ring) == kept));
            assert!(front.running().is_empty());
        }
    }
}

/// cloud-hypervisor, crosvm: the vhost crate's order, calls and kicks after the addresses.
#[test]
fn cloud_hypervisor_resets_and_starts_again() {
    let mut front = Front::new();
    front.say(Request::SetOwner);
    let _ = front.get(Request::GetFeatures);
    let _ = front.get(Request::GetProtocolFeatures);
    assert_eq!(front.ack(Request::SetProtocolFeatures(PROTOCOL_FEATURES), Vec::new()), 0);
    for _ in 0..2 {
        assert_eq!(front.ack(Request::SetFeatures(PLAIN), Vec::new()), 0);
        let table = Request::SetMemTable(vec![region(0)]);
        assert_eq!(front.ack(table, vec![memory(REGION_BYTES)]), 0);
        for ring in 0..2 {
            front.say(Request::SetVringNum(VringState { ring, num: 256 }));
            front.say(Request::SetVringAddr(ring_addr(ring)));
            front.say(Request::SetVringBase(VringState { ring, num: 0 }));
            front.say_fd(call(ring), event());
            front.kick(ring);
        }
        (0..2).for_each(|ring| front.enable(ring, true));
        assert_eq!(front.session.ready(), Ok(()));
        (0..2).for_each(|ring| front.enable(ring, false));
        assert!((0..2).all(|ring| front.base(ring) == 0));
        assert_eq!(front.ack(Request::ResetOwner, Vec::new()), 0);
    }
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_beginning() {
    for extra in [0, RING_PACKED] {
        let mut front = Front::new();
        let _ = front.get(Request::GetFeatures);
        front.say(Request::SetOwner);
        front.say(Request::SetFeatures(VERSION_1 | extra));
        front.share();
        for ring in 0..2 {
            front.describe(ring, if extra == 0 { 0 } else { 0x8000 });
            front.kick(ring);
        }
        assert_eq!(front.session.ready(), Ok(()));
        let enabled = |e: &Event| matches!(e, Event::Started { enabled: true, .. });
        assert_eq!(front.events().iter().filter(|e| enabled(e)).count(), 2);
        let text = front.refused(Request::SetVringEnable { ring: 0, enable: false }, Vec::new());
        assert_eq!(text, "SET_VRING_ENABLE without its protocol feature");
    }
}

#[test]
fn ring_addresses_are_translated_from_front_end_to_guest() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    assert_eq!(front.rings.queues[&0].desc.0, GUEST);
    assert_eq!(front.rings.queues[&1].desc.0, GUEST + 0x1_0000);
}

#[test]
fn packed_positions_travel_with_both_halves() {
    let mut front = Front::new();
    front.negotiate(PACKED);
    front.share();
    front.describe(1, 0x0007_8007);
    front.enable(1, true);
    front.kick(1);
    let Some(Event::Started { position, .. }) = front.events().pop() else { panic!() };
    let used_behind =
        RingPosition::Packed { avail: 7, avail_wrap: true, used: 7, used_wrap: false };
    assert_eq!(position, used_behind);
}

#[test]
fn reset_device_forgets_rings_and_features_but_neither_calls_nor_memory() {
    let mut front = Front::new();
    front.up(PLAIN, 2);
    front.say_fd(call(1), event());
    assert_eq!(front.ack(Request::ResetDevice, Vec::new()), 0);
    assert!(front.running().is_empty());
    assert_eq!(front.session.features(), None);
    front.say(Request::SetFeatures(PLAIN));
    front.describe(1, 0);
    front.kick(1);
    let Some(Event::Started { enabled, .. }) = front.events().pop() else { panic!() };
    assert!(!enabled, "a reset disables rings");
    assert!(front.rings.queues[&1].call.is_some());
}

#[test]
fn rarp_and_mtu_reach_the_rings() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let _ = front.events();
    assert_eq!(front.ack(Request::SendRarp([2, 0, 0, 0, 0, 9]), Vec::new()), 0);
    assert_eq!(front.events(), [Event::Announced([2, 0, 0, 0, 0, 9])]);
    assert_eq!(front.rings.queues[&0].mtu, 9000);
    assert_eq!(front.ack(Request::NetSetMtu(1400), Vec::new()), 0);
    assert_eq!(front.rings.queues[&0].mtu, 1400);
    assert_eq!(front.ack(Request::NetSetMtu(9001), Vec::new()), 1);
    assert_eq!(front.ack(Request::NetSetMtu(67), Vec::new()), 1);
    assert_eq!(front.rings.queues[&1].mtu, 1400);
}

#[test]
fn ring_reset_is_offered_where_the_front_end_forwards_it() {
    use crate::session::{Session, SessionSettings};
    use virtio_net::OffloadSet;
    use virtio_net::features::RING_RESET;

    for (ring_reset, offered) in [(false, FEATURES), (true, FEATURES | RING_RESET)] {
        let offloads = OffloadSet::ALL;
        let settings = SessionSettings {
            queues: 1,
            queue_size: 256,
            mtu: 1500,
            ring_reset,
            offloads,
            postcopy: false,
        };
        assert_eq!(Session::new(settings).offered(), offered);
    }
    assert_eq!(FEATURES & RING_RESET, 0);
}

#[test]
fn offloads_are_offered_as_the_port_says() {
    use crate::session::{Session, SessionSettings};
    use virtio_net::OffloadSet;
    use virtio_net::features::{
        CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_USO4, GUEST_USO6, HOST_TSO4, HOST_USO, OFFLOADS,
    };

    let none = OffloadSet::NONE;
    for (offloads, bits) in [
        (OffloadSet::ALL, OFFLOADS),
        (none, 0),
        (OffloadSet { csum: true, ..none }, CSUM | GUEST_CSUM),
        (OffloadSet { csum: true, tso4: true, ..none }, CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO4),
        (
            OffloadSet { csum: true, uso: true, ..none },
            CSUM | GUEST_CSUM | HOST_USO | GUEST_USO4 | GUEST_USO6,
        ),
    ] {
        let settings = SessionSettings {
            queues: 1,
            queue_size: 256,
            mtu: 1500,
            ring_reset: false,
            offloads,
            postcopy: false,
        };
        assert_eq!(Session::new(settings).offered() & OFFLOADS, bits, "{offloads:?}");
    }
}
