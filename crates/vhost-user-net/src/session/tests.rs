#![expect(clippy::arithmetic_side_effects, clippy::needless_pass_by_value, reason = "test code")]

mod faults;
mod fds;
mod front;
mod gone;
mod handover;
mod inflight;
mod iotlb;
mod log;
mod memory;
mod order;
mod postcopy;
mod refusals;
mod scripts;
mod state;
