#![doc = include_str!("../README.md")]

pub mod af_xdp;
mod direct;
pub mod interface;
pub mod packet_mmap;
mod parts;
mod sys;
pub mod tap;
mod vnet;

pub use parts::{Parts, PartsError};
