#![doc = include_str!("../README.md")]

pub mod interface;
mod sys;
pub mod tap;
mod vnet;
