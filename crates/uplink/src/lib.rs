#![doc = include_str!("../README.md")]

mod checksum;
pub mod interface;
pub mod packet_mmap;
mod sys;
pub mod tap;
mod vnet;
