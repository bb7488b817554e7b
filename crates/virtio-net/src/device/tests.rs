#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::sync::Arc;

use port::{DropReason, Egress, FrameBuf, Ingress, QueueCounters};
use virtio_bindings::virtio_net as net;
use virtq::Layout;
use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr, SegStore};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{
    ACKNOWLEDGE, Ack, Action, ActivateError, Activated, DRIVER, DRIVER_OK, Device, DeviceSettings,
    FEATURES_OK, FILTER_ENTRIES, Mac, NEEDS_RESET, QueueEvents, SettingsError,
};
use crate::features as f;
use crate::rig::{Ledger, counter, event, pattern};

const MAC: Mac = Mac([0x02, 0, 0, 0, 0, 7]);
const OTHER: Mac = Mac([0x02, 0, 0, 0, 0, 9]);
const GROUP: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
const BROADCAST: Mac = Mac([0xff; 6]);

fn settings() -> DeviceSettings {
    DeviceSettings { mac: MAC, mtu: Some(1500), queue_pairs: 4, without: 0 }
}

/// A device whose driver accepted everything but `without`, and but hashes, which have tests of
/// their own.
fn negotiated(without: u64) -> Device {
    let mut device = Device::new(settings()).unwrap();
    let features = device.offered_features() & !(without | f::RSS | f::HASH_REPORT);
    device.set_driver_features(features);
    let _ = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_ne!(device.status() & FEATURES_OK, 0);
    device
}

fn running(without: u64) -> Device {
    let mut device = negotiated(without);
    assert_eq!(device.set_status(device.status() | DRIVER_OK), Some(Action::Activate));
    device
}

fn config(device: &Device) -> (u16, u16, u16) {
    let mut bytes = [0; 6];
    device.read_config(6, &mut bytes);
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (half(0), half(2), half(4))
}

const OK: (Ack, Option<Action>) = (Ack::Ok, None);
const ERR: (Ack, Option<Action>) = (Ack::Err, None);

fn rx(device: &mut Device, command: u32, data: &[u8]) -> (Ack, Option<Action>) {
    device.command(net::VIRTIO_NET_CTRL_RX as u8, command as u8, data)
}

#[test]
fn settings_that_make_no_device_are_refused() {
    let with = |change: fn(&mut DeviceSettings)| {
        let mut settings = settings();
        change(&mut settings);
        Device::new(settings).map(|d| d.queue_count())
    };
    assert_eq!(with(|_| ()), Ok(9));
    assert_eq!(with(|s| s.queue_pairs = 0), Err(SettingsError::QueuePairs(0)));
    assert_eq!(with(|s| s.queue_pairs = 32768), Err(SettingsError::QueuePairs(32768)));
    assert_eq!(with(|s| s.mac = GROUP), Err(SettingsError::Mac(GROUP)));
    assert_eq!(with(|s| s.mac = Mac([0; 6])), Err(SettingsError::Mac(Mac([0; 6]))));
    assert_eq!(with(|s| s.mtu = Some(67)), Err(SettingsError::Mtu(67)));
}

#[test]
fn offers_follow_the_settings() {
    let offers = |settings| Device::new(settings).unwrap().offered_features();
    assert_eq!(offers(settings()), f::EMBEDDED_FEATURES);
    let plain = DeviceSettings { mtu: None, queue_pairs: 1, without: f::IN_ORDER, ..settings() };
    assert_eq!(offers(plain), f::EMBEDDED_FEATURES & !(f::MTU | f::MQ | f::RSS | f::IN_ORDER));
}

