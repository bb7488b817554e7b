//! The whole switch with mock ports: workers run, frames move, every one is accounted for.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "test code"
)]

mod by_hand;
mod capture;
mod faults;
mod forwarding;
mod life;
mod limits;
mod mock;
mod model;
mod multiqueue;
mod polling;
mod reasons;
mod spread;
mod travel;
