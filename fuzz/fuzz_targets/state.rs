//! Any bytes as a device's state: they are refused, or they are exactly what is written for what
//! they say; and a state that is changed in one place never says more than its length holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_net::state::{FLOWS_MAX, STREAM_MAX, decode, encode};

/// A header with the right magic, version and length before the bytes, so that more than the
/// first checks are reached.
fn headed(stations: u32, rest: &[u8]) -> Vec<u8> {
    let bytes = u32::try_from(24 + rest.len()).unwrap_or(u32::MAX);
    let flows = (bytes.saturating_sub(64) / 12).saturating_sub(stations);
    let mut stream = b"CSWYPORT\x01\0\0\0".to_vec();
    for number in [bytes, stations, flows] {
        stream.extend(number.to_le_bytes());
    }
    stream.extend(rest);
    stream
}

fn check(stream: &[u8]) {
    let Ok(snapshot) = decode(stream) else { return };
    assert!(snapshot.flows.len() <= FLOWS_MAX);
    let entries = snapshot.stations.len() + snapshot.flows.len();
    assert_eq!(stream.len(), 64 + entries * 12);
    if stream.len() <= STREAM_MAX {
        assert_eq!(encode(&snapshot), stream);
    }
}

fuzz_target!(|input: (u32, &[u8])| {
    let (stations, bytes) = input;
    check(bytes);
    check(&headed(stations, bytes));
    check(&headed(stations % 64, bytes));
});
