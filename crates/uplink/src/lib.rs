#![doc = include_str!("../README.md")]

pub mod af_xdp;
mod checksum;
pub mod interface;
pub mod packet_mmap;
mod sys;
pub mod tap;
mod vnet;
