//! Front ends on real sockets: the `vhost` crate's, and drivers that send frames to each other.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

#[cfg(test)]
mod changes;
#[path = "../../examples/wire/fabric.rs"]
mod fabric;
#[cfg(test)]
mod floods;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod freed;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod late;
#[cfg(test)]
mod parked;
#[cfg(test)]
mod peer;
#[cfg(test)]
mod sockets;
#[cfg(test)]
mod state;
#[cfg(test)]
mod turns;
