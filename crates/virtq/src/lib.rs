//! The device side of split and packed virtqueues over guest memory.

mod chain;
mod config;
#[cfg(feature = "driver")]
pub mod driver;
mod error;
pub mod mem;
mod notify;
mod packed;
mod queue;
mod shared;
mod split;
#[cfg(test)]
mod testing;
mod walk;

pub use chain::{Chain, ChainBuf, Chains, Token};
pub use config::{Layout, QueueConfig, QueueError, RingArea, RingFeatures, RingPosition};
pub use error::ChainError;
pub use packed::Packed;
pub use queue::Virtq;
pub use split::Split;
