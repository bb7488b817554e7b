//! The mock guest drives the embedded device model: negotiation, queue registers, frames, calls.
#![expect(clippy::unwrap_used, reason = "test code")]
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use packet::MacAddr;
use port::{Fabric, QueueId};
use switch::{PortConfig, PortHandle, Switch, SwitchConfig};
use testkit::{Guest, GuestSettings, Ledger, TestFrame, read_frame};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_net::device::{Action, Mac, QueueEvents};
use virtio_net::{Device, DeviceSettings};
use virtq::{Layout, RingFeatures};

/// What a driver does at start, and what a VMM does then.
fn boot(guest: &Guest, device: &mut Device, fabric: &dyn Fabric, handle: &PortHandle) {
    let bits = guest.settings().bits();
    let mut status = 0;
    for bit in [VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER] {
        status |= u8::try_from(bit).unwrap();
        assert_eq!(device.set_status(status), None);
    }
    assert_eq!(device.offered_features() & bits, bits, "offered");
    device.set_driver_features(bits);
    status |= u8::try_from(VIRTIO_CONFIG_S_FEATURES_OK).unwrap();
    assert_eq!(device.set_status(status), None);
    assert_eq!(device.status(), status, "the features were agreed");
    for (index, config) in guest.queue_configs().into_iter().enumerate() {
        let queue = device.queue_mut(index).unwrap();
        queue.size = config.size;
        (queue.desc, queue.driver, queue.device) = (config.desc, config.driver, config.device);
        queue.ready = true;
    }
    status |= u8::try_from(VIRTIO_CONFIG_S_DRIVER_OK).unwrap();
    assert_eq!(device.set_status(status), Some(Action::Activate));
    let fds = guest.event_fds();
    let events = |index: usize| {
        let (kick, call) = fds.get(index).unwrap().clone();
        QueueEvents { kick: Some(kick), call: Some(call) }
    };
    let mut running =
        device.activate(guest.memory(), events, |pair| handle.counters(pair).unwrap()).unwrap();
    let pair = running.pairs.remove(0);
    let at = QueueId { port: handle.id, pair: 0 };
    fabric.attach_egress(at, Box::new(pair.receiveq.unwrap()));
    fabric.attach_ingress(at, Box::new(pair.transmitq.unwrap()));
}

#[test]
fn a_device_that_the_guest_set_up_carries_frames_and_calls() {
    for (layout, event_idx) in
        [(Layout::Split, false), (Layout::Split, true), (Layout::Packed, true)]
    {
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let features = RingFeatures { event_idx, indirect: true, in_order: true };
        let settings = GuestSettings { features, mtu: 1500, ..GuestSettings::new(layout) };
        let macs = [1, 2].map(|n| MacAddr([2, 0, 0, 0, 0, n]));
        let mut guests = Vec::new();
        for mac in macs {
            let handle = switch.add_port(&PortConfig::new(mac.to_string())).unwrap();
            let guest = Guest::new(settings).unwrap();
            let mac = Mac(mac.0);
            let own = DeviceSettings { mac, mtu: Some(1500), queue_pairs: 1, without: 0 };
            let mut device = Device::new(own).unwrap();
            boot(&guest, &mut device, &switch, &handle);
            guests.push(guest);
        }
        let end = Instant::now() + Duration::from_secs(10);
        for id in 0..200 {
            let (from, to) = if id % 2 == 0 { (0, 1) } else { (1, 0) };
            assert!(!guests[to].enable_calls());
            let frame = TestFrame { dst: macs[to], src: macs[from], tci: None, id, len: 60 };
            assert!(guests[from].send(&frame.bytes(), 2).unwrap());
            let _ = guests[from].flush();
            while !guests[to].take_call() {
                assert!(Instant::now() < end, "{layout:?}: no call for frame {id}");
                std::thread::yield_now();
            }
            let frames = guests[to].receive().unwrap();
            assert_eq!(frames.iter().map(|f| read_frame(f)).collect::<Vec<_>>(), [Some(frame)]);
        }
        for guest in &mut guests {
            while !guest.all_sent().unwrap() {
                assert!(Instant::now() < end);
            }
        }
        Ledger::balance(&switch.stats()).unwrap();
    }
}
