#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch;
pub mod capture;
mod counters;
mod drop_reason;
mod frame;
mod offload;
mod status;
mod traits;

pub use batch::{Batch, FrameBuf};
pub use counters::{
    CallCounters, CallTotals, Counter, EgressCounters, IngressCounters, KernelCounters,
    QueueCounters, QueueTotals,
};
pub use drop_reason::DropReason;
pub use frame::{Alike, BURST_MAX, Frame, HEAD_MAX, HEAD_ROOM};
pub use offload::{Gso, Offload};
pub use status::{PortState, PortStatus, StatusCell};
pub use traits::{Egress, Fabric, Ingress, Notified, PortId, QueueFault, QueueId};
