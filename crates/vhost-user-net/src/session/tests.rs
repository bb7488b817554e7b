#![expect(clippy::arithmetic_side_effects, reason = "test code")]

mod faults;
mod front;
mod memory;
mod order;
mod refusals;
mod scripts;