#[test]
fn features_that_do_not_go_together_are_not_ok() {
    let tries = [
        (f::VERSION_1, true),
        (0, false),
        (f::VERSION_1 | f::CSUM, true),
        (f::VERSION_1 | f::HOST_TSO4, false),
        (f::VERSION_1 | f::HOST_USO | f::GUEST_CSUM, false),
        (f::VERSION_1 | f::CSUM | f::HOST_ECN, false),
        (f::VERSION_1 | f::CSUM | f::HOST_ECN | f::HOST_TSO6, true),
        (f::VERSION_1 | f::GUEST_TSO6 | f::CSUM, false),
        (f::VERSION_1 | f::GUEST_USO4, false),
        (f::VERSION_1 | f::GUEST_CSUM | f::GUEST_ECN | f::HOST_TSO4, false),
        (f::VERSION_1 | f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_ECN, true),
        (f::VERSION_1 | 1 << 63, false),
        (f::VERSION_1 | f::MQ, false),
        (f::VERSION_1 | f::MQ | f::CTRL_VQ, true),
        (f::VERSION_1 | f::GUEST_ANNOUNCE, false),
        (f::VERSION_1 | f::CTRL_RX, false),
        (f::VERSION_1 | f::CTRL_VQ | f::CTRL_RX_EXTRA, false),
        (f::VERSION_1 | f::CTRL_VLAN, false),
        (f::VERSION_1 | f::CTRL_MAC_ADDR, false),
        (f::EMBEDDED_FEATURES, true),
    ];
    for (features, ok) in tries {
        let mut device = Device::new(settings()).unwrap();
        device.set_driver_features(features);
        assert_eq!(device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK), None);
        assert_eq!(device.status() & FEATURES_OK != 0, ok, "{features:#x}");
        // Without the agreement the driver cannot go on.
        let action = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let agreed = ok.then_some(Action::Activate);
        assert_eq!(action, agreed, "{features:#x}");
    }
}

#[test]
fn status_follows_the_specification() {
    let mut device = running(0);
    device.set_driver_features(0);
    let agreed = f::EMBEDDED_FEATURES & !(f::RSS | f::HASH_REPORT);
    assert_eq!(device.acked_features(), agreed, "features are agreed");
    assert_eq!(device.set_status(0x0f), None, "no second activation");
    assert_eq!(device.set_status(0x0f | NEEDS_RESET), None);
    assert_eq!(device.status(), 0x0f, "only the device asks for a reset");
    assert_eq!(device.needs_reset(), Some(Action::ConfigInterrupt));
    assert_eq!(device.status(), 0x4f);
    assert_eq!(device.set_status(1), None);
    assert_eq!(device.status(), 0x4f, "bits are never cleared one by one");
    device.queue_mut(0).unwrap().ready = true;
    assert_eq!(device.set_status(0), Some(Action::Reset));
    assert_eq!((device.status(), device.acked_features()), (0, 0));
    assert!(!device.queue_mut(0).unwrap().ready);
}

#[test]
fn the_configuration_space_has_mac_status_pairs_and_mtu() {
    let mut device = running(0);
    let mut bytes = [0xee; 16];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 7, 1, 0, 4, 0, 0xdc, 5, 0, 0, 0, 0]);
    device.read_config(4, &mut bytes[..3]);
    assert_eq!(bytes[..3], [0, 7, 1]);
    device.read_config(usize::MAX, &mut bytes[..1]);
    assert_eq!(bytes[0], 0);
    let before = device.config_generation();
    assert_eq!(device.set_link(true), None);
    assert_eq!(device.set_link(false), Some(Action::ConfigInterrupt));
    assert_eq!(config(&device), (0, 4, 1500));
    assert_ne!(device.config_generation(), before);
    assert_eq!(running(f::STATUS).set_link(false), None, "nobody asked");
    assert_eq!(negotiated(0).set_link(false), None, "no driver yet");
}

#[test]
fn announcements_are_asked_for_and_acknowledged() {
    let ack = (net::VIRTIO_NET_CTRL_ANNOUNCE as u8, net::VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8);
    let mut device = running(0);
    assert_eq!(device.command(ack.0, ack.1, &[]), ERR, "nobody asked");
    assert_eq!(device.announce(), Some(Action::ConfigInterrupt));
    assert_eq!(config(&device).0, 3);
    assert_eq!(device.command(ack.0, ack.1, &[0]), ERR);
    assert_eq!(device.command(ack.0, 1, &[]), ERR);
    assert_eq!(device.command(ack.0, ack.1, &[]), (Ack::Ok, Some(Action::Announced)));
    assert_eq!(config(&device).0, 1);
    assert_eq!(running(f::GUEST_ANNOUNCE).announce(), None);
    assert_eq!(negotiated(0).announce(), None);
    let _ = device.set_link(false);
    assert_eq!(device.announce(), None, "the link is down");
}

