#![doc = include_str!("../README.md")]

pub mod af_xdp;
mod checksum;
pub mod interface;
mod sys;
pub mod tap;
mod vnet;
