//! Any bytes play the kernel on the rings of an `AF_XDP` queue: no frame reaches beyond its chunks,
//! and nothing is sent that is not ours.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = uplink::af_xdp::play_kernel(bytes);
});
