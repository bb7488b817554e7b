//! The device side of split and packed virtqueues over guest memory.

#[cfg(feature = "driver")]
pub mod driver;
mod chain;
mod config;
pub mod mem;
mod queue;

pub use chain::{Chain, ChainBuf, ChainError, Chains, Token};
pub use config::{Layout, QueueConfig, QueueError, RingFeatures, RingPosition};
pub use queue::Virtq;
