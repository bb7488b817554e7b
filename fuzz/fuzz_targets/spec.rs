//! Any SPEC: it is refused in one line, or it is a port that reads the same when it is shown.
#![no_main]

use control::PortSpec;
use control::spec::one_line;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match text.parse::<PortSpec>() {
        Ok(port) => {
            let again: PortSpec = port.to_string().parse().expect("what is shown can be read");
            assert_eq!(port, again);
        }
        Err(error) => assert!(!one_line(&error.to_string()).contains('\n')),
    }
});
