//! Front ends on real sockets: the `vhost` crate's, and drivers that send frames to each other.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

#[path = "../../examples/wire/fabric.rs"]
mod fabric;
mod frames;
mod guest;
mod harness;
mod peer;
mod sockets;
