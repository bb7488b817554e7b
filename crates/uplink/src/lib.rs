#![doc = include_str!("../README.md")]

pub mod af_xdp;
pub mod interface;
pub mod packet_mmap;
mod sys;
pub mod tap;
mod vnet;
