#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapt;
pub mod backlog;
mod batch;
pub mod capture;
mod coalesce;
mod counters;
pub mod deferral;
mod drop_reason;
mod finish;
mod frame;
pub mod lane;
mod offload;
mod snapshot;
mod status;
mod traits;

pub use adapt::{Adapter, Way};
pub use batch::{Batch, FrameBuf};
pub use coalesce::Coalescer;
pub use counters::{
    CallCounters, CallTotals, Counter, EgressCounters, IngressCounters, KernelCounters,
    QueueCounters, QueueRecord, QueueTotals, WayRecord,
};
pub use drop_reason::DropReason;
pub use finish::{Finish, finish_checksum, sum_body};
pub use frame::{Alike, BURST_BYTES, BURST_MAX, Frame, HEAD_MAX, HEAD_ROOM};
pub use offload::{Gso, Offload, OffloadSet};
pub use snapshot::{FlowPlace, PortSnapshot, PortTotals, Restored, Station};
pub use status::{PortState, PortStatus, StatusCell};
pub use traits::{Egress, Fabric, Ingress, Notified, PortId, QueueFault, QueueId};
