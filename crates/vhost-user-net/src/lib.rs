#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod codec;
pub mod fds;
pub mod handover;
pub mod memory;
mod rarp;
pub mod record;
pub mod session;
mod shell;
pub mod state;

pub use session::{RingIndex, Session, SessionError, SessionSettings};
pub use shell::{CountersOf, OpenError, PortLinks, PortSettings, SocketMode, VhostUserPort};
