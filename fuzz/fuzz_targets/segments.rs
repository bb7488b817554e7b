//! Any bytes as a large frame: it is refused, or its segments hold its payload, once and in order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use packet::{CUT_HEADER_MAX, Checksum, Cut};

fuzz_target!(|input: (u16, &[u8])| {
    let (size, bytes) = input;
    let head = bytes.get(..CUT_HEADER_MAX).unwrap_or(bytes);
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let Ok(cut) = Cut::new(head, len, size) else { return };
    let mut at = cut.header_len();
    for index in 0..cut.count() {
        let range = cut.range(index);
        assert_eq!(range.start, at);
        assert!(range.end - range.start <= u32::from(size));
        at = range.end;
        let mut sum = Checksum::default();
        sum.add(&bytes[range.start as usize..range.end as usize]);
        assert_eq!(cut.header(index, sum).bytes().len(), cut.header_len() as usize);
    }
    assert_eq!(at, len);
});
