//! Rings as a whole: our driver and our device against a naive model, the device against
//! `virtio-queue`, and both directions of notification suppression.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "test code"
)]

mod bench;
mod model;
mod oracle;
mod suppression;
mod threads;
