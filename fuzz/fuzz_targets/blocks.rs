//! Any bytes as a block of a packet_mmap ring: every frame that the walk gives is within it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let frames = uplink::packet_mmap::walk_any(bytes);
    assert!(frames <= bytes.len() / 48, "more frames than headers fit");
});
