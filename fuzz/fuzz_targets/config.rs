//! Any configuration file: it is refused in one line that names the place, or it differs in
//! nothing from itself and in everything from an empty one.
#![no_main]

use control::{Config, Difference};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Config::parse(text) {
        Ok(config) => {
            assert!(Difference::between(&config, &config).is_empty());
            let all = Difference::between(&Config::default(), &config);
            assert_eq!(all.added, config.ports);
            assert!(all.removed.is_empty());
        }
        Err(error) => {
            assert!(error.line.is_some());
            assert!(!error.to_string().contains('\n'));
        }
    }
});