#[test]
fn queue_pairs_are_set_within_the_limits() {
    let mq = net::VIRTIO_NET_CTRL_MQ as u8;
    let mut device = running(0);
    assert_eq!(device.command(mq, 0, &[4, 0]), (Ack::Ok, Some(Action::QueuePairs(4))));
    assert_eq!(device.active_pairs(), 4);
    let bad: [&[u8]; 5] = [&[0, 0], &[5, 0], &[0, 0x80], &[1], &[1, 0, 0]];
    for data in bad {
        assert_eq!(device.command(mq, 0, data), ERR, "{data:?}");
    }
    assert_eq!(device.command(mq, 1, &[1, 0]), ERR);
    assert_eq!(device.active_pairs(), 4);
    assert_eq!(running(f::MQ).command(mq, 0, &[1, 0]), ERR);
    let _ = device.set_status(0);
    assert_eq!(device.active_pairs(), 1);
}

#[test]
fn receive_modes_decide_what_passes() {
    let mut device = running(0);
    let passes = |device: &Device, mac: Mac| {
        let frame = [&mac.0[..], &MAC.0, &[8, 0]].concat();
        device.filter().read(|filter| filter.passes(&frame))
    };
    assert!(passes(&device, OTHER), "promiscuous after a reset");
    assert_eq!(rx(&mut device, net::VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
    let now = |device: &Device| [MAC, OTHER, GROUP, BROADCAST].map(|mac| passes(device, mac));
    assert_eq!(now(&device), [true, false, false, true]);
    let modes = [
        (net::VIRTIO_NET_CTRL_RX_ALLMULTI, [true, false, true, true]),
        (net::VIRTIO_NET_CTRL_RX_ALLUNI, [true, true, false, true]),
        (net::VIRTIO_NET_CTRL_RX_NOMULTI, [true, false, false, true]),
        (net::VIRTIO_NET_CTRL_RX_NOUNI, [false, false, false, true]),
        (net::VIRTIO_NET_CTRL_RX_NOBCAST, [true, false, false, false]),
        (net::VIRTIO_NET_CTRL_RX_PROMISC, [true; 4]),
    ];
    for (mode, expected) in modes {
        assert_eq!(rx(&mut device, mode, &[1]), OK);
        assert_eq!(now(&device), expected, "mode {mode}");
        assert_eq!(rx(&mut device, mode, &[0]), OK);
        assert_eq!(now(&device), [true, false, false, true], "mode {mode}");
    }
    for data in [&[][..], &[2], &[1, 1]] {
        assert_eq!(rx(&mut device, net::VIRTIO_NET_CTRL_RX_PROMISC, data), ERR);
    }
    assert_eq!(rx(&mut device, 6, &[1]), ERR);
    assert_eq!(rx(&mut running(f::CTRL_RX | f::CTRL_RX_EXTRA), 0, &[1]), ERR);
    let extra = net::VIRTIO_NET_CTRL_RX_NOUNI;
    assert_eq!(rx(&mut running(f::CTRL_RX_EXTRA), extra, &[1]), ERR);
}

fn tables(unicast: &[Mac], multicast: &[Mac]) -> Vec<u8> {
    let part = |macs: &[Mac]| {
        let count = (macs.len() as u32).to_le_bytes();
        [&count[..], &macs.iter().flat_map(|mac| mac.0).collect::<Vec<u8>>()].concat()
    };
    [part(unicast), part(multicast)].concat()
}

#[test]
fn mac_tables_are_replaced_whole_or_not_at_all() {
    let (class, set) = (net::VIRTIO_NET_CTRL_MAC as u8, net::VIRTIO_NET_CTRL_MAC_TABLE_SET as u8);
    let mut device = running(0);
    let _ = rx(&mut device, net::VIRTIO_NET_CTRL_RX_PROMISC, &[0]);
    let passes = |device: &Device, mac: Mac| device.filter().read(|filter| filter.passes(&mac.0));
    assert_eq!(device.command(class, set, &tables(&[OTHER], &[GROUP])), OK);
    assert!(passes(&device, OTHER) && passes(&device, GROUP));
    let good = tables(&[], &[]);
    let cut = &tables(&[OTHER], &[GROUP])[..19];
    let long = [&good[..], &[0]].concat();
    let huge = [0xff; 8];
    for data in [&[][..], &good[..7], cut, &long, &huge] {
        assert_eq!(device.command(class, set, data), ERR, "{data:?}");
        assert!(passes(&device, OTHER) && passes(&device, GROUP));
    }
    assert_eq!(device.command(class, set, &good), OK);
    assert!(!passes(&device, OTHER) && !passes(&device, GROUP));
    let many = vec![MAC; FILTER_ENTRIES + 1];
    assert_eq!(device.command(class, set, &tables(&many, &[])), OK);
    assert!(passes(&device, OTHER) && !passes(&device, GROUP));
    assert_eq!(running(f::CTRL_RX | f::CTRL_RX_EXTRA).command(class, set, &good), ERR);
}

#[test]
fn the_address_is_set_through_the_control_queue() {
    let (class, set) = (net::VIRTIO_NET_CTRL_MAC as u8, net::VIRTIO_NET_CTRL_MAC_ADDR_SET as u8);
    let mut device = running(0);
    let done = (Ack::Ok, Some(Action::MacChanged(OTHER)));
    assert_eq!(device.command(class, set, &OTHER.0), done);
    let mut mac = [0; 6];
    device.read_config(0, &mut mac);
    assert_eq!((device.mac(), mac), (OTHER, OTHER.0));
    for data in [&OTHER.0[..5], &GROUP.0, &[0; 6], &[2; 7]] {
        assert_eq!(device.command(class, set, data), ERR);
    }
    assert_eq!(device.command(class, 2, &OTHER.0), ERR);
    assert_eq!(running(f::CTRL_MAC_ADDR).command(class, set, &OTHER.0), ERR);
    let _ = device.set_status(0);
    assert_eq!(device.mac(), MAC);
}

#[test]
fn vlans_pass_after_they_were_added() {
    let class = net::VIRTIO_NET_CTRL_VLAN as u8;
    let tagged = [&MAC.0[..], &OTHER.0, &[0x81, 0, 0x20, 5, 8, 0]].concat();
    let passes = |device: &Device| device.filter().read(|filter| filter.passes(&tagged));
    let mut device = running(0);
    let _ = rx(&mut device, net::VIRTIO_NET_CTRL_RX_PROMISC, &[0]);
    assert!(!passes(&device));
    assert_eq!(device.command(class, 0, &[5, 0]), OK);
    assert!(passes(&device));
    assert_eq!(device.command(class, 1, &[5, 0]), OK);
    assert!(!passes(&device));
    for (command, data) in [(0, &[0, 0x10][..]), (0, &[5]), (0, &[5, 0, 0]), (2, &[5, 0])] {
        assert_eq!(device.command(class, command, data), ERR);
    }
    let mut device = running(f::CTRL_VLAN);
    let _ = rx(&mut device, net::VIRTIO_NET_CTRL_RX_PROMISC, &[0]);
    assert!(passes(&device), "no filter without CTRL_VLAN");
    assert_eq!(device.command(class, 0, &[5, 0]), ERR);
}

#[test]
fn unknown_classes_are_errors() {
    let mut device = running(0);
    for class in 5..=255 {
        assert_eq!(device.command(class, 0, &[0, 0]), ERR);
    }
}

const MEMORY: usize = 4 << 20;

/// A driver with one queue in the memory of a VMM.
struct Vmm {
    device: Device,
    memory: Arc<GuestMemoryMmap>,
    map: GuestMap,
}

impl Vmm {
    fn new(without: u64) -> Self {
        let ranges = [(GuestAddress(0), MEMORY)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let map = GuestMap::new(Arc::clone(&memory)).unwrap();
        Self { device: negotiated(without), memory, map }
    }

    /// Sets queue `index` up as its driver would.
    fn set_up(&mut self, index: usize) -> DriverQueue {
        let features = self.device.acked_features();
        let config =
            DriverConfig::new(f::layout(features), 16).with_features(f::ring_features(features), 4);
        let base = GuestPhysAddr(index as u64 * 0x4000);
        let queue = DriverQueue::new(&self.map, config, base).unwrap();
        let setup = self.device.queue_mut(index).unwrap();
        let areas = queue.areas();
        (setup.size, setup.desc) = (16, areas.desc);
        (setup.driver, setup.device, setup.ready) = (areas.driver, areas.device, true);
        queue
    }

    fn start(&mut self, call: &QueueEvents) -> Result<Activated, ActivateError> {
        let status = self.device.status();
        assert_eq!(self.device.set_status(status | DRIVER_OK), Some(Action::Activate));
        let counters: Arc<QueueCounters> = Arc::default();
        self.device.activate(&self.memory, |_| call.clone(), |_| Arc::clone(&counters))
    }
}

fn buffers(map: &GuestMap) -> BufferPool {
    BufferPool::new(map, GuestPhysAddr(0x10_0000), 2048, 64).unwrap()
}

#[test]
fn commands_arrive_through_the_control_queue() {
    for packed in [0, f::RING_PACKED] {
        let mut vmm = Vmm::new(packed);
        let events = QueueEvents { kick: Some(event()), call: Some(event()) };
        assert_eq!(vmm.device.control_index(), Some(8));
        let mut driver = vmm.set_up(8);
        let mut control = vmm.start(&events).unwrap().control.unwrap();
        let pool = buffers(&vmm.map);
        let ack = |index: u32| {
            let mut byte = [0xee];
            assert_eq!(pool.read(index, 0, &mut byte), 1);
            byte[0]
        };
        let mut commands: Vec<(Vec<u8>, u8)> = (0..40).map(|_| (vec![0, 0, 0], 0)).collect();
        commands.extend([(vec![4, 0, 2, 0], 0), (vec![4, 0, 9, 0], 1), (vec![], 1), (vec![4], 1)]);
        let mut actions = Vec::new();
        for (command, expected) in &commands {
            assert_eq!(pool.write(0, 0, command), command.len());
            assert_eq!(pool.write(1, 0, &[0xee]), 1);
            let readable = [pool.buffer(0, command.len() as u32)];
            let readable: &[Buffer] = if command.is_empty() { &[] } else { &readable };
            driver.add(readable, &[pool.buffer(1, 1)], 1).unwrap();
            driver.publish();
            let _ = driver.enable_calls();
            actions.extend(vmm.device.serve_control(&mut control).unwrap());
            assert_eq!(counter(events.call.as_ref().unwrap()), 1);
            let used = driver.poll_used().unwrap().unwrap();
            assert_eq!((used.len, ack(1)), (1, *expected), "{command:?}");
        }
        assert_eq!(actions, [Action::QueuePairs(2)]);
        // No place for the answer: it goes back, nothing is written.
        driver.add_readable(&[pool.buffer(0, 4)], 1).unwrap();
        driver.publish();
        let _ = vmm.device.serve_control(&mut control).unwrap();
        assert_eq!(driver.poll_used().unwrap().unwrap().len, 0);
        driver.add_writable(&[Buffer { addr: GuestPhysAddr(1 << 40), len: 1 }], 1).unwrap();
        driver.publish();
        assert!(vmm.device.serve_control(&mut control).is_err());
    }
}

#[test]
fn the_control_queue_moves_without_mq_and_goes_without_ctrl_vq() {
    assert_eq!(negotiated(f::MQ).control_index(), Some(2));
    let control = f::CTRL_VQ
        | f::MQ
        | f::GUEST_ANNOUNCE
        | f::CTRL_RX
        | f::CTRL_RX_EXTRA
        | f::CTRL_VLAN
        | f::CTRL_MAC_ADDR
        | f::CTRL_GUEST_OFFLOADS;
    assert_eq!(negotiated(control).control_index(), None);
}

#[test]
fn activation_starts_what_the_driver_enabled() {
    let mut vmm = Vmm::new(0);
    let events = QueueEvents::default();
    for index in [0, 1, 3] {
        let _ = vmm.set_up(index);
    }
    let not_yet = vmm.device.activate(&vmm.memory, |_| events.clone(), |_| Arc::default());
    assert_eq!(not_yet.unwrap_err(), ActivateError::NotReady);
    let running = vmm.start(&events).unwrap();
    let ready = |pair: &super::QueuePair| (pair.receiveq.is_some(), pair.transmitq.is_some());
    let pairs: Vec<_> = running.pairs.iter().map(ready).collect();
    assert_eq!(pairs, [(true, true), (false, true), (false, false), (false, false)]);
    assert!(running.control.is_none());
    let options = |pair: usize| *running.pairs[pair].transmitq.as_ref().unwrap().options();
    assert!(options(0).enabled && !options(1).enabled, "one pair until the driver asks for more");
    assert_eq!(options(0).max_frame, 1518);
    assert!(options(0).mergeable);
    let queue = running.pairs[0].transmitq.as_ref().unwrap().queue();
    assert_eq!((queue.layout(), queue.size()), (Layout::Packed, 16));

    let mut vmm = Vmm::new(0);
    let _ = vmm.set_up(1);
    vmm.device.queue_mut(1).unwrap().desc = GuestPhysAddr(1 << 40);
    let error = vmm.start(&events).unwrap_err();
    assert!(matches!(error, ActivateError::Queue { index: 1, .. }), "{error}");
}

#[test]
fn one_queue_is_reset_and_resized() {
    let mut vmm = Vmm::new(0);
    let _ = vmm.set_up(1);
    assert!(!vmm.device.reset_queue(1), "not before DRIVER_OK");
    let running = vmm.start(&QueueEvents::default()).unwrap();
    assert!(vmm.device.reset_queue(1));
    assert!(!vmm.device.reset_queue(99));
    assert!(!vmm.device.queue_mut(1).unwrap().ready);
    drop(running);
    let _ = vmm.set_up(1);
    let counters = Arc::default();
    let events = QueueEvents::default();
    let pair = vmm.device.activate_queue(1, &vmm.memory, events, &counters).unwrap();
    assert!(pair.receiveq.is_none());
    assert_eq!(pair.transmitq.unwrap().queue().size(), 16);
    let mut vmm = Vmm::new(f::RING_RESET);
    let _ = vmm.set_up(1);
    let _ = vmm.start(&QueueEvents::default()).unwrap();
    assert!(!vmm.device.reset_queue(1), "not negotiated");
}

#[test]
fn receiveqs_apply_the_filter() {
    let mut vmm = Vmm::new(0);
    let mut driver = vmm.set_up(0);
    let mut running = vmm.start(&QueueEvents::default()).unwrap();
    let receiveq = running.pairs[0].receiveq.as_mut().unwrap();
    let pool = buffers(&vmm.map);
    let _ = rx(&mut vmm.device, net::VIRTIO_NET_CTRL_RX_PROMISC, &[0]);
    for index in 0..4 {
        driver.add_writable(&[pool.buffer(index, 2048)], index.into()).unwrap();
    }
    driver.publish();
    let mut buf = FrameBuf::default();
    for mac in [OTHER, MAC, GROUP] {
        let frame = [&mac.0[..], &pattern(54, 0)].concat();
        buf.slot().unwrap().fill_private(&frame);
        buf.keep();
    }
    let batch = buf.batch(SegStore::empty(), None);
    receiveq.send(&batch, &[0, 1, 2]).unwrap();
    let drops = vec![(DropReason::RxFiltered, 2)];
    Ledger { tx: (1, 60), drops, ..Ledger::default() }.check(receiveq.counters());
    assert_eq!(driver.poll_used().unwrap().unwrap().len, 72);
    let mut frame = [0; 6];
    assert_eq!(pool.read(0, 12, &mut frame), 6);
    assert_eq!(frame, MAC.0);
}

#[test]
fn an_activated_transmitq_receives() {
    let mut vmm = Vmm::new(0);
    let mut driver = vmm.set_up(1);
    let mut running = vmm.start(&QueueEvents::default()).unwrap();
    let pool = buffers(&vmm.map);
    assert_eq!(pool.write(3, 12, &pattern(60, 0)), 60);
    driver.add_readable(&[pool.buffer(3, 72)], 3).unwrap();
    driver.publish();
    let mut buf = FrameBuf::default();
    let batch = running.pairs[0].transmitq.as_mut().unwrap().receive(&mut buf);
    assert_eq!(batch.frames()[0].head(), pattern(60, 0));
}
