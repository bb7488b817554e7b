//! Any text as a capture's filter, on any frame: it is refused in one line that says what would be
//! right, or it says yes or no; `not` of it says the opposite.
#![no_main]

use libfuzzer_sys::fuzz_target;
use port::capture::Filter;

fuzz_target!(|input: (&str, &[u8], u32)| {
    let (text, frame, bytes) = input;
    let head = frame.get(..frame.len().min(128)).unwrap_or_default();
    match text.parse::<Filter>() {
        Ok(filter) => {
            let says = filter.matches(head, bytes);
            if let Ok(opposite) = format!("not ( {text} )").parse::<Filter>()
                && !text.trim().is_empty()
            {
                assert_ne!(opposite.matches(head, bytes), says, "not of {text:?}");
            }
        }
        Err(error) => {
            let said = error.to_string();
            assert!(said.contains("expected"), "{said}");
        }
    }
});
