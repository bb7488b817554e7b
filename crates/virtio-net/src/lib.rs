#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "vhost-user-backend")]
pub mod daemon;
pub mod device;
pub mod features;
pub mod header;
pub mod notify;
mod options;
mod receiveq;
#[cfg(test)]
mod rig;
mod transmitq;

pub use device::{Device, DeviceSettings};
pub use options::{DEFAULT_RETRIES, HeaderLen, QueueOptions};
pub use port::OffloadSet;
pub use receiveq::{Receiveq, ReceiveqParts};
pub use transmitq::{Transmitq, TransmitqParts};
