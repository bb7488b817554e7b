//! Developer commands of the Causeway tree: `cargo xtask help` lists them.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::run()
}
