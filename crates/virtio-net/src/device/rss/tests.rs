#![expect(clippy::cast_possible_truncation, reason = "test code")]

use packet::{HashKind, ReceiveHash};
use virtio_bindings::virtio_net as net;

use super::super::{ACKNOWLEDGE, Ack, Action, DRIVER, DRIVER_OK, DeviceSettings, FEATURES_OK, Mac};
use super::{Device, Rss, TABLE_MAX};
use crate::features as f;

const KEY: [u8; 40] = [0x6d; 40];
const ERR: (Ack, Option<Action>) = (Ack::Err, None);

fn settings(queue_pairs: u16) -> DeviceSettings {
    DeviceSettings { mac: Mac([2, 0, 0, 0, 0, 7]), mtu: None, queue_pairs, without: 0 }
}

fn running(queue_pairs: u16, without: u64) -> Device {
    let mut device = Device::new(settings(queue_pairs)).unwrap();
    device.set_driver_features(device.offered_features() & !without);
    let _ = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_ne!(device.status() & FEATURES_OK, 0);
    let _ = device.set_status(device.status() | DRIVER_OK);
    device
}

fn rss(kinds: u32, table: &[u16], [unclassified, transmit]: [u16; 2], key: &[u8]) -> Vec<u8> {
    let mut data = kinds.to_le_bytes().to_vec();
    data.extend((table.len() as u16).wrapping_sub(1).to_le_bytes());
    data.extend(unclassified.to_le_bytes());
    data.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
    data.extend(transmit.to_le_bytes());
    data.push(key.len() as u8);
    data.extend(key);
    data
}

fn hash(kinds: u32, key: &[u8]) -> Vec<u8> {
    let mut data = kinds.to_le_bytes().to_vec();
    data.extend([0; 8]);
    data.push(key.len() as u8);
    data.extend(key);
    data
}

fn command(device: &mut Device, command: u32, data: &[u8]) -> (Ack, Option<Action>) {
    device.command(net::VIRTIO_NET_CTRL_MQ as u8, command as u8, data)
}

fn set_rss(device: &mut Device, data: &[u8]) -> (Ack, Option<Action>) {
    command(device, net::VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data)
}

#[test]
fn the_configuration_space_says_what_is_possible() {
    let device = running(4, 0);
    let mut bytes = [0xee; 8];
    device.read_config(17, &mut bytes);
    assert_eq!(bytes, [40, 128, 0, 0x3f, 0, 0, 0, 0]);
    let without = DeviceSettings { without: f::RSS | f::HASH_REPORT, ..settings(4) };
    Device::new(without).unwrap().read_config(17, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    let offered = |pairs| Device::new(settings(pairs)).unwrap().offered_features();
    assert_eq!(offered(1) & (f::RSS | f::HASH_REPORT), f::HASH_REPORT, "one pair: no choice");
    assert_eq!(offered(2) & (f::RSS | f::HASH_REPORT), f::RSS | f::HASH_REPORT);
    assert_eq!(f::DEVICE_FEATURES & (f::RSS | f::HASH_REPORT), 0, "not over vhost-user");
    for alone in [f::RSS, f::HASH_REPORT] {
        let mut device = Device::new(settings(2)).unwrap();
        device.set_driver_features(f::VERSION_1 | alone);
        let _ = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(device.status() & FEATURES_OK, 0, "it needs the control queue");
    }
}

#[test]
fn a_table_is_taken_over_whole() {
    let mut device = running(4, 0);
    let kinds = HashKind::TcpV4.bit() | HashKind::Ipv6.bit();
    let done = set_rss(&mut device, &rss(kinds, &[2, 0, 1, 1], [1, 2], &KEY));
    assert_eq!(done, (Ack::Ok, Some(Action::Rss(3))));
    let hash = ReceiveHash::new(&KEY, kinds).unwrap();
    let expected = Rss { hash: hash.clone(), table: [2, 0, 1, 1].into(), unclassified: 1 };
    assert_eq!((device.rss(), device.active_pairs()), (Some(&expected), 3));
    assert_eq!(device.hash.get(), Some(hash.clone()));
    // The number of pairs alone: the device chooses again, and still reports that hash.
    let pairs = command(&mut device, net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &[2, 0]);
    assert_eq!(pairs, (Ack::Ok, Some(Action::QueuePairs(2))));
    assert_eq!((device.rss(), device.hash.get()), (None, Some(hash)));
    let whole = rss(HashKind::ALL, &[3; TABLE_MAX as usize], [0, 1], &KEY);
    assert_eq!(set_rss(&mut device, &whole), (Ack::Ok, Some(Action::Rss(4))));
    let _ = device.set_status(0);
    assert_eq!((device.rss(), device.hash.get()), (None, None));
}

#[test]
fn wrong_tables_change_nothing() {
    let mut device = running(4, 0);
    let good = rss(HashKind::ALL, &[0, 1], [0, 1], &KEY);
    let _ = set_rss(&mut device, &good);
    let before = device.rss().cloned();
    let wrong = [
        rss(HashKind::ALL + 1, &[0, 1], [0, 1], &KEY),
        rss(HashKind::ALL, &[0, 1, 2], [0, 1], &KEY),
        rss(HashKind::ALL, &[0; 256], [0, 1], &KEY),
        rss(HashKind::ALL, &[], [0, 1], &KEY),
        rss(HashKind::ALL, &[0, 4], [0, 1], &KEY),
        rss(HashKind::ALL, &[0, 0x8000], [0, 1], &KEY),
        rss(HashKind::ALL, &[0, 1], [4, 1], &KEY),
        rss(HashKind::ALL, &[0, 1], [0, 0], &KEY),
        rss(HashKind::ALL, &[0, 1], [0, 5], &KEY),
        rss(HashKind::ALL, &[0, 1], [0, 1], &[1; 41]),
        [good.as_slice(), &[0]].concat(),
    ];
    for data in &wrong {
        assert_eq!(set_rss(&mut device, data), ERR, "{data:?}");
    }
    for len in 0..good.len() {
        assert_eq!(set_rss(&mut device, &good[..len]), ERR, "{len} bytes");
    }
    assert_eq!((device.rss().cloned(), device.active_pairs()), (before, 2));
    assert_eq!(set_rss(&mut running(4, f::RSS), &good), ERR, "not negotiated");
    assert_eq!(command(&mut device, 3, &good), ERR);
}

#[test]
fn the_reported_hash_is_set_alone_without_rss() {
    let set = |device: &mut Device, data: &[u8]| {
        command(device, net::VIRTIO_NET_CTRL_MQ_HASH_CONFIG, data)
    };
    let mut device = running(4, f::RSS);
    let good = hash(HashKind::UdpV6.bit(), &KEY);
    assert_eq!(set(&mut device, &good), (Ack::Ok, None));
    let expected = ReceiveHash::new(&KEY, HashKind::UdpV6.bit());
    assert_eq!(device.hash.get(), expected);
    for len in 0..good.len() {
        assert_eq!(set(&mut device, &good[..len]), ERR, "{len} bytes");
    }
    assert_eq!(set(&mut device, &hash(HashKind::ALL + 1, &KEY)), ERR);
    assert_eq!(device.hash.get(), expected);
    assert_eq!(set(&mut running(4, 0), &good), ERR, "RSS says it");
    assert_eq!(set(&mut running(4, f::HASH_REPORT | f::RSS), &good), ERR, "not negotiated");
}
