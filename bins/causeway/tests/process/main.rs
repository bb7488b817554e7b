//! `causeway` as a process: its command line, its life, its ports at run time.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "test code"
)]

mod bed;
mod broken;
mod capture;
mod counts;
mod driver;
mod guest;
mod life;
mod limits;
mod masks;
mod memory;
mod namespace;
mod ports;
mod sandbox;
mod state;
mod takeover;
mod taps;
mod uplinks;
mod usage;
