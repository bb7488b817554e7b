#![doc = include_str!("../README.md")]

mod sys;
pub mod tap;
mod vnet;
