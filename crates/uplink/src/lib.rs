#![doc = include_str!("../README.md")]

#[cfg_attr(
    not(test),
    expect(dead_code, reason = "packet_mmap and af_xdp use it: whoever comes first")
)]
mod checksum;
pub mod interface;
mod sys;
pub mod tap;
mod vnet;
