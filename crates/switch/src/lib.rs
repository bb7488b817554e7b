#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod carry;
mod config;
mod doze;
mod event;
mod fabric;
mod fdb;
mod guard;
mod lane;
mod load;
mod own;
mod panics;
mod pipeline;
mod placement;
mod receive_table;
mod room;
mod shared;
mod stats;
mod steering;
mod table;
mod travel;
mod vlan;
mod worker;

pub use carry::SwitchRecord;
pub use config::{AtStart, PollMode, PortConfig, SwitchConfig, Workers};
pub use event::{Events, SwitchEvent, Way};
pub use fabric::{Moved, PAIRS_MAX, Placement, PortError, PortHandle, Switch};
pub use fdb::{FdbEntry, FdbLimits, STATIC_MAX};
pub use guard::{PortDebt, PortLimits, Rate, Sources};
pub use receive_table::{ReceiveTable, TableError};
pub use shared::BATCH_SIZES;
pub use stats::{PortStats, SwitchStats, WorkerStats};
pub use vlan::{VlanRule, VlanRuleError, VlanSet};
pub use worker::Turn;
