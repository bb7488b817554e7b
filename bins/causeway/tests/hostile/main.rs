//! A hostile front end and its hostile driver against one port of a running switch, while two good
//! guests exchange frames over two others: case by case, each with split and with packed rings.
//!
//! After each case the process lives, the good guests have lost nothing and go on, and the port can
//! be used again; at the end the process has as many fds, threads and mappings as at first.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

#[path = "../process/bed.rs"]
#[expect(dead_code, reason = "shared with the other tests of the process")]
mod bed;
mod cases;
mod evil;
mod good;
mod world;
