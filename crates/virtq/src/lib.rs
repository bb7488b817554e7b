#![doc = include_str!("../README.md")]

mod chain;
mod config;
mod dirty;
#[cfg(feature = "driver")]
pub mod driver;
mod error;
mod inflight;
mod iotlb;
#[cfg(all(test, loom))]
mod loom;
pub mod mem;
mod notify;
mod packed;
mod queue;
mod record;
mod shared;
mod split;
#[doc(hidden)]
pub mod sweep;
#[cfg(test)]
mod testing;
mod walk;

pub use chain::{AHEAD, ChainBuf, Chains, Token};
pub use config::{Layout, QueueConfig, QueueError, RingArea, RingFeatures, RingPosition};
pub use dirty::{Places, RingLog};
pub use error::ChainError;
pub use inflight::{Inflight, inflight_bytes};
pub use iotlb::{ASKED_MAX, Access, ENTRIES_MAX, Iotlb, IotlbEntry, IotlbMiss, Iova, RingIotlb};
pub use packed::Packed;
pub use queue::Virtq;
pub use record::Recovery;
pub use split::Split;
